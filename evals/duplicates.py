"""`evals/duplicates`: pairs of near-duplicates against the groups of the golden set."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import pyarrow as pa

from evals.golden import Golden
from evals.metrics import Decisions, Pair, connected_pairs, pair_decisions, pairs_in_groups
from evals.pictures import bars
from evals.result import EvalResult, NotProcessedError, Reader, matched, rounded

TABLE = ("near_duplicates", "all")
"""Asset and key of the table of all groups."""
TOLERANCE = 0.02
FINDABLE_BITS = 12
"""Pairs whose stills come as near as this in some 64-bit hash are what a perceptual hash can find."""
DECIDED = ("exact", "perceptual")

ROWS = pa.schema(
    [
        ("file", pa.string()),
        ("other", pa.string()),
        ("true", pa.bool_()),
        ("found", pa.bool_()),
        ("methods", pa.list_(pa.string())),
        ("hash_bits", pa.int64()),
    ]
)


def evaluate_duplicates(golden: Golden, tables: Reader) -> EvalResult:
    """Precision and recall of duplicate pairs among the files with a stated group.

    A pair is found when exact and perceptual matches put both files into one group. `recall_findable`
    counts only true pairs whose perceptual hashes lie within FINDABLE_BITS. The figures `*_semantic` let
    semantic matches count too.
    """
    judged = [(item.file, item.copies.group) for item in golden.items if item.copies is not None]
    known = matched(golden, tables, [item for item in golden.items if item.copies is not None], TABLE[0])
    found = tables.rows(*TABLE)
    if found is None:
        raise NotProcessedError(
            "The table near_duplicates does not exist.",
            f"Process the golden media first: media-assets run {golden.media_folder}",
        )
    files = {media_id: file for file, media_id in known.items()}
    groups = dict(judged)
    truth = pairs_in_groups(groups)
    links = [(row["media_id"], row["other_id"], row["method"]) for row in found]
    made = _pairs(links, DECIDED, files)
    any_method = _pairs(links, (*DECIDED, "semantic"), files)
    bits = {pair: _hash_bits(tables, [known[file] for file in pair]) for pair in truth}
    findable = {pair for pair, distance in bits.items() if distance is not None and distance <= FINDABLE_BITS}
    decided = pair_decisions(truth, made, groups)
    loose = pair_decisions(truth, any_method, groups)
    figures = rounded(
        {
            "precision": (decided.precision, "higher", TOLERANCE),
            "recall": (decided.recall, "higher", TOLERANCE),
            "recall_findable": (pair_decisions(findable, made & findable, groups).recall, "higher", TOLERANCE),
            "findable_pairs": (len(findable), None, 0.0),
            "true_pairs": (len(truth), None, 0.0),
            "precision_semantic": (loose.precision, None, 0.0),
            "recall_semantic": (loose.recall, None, 0.0),
        }
    )
    rows = [
        _row(pair, truth, made, _methods(pair, links, files), bits.get(pair))
        for pair in sorted(truth | (made & _all(groups)), key=sorted)
    ]
    return EvalResult(
        "duplicates",
        golden.name,
        golden.digest,
        "+".join(sorted({method for _, _, method in links})) or "none",
        figures,
        pa.Table.from_pylist(rows, schema=ROWS),
        bars("Pairs", _counts(decided)),
    )


def _all(groups: Mapping[str, str | None]) -> set[Pair]:
    return pairs_in_groups(dict.fromkeys(groups, "all"))


def _pairs(links: Sequence[tuple[str, str, str]], methods: Collection[str], files: Mapping[str, str]) -> set[Pair]:
    """Pairs of golden files that a grouping by `methods` puts together; other media may lie between them."""
    joined = connected_pairs((one, other) for one, other, method in links if method in methods)
    return {frozenset(files[media_id] for media_id in pair) for pair in joined if pair <= files.keys()}


def _methods(pair: Pair, links: Sequence[tuple[str, str, str]], files: Mapping[str, str]) -> list[str]:
    return sorted({method for one, other, method in links if {files.get(one), files.get(other)} == pair})


def _hash_bits(tables: Reader, media_ids: Sequence[str]) -> int | None:
    """Smallest Hamming distance between stills of two items, of 64 bits; None where one has no stills."""
    one, other = (
        [int.from_bytes(row["phash"]) for row in tables.rows("frames", key, ["phash"]) or ()] for key in media_ids
    )
    return min(((a ^ b).bit_count() for a in one for b in other), default=None)


def _row(pair: Pair, truth: set[Pair], made: set[Pair], methods: list[str], bits: int | None) -> dict[str, Any]:
    file, other = sorted(pair)
    return {
        "file": file,
        "other": other,
        "true": pair in truth,
        "found": pair in made,
        "methods": methods,
        "hash_bits": bits,
    }


def _counts(decided: Decisions) -> list[tuple[str, float]]:
    return [
        ("found", float(decided.true_positive)),
        ("false", float(decided.false_positive)),
        ("missed", float(decided.false_negative)),
    ]
