"""What an evaluation reads and what it returns."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from evals.golden import Golden, GoldenItem, Item
from resources.errors import MediaError, printable
from resources.files.local import replacing

Better = Literal["higher", "lower"]
METADATA_KEY = b"media_assets.eval"
Vectors = npt.NDArray[np.float32]
Draft = dict[str, tuple[float | None, Better | None, float]]
"""Figures under construction: value (None: undefined), direction, tolerance."""


class NotProcessedError(MediaError):
    """What an evaluation needs has not been computed yet."""

    code, retryable, http_status = "golden_not_processed", True, 409
    remedy = "Process the golden media first: media-assets run <golden folder>"


class TableStore(Protocol):
    """Where derived tables are read from; `resources.files.derived.DerivedStore` is one."""

    def read(self, asset: str, media_id: str, side: str = "", columns: list[str] | None = None) -> pa.Table:
        """The stored table. Raises FileNotFoundError when there is none."""
        ...


class TextEncoder(Protocol):
    """The text side of the joint embedding."""

    @property
    def identity(self) -> str:
        """Identity of the model, as in the `model` column of `embeddings`."""
        ...

    def encode_texts(self, texts: Sequence[str]) -> Vectors:
        """float32 [n, d], unit length."""
        ...


@dataclass(frozen=True, slots=True)
class Verdict:
    """What moderation says about one text: labels it finds, whether it asks for action, the strongest score 0-1."""

    labels: frozenset[str]
    actioned: bool
    score: float


class TextModerator(Protocol):
    """Moderation of a text on its own, as the graph moderates it."""

    @property
    def identity(self) -> str:
        """Identity of the model and of the policy."""
        ...

    def judge(self, texts: Sequence[str]) -> list[Verdict]:
        """A verdict per text, in order."""
        ...


@dataclass(frozen=True)
class Reader:
    """Derived tables of registered media, and the models that answer a query or judge a text of the golden set."""

    store: TableStore
    library: Sequence[Item]
    encoder: TextEncoder | None = None
    moderator: TextModerator | None = None

    def rows(self, asset: str, media_id: str, columns: list[str] | None = None) -> list[dict[str, Any]] | None:
        """Rows of a table; None when the asset has no table for the item."""
        try:
            found: list[dict[str, Any]] = self.store.read(asset, media_id, "", columns).to_pylist()
        except FileNotFoundError:
            return None
        return found


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure; `better` says which way is good (None: informative), `tolerance` how much worse it may get."""

    value: float
    better: Better | None = None
    tolerance: float = 0.0


@dataclass(frozen=True)
class EvalResult:
    """One evaluation of one golden set: figures, a row per item, a picture (PNG) and the models that were measured."""

    name: str
    golden: str
    golden_digest: str
    model: str
    figures: Mapping[str, Figure]
    rows: pa.Table
    picture: bytes = field(default=b"", repr=False)

    def write(self, home: Path) -> Path:
        """Write the rows, with the figures in the file's metadata, to `<home>/evals/<name>/<model>.parquet`."""
        path = folder(home, self.name) / f"{safe_name(self.model)}.parquet"
        facts = {
            "golden": self.golden,
            "golden_digest": self.golden_digest,
            "model": self.model,
            "figures": {name: [f.value, f.better, f.tolerance] for name, f in self.figures.items()},
        }
        metadata = {**(self.rows.schema.metadata or {}), METADATA_KEY: json.dumps(facts).encode()}
        sink = pa.BufferOutputStream()
        pq.write_table(self.rows.replace_schema_metadata(metadata), sink)
        with replacing(path) as temporary:
            temporary.write_bytes(sink.getvalue())
        return path

    @classmethod
    def read(cls, path: Path) -> Self:
        """What `write` stored, without the picture. Raises FileNotFoundError, ValueError."""
        rows = pq.read_table(str(path), partitioning=None)
        content = (rows.schema.metadata or {}).get(METADATA_KEY)
        if content is None:
            raise ValueError(f"{path} was not written by an evaluation")
        facts = json.loads(content)
        figures = {name: Figure(*values) for name, values in facts["figures"].items()}
        return cls(path.parent.name, facts["golden"], facts["golden_digest"], facts["model"], figures, rows)


def latest(home: Path, name: str) -> EvalResult | None:
    """The newest stored result of one evaluation."""
    paths = sorted(folder(home, name).glob("*.parquet"), key=lambda path: path.stat().st_mtime_ns)
    return EvalResult.read(paths[-1]) if paths else None


def folder(home: Path, name: str) -> Path:
    """Where the results of one evaluation lie."""
    return home / "evals" / name


def safe_name(model: str) -> str:
    """A model identity as a file name."""
    return re.sub(r"[^A-Za-z0-9._@+-]+", "_", model)[:180] or "none"


def rounded(figures: Draft) -> dict[str, Figure]:
    """Figures without those that are undefined (None), to six decimals."""
    return {
        name: Figure(round(value, 6), better, tolerance)
        for name, (value, better, tolerance) in figures.items()
        if value is not None and math.isfinite(value)
    }


def matched(golden: Golden, tables: Reader, wanted: Sequence[GoldenItem], asset: str) -> dict[str, str]:
    """Media ID of each wanted golden file. Raises NotProcessedError naming how many are unknown, and the command."""
    remedy = f"Process the golden media first: media-assets run {golden.media_folder}"
    if not wanted:
        raise NotProcessedError(
            f"The golden set {golden.name} holds no truth for {asset}.", "Add some (docs/evals.md) or use another set."
        )
    known = golden.match(tables.library)
    missing = [item.file for item in wanted if item.file not in known]
    if missing:
        raise NotProcessedError(
            f"{len(missing)} of {len(wanted)} golden files that {asset} needs are not registered, "
            f"such as {printable(missing[0], 80)}.",
            remedy,
        )
    return {item.file: known[item.file] for item in wanted}


def read_all(
    golden: Golden, tables: Reader, wanted: Sequence[GoldenItem], asset: str, columns: list[str] | None = None
) -> dict[str, list[dict[str, Any]] | None]:
    """Rows of `asset` for each wanted file; None where the file has no table (its processing failed).

    Raises NotProcessedError when a file is not registered, or no file has the table.
    """
    known = matched(golden, tables, wanted, asset)
    rows = {file: tables.rows(asset, media_id, columns) for file, media_id in known.items()}
    if all(found is None for found in rows.values()):
        raise NotProcessedError(
            f"No golden file of {golden.name} has a table of {asset}.",
            f"Process the golden media first: media-assets run {golden.media_folder}",
        )
    return rows


def models_of(rows: Mapping[str, list[dict[str, Any]] | None]) -> str:
    """Identities in the `model` columns, joined; `none` where there is no row."""
    names = {row["model"] for found in rows.values() for row in found or () if row.get("model")}
    return "+".join(sorted(names)) or "none"
