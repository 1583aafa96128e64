"""The pipe format between a decoder process and its parent: a JSON header, then raw bytes. No pickle.

A message is two little-endian uint32, the lengths of header and payload, then both. Requests go to the
worker as messages without payload. Everything the worker sends is checked by the parent.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, BinaryIO

LENGTHS = struct.Struct("<II")
MAX_HEADER_BYTES = 16 * 2**20
MAX_PAYLOAD_BYTES = 256 * 2**20
MAX_RANGE_BYTES = 4 * 2**20
TRACK_CHUNK_FRAMES = 512
PCM_CHUNK_SAMPLES = 60 * 16_000
SAMPLE_RATE = 16_000
TRACK_HEIGHT, TRACK_WIDTH = 27, 48
FRAME_BYTES = TRACK_HEIGHT * TRACK_WIDTH * 3
THUMBNAIL = 160, 120
"""Most columns and rows of a thumbnail, pixels."""

Emit = Callable[..., None]
"""`emit(type, payload=b"", /, **fields)`: send one message to the parent."""

Fetch = Callable[[int, int], bytes]
"""`fetch(offset, size)`: bytes of a remote object, at most to its end."""


@dataclass(frozen=True, slots=True)
class Request:
    """One job for a decoder process, of one file.

    `operation` is probe or decode; `path` the file-system path as bytes in hex; `kind` what an earlier
    probe found and `bytes` the size it saw; `wanted` holds frames, audio or both; `etag` the version of a
    local file that is meant, any where it is empty, and `within` the folder it must be in, its links followed,
    as bytes in hex. Sizes are pixels, times seconds. An object of `remote_bytes` bytes has no path: the worker
    asks its parent for each range with a `read` message, and gets a message with that payload. So it needs
    neither network nor credentials.
    """

    operation: str
    path: str
    suffix: str
    max_bytes: int
    max_pixels: int
    max_duration_s: float
    max_text_bytes: int
    kind: str = ""
    bytes: int = -1
    wanted: tuple[str, ...] = ()
    still_interval_s: float = 1.0
    still_change: float = 12.0
    still_max_side: int = 1280
    image_max_side: int = 2560
    threads: int = 1
    remote_bytes: int = -1
    etag: str = ""
    within: str = ""

    def header(self) -> dict[str, Any]:
        """The request as JSON-ready fields."""
        return asdict(self)


def encode(header: dict[str, Any], payload: bytes | memoryview = b"") -> bytes:
    """Lengths and header of one message; the payload follows by itself."""
    text = json.dumps(header, allow_nan=False).encode()
    return LENGTHS.pack(len(text), len(payload)) + text


def read_range(stream: BinaryIO) -> bytes:
    """The parent's answer to a `read` message. Raises EOFError when the parent closed the pipe."""
    lengths = stream.read(LENGTHS.size)
    if len(lengths) < LENGTHS.size:
        raise EOFError
    header, size = LENGTHS.unpack(lengths)
    stream.read(header)
    return stream.read(size)


def read_request(stream: BinaryIO) -> Request | None:
    """The next request, or None when the parent closed the pipe."""
    lengths = stream.read(LENGTHS.size)
    if len(lengths) < LENGTHS.size:
        return None
    size, _ = LENGTHS.unpack(lengths)
    fields = json.loads(stream.read(size))
    return Request(**{**fields, "wanted": tuple(fields["wanted"])})
