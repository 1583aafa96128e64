"""Audio and video containers through PyAV: opening safely, the media clock, what the container promises."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import TYPE_CHECKING, Any, BinaryIO

from resources.errors import Truncated, Undecodable, Unsupported

if TYPE_CHECKING:
    from av.audio.stream import AudioStream
    from av.container import InputContainer
    from av.video.stream import VideoStream

DEMUXERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,flv,live_flv,asf,ogg,wav,w64,aiff,flac,mp3,aac,amr,amrnb,"
    "amrwb,caf,au,ac3,eac3,dts,gif,ivf,mxf,rm,wv,ape,tta,dv,yuv4mpegpipe,nut,swf,voc,mpc,mpc8,tak,h264,hevc,m4v"
)
"""Demuxers in use. Playlists (hls, concat, dash) are absent: they would open other files and addresses."""

WEAK_DEMUXERS = frozenset(
    {"mp3", "aac", "ac3", "eac3", "dts", "mpeg", "h264", "hevc", "m4v", "amr", "mpc", "swf", "dv"}
)
"""Recognised by little more than a sync word, so that random bytes may pass: a frame must decode too."""

EXACT_DURATION = ("mov", "matroska", "webm", "wav", "w64", "aiff", "avi", "caf", "flac", "mxf", "nut")
"""Containers whose duration is written, not estimated from the bit rate."""

TIMESTAMP_JUMPS = 0x0200
"""libav's AVFMT_TS_DISCONT: the format's clock starts anywhere (broadcast), not at zero."""

MICROSECOND = Fraction(1, 1_000_000)
READ_BUFFER_BYTES = 256 * 1024
VIDEO_MIMES = {
    "mov": "video/mp4",
    "matroska": "video/x-matroska",
    "avi": "video/x-msvideo",
    "mpegts": "video/mp2t",
    "mpeg": "video/mpeg",
    "flv": "video/x-flv",
    "asf": "video/x-ms-wmv",
    "ogg": "video/ogg",
    "gif": "image/gif",
    "mxf": "application/mxf",
}
AUDIO_MIMES = {
    "mov": "audio/mp4",
    "matroska": "audio/x-matroska",
    "wav": "audio/wav",
    "mp3": "audio/mpeg",
    "flac": "audio/flac",
    "ogg": "audio/ogg",
    "aac": "audio/aac",
    "aiff": "audio/aiff",
    "asf": "audio/x-ms-wma",
    "amr": "audio/amr",
}


@contextmanager
def opened(stream: BinaryIO, head: bytes) -> Iterator[InputContainer]:
    """The container behind `stream`, opened without touching any other file.

    Raises Truncated where an MP4 ends inside a box, Undecodable where the container is recognised and
    broken, Unsupported where it is none.
    """
    import av

    try:
        container = av.open(
            stream,
            "r",
            options={"format_whitelist": DEMUXERS, "enable_drefs": "0"},
            metadata_errors="replace",
            buffer_size=READ_BUFFER_BYTES,
            io_open=_refuse_other_files,
        )
    except MemoryError:
        raise
    except (av.FFmpegError, OSError, ValueError) as error:
        raise _unopenable(stream, head, error) from None
    with container:
        yield container


def first_video(container: InputContainer) -> VideoStream | None:
    """The first video stream that is not attached cover art."""
    from av.stream import Disposition

    return next((s for s in container.streams.video if not s.disposition & Disposition.attached_pic), None)


def first_audio(container: InputContainer) -> AudioStream | None:
    """The first audio stream."""
    return next(iter(container.streams.audio), None)


def origin_s(container: InputContainer, has_video: bool) -> float:
    """Container time that counts as 0 s of the media.

    MP4, Matroska and their like have a clock that starts at 0, so that a first frame at 1.075 s stays
    there, as players show it. Where the clock starts anywhere (MPEG-TS), below zero, or there is nothing
    to keep in step with (audio alone), the first timestamp counts as 0.
    """
    start = container.start_time
    if start is None:
        return 0.0
    anywhere = int(container.format.flags) & TIMESTAMP_JUMPS or start < 0 or not has_video
    return start / 1e6 if anywhere else 0.0


def duration_s(container: InputContainer, has_video: bool) -> float | None:
    """End of the media by the container, seconds from `origin_s`; None where it does not say."""
    if container.duration is None or container.duration <= 0:
        return None
    return max(0.0, (container.start_time or 0) / 1e6 - origin_s(container, has_video) + container.duration / 1e6)


def promised_end_s(container: InputContainer, stream: VideoStream | AudioStream, origin: float) -> float | None:
    """Where the container says the stream ends, seconds from `origin`; None where it is an estimate."""
    if not container.format.name.startswith(EXACT_DURATION) or not stream.duration or stream.time_base is None:
        return None
    return float(((stream.start_time or 0) + stream.duration) * stream.time_base) - origin


def mime(container: InputContainer, head: bytes, has_video: bool) -> str:
    """Media type of the container by content."""
    name = container.format.name.split(",")[0]
    side = "video" if has_video else "audio"
    if name == "mov" and container.metadata.get("major_brand", "").startswith("qt"):
        return "video/quicktime"
    if name == "matroska" and b"webm" in head[:64]:
        return f"{side}/webm"
    return (VIDEO_MIMES if has_video else AUDIO_MIMES).get(name, f"{side}/x-{name}")


def mp4_head(head: bytes) -> bool:
    """Whether the file begins with a box of the MP4 family."""
    return head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free")


def box_overrun(stream: BinaryIO) -> bool:
    """Whether an MP4's top-level box runs beyond the end of the file: the mark of an incomplete upload."""
    end = stream.seek(0, 2)
    at = 0
    while at + 8 <= end:
        stream.seek(at)
        size, kind = struct.unpack(">I4s", stream.read(8))
        if not kind.isalnum():
            return False
        if size == 1:
            large = stream.read(8)
            size = struct.unpack(">Q", large)[0] if len(large) == 8 else end
        if size < 8:
            return False
        at += size
    return at != end


def _refuse_other_files(*_: Any) -> Any:
    raise Unsupported("The container refers to other files.")


def _unopenable(stream: BinaryIO, head: bytes, error: Exception) -> Exception:
    from resources.decoding.sniff import claims_container

    name = type(error).__name__
    if mp4_head(head) and box_overrun(stream):
        return Truncated("The MP4 file ends in the middle of its data, before its index.")
    if claims_container(head):
        return Undecodable(f"The container cannot be opened ({name}).")
    return Unsupported("The content is no video, audio, picture or text format that is known here.")
