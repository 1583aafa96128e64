"""Waveform with the words under it: the picture of a transcript."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

WIDTH = 960
ROW_S = 15.0
MAX_ROWS = 4
WAVE_HEIGHT = 56
LANES = 3
LANE_HEIGHT = 16
MARGIN = 8
ROW_HEIGHT = WAVE_HEIGHT + LANES * LANE_HEIGHT + MARGIN
BINS = WIDTH * MAX_ROWS
FONT_SIZE = 12
COLOURS = 16
WORD_LIMIT = 24
PAPER, SPEECH, WAVE, INK, AXIS = (255, 255, 255), (226, 238, 255), (52, 101, 164), (32, 32, 32), (170, 170, 170)


@dataclass(frozen=True, slots=True)
class Envelope:
    """Lowest and highest sample of equal stretches of audio: float32 [bins] each, -1..1."""

    low: npt.NDArray[np.float32]
    high: npt.NDArray[np.float32]


def envelope(pcm: npt.NDArray[np.float32]) -> Envelope:
    """The outline of float32 [samples] audio in at most as many bins as the picture has columns."""
    if not len(pcm):
        return Envelope(np.zeros(1, np.float32), np.zeros(1, np.float32))
    edges = np.unique(np.linspace(0, len(pcm), BINS, endpoint=False, dtype=np.int64))
    return Envelope(np.minimum.reduceat(pcm, edges), np.maximum.reduceat(pcm, edges))


def waveform(
    shape: Envelope, duration_s: float, speech: Sequence[tuple[float, float]], words: Sequence[tuple[float, float, str]]
) -> bytes:
    """PNG, 960 pixels wide, of the whole audio in one to four rows of equal time, below 25 kB.

    `speech` are spans and `words` spans with text, in seconds. Words that find no room are left out.
    """
    duration_s = max(duration_s, 1e-3)
    rows = min(MAX_ROWS, max(1, int(np.ceil(duration_s / ROW_S))))
    row_s = duration_s / rows
    image = Image.new("RGB", (WIDTH, rows * ROW_HEIGHT + MARGIN), PAPER)
    draw = ImageDraw.Draw(image)
    for start, end in speech:
        for row in range(int(start / row_s), min(rows - 1, int(end / row_s)) + 1):
            left, right = _x(start, row, row_s), _x(end, row, row_s)
            draw.rectangle((left, _top(row), max(left, right), _top(row) + WAVE_HEIGHT), fill=SPEECH)
    _draw_outline(draw, shape, rows)
    _draw_words(draw, words, rows, row_s)
    return _png(image)


def _draw_outline(draw: ImageDraw.ImageDraw, shape: Envelope, rows: int) -> None:
    scale = max(float(np.max(np.abs(shape.low))), float(np.max(np.abs(shape.high))), 1e-4)
    bins = len(shape.low)
    for row in range(rows):
        middle = _top(row) + WAVE_HEIGHT // 2
        draw.line((0, middle, WIDTH, middle), fill=AXIS)
        for x in range(WIDTH):
            first = (row * WIDTH + x) * bins // (rows * WIDTH)
            last = max(first + 1, (row * WIDTH + x + 1) * bins // (rows * WIDTH))
            high, low = float(shape.high[first:last].max()), float(shape.low[first:last].min())
            half = WAVE_HEIGHT / 2 / scale
            draw.line((x, middle - max(0.0, high) * half, x, middle - min(0.0, low) * half), fill=WAVE)


def _draw_words(draw: ImageDraw.ImageDraw, words: Sequence[tuple[float, float, str]], rows: int, row_s: float) -> None:
    font = _font()
    free = [[0.0] * LANES for _ in range(rows)]
    for start, _end, text in words:
        row = min(rows - 1, int(start / row_s))
        label = text if len(text) <= WORD_LIMIT else text[: WORD_LIMIT - 1] + "…"
        width = draw.textlength(label, font=font)
        left = min(_x(start, row, row_s), WIDTH - width)
        lane = next((lane for lane, until in enumerate(free[row]) if until <= left), None)
        if lane is not None:
            draw.text((left, _top(row) + WAVE_HEIGHT + lane * LANE_HEIGHT), label, fill=INK, font=font)
            free[row][lane] = left + width + 4


def _x(time_s: float, row: int, row_s: float) -> float:
    return min(max((time_s - row * row_s) / row_s, 0.0), 1.0) * (WIDTH - 1)


def _top(row: int) -> int:
    return MARGIN + row * ROW_HEIGHT


def _png(image: Image.Image) -> bytes:
    sink = io.BytesIO()
    image.quantize(COLOURS).save(sink, "PNG", optimize=True)
    return sink.getvalue()


@cache
def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """DejaVu Sans as matplotlib ships it, which knows more scripts than Pillow's own font."""
    # Found, not imported: matplotlib makes folders in the user's home.
    found = find_spec("matplotlib")
    folder = found.submodule_search_locations[0] if found and found.submodule_search_locations else ""
    try:
        return ImageFont.truetype(str(Path(folder, "mpl-data", "fonts", "ttf", "DejaVuSans.ttf")), FONT_SIZE)
    except OSError:
        return ImageFont.load_default(FONT_SIZE)
