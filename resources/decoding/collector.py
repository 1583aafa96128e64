"""Collects the messages of one decode; what cannot be true raises DecoderCrashed."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image
from pydantic import BaseModel, ValidationError

from resources import errors
from resources.decoding import protocol
from resources.decoding.answers import (
    AudioChunk,
    AudioPart,
    Decoded,
    Failed,
    FramesPart,
    PartFacts,
    Pcm,
    Progress,
    Segments,
    Still,
    StillFacts,
    TextSegment,
    Thumbnail,
    Track,
    TrackChunk,
)
from resources.decoding.pool import Message
from resources.errors import DecoderCrashed, MediaError
from resources.settings import Limits

M = TypeVar("M", bound=BaseModel)

FAILURES: dict[str, type[MediaError]] = {
    kind.code: kind
    for kind in (
        errors.Undecodable,
        errors.Truncated,
        errors.TooLarge,
        errors.Unsupported,
        errors.Empty,
        errors.Unreadable,
        errors.SourceChanged,
        errors.OutOfMemory,
        errors.Internal,
    )
}
MAX_STILLS = 200_000
FULL_SCALE = 32_768.0


class Collector:
    """Checks and gathers the messages of a decode pass."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._frames = FramesPart()
        self._audio = AudioPart()
        self._failed: dict[str, MediaError] = {}
        self._take: dict[str, Callable[[Message], None]] = {
            "still": self._still,
            "thumbnail": self._thumbnail,
            "track": self._track,
            "pcm": self._pcm,
            "facts": self._facts,
            "failed": self._failure,
            "progress": self._progress,
        }
        self._next_frame = self._next_sample = 0
        self.media_s = 0.0

    def take(self, message: Message) -> None:
        """Add one message. Raises DecoderCrashed for anything out of order, shape or range."""
        if message.kind not in self._take:
            raise DecoderCrashed("The decoder process sent a message of unknown kind.")
        self._take[message.kind](message)

    def decoded(self, wanted: frozenset[str]) -> Decoded:
        """The pass as a whole. Raises DecoderCrashed when a wanted part neither ended nor failed."""
        parts: dict[str, FramesPart | AudioPart] = {"frames": self._frames, "audio": self._audio}
        for name in wanted - self._failed.keys():
            if parts[name].facts is None:
                self._failed[name] = errors.Undecodable(f"The file has no {name} stream that can be decoded.")
        return Decoded(self._failed.get("frames") or self._frames, self._failed.get("audio") or self._audio)

    def _still(self, message: Message) -> None:
        facts = parsed(StillFacts, message)
        stills = self._frames.stills
        later = not stills or (facts.frame > stills[-1].facts.frame and facts.start_s >= stills[-1].facts.start_s)
        if not later or len(stills) >= MAX_STILLS:
            raise DecoderCrashed("The decoder process sent stills out of order.")
        _check_picture(message.payload, facts.width, facts.height)
        stills.append(Still(facts, message.payload))

    def _thumbnail(self, message: Message) -> None:
        size = parsed(Thumbnail, message)
        if self._frames.thumbnail is not None or len(message.payload) != size.width * size.height * 3:
            raise DecoderCrashed("The decoder process sent a thumbnail that does not add up.")
        self._frames.thumbnail = Image.frombytes("RGB", (size.width, size.height), message.payload)

    def _track(self, message: Message) -> None:
        facts = parsed(Track, message)
        count = len(facts.start_s)
        if facts.first_frame != self._next_frame or len(message.payload) != count * protocol.FRAME_BYTES:
            raise DecoderCrashed("The decoder process sent a track that does not add up.")
        self._next_frame += count
        self._frames.track.append(TrackChunk(facts.first_frame, tuple(facts.start_s), _zstd(message.payload)))

    def _pcm(self, message: Message) -> None:
        facts = parsed(Pcm, message)
        if facts.first_sample != self._next_sample or not message.payload or len(message.payload) % 2:
            raise DecoderCrashed("The decoder process sent samples that do not add up.")
        samples = np.frombuffer(message.payload, np.int16)
        self._next_sample += len(samples)
        self._audio.chunks.append(_audio_chunk(facts.first_sample, samples))

    def _facts(self, message: Message) -> None:
        facts = parsed(PartFacts, message)
        part: FramesPart | AudioPart = self._frames if facts.part == "frames" else self._audio
        part.facts = facts

    def _failure(self, message: Message) -> None:
        failed = parsed(Failed, message)
        self._failed[failed.part] = failure_of(failed)

    def _progress(self, message: Message) -> None:
        self.media_s = max(self.media_s, parsed(Progress, message).media_s)


def parsed(model: type[M], message: Message) -> M:
    """A message's fields. Raises DecoderCrashed where they cannot be true."""
    try:
        return model.model_validate(_tuples(message.fields))
    except ValidationError:
        raise DecoderCrashed(f"The decoder process sent a {model.__name__} that cannot be true.") from None


def _tuples(fields: dict[str, Any]) -> dict[str, Any]:
    """JSON has no tuples, and strict validation wants them for segments."""
    if isinstance(segments := fields.get("segments"), list):
        return {**fields, "segments": [tuple(entry) if isinstance(entry, list) else entry for entry in segments]}
    return fields


def expect(message: Message, kind: str) -> None:
    """Raise DecoderCrashed unless the message is of this kind."""
    if message.kind != kind:
        raise DecoderCrashed("The decoder process sent a message of unknown kind.")


def failure_of(failed: Failed) -> MediaError:
    """The error that a decoder process names."""
    return FAILURES.get(failed.code, errors.Internal)(failed.message, failed.remedy)


def segments_of(message: Message) -> list[TextSegment]:
    """The cues or paragraphs in a message. Raises DecoderCrashed."""
    found = parsed(Segments, message).segments
    if any(start_s is not None and end_s is not None and end_s < start_s for start_s, end_s, _ in found):
        raise DecoderCrashed("The decoder process sent a cue that ends before it starts.")
    return [TextSegment(text, start_s, end_s) for start_s, end_s, text in found]


def _check_picture(data: bytes, width: int, height: int) -> None:
    """Raise DecoderCrashed unless the bytes begin a JPEG or PNG of the size stated."""
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as picture:
            agrees = picture.size == (width, height) and picture.mode == "RGB"
    except Exception:  # noqa: BLE001 - whatever Pillow thinks of it, the worker did not send a still
        agrees = False
    if not agrees:
        raise DecoderCrashed("The decoder process sent a still that is no picture of the size stated.")


def _zstd(data: bytes) -> bytes:
    import pyarrow as pa

    packed: bytes = pa.Codec("zstd", compression_level=1).compress(data, asbytes=True)
    return packed


def _audio_chunk(first_sample: int, samples: npt.NDArray[np.int16]) -> AudioChunk:
    level = samples.astype(np.float64) / FULL_SCALE
    return AudioChunk(
        first_sample,
        len(samples),
        math.sqrt(float(np.mean(level * level))),
        float(np.abs(level).max()),
        _flac(samples),
    )


def _flac(samples: npt.NDArray[np.int16]) -> bytes:
    """16-bit mono samples at 16 kHz as FLAC, encoded on this side so that readers need not trust the worker."""
    import av

    sink = io.BytesIO()
    with av.open(sink, "w", format="flac") as container:
        stream = container.add_stream("flac", rate=protocol.SAMPLE_RATE, layout="mono", format="s16")
        frame = av.AudioFrame.from_ndarray(samples.reshape(1, -1), format="s16", layout="mono")
        frame.sample_rate = protocol.SAMPLE_RATE
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return sink.getvalue()
