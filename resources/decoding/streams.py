"""One decode pass over one file: stills, the 48x27 track of every frame, and 16 kHz mono samples."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import partial
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import Image

from resources.decoding import containers, pictures
from resources.decoding.probe import SIDEWAYS, clockwise, readable, sample_aspect, upright_size
from resources.decoding.protocol import (
    PCM_CHUNK_SAMPLES,
    SAMPLE_RATE,
    TRACK_CHUNK_FRAMES,
    TRACK_HEIGHT,
    TRACK_WIDTH,
    Emit,
    Fetch,
    Request,
)
from resources.decoding.sniff import HEAD_BYTES, picture_format
from resources.errors import Empty, MediaError, TooLarge, Truncated, Undecodable

if TYPE_CHECKING:
    from av.audio.frame import AudioFrame
    from av.audio.resampler import AudioResampler
    from av.container import InputContainer
    from av.packet import Packet
    from av.video.frame import VideoFrame

CHANGE_BURST = 8.0
CHANGE_REFILL_PER_S = 2.0
ROUNDING_S = 1e-3
PROGRESS_EVERY_S = 0.5
MISSING_TAIL_SHARE = 0.05
MISSING_TAIL_S = 0.5
MIN_DECODED_SHARE = 0.5
GAP_S = 0.1
SILENCE_BLOCK = SAMPLE_RATE


def decode(request: Request, emit: Emit, fetch: Fetch) -> None:
    """Decode what the request wants; sends stills, track, samples, `failed` per part, and facts."""
    with readable(request, fetch) as (stream, _):
        head = stream.read(HEAD_BYTES)
        if request.kind == "image":
            _decode_image(stream, head, request, emit)
            return
        stream.seek(0)
        with containers.opened(stream, head) as container:
            _Pass(container, request, emit).run()


def _decode_image(stream: BinaryIO, head: bytes, request: Request, emit: Emit) -> None:
    form = picture_format(head)
    if form is None:
        raise Undecodable("The file is no picture any more.")
    stream.seek(0)
    with pictures.opened(stream, form, request.max_pixels) as picture:
        still, thumbnail = pictures.image_still(picture, request.image_max_side)
    emit("still", still.image, **_still_fields(still, 0, None, None, 0.0, "image", None))
    emit("thumbnail", thumbnail.tobytes(), width=thumbnail.width, height=thumbnail.height)
    emit("facts", part="frames", frames_decoded=1, decode_errors=0, end_s=0.0)


def _still_fields(
    still: pictures.Still,
    frame: int,
    pts: int | None,
    time_base: Fraction | None,
    start_s: float,
    reason: str,
    repeat_of: int | None,
) -> dict[str, object]:
    return {
        "frame": frame,
        "pts": pts,
        "time_base": None if time_base is None else f"{time_base.numerator}/{time_base.denominator}",
        "start_s": start_s,
        "width": still.width,
        "height": still.height,
        "reason": reason,
        "phash": still.phash.hex(),
        "repeat_of": repeat_of,
    }


class _Pass:
    """Demuxes once and hands packets to the parts wanted; a part that fails leaves the other running."""

    def __init__(self, container: InputContainer, request: Request, emit: Emit) -> None:
        video, audio = containers.first_video(container), containers.first_audio(container)
        self._container = container
        self._request = request
        self._emit = emit
        self._origin = containers.origin_s(container, video is not None)
        self._end_s = 0.0
        self._parts: dict[int, _Video | _Audio] = {}
        if video is not None and "frames" in request.wanted:
            promise = containers.promised_end_s(container, video, self._origin)
            video.codec_context.thread_type = "AUTO"
            video.codec_context.thread_count = request.threads
            self._parts[video.index] = _Video(request, emit, self._origin, promise, video.frames, sample_aspect(video))
        if audio is not None and "audio" in request.wanted:
            promise = containers.promised_end_s(container, audio, self._origin)
            self._parts[audio.index] = _Audio(request, emit, self._origin, promise)
        self._streams = [stream for stream in (video, audio) if stream is not None]

    def run(self) -> None:
        """Decode to the end of the file, then let every part judge what it got."""
        import av

        reported = time.monotonic()
        try:
            for packet in self._container.demux(self._streams):
                self._feed(packet)
                if time.monotonic() - reported > PROGRESS_EVERY_S:
                    reported = time.monotonic()
                    self._emit("progress", media_s=self._end_s)
        except av.FFmpegError:
            self._drain()
        missing = self._missing_tail()
        for part in self._parts.values():
            self._guarded(part, partial(part.finish, missing))

    def _drain(self) -> None:
        """Fetch the frames that decoders still hold after the reader gave up."""
        for stream in self._streams:
            if part := self._parts.get(stream.index):
                self._guarded(part, partial(part.consume, partial(stream.codec_context.decode, None)))

    def _feed(self, packet: Packet[Any]) -> None:
        if packet.pts is not None and packet.time_base is not None:
            end_s = float((packet.pts + (packet.duration or 0)) * packet.time_base) - self._origin
            self._end_s = max(self._end_s, end_s)
            if self._end_s > self._request.max_duration_s:
                limit = f"{self._request.max_duration_s:.0f} s (limits.max_duration_s)"
                raise TooLarge(f"It goes on after {limit}.")
        part = self._parts.get(packet.stream.index)
        if part is not None:
            self._guarded(part, partial(part.consume, packet.decode))

    def _guarded(self, part: _Video | _Audio, action: Callable[[], None]) -> None:
        """Run `action`; an error ends this part alone."""
        if part.failed:
            return
        try:
            action()
        except MediaError as error:
            part.failed = True
            self._emit("failed", part=part.name, code=error.code, message=error.message, remedy=error.remedy_text)

    def _missing_tail(self) -> bool:
        """Whether reading stopped clearly before the end the container states for the whole file."""
        name = self._container.format.name
        if not name.startswith(containers.EXACT_DURATION):
            return False
        stated = containers.duration_s(self._container, self._container.streams.video is not None)
        return stated is not None and _ends_early(self._end_s, stated)


def _ends_early(end_s: float, promised_s: float) -> bool:
    return promised_s - end_s > max(MISSING_TAIL_S, MISSING_TAIL_SHARE * promised_s)


class _Video:
    """The first video stream: the track of every frame, and stills where time or the picture has moved on."""

    name = "frames"

    def __init__(
        self, request: Request, emit: Emit, origin: float, promised_end_s: float | None, promised: int, sar: float
    ) -> None:
        self.failed = False
        self._request = request
        self._emit = emit
        self._origin = origin
        self._promised_end_s = promised_end_s
        self._promised_frames = promised
        self._sar = sar
        self._frames = self._errors = 0
        self._end_s = 0.0
        self._last_s = -1.0
        self._track = np.empty((TRACK_CHUNK_FRAMES, TRACK_HEIGHT, TRACK_WIDTH, 3), np.uint8)
        self._times: list[float] = []
        self._picker = _Picker(request.still_interval_s, request.still_change)
        self._repeats = pictures.Repeats()
        self._small, self._large = _Scaler("AREA"), _Scaler("BICUBIC")

    def consume(self, decode: Callable[[], Sequence[Any]]) -> None:
        """Take what `decode` returns; its errors are counted, the judgement comes at the end."""
        import av

        try:
            frames = decode()
        except av.FFmpegError:
            self._errors += 1
            return
        for frame in frames:
            self._take(frame)

    def finish(self, missing_tail: bool) -> None:
        """Send what is left and the facts. Raises Undecodable, Truncated."""
        if not self._frames:
            raise Undecodable("No frame of the video can be decoded.")
        if missing_tail or (self._promised_end_s is not None and _ends_early(self._end_s, self._promised_end_s)):
            promised = f" of {self._promised_end_s:.1f}" if self._promised_end_s else ""
            raise Truncated(f"The video ends after {self._end_s:.1f}{promised} s; its tail is missing.")
        if self._frames < MIN_DECODED_SHARE * self._promised_frames and self._errors:
            raise Undecodable(f"Only {self._frames} of {self._promised_frames} frames can be decoded.")
        self._send_track()
        self._emit("facts", part=self.name, frames_decoded=self._frames, decode_errors=self._errors, end_s=self._end_s)

    def _take(self, frame: VideoFrame) -> None:
        if frame.width * frame.height > self._request.max_pixels:
            raise TooLarge(f"A frame has {frame.width}x{frame.height} pixels (limits.max_pixels).")
        at_s = self._time_of(frame)
        rotation = clockwise(frame)
        small = self._small.array(frame, TRACK_WIDTH, TRACK_HEIGHT, rotation)
        reason = self._picker.reason(at_s, small)
        if reason:
            self._send_still(frame, at_s, rotation, reason)
        self._track[len(self._times)] = small
        self._times.append(at_s)
        self._frames += 1
        if len(self._times) == TRACK_CHUNK_FRAMES:
            self._send_track()

    def _time_of(self, frame: VideoFrame) -> float:
        """Presentation time, seconds from the start of the media; never before the previous frame."""
        length_s = float((frame.duration or 0) * frame.time_base) if frame.time_base else 0.0
        if frame.pts is None or frame.time_base is None:
            at_s = max(self._end_s, 0.0)
        else:
            at_s = max(float(frame.pts * frame.time_base) - self._origin, self._last_s, 0.0)
        self._last_s = at_s
        self._end_s = max(self._end_s, at_s + length_s)
        return at_s

    def _send_still(self, frame: VideoFrame, at_s: float, rotation: int, reason: str) -> None:
        width, height = upright_size(frame.width, frame.height, self._sar, rotation)
        scale = min(1.0, self._request.still_max_side / max(width, height))
        size = max(1, round(width * scale)), max(1, round(height * scale))
        picture = Image.fromarray(self._large.array(frame, *size, rotation))
        reduction = pictures.reduced(picture)
        still = pictures.encoded(picture, reduction, "JPEG", pictures.JPEG_STILL)
        repeat_of = self._repeats.earlier(self._frames, reduction)
        fields = _still_fields(still, self._frames, frame.pts, frame.time_base, at_s, reason, repeat_of)
        self._emit("still", still.image, **fields)

    def _send_track(self) -> None:
        if count := len(self._times):
            first = self._frames - count
            self._emit("track", self._track[:count].tobytes(), first_frame=first, start_s=self._times)
            self._times = []


class _Scaler:
    """Upright RGB arrays from frames; keeps its conversion, which costs more to set up than to use."""

    def __init__(self, kernel: str) -> None:
        from av.video.reformatter import Interpolation, VideoReformatter

        self._kernel = Interpolation[kernel]
        self._reformatter = VideoReformatter()

    def array(self, frame: VideoFrame, width: int, height: int, rotation: int) -> npt.NDArray[np.uint8]:
        """The frame turned clockwise by `rotation` degrees, at `width` x `height`: uint8 [height, width, 3]."""
        stored = (height, width) if rotation in SIDEWAYS else (width, height)
        scaled = self._reformatter.reformat(frame, *stored, "rgb24", interpolation=self._kernel, threads=1)
        pixels: npt.NDArray[np.uint8] = scaled.to_ndarray()  # type: ignore[assignment]
        return np.ascontiguousarray(np.rot90(pixels, -(rotation // 90))) if rotation else pixels


class _Picker:
    """Decides which frames become stills.

    One at least every interval, and one where the 48x27 picture differs from the last still by more than
    `change`. Changes draw on a budget that allows a burst, so that a single flashed frame is never missed,
    and refills slowly, so that strobing or violent motion cannot make every frame a still.
    """

    def __init__(self, interval_s: float, change: float) -> None:
        self._interval_s = interval_s
        self._change = change
        self._last: npt.NDArray[np.int16] | None = None
        self._last_s = 0.0
        self._budget = CHANGE_BURST
        self._budget_s = 0.0

    def reason(self, at_s: float, small: npt.NDArray[np.uint8]) -> str:
        """interval, change, or nothing when the frame is passed over. `small` is uint8 [27, 48, 3]."""
        picture = small.astype(np.int16)
        refill = max(0.0, at_s - self._budget_s) * CHANGE_REFILL_PER_S
        self._budget, self._budget_s = min(CHANGE_BURST, self._budget + refill), at_s
        reason = ""
        if self._last is None or at_s - self._last_s >= self._interval_s - ROUNDING_S:
            reason = "interval"
        elif self._budget >= 1 and np.abs(picture - self._last).mean() > self._change:
            reason = "change"
            self._budget -= 1
        if reason:
            self._last, self._last_s = picture, at_s
        return reason


class _Audio:
    """The first audio stream as 16 kHz mono, 16-bit, in step with the media clock."""

    name = "audio"

    def __init__(self, request: Request, emit: Emit, origin: float, promised_end_s: float | None) -> None:
        self.failed = False
        self._emit = emit
        self._origin = origin
        self._promised_end_s = promised_end_s
        self._limit = int(request.max_duration_s * SAMPLE_RATE)
        self._resampler: AudioResampler | None = None
        self._setup: tuple[str, str, int] | None = None
        self._buffer = np.empty(PCM_CHUNK_SAMPLES, np.int16)
        self._filled = self._sent = self._decoded = self._errors = 0

    def consume(self, decode: Callable[[], Sequence[Any]]) -> None:
        """Take what `decode` returns; its errors are counted, the judgement comes at the end."""
        import av

        try:
            for frame in decode():
                self._take(frame)
        except (av.FFmpegError, NotImplementedError):
            self._errors += 1

    def finish(self, missing_tail: bool) -> None:
        """Send what is left and the facts. Raises Empty, Undecodable, Truncated."""
        self._flush_resampler()
        total = self._sent + self._filled
        if not self._decoded and self._errors:
            raise Undecodable("No part of the audio stream can be decoded.")
        if not self._decoded:
            raise Empty("The audio stream holds no samples.")
        end_s = total / SAMPLE_RATE
        if missing_tail or (self._promised_end_s is not None and _ends_early(end_s, self._promised_end_s)):
            promised = f" of {self._promised_end_s:.1f}" if self._promised_end_s else ""
            raise Truncated(f"The audio ends after {end_s:.1f}{promised} s; its tail is missing.")
        self._send()
        self._emit("facts", part=self.name, frames_decoded=total, decode_errors=self._errors, end_s=end_s)

    def _take(self, frame: AudioFrame) -> None:
        setup = (frame.format.name, frame.layout.name, frame.sample_rate)
        if setup != self._setup:
            self._flush_resampler()
            self._setup = setup
        self._fill_gap(frame)
        self._decoded += frame.samples
        self._append_all(self._resample(frame))

    def _fill_gap(self, frame: AudioFrame) -> None:
        """Silence where the stream starts late or skips, so that sample i stays at i / 16000 s."""
        if frame.pts is None or frame.time_base is None:
            return
        starts_at = round((float(frame.pts * frame.time_base) - self._origin) * SAMPLE_RATE)
        missing = starts_at - self._sent - self._filled
        threshold = 0 if not self._decoded else GAP_S * SAMPLE_RATE
        while missing > threshold:
            block = min(missing, SILENCE_BLOCK)
            self._append(np.zeros(block, np.int16))
            missing -= block
            threshold = 0

    def _resample(self, frame: AudioFrame | None) -> Sequence[AudioFrame]:
        from av.audio.resampler import AudioResampler

        if self._resampler is None:
            self._resampler = AudioResampler(format="s16", layout="mono", rate=SAMPLE_RATE)
        if frame is not None:
            frame.pts = None
        return self._resampler.resample(frame)

    def _flush_resampler(self) -> None:
        if self._resampler is not None:
            self._append_all(self._resample(None))
            self._resampler = None

    def _append_all(self, frames: Sequence[AudioFrame | None]) -> None:
        for frame in frames:
            if frame is not None:
                self._append(frame.to_ndarray().reshape(-1).astype(np.int16, copy=False))

    def _append(self, samples: npt.NDArray[np.int16]) -> None:
        if self._sent + self._filled + len(samples) > self._limit:
            raise TooLarge("The audio is longer than limits.max_duration_s.")
        while len(samples):
            room = min(len(samples), PCM_CHUNK_SAMPLES - self._filled)
            self._buffer[self._filled : self._filled + room] = samples[:room]
            self._filled += room
            samples = samples[room:]
            if self._filled == PCM_CHUNK_SAMPLES:
                self._send()

    def _send(self) -> None:
        if self._filled:
            self._emit("pcm", self._buffer[: self._filled].tobytes(), first_sample=self._sent)
            self._sent += self._filled
            self._filled = 0
