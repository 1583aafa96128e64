"""`evals/moderation`: findings in pictures and texts against what a moderator expects."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa

from evals.golden import Golden, GoldenItem
from evals.metrics import Decisions, average_precision, binary_decisions, label_decisions
from evals.pictures import bars
from evals.result import Draft, EvalResult, NotProcessedError, Reader, Verdict, models_of, read_all, rounded

TOLERANCE = 0.03
NO_FINDING = "none"
TERMS: dict[str, tuple[str, ...]] = {
    "weapon": ("weapons", "military"),
    "firearm": ("weapons",),
    "military": ("military",),
    "smoking-related": ("tobacco",),
    "sexual": ("sexual", "nudity"),
    "gore": ("violence",),
}
"""Words of golden sets and the labels of the taxonomy that fulfil them, the usual one first."""

ROWS = pa.schema(
    [
        ("file", pa.string()),
        ("row", pa.int64()),
        ("expected", pa.list_(pa.string())),
        ("found", pa.list_(pa.string())),
        ("action", pa.string()),
        ("score", pa.float64()),
        ("right", pa.bool_()),
        ("processed", pa.bool_()),
    ]
)


def evaluate_moderation(golden: Golden, tables: Reader) -> EvalResult:
    """Precision and recall per label on pictures, false flags on ordinary pictures, and the texts of truth tables.

    A label counts as found when the policy reports it, whatever the action. A text of a truth table is
    judged on its own by the text model and the policy, without the other columns of its row.
    """
    judged = [item for item in golden.items if item.moderation is not None]
    plain = [item for item in golden.items if item.moderation is None and item.subject is not None]
    tables_of_texts = [item for item in golden.items if item.truth_column]
    rows: list[dict[str, object]] = []
    figures: Draft = {}
    models = []
    if judged or plain or not tables_of_texts:
        found = read_all(golden, tables, [*judged, *plain], "moderation_labels")
        models.append(models_of(found))
        models.extend(f"policy-{row['policy_version']}" for labels in found.values() for row in labels or ())
        for item in (*judged, *plain):
            rows.append(_picture_row(item, found[item.file]))
        figures |= _label_figures(judged, rows)
        figures |= _false_flags(plain, rows)
        figures["unprocessed"] = (sum(labels is None for labels in found.values()), "lower", 0.0)
    for item in tables_of_texts:
        if tables.moderator is None:
            raise NotProcessedError("Truth tables of texts need the text moderation model.", "Pass it with the reader.")
        models.append(tables.moderator.identity)
        texts = golden.labelled_texts(item)
        verdicts = tables.moderator.judge([text.text for text in texts])
        harmful = [text.harmful for text in texts]
        rows.extend(_text_row(item, row, yes, v) for row, (yes, v) in enumerate(zip(harmful, verdicts, strict=True)))
        figures |= _text_figures(item.file.rpartition("/")[2].removesuffix(".csv"), harmful, verdicts)
    return EvalResult(
        "moderation",
        golden.name,
        golden.digest,
        "+".join(sorted(set("+".join(models).split("+")) - {"none"})) or "none",
        rounded(figures),
        pa.Table.from_pylist(rows, schema=ROWS),
        bars(
            "Precision and recall", [(n, f[0]) for n, f in figures.items() if f[0] is not None and n != "unprocessed"]
        ),
    )


def expectations(terms: Sequence[str]) -> list[tuple[str, ...]]:
    """Golden terms as choices of taxonomy labels; a term the taxonomy has no label for is left out."""
    from media_assets.moderation.taxonomy import LABELS

    choices = [TERMS.get(term, (term,)) for term in terms]
    known = [tuple(label for label in options if label in LABELS) for options in choices]
    return list(dict.fromkeys(options for options in known if options))


def _picture_row(item: GoldenItem, labels: list[dict[str, object]] | None) -> dict[str, object]:
    terms = item.moderation.expected if item.moderation else ()
    decisions = [row for row in labels or () if row["label"] != NO_FINDING]
    found = sorted({str(row["label"]) for row in decisions})
    actions = {str(row["action"]) for row in decisions}
    score = label_decisions(expectations(terms), found)
    return {
        "file": item.file,
        "row": None,
        "expected": list(terms),
        "found": found,
        "action": next((action for action in ("block", "review") if action in actions), "allow"),
        "score": max((float(str(row["score"])) for row in decisions), default=None),
        "right": not score.false_positive and not score.false_negative,
        "processed": labels is not None,
    }


def _label_figures(judged: Sequence[GoldenItem], rows: Sequence[dict[str, object]]) -> Draft:
    found = {row["file"]: row["found"] for row in rows}
    per_item = [(expectations(item.moderation.expected), found[item.file]) for item in judged if item.moderation]
    names = sorted(
        {name for due, _ in per_item for name, *_ in due} | {n for _, made in per_item for n in _strings(made)}
    )
    figures = _decision_figures("", [label_decisions(due, _strings(made)) for due, made in per_item])
    for name in names:
        figures |= _decision_figures(f"_{name}", [label_decisions(due, _strings(made), name) for due, made in per_item])
    return figures


def _strings(value: object) -> list[str]:
    return [str(entry) for entry in value] if isinstance(value, list) else []


def _decision_figures(suffix: str, decisions: Sequence[Decisions]) -> Draft:
    summed = sum(decisions, Decisions(0, 0, 0))
    return {
        f"precision{suffix}": (summed.precision, "higher", TOLERANCE),
        f"recall{suffix}": (summed.recall, "higher", TOLERANCE),
    }


def _false_flags(plain: Sequence[GoldenItem], rows: Sequence[dict[str, object]]) -> Draft:
    names = {item.file for item in plain}
    flags = [row["action"] != "allow" for row in rows if row["file"] in names and row["processed"]]
    return {"ordinary_flagged": (sum(flags) / len(flags) if flags else None, "lower", TOLERANCE)}


def _text_row(item: GoldenItem, row: int, harmful: bool, verdict: Verdict) -> dict[str, object]:
    return {
        "file": item.file,
        "row": row,
        "expected": ["harmful"] if harmful else [],
        "found": sorted(verdict.labels),
        "action": "review" if verdict.actioned else "allow",
        "score": verdict.score,
        "right": harmful == bool(verdict.labels),
        "processed": True,
    }


def _text_figures(name: str, harmful: Sequence[bool], verdicts: Sequence[Verdict]) -> Draft:
    found = binary_decisions(harmful, [bool(verdict.labels) for verdict in verdicts])
    acted = binary_decisions(harmful, [verdict.actioned for verdict in verdicts])
    return {
        f"text_precision_{name}": (found.precision, "higher", TOLERANCE),
        f"text_recall_{name}": (found.recall, "higher", TOLERANCE),
        f"text_action_precision_{name}": (acted.precision, None, 0.0),
        f"text_action_recall_{name}": (acted.recall, None, 0.0),
        f"text_average_precision_{name}": (
            average_precision(harmful, [verdict.score for verdict in verdicts]),
            "higher",
            TOLERANCE,
        ),
    }
