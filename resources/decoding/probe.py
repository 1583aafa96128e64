"""The probe: kind, format, size, duration and SHA-256 of one file, by content alone."""

from __future__ import annotations

import hashlib
import io
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, BinaryIO

from resources.decoding import containers, documents, pictures, sniff
from resources.decoding.protocol import MAX_RANGE_BYTES, Emit, Fetch, Request
from resources.errors import Empty, SourceChanged, TooLarge, Truncated, Undecodable, Unreadable, Unsupported
from resources.files.local import version_of

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

HASH_CHUNK_BYTES = 4 * 2**20
RANGE_BUFFER_BYTES = 256 * 1024
SEGMENTS_PER_MESSAGE = 200
FIRST_PACKETS = 200
SIDEWAYS = (90, 270)
SAR_RANGE = (0.25, 4.0)
_LINKS = "Set ingestion.follow_links if that is meant."


@dataclass(frozen=True, slots=True)
class Facts:
    """What the probe found; sizes in pixels as displayed, times in seconds, rotation clockwise in degrees."""

    kind: str
    mime: str
    duration_s: float | None = None
    width: int | None = None
    height: int | None = None
    fps: float | None = None
    rotation: int | None = None
    has_audio: bool = False
    video_codec: str | None = None
    audio_codec: str | None = None
    start_offset_s: float | None = None
    sha256: str = ""
    bytes: int = 0


def probe(request: Request, emit: Emit, fetch: Fetch) -> None:
    """Hash and classify the file; sends `text` messages for a document, then one `media` message.

    A remote object is not hashed here: the ranges that tell what it is are all that is read of it.
    """
    with readable(request, fetch) as (stream, size):
        head = stream.read(sniff.HEAD_BYTES)
        digest = _sha256(stream, emit) if request.remote_bytes < 0 else ""
        stream.seek(0)
        facts = _classified(stream, head, request, emit)
    emit("media", **asdict(replace(facts, sha256=digest, bytes=size)))


class Ranges(io.RawIOBase):
    """A remote object as a seekable file; every read is a question to the parent process."""

    def __init__(self, fetch: Fetch, size: int) -> None:
        self._fetch = fetch
        self._size = size
        self._at = 0

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move to `offset` from the start, from here, or from the end."""
        self._at = max(0, offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence])
        return self._at

    def tell(self) -> int:
        """Where the next read starts."""
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer`, or as much of it as one range may hold; 0 at the end."""
        wanted = min(len(buffer), self._size - self._at, MAX_RANGE_BYTES)
        if wanted <= 0:
            return 0
        data = self._fetch(self._at, wanted)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


@contextmanager
def readable(request: Request, fetch: Fetch) -> Iterator[tuple[BinaryIO, int]]:
    """The file opened for reading and its size in bytes.

    Never waits on a pipe or device. Raises Unreadable, TooLarge, Empty, and SourceChanged when size or
    modification time differ afterwards or from those it was registered with, or the size from what a probe saw.
    """
    if request.remote_bytes >= 0:
        _judge_size(request, request.remote_bytes)
        yield io.BufferedReader(Ranges(fetch, request.remote_bytes), RANGE_BUFFER_BYTES), request.remote_bytes
        return
    try:
        descriptor = os.open(bytes.fromhex(request.path), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise Unreadable(f"The file cannot be opened: {error.strerror}.") from None
    before = os.fstat(descriptor)
    if not stat.S_ISREG(before.st_mode):
        os.close(descriptor)
        raise Unsupported("It is no regular file but a folder, pipe or device.", "Name the media file itself.")
    with open(descriptor, "rb") as stream:
        if not _is_within(descriptor, bytes.fromhex(request.within)):
            raise Unreadable("The file leads out of its folder through a link.", _LINKS)
        if request.etag not in ("", version_of(before)):
            raise SourceChanged("The file was changed since it was registered.")
        _judge_size(request, before.st_size)
        try:
            yield stream, before.st_size
        finally:
            after = os.fstat(descriptor)
            if (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
                raise SourceChanged("The file was written to while it was read.")


def _is_within(descriptor: int, folder: bytes) -> bool:
    """Whether an open file is in `folder`, however its path led there; cannot be told but on Linux."""
    if not folder or sys.platform != "linux":
        return True
    return os.readlink(f"/proc/self/fd/{descriptor}".encode()).startswith(folder.rstrip(b"/") + b"/")


def _judge_size(request: Request, size: int) -> None:
    if size > request.max_bytes:
        raise TooLarge(f"The file has {size} bytes, more than {request.max_bytes} (limits.max_bytes).")
    if size == 0:
        raise Empty("The file has zero bytes.")
    if request.bytes not in (-1, size):
        raise SourceChanged(f"The file had {request.bytes} bytes when probed and has {size} now.")


def upright_size(width: int, height: int, sar: float, rotation: int) -> tuple[int, int]:
    """Display size of a video picture: pixels made square by widening, then rotated."""
    if SAR_RANGE[0] <= sar <= SAR_RANGE[1]:
        width = max(1, round(width * sar))
    return (height, width) if rotation in SIDEWAYS else (width, height)


def sample_aspect(stream: VideoStream) -> float:
    """Width of a pixel over its height; 1 where unknown."""
    ratio = stream.sample_aspect_ratio
    return float(ratio) if ratio else 1.0


def clockwise(frame: VideoFrame) -> int:
    """Clockwise rotation, a multiple of 90 degrees, that makes the frame upright."""
    return round(-frame.rotation / 90) * 90 % 360


def _sha256(stream: BinaryIO, emit: Emit) -> str:
    stream.seek(0)
    digest = hashlib.sha256()
    while chunk := stream.read(HASH_CHUNK_BYTES):
        digest.update(chunk)
        emit("progress", media_s=0.0)
    return digest.hexdigest()


def _classified(stream: BinaryIO, head: bytes, request: Request, emit: Emit) -> Facts:
    if sniff.looks_like_text(head):
        return _document(stream, request, emit)
    sniff.refuse_foreign(head)
    if (form := sniff.picture_format(head)) and not _animated_gif(stream, form, request.max_pixels):
        return _picture(stream, form, request.max_pixels)
    return _container(stream, head, request)


def _animated_gif(stream: BinaryIO, form: str, max_pixels: int) -> bool:
    """A GIF with several frames is a video; its size is checked before the second frame is sought."""
    if form != "GIF":
        return False
    with pictures.opened(stream, form, max_pixels) as picture:
        try:
            picture.seek(1)
        except EOFError:
            return False
        return True


def _picture(stream: BinaryIO, form: str, max_pixels: int) -> Facts:
    with pictures.opened(stream, form, max_pixels) as picture:
        width, height, rotation = pictures.display_size(picture)
    return Facts("image", pictures.MIMES[form], width=width, height=height, rotation=rotation)


def _document(stream: BinaryIO, request: Request, emit: Emit) -> Facts:
    if stream.seek(0, os.SEEK_END) > request.max_text_bytes:
        raise TooLarge(f"The document has more than {request.max_text_bytes} bytes (limits.max_text_bytes).")
    stream.seek(0)
    data = stream.read(request.max_text_bytes)
    text = documents.decode_text(data)
    media_type = documents.text_mime(text, request.suffix)
    batch: list[tuple[float | None, float | None, str]] = []
    for segment in documents.segments(text, media_type):
        batch.append((segment.start_s, segment.end_s, segment.text))
        if len(batch) >= SEGMENTS_PER_MESSAGE:
            emit("text", segments=batch)
            batch = []
    emit("text", segments=batch)
    return Facts("text", media_type)


def _container(stream: BinaryIO, head: bytes, request: Request) -> Facts:
    stream.seek(0)
    with containers.opened(stream, head) as container:
        video, audio = containers.first_video(container), containers.first_audio(container)
        if video is None and audio is None:
            raise Empty("The container holds no video and no audio stream.")
        duration = containers.duration_s(container, video is not None)
        if duration is not None and duration > request.max_duration_s:
            raise TooLarge(
                f"It lasts {duration:.0f} s, longer than {request.max_duration_s:.0f} s (limits.max_duration_s)."
            )
        facts = Facts(
            kind="video" if video is not None else "audio",
            mime=containers.mime(container, head, video is not None),
            duration_s=duration,
            has_audio=audio is not None,
            audio_codec=_codec(audio),
            start_offset_s=None if container.start_time is None else container.start_time / 1e6,
        )
        if video is not None:
            return _with_picture(facts, container, video, request.max_pixels)
        _require_audio(container, stream, head)
        return facts


def _with_picture(facts: Facts, container: InputContainer, video: VideoStream, max_pixels: int) -> Facts:
    width, height = video.width or 0, video.height or 0
    if width * height > max_pixels:
        raise TooLarge(f"The video has {width}x{height} pixels, more than {max_pixels} (limits.max_pixels).")
    frame = _first_frame(container, video)
    rotation = clockwise(frame) if frame is not None else 0
    if frame is not None:
        width, height = frame.width, frame.height
    if frame is None and _weak(container):
        raise Unsupported("The content resembles a video stream, but nothing in it decodes.")
    display = upright_size(width, height, sample_aspect(video), rotation)
    rate = video.average_rate or video.guessed_rate
    return replace(
        facts,
        width=display[0] or None,
        height=display[1] or None,
        rotation=rotation,
        fps=float(rate) if rate else None,
        video_codec=_codec(video),
    )


def _first_frame(container: InputContainer, video: VideoStream) -> VideoFrame | None:
    """The first frame that decodes within the first packets, or None."""
    import av

    try:
        for count, packet in enumerate(container.demux(video)):
            try:
                if frames := packet.decode():
                    return frames[0]  # type: ignore[return-value]
            except av.FFmpegError:
                continue
            if count > FIRST_PACKETS:
                return None
    except av.FFmpegError:
        return None
    return None


def _require_audio(container: InputContainer, stream: BinaryIO, head: bytes) -> None:
    """Raise Empty where an audio file holds no samples; Unsupported where a weak guess decodes to nothing."""
    import av

    audio = container.streams.audio[0]
    packets = decoded = 0
    try:
        for packet in container.demux(audio):
            packets += packet.size > 0
            try:
                decoded += len(packet.decode())
            except av.FFmpegError:
                continue
            if decoded or packets > FIRST_PACKETS:
                break
    except av.FFmpegError:
        pass
    if not packets:
        if sniff.claims_container(head) and containers.mp4_head(head) and containers.box_overrun(stream):
            raise Truncated("The file ends before its first sample.")
        raise Empty("The audio file is a header without samples.")
    if not decoded and _weak(container):
        raise Unsupported("The content resembles an audio stream, but nothing in it decodes.")
    if not decoded:
        raise Undecodable(f"Its audio ({_codec(audio) or 'unknown codec'}) cannot be decoded.")


def _weak(container: InputContainer) -> bool:
    return container.format.name.split(",")[0] in containers.WEAK_DEMUXERS


def _codec(stream: object) -> str | None:
    context = getattr(stream, "codec_context", None)
    return context.codec.canonical_name if context is not None else None
