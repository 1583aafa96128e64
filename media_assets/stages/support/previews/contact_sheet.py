"""A contact sheet: up to twelve stills of an item in one small JPEG."""

from __future__ import annotations

import io
from collections.abc import Sequence

from PIL import Image

from resources.decoding.protocol import THUMBNAIL

MAX_STILLS = 12
MAX_BYTES = 25_000
COLUMNS = 4
CELL = THUMBNAIL
GAP = 2
BACKGROUND = (24, 24, 24)
QUALITIES = (80, 65, 50, 35, 20, 10)


def contact_sheet(stills: Sequence[bytes | Image.Image]) -> bytes:
    """JPEG, at most 25 kB, of up to twelve stills spread evenly over `stills`, in order.

    A still is an encoded JPEG or PNG, or an RGB thumbnail that fits a cell. Raises ValueError without stills.
    """
    if not stills:
        raise ValueError("a contact sheet needs at least one still")
    chosen = [stills[index] for index in _spread(len(stills))]
    columns = min(COLUMNS, len(chosen))
    rows = -(-len(chosen) // columns)
    width, height = (columns * (CELL[0] + GAP) + GAP, rows * (CELL[1] + GAP) + GAP)
    sheet = Image.new("RGB", (width, height), BACKGROUND)
    for place, still in enumerate(chosen):
        cell = still if isinstance(still, Image.Image) else _thumbnail(still)
        left = GAP + place % columns * (CELL[0] + GAP) + (CELL[0] - cell.width) // 2
        top = GAP + place // columns * (CELL[1] + GAP) + (CELL[1] - cell.height) // 2
        sheet.paste(cell, (left, top))
    return _small_jpeg(sheet)


def _spread(count: int) -> list[int]:
    """Indices of at most twelve stills, the first and last among them, evenly apart."""
    if count <= MAX_STILLS:
        return list(range(count))
    return [round(place * (count - 1) / (MAX_STILLS - 1)) for place in range(MAX_STILLS)]


def _thumbnail(data: bytes) -> Image.Image:
    picture = Image.open(io.BytesIO(data), formats=("JPEG", "PNG"))
    picture.draft("RGB", CELL)
    small = picture.convert("RGB")
    small.thumbnail(CELL)
    return small


def _small_jpeg(sheet: Image.Image) -> bytes:
    for quality in QUALITIES:
        sink = io.BytesIO()
        sheet.save(sink, "JPEG", quality=quality, optimize=True)
        if sink.tell() <= MAX_BYTES:
            break
    return sink.getvalue()
