"""`evals/shots`: shot boundaries against cuts marked by eye or by construction."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from evals.golden import Golden, Range
from evals.metrics import SHOT_TOLERANCE, Boundary, Decisions, shot_errors
from evals.pictures import Timeline, timelines
from evals.result import EvalResult, Reader, models_of, read_all, rounded

F1_TOLERANCE = 0.02
GRADUAL_TOLERANCE = 0.1

ROWS = pa.schema(
    [
        ("file", pa.string()),
        ("hard_cuts", pa.int64()),
        ("found", pa.int64()),
        ("false_cuts", pa.int64()),
        ("gradual", pa.int64()),
        ("gradual_found", pa.int64()),
        ("gradual_named", pa.int64()),
        ("true_frames", pa.list_(pa.int64())),
        ("detected_frames", pa.list_(pa.int64())),
        ("processed", pa.bool_()),
    ]
)


def evaluate_shots(golden: Golden, tables: Reader) -> EvalResult:
    """Precision, recall and F1 of hard cuts within SHOT_TOLERANCE frames, and the gradual transitions found."""
    wanted = [(item, item.cuts) for item in golden.items if item.cuts is not None]
    found = read_all(golden, tables, [item for item, _ in wanted], "shots")
    rows: list[dict[str, object]] = []
    strips: list[Timeline] = []
    cuts, gradual, gradual_found, gradual_named = Decisions(0, 0, 0), 0, 0, 0
    for item, truth in wanted:
        shots = found[item.file] or []
        detected = boundaries(shots)
        score = shot_errors(truth, detected, SHOT_TOLERANCE)
        cuts += score.cuts
        gradual += score.gradual
        gradual_found += score.gradual_found
        gradual_named += score.gradual_named
        rows.append(
            {
                "file": item.file,
                "hard_cuts": len(truth.hard),
                "found": score.cuts.true_positive,
                "false_cuts": score.cuts.false_positive,
                "gradual": score.gradual,
                "gradual_found": score.gradual_found,
                "gradual_named": score.gradual_named,
                "true_frames": list(truth.hard),
                "detected_frames": [boundary.frame for boundary in detected],
                "processed": found[item.file] is not None,
            }
        )
        frames = max([row["end_frame"] + 1 for row in shots] + [frame + 1 for frame in truth.hard] + [1])
        spans = tuple((span.first, span.last) for span in truth.gradual)
        strips.append(Timeline(item.file, frames, truth.hard, tuple(b.frame for b in detected), spans))
    figures = rounded(
        {
            "precision": (cuts.precision, "higher", F1_TOLERANCE),
            "recall": (cuts.recall, "higher", F1_TOLERANCE),
            "f1": (cuts.f1, "higher", F1_TOLERANCE),
            "false_cuts": (cuts.false_positive, "lower", 0.0),
            "gradual_recall": (gradual_found / gradual if gradual else None, "higher", GRADUAL_TOLERANCE),
            "gradual_named": (gradual_named / gradual if gradual else None, "higher", GRADUAL_TOLERANCE),
            "unprocessed": (sum(shots is None for shots in found.values()), "lower", 0.0),
        }
    )
    table = pa.Table.from_pylist(rows, schema=ROWS)
    picture = timelines("Cuts: true above, detected below, gradual shaded", strips)
    return EvalResult("shots", golden.name, golden.digest, models_of(found), figures, table, picture)


def boundaries(shots: list[dict[str, Any]]) -> list[Boundary]:
    """Boundaries between the rows of a `shots` table; the start of the first shot is none."""
    return [
        Boundary(row["start_frame"], _transition(row), row["transition"] == "gradual")
        for row in sorted(shots, key=lambda row: row["shot"])
        if row["shot"] > 0
    ]


def _transition(row: dict[str, Any]) -> Range:
    first, last = row.get("transition_start_frame"), row.get("transition_end_frame")
    start = row["start_frame"]
    return Range(start if first is None else first, start if last is None else last)
