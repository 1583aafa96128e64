"""`evals/asr`: transcripts against what was said."""

from __future__ import annotations

import pyarrow as pa

from evals.golden import Golden, Speech
from evals.metrics import (
    Errors,
    hallucination_rate,
    normalise_speech,
    spoken_character_errors,
    total,
    word_count,
    word_errors,
)
from evals.pictures import bars
from evals.result import Draft, EvalResult, Reader, models_of, read_all, rounded

WER_TOLERANCE = 0.02
HALLUCINATION_TOLERANCE = 0.0
UNSPACED = frozenset({"ja", "zh", "th", "lo", "my", "km"})
"""Languages written without spaces: measured in characters."""

ROWS = pa.schema(
    [
        ("file", pa.string()),
        ("language", pa.string()),
        ("unit", pa.string()),
        ("edits", pa.int64()),
        ("length", pa.int64()),
        ("error_rate", pa.float64()),
        ("reference", pa.string()),
        ("hypothesis", pa.string()),
        ("processed", pa.bool_()),
    ]
)


def evaluate_asr(golden: Golden, tables: Reader) -> EvalResult:
    """Word error rate per language (characters where none are spaced) and words heard where nothing is said.

    An item without a transcript table counts as a transcript without words.
    """
    wanted = [(item, item.speech) for item in golden.items if item.speech is not None]
    transcripts = read_all(golden, tables, [item for item, _ in wanted], "transcript")
    rows: list[dict[str, object]] = []
    spoken: dict[str, list[Errors]] = {}
    silent: list[int] = []
    for item, truth in wanted:
        found = transcripts[item.file]
        said = " ".join(row["text"] for row in sorted(found or (), key=lambda row: row["segment"]))
        unit, errors = measure(truth, said)
        if truth.speech:
            spoken.setdefault(truth.language or "unknown", []).append(errors)
        elif found is not None:
            silent.append(word_count(said))
        rows.append(
            {
                "file": item.file,
                "language": truth.language,
                "unit": unit,
                "edits": errors.edits,
                "length": errors.length,
                "error_rate": errors.rate,
                "reference": normalise_speech(truth.transcript),
                "hypothesis": normalise_speech(said),
                "processed": found is not None,
            }
        )
    figures: Draft = {
        f"{'cer' if language in UNSPACED else 'wer'}_{language}": (total(errors).rate, "lower", WER_TOLERANCE)
        for language, errors in sorted(spoken.items())
    }
    figures["hallucination_rate"] = (hallucination_rate(silent), "lower", HALLUCINATION_TOLERANCE)
    figures["unprocessed"] = (sum(not row["processed"] for row in rows), "lower", 0.0)
    picture = bars("Error rate per clip", [(str(row["file"]), float(str(row["error_rate"]))) for row in rows])
    return EvalResult(
        "asr",
        golden.name,
        golden.digest,
        models_of(transcripts),
        rounded(figures),
        pa.Table.from_pylist(rows, schema=ROWS),
        picture,
    )


def measure(truth: Speech, said: str) -> tuple[str, Errors]:
    """The unit that suits the language (word or character), and the errors."""
    if truth.language in UNSPACED:
        return "character", spoken_character_errors(truth.transcript, said)
    return "word", word_errors(truth.transcript, said)
