"""Typed answers of the decoder processes: `Decoder.probe` and `Decoder.decode`. What they send is not trusted."""

from __future__ import annotations

import atexit
import io
import math
import os
import threading
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from resources import errors
from resources.decoding import protocol
from resources.decoding.pool import DecoderPool, Message
from resources.decoding.sources import LocalFile, RemoteFile, Source
from resources.errors import DecoderCrashed, MediaError
from resources.settings import Decoding, Limits, Settings

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
HASH_BYTES_PER_S = 10e6
MAX_STILLS = 200_000
MAX_SEGMENT_CHARACTERS = 10_000
MAX_THREADS = 4
FULL_SCALE = 32_768.0

Seconds = Annotated[float, Field(ge=0, le=1e7, allow_inf_nan=False)]
Pixels = Annotated[int, Field(ge=1, le=1_000_000)]
Count = Annotated[int, Field(ge=0, le=2**31 - 1)]
Name = Annotated[str, Field(max_length=100, pattern=r"^[\x21-\x7e]+$")]


class _Wire(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class _Probe(_Wire):
    kind: Literal["video", "audio", "image", "text"]
    mime: Name
    bytes: Annotated[int, Field(ge=0)]
    duration_s: Seconds | None
    width: Pixels | None
    height: Pixels | None
    fps: Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)] | None
    rotation: Literal[0, 90, 180, 270] | None
    has_audio: bool
    video_codec: Name | None
    audio_codec: Name | None
    start_offset_s: Annotated[float, Field(ge=-1e7, le=1e7, allow_inf_nan=False)] | None


class MediaFacts(_Probe):
    """What the probe found; sizes in pixels as displayed, times in seconds, rotation clockwise in degrees."""

    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _RemoteFacts(_Probe):
    """What the probe of an object found: all but its hash, for which it would have to be read whole."""

    sha256: Literal[""]


class _Segments(_Wire):
    segments: list[tuple[Seconds | None, Seconds | None, Annotated[str, Field(max_length=MAX_SEGMENT_CHARACTERS)]]]


class _Failed(_Wire):
    part: Literal["file", "frames", "audio"]
    code: str
    message: Annotated[str, Field(max_length=5_000)]
    remedy: Annotated[str, Field(max_length=5_000)]


class _Progress(_Wire):
    media_s: Annotated[float, Field(allow_inf_nan=False)]


class StillFacts(_Wire):
    """A still without its picture; `start_s` from the start of the media."""

    frame: Count
    pts: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None
    time_base: Annotated[str, Field(pattern=r"^\d{1,10}/\d{1,10}$")] | None
    start_s: Seconds
    width: Pixels
    height: Pixels
    reason: Literal["interval", "change", "image"]
    phash: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
    repeat_of: Count | None


class _Thumbnail(_Wire):
    width: Annotated[int, Field(ge=1, le=protocol.THUMBNAIL[0])]
    height: Annotated[int, Field(ge=1, le=protocol.THUMBNAIL[1])]


class _Track(_Wire):
    first_frame: Count
    start_s: Annotated[list[Seconds], Field(min_length=1, max_length=protocol.TRACK_CHUNK_FRAMES)]


class _Pcm(_Wire):
    first_sample: Annotated[int, Field(ge=0)]


class PartFacts(_Wire):
    """How one part went: frames or samples decoded, packets that failed, end of the part in seconds."""

    part: Literal["frames", "audio"]
    frames_decoded: Annotated[int, Field(ge=0)]
    decode_errors: Count
    end_s: Seconds


@dataclass(frozen=True, slots=True)
class TextSegment:
    """A paragraph, row or cue of a document; only cues have times (seconds)."""

    text: str
    start_s: float | None
    end_s: float | None


@dataclass(frozen=True, slots=True)
class Probed:
    """A probed file and, for a document, its text."""

    facts: MediaFacts
    segments: tuple[TextSegment, ...]


@dataclass(frozen=True, slots=True)
class Still:
    """A still: its facts and the encoded picture (JPEG or PNG, upright RGB)."""

    facts: StillFacts
    image: bytes


@dataclass(frozen=True, slots=True)
class TrackChunk:
    """Consecutive frames at 48x27: times in seconds, `rgb` zstd of uint8 [frames, 27, 48, 3]."""

    first_frame: int
    start_s: tuple[float, ...]
    rgb: bytes


@dataclass(frozen=True, slots=True)
class AudioChunk:
    """Up to 60 s of 16 kHz mono audio: FLAC bytes, level figures at full scale 1."""

    first_sample: int
    samples: int
    rms: float
    peak: float
    flac: bytes


@dataclass(slots=True)
class FramesPart:
    """What the pass made of the picture; an image comes with its `thumbnail`, RGB."""

    stills: list[Still] = field(default_factory=list)
    thumbnail: Image.Image | None = None
    track: list[TrackChunk] = field(default_factory=list)
    facts: PartFacts | None = None


@dataclass(slots=True)
class AudioPart:
    """What the pass made of the sound."""

    chunks: list[AudioChunk] = field(default_factory=list)
    facts: PartFacts | None = None


@dataclass(frozen=True, slots=True)
class Decoded:
    """One decode pass; a part that failed holds its error, and the other is unharmed."""

    frames: FramesPart | MediaError
    audio: AudioPart | MediaError


class Decoder:
    """Decodes untrusted files in the process-wide pool. Thread-safe; blocks while every worker is busy."""

    def __init__(self, limits: Limits, decoding: Decoding) -> None:
        self._limits = limits
        self._decoding = decoding
        self._threads = max(1, min(MAX_THREADS, (os.cpu_count() or 1) // decoding.workers))
        self.pool = DecoderPool(decoding.workers, limits.decode_memory_bytes, limits.decode_timeout_s)

    def probe(self, file: Source) -> Probed:
        """Facts and text of a file. Raises MediaError of the class that fits.

        A remote object is judged by ranges of it; only one that passes is read whole, for its hash.
        """
        if isinstance(file, LocalFile):
            facts, segments = self._probe(file, MediaFacts)
            return Probed(facts, segments)
        seen, segments = self._probe(file, _RemoteFacts)
        if seen.bytes != file.bytes:
            raise DecoderCrashed("The decoder process sent a size that is not the object's.")
        return Probed(MediaFacts(**{**seen.model_dump(), "sha256": file.sha256()}), segments)

    def _probe(self, file: Source, model: type[M]) -> tuple[M, tuple[TextSegment, ...]]:
        facts: list[M] = []
        segments: list[TextSegment] = []
        budget_s = self._limits.decode_timeout_s + self._limits.max_bytes / HASH_BYTES_PER_S
        with closing(self._messages(self._request("probe", file), lambda: budget_s, _fetch(file))) as messages:
            for message in messages:
                if message.kind == "text":
                    segments += _segments(message)
                elif message.kind == "media":
                    facts.append(_parsed(model, message))
                else:
                    _expect(message, "progress")
        if not facts:
            raise DecoderCrashed("The decoder process ended without an answer.")
        return facts[0], tuple(segments)

    def decode(self, file: Source, kind: str, size: int, duration_s: float | None, wanted: frozenset[str]) -> Decoded:
        """One pass for `wanted` (frames, audio) over a file probed as `kind` with `size` bytes.

        Raises MediaError where the file as a whole fails; a failure of one part is in the result.
        """
        file = file.copy or file if isinstance(file, RemoteFile) else file
        collector = _Collector(self._limits)
        request = self._request("decode", file, kind, size, tuple(sorted(wanted)))

        def budget() -> float:
            media_s = min(self._limits.max_duration_s, max(duration_s or 0.0, collector.media_s))
            return self._limits.decode_timeout_s + self._limits.decode_factor * media_s

        with closing(self._messages(request, budget, _fetch(file))) as messages:
            for message in messages:
                collector.take(message)
        if isinstance(file, RemoteFile):
            file.check()
        return collector.decoded(wanted)

    def close(self) -> None:
        """End the decoder processes."""
        self.pool.close()

    def _request(
        self, operation: str, file: Source, kind: str = "", size: int = -1, wanted: tuple[str, ...] = ()
    ) -> protocol.Request:
        limits, decoding = self._limits, self._decoding
        return protocol.Request(
            operation,
            file.path_hex if isinstance(file, LocalFile) else "",
            file.suffix.encode(errors="replace").decode(),
            limits.max_bytes,
            limits.max_pixels,
            limits.max_duration_s,
            limits.max_text_bytes,
            kind,
            size,
            wanted,
            decoding.still_interval_s,
            decoding.still_change,
            decoding.still_max_side,
            decoding.image_max_side,
            self._threads,
            -1 if isinstance(file, LocalFile) else file.bytes,
            (file.etag or "") if isinstance(file, LocalFile) else "",
            file.within_hex if isinstance(file, LocalFile) else "",
        )

    def _messages(
        self, request: protocol.Request, budget: Callable[[], float], fetch: protocol.Fetch | None
    ) -> Generator[Message]:
        """Messages but failures of the whole file, which are raised at the end; nothing after one counts.

        To be closed by the caller: an error kept somewhere must not keep a worker with it.
        """
        failure: MediaError | None = None
        with closing(self.pool.run(request, budget, fetch)) as messages:
            for message in messages:
                if message.kind == "failed" and message.fields.get("part") == "file":
                    failure = _failure(_parsed(_Failed, message))
                elif failure is None:
                    yield message
        if failure is not None:
            raise failure


class _Collector:
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
        facts = _parsed(StillFacts, message)
        stills = self._frames.stills
        later = not stills or (facts.frame > stills[-1].facts.frame and facts.start_s >= stills[-1].facts.start_s)
        if not later or len(stills) >= MAX_STILLS:
            raise DecoderCrashed("The decoder process sent stills out of order.")
        _check_picture(message.payload, facts.width, facts.height)
        stills.append(Still(facts, message.payload))

    def _thumbnail(self, message: Message) -> None:
        size = _parsed(_Thumbnail, message)
        if self._frames.thumbnail is not None or len(message.payload) != size.width * size.height * 3:
            raise DecoderCrashed("The decoder process sent a thumbnail that does not add up.")
        self._frames.thumbnail = Image.frombytes("RGB", (size.width, size.height), message.payload)

    def _track(self, message: Message) -> None:
        facts = _parsed(_Track, message)
        count = len(facts.start_s)
        if facts.first_frame != self._next_frame or len(message.payload) != count * protocol.FRAME_BYTES:
            raise DecoderCrashed("The decoder process sent a track that does not add up.")
        self._next_frame += count
        self._frames.track.append(TrackChunk(facts.first_frame, tuple(facts.start_s), _zstd(message.payload)))

    def _pcm(self, message: Message) -> None:
        facts = _parsed(_Pcm, message)
        if facts.first_sample != self._next_sample or not message.payload or len(message.payload) % 2:
            raise DecoderCrashed("The decoder process sent samples that do not add up.")
        samples = np.frombuffer(message.payload, np.int16)
        self._next_sample += len(samples)
        self._audio.chunks.append(_audio_chunk(facts.first_sample, samples))

    def _facts(self, message: Message) -> None:
        facts = _parsed(PartFacts, message)
        part: FramesPart | AudioPart = self._frames if facts.part == "frames" else self._audio
        part.facts = facts

    def _failure(self, message: Message) -> None:
        failed = _parsed(_Failed, message)
        self._failed[failed.part] = _failure(failed)

    def _progress(self, message: Message) -> None:
        self.media_s = max(self.media_s, _parsed(_Progress, message).media_s)


_decoders: dict[tuple[Limits, Decoding], Decoder] = {}
_decoders_lock = threading.Lock()


def decoder(settings: Settings) -> Decoder:
    """The process-wide decoder for these limits and decode settings.

    Made on first use and closed at exit; every stage and thread with equal settings shares its workers.
    """
    key = (settings.limits, settings.decoding)
    with _decoders_lock:
        if key not in _decoders:
            _decoders[key] = Decoder(*key)
        return _decoders[key]


@atexit.register
def close_decoders() -> None:
    """End every decoder process of this one."""
    with _decoders_lock:
        for made in _decoders.values():
            made.close()
        _decoders.clear()


def _fetch(file: Source) -> protocol.Fetch | None:
    return file.blocks().read if isinstance(file, RemoteFile) else None


def _parsed(model: type[M], message: Message) -> M:
    try:
        return model.model_validate(_tuples(message.fields))
    except ValidationError:
        raise DecoderCrashed(f"The decoder process sent a {model.__name__} that cannot be true.") from None


def _tuples(fields: dict[str, Any]) -> dict[str, Any]:
    """JSON has no tuples, and strict validation wants them for segments."""
    if isinstance(segments := fields.get("segments"), list):
        return {**fields, "segments": [tuple(entry) if isinstance(entry, list) else entry for entry in segments]}
    return fields


def _expect(message: Message, kind: str) -> None:
    if message.kind != kind:
        raise DecoderCrashed("The decoder process sent a message of unknown kind.")


def _failure(failed: _Failed) -> MediaError:
    return FAILURES.get(failed.code, errors.Internal)(failed.message, failed.remedy)


def _segments(message: Message) -> list[TextSegment]:
    parsed = _parsed(_Segments, message).segments
    if any(start_s is not None and end_s is not None and end_s < start_s for start_s, end_s, _ in parsed):
        raise DecoderCrashed("The decoder process sent a cue that ends before it starts.")
    return [TextSegment(text, start_s, end_s) for start_s, end_s, text in parsed]


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
