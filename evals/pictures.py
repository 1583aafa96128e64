"""Pictures of results for the Dagster UI: horizontal bars and shot timelines, as small PNGs."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

MAX_DATA_URI_BYTES = 60_000
MAX_ROWS = 40
WIDTH, LABEL_WIDTH, ROW_HEIGHT, HEADER = 720, 260, 20, 30
LABEL_CHARACTERS = 40
COLOURS = 16
BLUE, RED, GREEN, SHADE, INK, FAINT = "#3867d6", "#d63031", "#218c74", "#f6d8ae", "#222222", "#dddddd"


@dataclass(frozen=True, slots=True)
class Timeline:
    """Boundaries of one video, all in frames; gradual spans are inclusive."""

    label: str
    frames: int
    true: tuple[int, ...]
    detected: tuple[int, ...]
    gradual: tuple[tuple[int, int], ...]


def bars(title: str, values: Sequence[tuple[str, float | None]]) -> bytes:
    """Horizontal bars as PNG, largest first, at most MAX_ROWS of them."""
    known = sorted(((label, value) for label, value in values if value is not None), key=lambda bar: -bar[1])[:MAX_ROWS]
    top = max((value for _, value in known), default=0.0) or 1.0
    picture, draw = _canvas(f"{title} ({len(known)} of {len(values)})", len(known))
    for row, (label, value) in enumerate(known):
        y = HEADER + row * ROW_HEIGHT
        _label(draw, y, label)
        end = LABEL_WIDTH + (WIDTH - LABEL_WIDTH - 60) * value / top
        draw.rectangle((LABEL_WIDTH, y + 3, end, y + ROW_HEIGHT - 4), fill=BLUE)
        draw.text((end + 4, y + 3), f"{value:.3g}", INK, _font())
    return _png(picture)


def timelines(title: str, videos: Sequence[Timeline]) -> bytes:
    """A strip per video as PNG: true cuts in green above, detected in red below, gradual spans shaded."""
    shown = videos[:MAX_ROWS]
    picture, draw = _canvas(title, len(shown))
    for row, video in enumerate(shown):
        y = HEADER + row * ROW_HEIGHT
        _label(draw, y, video.label)
        scale = (WIDTH - LABEL_WIDTH - 10) / max(video.frames, 1)
        for first, last in video.gradual:
            draw.rectangle(
                (LABEL_WIDTH + first * scale, y + 2, LABEL_WIDTH + last * scale, y + ROW_HEIGHT - 3), fill=SHADE
            )
        middle = y + ROW_HEIGHT // 2
        draw.line((LABEL_WIDTH, middle, WIDTH - 10, middle), fill=FAINT)
        for frames, colour, low, high in ((video.true, GREEN, y + 2, middle), (video.detected, RED, middle, y + 17)):
            for frame in frames:
                x = LABEL_WIDTH + frame * scale
                draw.line((x, low, x, high), fill=colour, width=2)
    return _png(picture)


def data_uri(png: bytes) -> str:
    """A PNG as a Markdown picture; empty when it would exceed MAX_DATA_URI_BYTES."""
    encoded = f"![picture](data:image/png;base64,{base64.b64encode(png).decode()})"
    return encoded if png and len(encoded) <= MAX_DATA_URI_BYTES else ""


def _canvas(title: str, rows: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    picture = Image.new("RGB", (WIDTH, HEADER + max(rows, 1) * ROW_HEIGHT + 6), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((8, 8), title, INK, _font(14))
    return picture, draw


def _label(draw: ImageDraw.ImageDraw, y: int, label: str) -> None:
    text = label if len(label) <= LABEL_CHARACTERS else f"…{label[1 - LABEL_CHARACTERS :]}"
    # Names come from strangers: a line break in one must not spill over its neighbours.
    draw.text((8, y + 3), "".join(char if char.isprintable() else "?" for char in text), INK, _font())


def _font(size: int = 11) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.quantize(COLOURS, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
