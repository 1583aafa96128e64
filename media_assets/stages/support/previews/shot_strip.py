"""The shot strip: one still per shot, in order, with the time and the kind of transition it starts with."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image, ImageDraw

from media_assets.stages.support.tracks import read_still

MAX_BYTES = 25_000
MAX_SHOTS = 24
COLUMNS = 6
CELL_WIDTH, CELL_HEIGHT, CAPTION_HEIGHT = 160, 90, 14
MARKS = {"start": "", "cut": "| ", "gradual": "~ "}
QUALITIES = (80, 65, 50, 35, 20)


def shot_strip(shots: Sequence[Mapping[str, Any]], stills: Sequence[Mapping[str, Any]]) -> bytes:
    """A JPEG of at most 25 kB: the first still of each shot, six in a row, at most 24 evenly chosen shots.

    `shots` are rows of the `shots` table, `stills` rows of `frames` in order, neither empty.
    """
    chosen = _evenly(shots, MAX_SHOTS)
    columns = min(COLUMNS, len(chosen))
    rows = -(-len(chosen) // columns)
    sheet = Image.new("RGB", (columns * CELL_WIDTH, rows * (CELL_HEIGHT + CAPTION_HEIGHT)), "black")
    draw = ImageDraw.Draw(sheet)
    for position, shot in enumerate(chosen):
        x, y = (position % columns) * CELL_WIDTH, (position // columns) * (CELL_HEIGHT + CAPTION_HEIGHT)
        picture = read_still(still_of(shot, stills))
        picture.thumbnail((CELL_WIDTH, CELL_HEIGHT))
        sheet.paste(picture, (x + (CELL_WIDTH - picture.width) // 2, y + (CELL_HEIGHT - picture.height) // 2))
        caption = f"{MARKS[shot['transition']]}{shot['shot']}  {shot['start_s']:.1f}-{shot['end_s']:.1f} s"
        draw.text((x + 4, y + CELL_HEIGHT + 1), caption, fill="white")
    return _jpeg(sheet)


def still_of(shot: Mapping[str, Any], stills: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The first still inside the shot, else the last before it, else the first of all."""
    inside = [still for still in stills if shot["start_frame"] <= still["frame"] <= shot["end_frame"]]
    before = [still for still in stills if still["frame"] < shot["start_frame"]]
    return inside[0] if inside else before[-1] if before else stills[0]


def _evenly(rows: Sequence[Mapping[str, Any]], most: int) -> list[Mapping[str, Any]]:
    if len(rows) <= most:
        return list(rows)
    return [rows[round(at * (len(rows) - 1) / (most - 1))] for at in range(most)]


def _jpeg(sheet: Image.Image) -> bytes:
    """The sheet at the best quality that fits, made smaller only if none does."""
    while True:
        for quality in QUALITIES:
            sink = io.BytesIO()
            sheet.save(sink, "JPEG", quality=quality, optimize=True)
            if sink.tell() <= MAX_BYTES:
                return sink.getvalue()
        sheet = sheet.resize((sheet.width * 3 // 4, sheet.height * 3 // 4))
