"""Purging from evaluations: results whose rows quote a golden file that is to be forgotten."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from evals.golden import GoldenSetError, Item, golden_of
from resources.library import Library


def golden_files(library: Library, items: Sequence[Item]) -> set[str] | None:
    """Files of the configured golden set that are these items, by path or by content; None if it cannot be read."""
    try:
        return set(golden_of(library.settings).match(items))
    except GoldenSetError:
        return None


def forget(home: Path, files: Collection[str] | None, uris: Collection[str]) -> list[str]:
    """Delete stored results that name one of `files`, or a file some URI ends in; returns the evaluations' names.

    With None for `files` nobody knows which results quote them, and all are deleted.
    Baselines hold figures alone and stay. The evaluations can be materialized again at any time.
    """
    dropped: set[str] = set()
    for path in sorted((home / "evals").glob("*/*.parquet")) + sorted((home / "evals").glob("*/.*.part")):
        if files is None or path.suffix == ".part" or _names(path, set(files), uris):
            path.unlink(missing_ok=True)
            dropped.add(path.parent.name)
    return sorted(dropped)


def _names(path: Path, files: set[str], uris: Collection[str]) -> bool:
    rows = pq.read_table(str(path), partitioning=None)
    texts = {text for column in rows.columns for text in _texts(column)}
    return bool(texts & files) or any(uri.endswith(f"/{text}") for text in texts if text for uri in uris)


def _texts(column: pa.ChunkedArray) -> Iterator[str]:
    """Texts of a column, and of its lists."""
    if pa.types.is_list(column.type):
        column = column.combine_chunks().flatten()
    if pa.types.is_string(column.type):
        found: Any = column.unique().to_pylist()
        yield from (text for text in found if text)
