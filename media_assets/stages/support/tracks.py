"""Reading what decoding left behind: the 48x27 track, 16 kHz samples and stills, as arrays and pictures."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image

SAMPLE_RATE = 16_000
TRACK_HEIGHT, TRACK_WIDTH, TRACK_CHANNELS = 27, 48, 3
FRAME_BYTES = TRACK_HEIGHT * TRACK_WIDTH * TRACK_CHANNELS
FULL_SCALE = 32_768


def read_track(table: pa.Table) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float64]]:
    """Every frame of the first video stream from the side table `frames.track`.

    Returns uint8 [n, 27, 48, 3] RGB in presentation order and float64 [n] presentation times in seconds
    from the start of the media; n is 0 where the item has no track. Raises ValueError on a damaged table.
    """
    codec = pa.Codec("zstd")
    rows = sorted(table.select(["first_frame", "frames", "start_s", "rgb"]).to_pylist(), key=lambda r: r["first_frame"])
    total = sum(row["frames"] for row in rows)
    frames = np.empty((total, TRACK_HEIGHT, TRACK_WIDTH, TRACK_CHANNELS), np.uint8)
    times = np.empty(total, np.float64)
    at = 0
    for row in rows:
        count = row["frames"]
        raw = codec.decompress(row["rgb"], decompressed_size=count * FRAME_BYTES)
        if row["first_frame"] != at or len(row["start_s"]) != count or len(raw) != count * FRAME_BYTES:
            raise ValueError(f"track chunk at frame {row['first_frame']} does not continue at frame {at}")
        frames[at : at + count] = np.frombuffer(raw, np.uint8).reshape(count, *frames.shape[1:])
        times[at : at + count] = row["start_s"]
        at += count
    return frames, times


def read_pcm(audio: pa.Table) -> npt.NDArray[np.float32]:
    """All samples of an `audio` table: float32 [samples] in -1..1, 16 kHz mono; empty without rows.

    Sample i is at i / 16000 seconds from the start of the media. Raises ValueError on a damaged chunk.
    """
    rows = sorted(audio.select(["chunk", "samples", "flac"]).to_pylist(), key=lambda row: row["chunk"])
    pcm = np.empty(sum(row["samples"] for row in rows), np.float32)
    at = 0
    for row in rows:
        samples = _flac(row["flac"])
        if len(samples) != row["samples"]:
            raise ValueError(f"audio chunk {row['chunk']} holds {len(samples)} samples, not {row['samples']}")
        np.divide(samples, FULL_SCALE, out=pcm[at : at + len(samples)], casting="unsafe")
        at += len(samples)
    return pcm


def read_still(row: Mapping[str, Any] | bytes) -> Image.Image:
    """The picture of a row of `frames` (or of its `image` bytes): an upright, fully loaded RGB PIL image.

    `numpy.asarray` of it is uint8 [height, width, 3].
    """
    data = row if isinstance(row, bytes) else row["image"]
    picture = Image.open(io.BytesIO(data), formats=("JPEG", "PNG"))
    picture.load()
    return picture if picture.mode == "RGB" else picture.convert("RGB")  # which copies one that is RGB already


def _flac(data: bytes) -> npt.NDArray[np.int16]:
    import av

    with av.open(io.BytesIO(data), format="flac") as container:
        blocks = [frame.to_ndarray().reshape(-1) for frame in container.decode(audio=0)]
    return np.concatenate(blocks).astype(np.int16, copy=False) if blocks else np.empty(0, np.int16)
