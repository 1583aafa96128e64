"""OCR overlay: a still with the lines that were read on it outlined, numbered and spelled out beside it."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

MAX_BYTES = 25_000
STILL = (480, 360)
PANEL_WIDTH = 240
ROW = 12
MARGIN = 4
OUTLINE = (255, 64, 160)
INK = (230, 230, 230)
BACKGROUND = (24, 24, 24)
LONGEST_TEXT = 36
QUALITIES = (80, 65, 50, 35, 20, 10)


def ocr_overlay(still: Image.Image, lines: Sequence[tuple[str, npt.NDArray[np.float32]]]) -> bytes:
    """JPEG, at most 25 kB: `still` with each line's quad, and the texts in the order given on its right.

    A line is its text and its quad, float32 [4, 2] in fractions of width and height. Text is drawn as
    pixels only; characters the built-in font lacks become `?`.
    """
    small = still.convert("RGB")
    small.thumbnail(STILL)
    sheet = Image.new("RGB", (small.width + PANEL_WIDTH, max(small.height, ROW * 3)), BACKGROUND)
    sheet.paste(small, (0, 0))
    pen = ImageDraw.Draw(sheet)
    for number, (_, quad) in enumerate(lines, start=1):
        corners = [(float(x) * (small.width - 1), float(y) * (small.height - 1)) for x, y in quad]
        pen.polygon(corners, outline=OUTLINE)
        pen.text(corners[0], str(number), fill=OUTLINE)
    _list_texts(pen, [text for text, _ in lines], small.width + MARGIN, sheet.height)
    return _small_jpeg(sheet)


def _list_texts(pen: ImageDraw.ImageDraw, texts: Sequence[str], left: int, height: int) -> None:
    room = height // ROW - 1
    for place, text in enumerate(texts[:room]):
        shown = text.encode("latin-1", "replace").decode("latin-1")[:LONGEST_TEXT]
        pen.text((left, MARGIN + place * ROW), f"{place + 1} {shown}", fill=INK)
    if len(texts) > room:
        pen.text((left, MARGIN + room * ROW), f"and {len(texts) - room} more", fill=INK)


def _small_jpeg(sheet: Image.Image) -> bytes:
    for quality in QUALITIES:
        sink = io.BytesIO()
        sheet.save(sink, "JPEG", quality=quality, optimize=True)
        if sink.tell() <= MAX_BYTES:
            break
    return sink.getvalue()
