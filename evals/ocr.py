"""`evals/ocr`: text read in pictures and on screen against what is written there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from evals.golden import Golden, GoldenItem, Print, ScreenText
from evals.metrics import Errors, character_errors, contains_text, total, unordered_character_errors
from evals.pictures import bars
from evals.result import Draft, EvalResult, Reader, models_of, read_all, rounded

CER_TOLERANCE = 0.02
RECALL_TOLERANCE = 0.05
SPAN_SLACK_S = 1.0
"""How far the recognised span may lie from the true one, seconds: stills are taken about once a second."""

SCREEN = "screen"
"""The slice of on-screen text in videos."""

ROWS = pa.schema(
    [
        ("file", pa.string()),
        ("slice", pa.string()),
        ("edits", pa.int64()),
        ("edits_any_order", pa.int64()),
        ("length", pa.int64()),
        ("cer", pa.float64()),
        ("cer_any_order", pa.float64()),
        ("found", pa.bool_()),
        ("reference", pa.string()),
        ("hypothesis", pa.string()),
        ("processed", pa.bool_()),
    ]
)


def evaluate_ocr(golden: Golden, tables: Reader) -> EvalResult:
    """Character error rate of pictures, in reading order and in any order, and recall of on-screen text in videos.

    Pictures fall into slices: `printed_en` (upright English print), `scene_en` (single words in photographs),
    `rotated`, `partial` (truth names only the readable text) and `other` languages.
    """
    printed = [(item, item.print) for item in golden.items if item.print is not None]
    screened = [item for item in golden.items if item.screen_text]
    texts = read_all(golden, tables, [*(item for item, _ in printed), *screened], "ocr_text")
    media = golden.match(tables.library)
    rows = [_print_row(item, truth, texts[item.file]) for item, truth in printed]
    for item in screened:
        fps = _fps(tables, media[item.file])
        rows.extend(
            _screen_row(item, text, line, texts[item.file], fps) for text in item.screen_text for line in text.lines
        )
    figures: Draft = {}
    for name in sorted({str(row["slice"]) for row in rows if row["slice"] != SCREEN}):
        members = [row for row in rows if row["slice"] == name]
        figures[f"cer_{name}"] = (_rate(members, "edits"), "lower", CER_TOLERANCE)
        figures[f"cer_any_order_{name}"] = (_rate(members, "edits_any_order"), "lower", CER_TOLERANCE)
    found = [bool(row["found"]) for row in rows if row["slice"] == SCREEN]
    figures["screen_text_recall"] = (sum(found) / len(found) if found else None, "higher", RECALL_TOLERANCE)
    figures["unprocessed"] = (sum(rows_ is None for rows_ in texts.values()), "lower", 0.0)
    shown = [(str(row["file"]), float(str(row["cer"]))) for row in rows if row["slice"] != SCREEN]
    return EvalResult(
        "ocr",
        golden.name,
        golden.digest,
        models_of(texts),
        rounded(figures),
        pa.Table.from_pylist(rows, schema=ROWS),
        bars("Character error rate per picture", shown),
    )


def slice_of(truth: Print) -> str:
    """The slice a picture belongs to."""
    if truth.languages != ("en",):
        return "other"
    if truth.rotated:
        return "rotated"
    if truth.partial:
        return "partial"
    return "scene_en" if truth.scene else "printed_en"


def _print_row(item: GoldenItem, truth: Print, found: list[dict[str, Any]] | None) -> dict[str, object]:
    lines = [row["text"] for row in sorted(found or (), key=lambda row: row["line"])]
    ordered, free = character_errors(truth.lines, lines), unordered_character_errors(truth.lines, lines)
    return {
        "file": item.file,
        "slice": slice_of(truth),
        "edits": ordered.edits,
        "edits_any_order": free.edits,
        "length": ordered.length,
        "cer": ordered.rate,
        "cer_any_order": free.rate,
        "found": None,
        "reference": "\n".join(truth.lines),
        "hypothesis": "\n".join(lines),
        "processed": found is not None,
    }


def _screen_row(
    item: GoldenItem, text: ScreenText, line: str, found: list[dict[str, Any]] | None, fps: float
) -> dict[str, object]:
    near = [row["text"] for row in found or () if _overlaps(row, text, fps)]
    return {
        "file": item.file,
        "slice": SCREEN,
        "found": contains_text(line, near),
        "reference": line,
        "hypothesis": "\n".join(near),
        "processed": found is not None,
    }


def _overlaps(row: dict[str, Any], text: ScreenText, fps: float) -> bool:
    if text.frames is None or not fps:
        return True
    start_s, end_s = text.frames.first / fps, (text.frames.last + 1) / fps
    return bool(row["start_s"] <= end_s + SPAN_SLACK_S and row["end_s"] >= start_s - SPAN_SLACK_S)


def _fps(tables: Reader, media_id: str) -> float:
    rows = tables.rows("media", media_id, ["fps"])
    return float(rows[0]["fps"] or 0.0) if rows else 0.0


def _rate(rows: Sequence[dict[str, object]], edits: str) -> float:
    return total(Errors(int(str(row[edits])), int(str(row["length"]))) for row in rows).rate
