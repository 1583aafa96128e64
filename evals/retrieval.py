"""`evals/retrieval`: pictures found by their label or caption."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from evals.golden import Golden
from evals.metrics import first_hit, recall_at
from evals.pictures import bars
from evals.result import Draft, EvalResult, NotProcessedError, Reader, Vectors, matched, rounded

RECALL_TOLERANCE = 0.03
SHOWN = 5

ROWS = pa.schema(
    [
        ("query", pa.string()),
        ("slice", pa.string()),
        ("files", pa.list_(pa.string())),
        ("rank", pa.int64()),
        ("best", pa.list_(pa.string())),
    ]
)


@dataclass(frozen=True, slots=True)
class Query:
    """A text, the files that answer it, and its slice: labels, labels_doubtful or captions."""

    text: str
    slice: str
    files: frozenset[str]


def evaluate_retrieval(golden: Golden, tables: Reader) -> EvalResult:
    """Recall@1 and @5 of text queries over the golden pictures, per slice.

    The gallery is every golden picture with a subject; a label is answered by any picture that carries
    it. A picture without a vector can not be found. Raises NotProcessedError when the vectors come from
    another model than the query encoder.
    """
    if tables.encoder is None:
        raise NotProcessedError("Retrieval needs the text encoder of the joint embedding.", "Pass one with the reader.")
    wanted = [item for item in golden.items if item.subject is not None]
    known = matched(golden, tables, wanted, "embeddings")
    vectors: dict[str, Vectors] = {}
    for item in wanted:
        rows = tables.rows("embeddings", known[item.file], ["unit", "space", "vector", "model"]) or []
        for row in rows:
            if row["unit"] == "image" and row["space"] == "joint":
                _check_model(row["model"], tables.encoder.identity, golden)
                vectors[item.file] = np.asarray(row["vector"], np.float32)
    if not vectors:
        raise NotProcessedError(
            "No golden picture has a joint vector.",
            f"Process the golden media first: media-assets run {golden.media_folder}",
        )
    queries = list(queries_of(golden))
    gallery = list(vectors)
    encoded = tables.encoder.encode_texts([query.text for query in queries])
    scores = encoded @ np.stack([vectors[file] for file in gallery]).T
    rankings = [[gallery[index] for index in np.argsort(-row, kind="stable")] for row in scores]
    ranks = [first_hit(ranking, query.files) for query, ranking in zip(queries, rankings, strict=True)]
    rows = [
        {
            "query": query.text,
            "slice": query.slice,
            "files": sorted(query.files),
            "rank": rank,
            "best": ranking[:SHOWN],
        }
        for query, ranking, rank in zip(queries, rankings, ranks, strict=True)
    ]
    figures: Draft = {
        f"recall@{k}_{name}": (
            recall_at([rank for query, rank in zip(queries, ranks, strict=True) if query.slice == name], k),
            "higher" if name != "labels_doubtful" else None,
            RECALL_TOLERANCE,
        )
        for name in ("labels", "labels_doubtful", "captions")
        for k in (1, 5)
    }
    figures["unprocessed"] = (len(wanted) - len(vectors), "lower", 0.0)
    return EvalResult(
        "retrieval",
        golden.name,
        golden.digest,
        tables.encoder.identity,
        rounded(figures),
        pa.Table.from_pylist(rows, schema=ROWS),
        bars(
            "Rank of the first right picture",
            [(q.text, float(r or len(gallery))) for q, r in zip(queries, ranks, strict=True)],
        ),
    )


def queries_of(golden: Golden) -> Iterator[Query]:
    """One query per distinct label and per caption."""
    labels: dict[str, set[str]] = {}
    doubtful: set[str] = set()
    for item in golden.items:
        if item.subject is not None and item.subject.label:
            labels.setdefault(item.subject.label, set()).add(item.file)
            if item.subject.doubtful:
                doubtful.add(item.subject.label)
    for label, files in labels.items():
        yield Query(label, "labels_doubtful" if label in doubtful else "labels", frozenset(files))
    for item in golden.items:
        for caption in item.subject.captions if item.subject is not None else ():
            yield Query(caption, "captions", frozenset({item.file}))


def _check_model(found: str, encoder: str, golden: Golden) -> None:
    if found != encoder:
        raise NotProcessedError(
            f"The golden pictures were embedded by {found}, queries are encoded by {encoder}.",
            f"Process the golden media with the present model: media-assets run {golden.media_folder}",
        )
