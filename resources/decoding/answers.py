"""What decoder processes send, in types: the wire's models, which believe nothing, and what callers get."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from resources.decoding import protocol
from resources.errors import MediaError

MAX_SEGMENT_CHARACTERS = 10_000

Seconds = Annotated[float, Field(ge=0, le=1e7, allow_inf_nan=False)]
Pixels = Annotated[int, Field(ge=1, le=1_000_000)]
Count = Annotated[int, Field(ge=0, le=2**31 - 1)]
Name = Annotated[str, Field(max_length=100, pattern=r"^[\x21-\x7e]+$")]


class Wire(BaseModel):
    """A message of a decoder process; what is missing, unknown or of another type is refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class ProbeFacts(Wire):
    """What a probe says of a file of any kind."""

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


class MediaFacts(ProbeFacts):
    """What the probe found; sizes in pixels as displayed, times in seconds, rotation clockwise in degrees."""

    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class RemoteFacts(ProbeFacts):
    """What the probe of an object found: all but its hash, for which it would have to be read whole."""

    sha256: Literal[""]


class Segments(Wire):
    """Cues or paragraphs: start and end in seconds where there are any, and text."""

    segments: list[tuple[Seconds | None, Seconds | None, Annotated[str, Field(max_length=MAX_SEGMENT_CHARACTERS)]]]


class Failed(Wire):
    """Why a part of the answer is missing."""

    part: Literal["file", "frames", "audio"]
    code: str
    message: Annotated[str, Field(max_length=5_000)]
    remedy: Annotated[str, Field(max_length=5_000)]


class Progress(Wire):
    """How far into the media decoding is, seconds."""

    media_s: Annotated[float, Field(allow_inf_nan=False)]


class StillFacts(Wire):
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


class Thumbnail(Wire):
    """Size of a thumbnail, pixels."""

    width: Annotated[int, Field(ge=1, le=protocol.THUMBNAIL[0])]
    height: Annotated[int, Field(ge=1, le=protocol.THUMBNAIL[1])]


class Track(Wire):
    """A stretch of the 48×27 track: its first frame, and the start of each, seconds."""

    first_frame: Count
    start_s: Annotated[list[Seconds], Field(min_length=1, max_length=protocol.TRACK_CHUNK_FRAMES)]


class Pcm(Wire):
    """A stretch of 16 kHz mono samples."""

    first_sample: Annotated[int, Field(ge=0)]


class PartFacts(Wire):
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
