"""Index shards: one FAISS shard per bucket and embedding space, built beside the old one, checked, then swapped in.

    <root>/index/<bucket>/CURRENT                   {"build": ..., "previous": ...}: replacing it is the swap
    <root>/index/<bucket>/<build>/manifest.json     what is in the build
    <root>/index/<bucket>/<build>/<space>.faiss     the vectors; ids are row numbers of
    <root>/index/<bucket>/<build>/<space>.parquet   media_id, unit, ordinal, start_s, end_s, version, model

A build's name is a digest of what goes into it, so building again without a change does nothing. Whatever dies before
the swap leaves the old shard serving; the previous build is kept for readers that are still on it.
Vectors are unit-normalised, so inner product is cosine similarity.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from upath import UPath

from media_assets.library.buckets import exclusive, key
from media_assets.library.catalog import Live, Skipped, content_digest, read_items
from resources.errors import MediaError
from resources.faults import fault
from resources.files.catalog_files import arrow_path, filesystem, is_local, publishing
from resources.files.derived import COMPRESSION, DerivedStore

INDEX, CURRENT, MANIFEST = "index", "CURRENT", "manifest.json"
JOINT, VISUAL = "joint", "visual"
TEXT_UNITS = frozenset({"transcript", "ocr_text"})
RECALL_AT = 10
RECALL_SAMPLE = 100
FORMAT = 1
_OPEN_ATTEMPTS = 3
_TIE = 1e-5

Vectors = NDArray[np.float32]
"""float32 [n, d], rows of unit length."""

ROWS = pa.schema(
    [
        pa.field("media_id", pa.string(), nullable=False),
        pa.field("unit", pa.string(), nullable=False),
        pa.field("ordinal", pa.int32(), nullable=False),
        pa.field("start_s", pa.float64(), nullable=False),
        pa.field("end_s", pa.float64(), nullable=False),
        pa.field("version", pa.string(), nullable=False),
        pa.field("model", pa.string(), nullable=False),
    ]
)
"""Sidecar of a shard, in the order of its vectors: pictures first, then texts, each by media ID."""


class ShardRejected(MediaError):
    """A new shard found too few of the true neighbours; the old one keeps serving."""

    code, http_status = "shard_rejected", 500
    remedy = "Lower index.min_recall, or use more buckets so that shards become small enough for exact search."


class ShardUnreadable(MediaError):
    """A shard that is current cannot be opened."""

    code, retryable, http_status = "shard_unreadable", True, 503
    remedy = "Materialize index_shard for this bucket again."


@dataclass(frozen=True, slots=True)
class Rule:
    """Which FAISS index a shard of n vectors gets.

    Up to `flat_max`: `Flat`, exact, a few milliseconds per query. Up to `hnsw_max`: `HNSW<links>` (Malkov & Yashunin,
    2016), memory 4*d + 8*links bytes per vector. Above: `IVF<4*sqrt(n)>,Flat`, built faster and searched by `nprobe`
    lists. The approximate ones are searched with the least effort that reaches the recall wanted.
    """

    flat_max: int = 50_000
    hnsw_max: int = 1_000_000
    hnsw_links: int = 32
    hnsw_construction: int = 80

    def factory(self, count: int) -> str:
        """FAISS factory string for `count` vectors."""
        if count <= self.flat_max:
            return "Flat"
        if count <= self.hnsw_max:
            return f"HNSW{self.hnsw_links}"
        return f"IVF{int(4 * math.sqrt(count))},Flat"


@dataclass(frozen=True, slots=True)
class SpaceReport:
    """One shard of a build: `effort` is efSearch or nprobe (0 for Flat), `stale_items` have another model's vectors."""

    vectors: int
    pictures: int
    dimension: int
    model: str
    factory: str
    effort: int
    recall: float
    items: int
    stale_items: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class BuildReport:
    """What one build did. `swapped` is false when the bucket was already up to date."""

    bucket: int
    build: str
    swapped: bool
    spaces: Mapping[str, SpaceReport]
    skipped: tuple[Skipped, ...] = ()


@dataclass
class _Gathered:
    """Vectors and rows of one space and model, in the order read."""

    vectors: list[Vectors] = field(default_factory=list)
    rows: list[pa.Table] = field(default_factory=list)
    items: set[str] = field(default_factory=set)

    @property
    def count(self) -> int:
        return sum(len(part) for part in self.vectors)


def build(
    store: DerivedStore,
    bucket: int,
    live: Live,
    min_recall: float,
    champion: str | None = None,
    rule: Rule | None = None,
) -> BuildReport:
    """Build, check and swap in the shards of one bucket.

    Args:
        store: where the tables are.
        bucket: number of the bucket.
        live: version of every item of the bucket whose `embeddings` are `ok`; all others leave the index.
        min_recall: recall@10 against exact search that a shard must reach on a sample of its own vectors, 0-1.
        champion: identity of the current embedding model. Vectors of different models are not comparable: a bucket that
            holds several keeps the model most of its items have (the champion on a tie) and reports the rest as stale.
        rule: which FAISS index by size.

    Memory holds the bucket's vectors twice. Raises ShardRejected, BucketBusy, CatalogUnreadable, OSError.
    """
    rule = rule or Rule()
    name = content_digest(live, "index", FORMAT, champion, min_recall, *asdict(rule).items())
    with exclusive(store, f"index-{key(bucket)}"):
        serving = _pointer(store, bucket)
        if report := _serving(store, bucket, name, serving):
            return report
        gathered, skipped = _gather(store, bucket, live)
        if skipped:
            # Their content is not in it, so the name must differ from that of the complete build.
            name = content_digest(live, name, *sorted(item.media_id for item in skipped))
            if report := _serving(store, bucket, name, serving):
                return report
        report = _write(store, bucket, name, gathered, skipped, min_recall, champion, rule)
        fault("index.before_swap")
        _swap(store, bucket, name, serving)
        fault("index.after_swap")
        _collect(store, bucket)
        return report


def _folder(store: DerivedStore, bucket: int) -> UPath:
    return store.root / INDEX / key(bucket)


def _pointer(store: DerivedStore, bucket: int) -> dict[str, str | None]:
    """What CURRENT says; empty when no shard serves yet."""
    path = _folder(store, bucket) / CURRENT
    try:
        found = json.loads(path.read_bytes())
        return {"build": str(found["build"]), "previous": found.get("previous")}
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ShardUnreadable(f"{path} is damaged.", "Delete it, then materialize index_shard again.") from error


def _serving(store: DerivedStore, bucket: int, name: str, serving: Mapping[str, str | None]) -> BuildReport | None:
    """The report of the build that serves, if it is `name` and whole."""
    if serving.get("build") != name:
        return None
    try:
        shards = open_bucket(store, bucket)
    except ShardUnreadable:
        return None
    return _report(bucket, name, shards.manifest, swapped=False) if shards else None


def _report(bucket: int, name: str, manifest: Mapping[str, Any], swapped: bool) -> BuildReport:
    spaces = {
        space: SpaceReport(**{**entry, "stale_items": tuple(entry["stale_items"])})
        for space, entry in manifest["spaces"].items()
    }
    return BuildReport(bucket, name, swapped, spaces, tuple(Skipped(**entry) for entry in manifest["skipped"]))


def _gather(store: DerivedStore, bucket: int, live: Live) -> tuple[dict[tuple[str, str], _Gathered], list[Skipped]]:
    """Vectors and rows by (space, model), and the items that could not be read."""
    found: dict[tuple[str, str, int], _Gathered] = {}
    bad: list[Skipped] = []
    source, items = read_items(store, bucket, "embeddings", live)
    for media_id, table in items:
        groups = _groups(table)
        try:
            parts = {group: _vectors(table.filter(mask)) for group, mask in groups.items()}
        except ValueError as error:
            bad.append(Skipped(media_id, f"{error}; materialize its embeddings again"))
            continue
        for group, vectors in parts.items():
            entry = found.setdefault((*group, vectors.shape[1]), _Gathered())
            entry.vectors.append(vectors)
            entry.rows.append(table.filter(groups[group]).select(ROWS.names).cast(ROWS))
            entry.items.add(media_id)
    kept: dict[tuple[str, str], _Gathered] = {}
    for (space, model, dimension), entry in sorted(found.items(), key=lambda pair: -len(pair[1].items)):
        if (space, model) not in kept:
            kept[space, model] = entry
            continue
        reason = f"its {space} vectors have {dimension} dimensions, unlike most of {model}"
        bad.extend(Skipped(media_id, reason) for media_id in sorted(entry.items))
    return kept, [*source.skipped, *bad]


def _groups(table: pa.Table) -> dict[tuple[str, str], pa.Array]:
    pairs = list(zip(table["space"].to_pylist(), table["model"].to_pylist(), strict=True))
    return {pair: pa.array([pair == other for other in pairs]) for pair in dict.fromkeys(pairs)}


def _vectors(table: pa.Table) -> Vectors:
    """The `vector` column as float32 [n, d]. Raises ValueError: lengths differ, not finite, not of unit length."""
    column = table["vector"].combine_chunks()
    values = column.flatten().to_numpy(zero_copy_only=False).astype(np.float32, copy=False)
    if not len(values) or len(values) % table.num_rows or column.null_count:
        raise ValueError("its vectors are not all of one length")
    vectors: Vectors = np.ascontiguousarray(values.reshape(table.num_rows, -1))
    widths = np.diff(column.offsets.to_numpy())
    if (widths != vectors.shape[1]).any():
        raise ValueError("its vectors are not all of one length")
    norms = np.linalg.norm(vectors, axis=1)
    if not np.isfinite(norms).all() or (np.abs(norms - 1) > 1e-2).any():
        raise ValueError("its vectors are not of unit length")
    return vectors


def _write(
    store: DerivedStore,
    bucket: int,
    name: str,
    gathered: Mapping[tuple[str, str], _Gathered],
    skipped: Sequence[Skipped],
    min_recall: float,
    champion: str | None,
    rule: Rule,
) -> BuildReport:
    """Write the build's folder, manifest last, and check what was written. Nothing points to it yet."""
    folder = _folder(store, bucket) / name
    spaces: dict[str, dict[str, Any]] = {}
    for space in sorted({space for space, _ in gathered}):
        model = _model(space, gathered, champion)
        stale = set().union(*(e.items for (s, m), e in gathered.items() if s == space and m != model))
        spaces[space] = {
            **_write_space(store, folder, space, gathered[space, model], min_recall, rule),
            "model": model,
            "stale_items": sorted(stale),
        }
    manifest = {
        "format": FORMAT,
        "build": name,
        "bucket": bucket,
        "spaces": spaces,
        "skipped": [asdict(item) for item in skipped],
    }
    fault("index.before_manifest")
    store.write_bytes(folder / MANIFEST, json.dumps(manifest, indent=1).encode())
    return _report(bucket, name, manifest, swapped=True)


def _model(space: str, gathered: Mapping[tuple[str, str], _Gathered], champion: str | None) -> str:
    votes = {model: len(entry.items) for (found, model), entry in gathered.items() if found == space}
    return max(votes, key=lambda model: (votes[model], model == champion, model))


def _write_space(
    store: DerivedStore, folder: UPath, space: str, gathered: _Gathered, min_recall: float, rule: Rule
) -> dict[str, Any]:
    rows = pa.concat_tables(gathered.rows)
    is_text = np.isin(rows["unit"].to_numpy(zero_copy_only=False).astype(str), list(TEXT_UNITS))
    order = np.argsort(is_text, kind="stable")
    rows, vectors = rows.take(order), np.concatenate(gathered.vectors)[order]
    with publishing(store, folder / f"{space}.parquet") as temporary:
        pq.write_table(rows, temporary, compression=COMPRESSION)
    factory = rule.factory(len(vectors))
    with publishing(store, folder / f"{space}.faiss") as temporary:
        _build_index(vectors, factory, rule, temporary)
    fault("index.after_space")
    effort, recall = _tune(_read_index(store, folder / f"{space}.faiss"), vectors, factory, min_recall)
    if recall < min_recall:
        raise ShardRejected(
            f"The new {space} shard in {folder} has recall@{RECALL_AT} {recall:.3f}, below {min_recall} ({factory})."
        )
    return {
        "vectors": len(vectors),
        "pictures": int(len(vectors) - is_text.sum()),
        "dimension": int(vectors.shape[1]),
        "factory": factory,
        "effort": effort,
        "recall": recall,
        "items": len(gathered.items),
    }


def _faiss() -> Any:
    """FAISS, untyped and imported on first use: its stubs lack the classes used here."""
    import faiss

    return faiss


def _build_index(vectors: Vectors, factory: str, rule: Rule, target: Path) -> None:
    index = _faiss().index_factory(vectors.shape[1], factory, _faiss().METRIC_INNER_PRODUCT)
    if factory.startswith("HNSW"):
        index.hnsw.efConstruction = rule.hnsw_construction
    if not index.is_trained:
        lists = index.nlist
        step = max(1, len(vectors) // (lists * 64))
        index.train(vectors[::step])
    index.add(vectors)
    _faiss().write_index(index, str(target))


def _read_index(store: DerivedStore, path: UPath) -> Any:
    """The FAISS index at `path`: memory-mapped from a folder, read whole from an object store."""
    if is_local(store):
        return _faiss().read_index(str(path), _faiss().IO_FLAG_MMAP_IFC)
    return _faiss().deserialize_index(np.frombuffer(path.read_bytes(), np.uint8))


def _efforts(index: Any, factory: str) -> tuple[int, ...]:
    if factory.startswith("HNSW"):
        return (32, 64, 128, 256, 512)
    if factory.startswith("IVF"):
        return tuple(min(2**power, index.nlist) for power in range(3, max(4, index.nlist.bit_length() + 1)))
    return (0,)


def _tune(index: Any, vectors: Vectors, factory: str, min_recall: float) -> tuple[int, float]:
    """The least search effort that reaches `min_recall`, and the recall@10 reached (the best there is, if none does).

    A neighbour counts as found when what was found in its place is as near, so equal vectors are no loss.
    """
    step = max(1, len(vectors) // RECALL_SAMPLE)
    sample = vectors[::step][:RECALL_SAMPLE]
    count = min(RECALL_AT, len(vectors))
    exact = _exact_scores(sample, vectors, count)
    effort, recall = 0, 0.0
    for effort in _efforts(index, factory):
        _, ids = index.search(sample, count, params=_parameters(factory, effort))
        true = np.where(ids >= 0, np.einsum("qd,qkd->qk", sample, vectors[np.maximum(ids, 0)]), -np.inf)
        recall = float((true >= exact[:, -1:] - _TIE).mean())
        if recall >= min_recall:
            break
    return effort, recall


def _exact_scores(queries: Vectors, vectors: Vectors, count: int) -> Vectors:
    """Inner products of each query's `count` nearest vectors, best first: float32 [q, count]."""
    best = np.full((len(queries), count), -np.inf, np.float32)
    for start in range(0, len(vectors), 65_536):
        scores = queries @ vectors[start : start + 65_536].T
        best = np.sort(np.concatenate([best, scores], axis=1), axis=1)[:, : -count - 1 : -1]
    return best


def _parameters(factory: str, effort: int, selector: Any = None) -> Any:
    if factory.startswith("HNSW"):
        return _faiss().SearchParametersHNSW(sel=selector, efSearch=effort)
    if factory.startswith("IVF"):
        return _faiss().SearchParametersIVF(sel=selector, nprobe=effort)
    return _faiss().SearchParameters(sel=selector)


def _swap(store: DerivedStore, bucket: int, name: str, serving: Mapping[str, str | None]) -> None:
    old = serving.get("build")
    previous = serving.get("previous") if old == name else old
    pointer = {"build": name, "previous": previous}
    store.write_bytes(_folder(store, bucket) / CURRENT, json.dumps(pointer).encode())


def forget_previous(store: DerivedStore, bucket: int) -> int:
    """Delete every build of a bucket but the one that serves, and what writers left; returns how many builds.

    Until the next change the bucket cannot be rolled back. Raises BucketBusy, ShardUnreadable, OSError.
    """
    folder = _folder(store, bucket)
    with exclusive(store, f"index-{key(bucket)}"):
        before = sum(path.is_dir() for path in folder.iterdir())
        if serving := _pointer(store, bucket):
            pointer = {"build": serving["build"], "previous": None}
            store.write_bytes(folder / CURRENT, json.dumps(pointer).encode())
        _collect(store, bucket)
        for path in [*folder.glob(".*"), *folder.glob("*/.*")]:
            path.unlink(missing_ok=True)
        return before - sum(path.is_dir() for path in folder.iterdir())


def _collect(store: DerivedStore, bucket: int) -> None:
    """Delete builds that neither serve nor served before."""
    folder = _folder(store, bucket)
    kept = set(_pointer(store, bucket).values())
    for path in list(folder.iterdir()):
        if path.is_dir() and path.name not in kept:
            if is_local(store):
                shutil.rmtree(str(path), ignore_errors=True)
            else:
                path.fs.rm(path.path, recursive=True)


@dataclass(frozen=True)
class Shard:
    """One space of one bucket, ready to search. Safe to search from several threads."""

    bucket: int
    report: SpaceReport
    rows: pa.Table
    index: Any

    def search(
        self, queries: Vectors, limit: int, units: Literal["all", "pictures", "texts"] = "all"
    ) -> list[tuple[list[int], list[float]]]:
        """Per query the row numbers of the nearest vectors and their cosine similarities, best first.

        Args:
            queries: float32 [q, d], unit length.
            limit: at most so many per query.
            units: restrict to rows of pictures (image, frame, shot) or texts (transcript, ocr_text).
        """
        first, last = {
            "all": (0, self.report.vectors),
            "pictures": (0, self.report.pictures),
            "texts": (self.report.pictures, self.report.vectors),
        }[units]
        limit = min(limit, last - first)
        if limit <= 0:
            return [([], [])] * len(queries)
        selector = None if units == "all" else _faiss().IDSelectorRange(first, last)
        effort = max(self.report.effort, limit) if self.report.factory.startswith("HNSW") else self.report.effort
        parameters = _parameters(self.report.factory, effort, selector)
        scores, ids = self.index.search(np.ascontiguousarray(queries, np.float32), limit, params=parameters)
        return [
            (
                [int(row) for row in line if row >= 0],
                [float(s) for s, row in zip(values, line, strict=True) if row >= 0],
            )
            for line, values in zip(ids, scores, strict=True)
        ]

    def at(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        """Sidecar rows (schema ROWS) by row number."""
        rows: list[dict[str, Any]] = self.rows.take(pa.array(numbers, pa.int64())).to_pylist()
        return rows


@dataclass(frozen=True)
class BucketShards:
    """The shards of the build that serves a bucket, by space."""

    bucket: int
    build: str
    manifest: Mapping[str, Any]
    spaces: Mapping[str, Shard]


def indexed_buckets(store: DerivedStore) -> list[int]:
    """Buckets that have a folder in the index, in order."""
    folder = store.root / INDEX
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit()) if folder.exists() else []


def current_build(store: DerivedStore, bucket: int) -> str | None:
    """Name of the build that serves a bucket; one small read."""
    return _pointer(store, bucket).get("build")


def open_bucket(store: DerivedStore, bucket: int) -> BucketShards | None:
    """The shards that serve a bucket, None when none was built. They stay usable after later swaps.

    Raises ShardUnreadable when files are missing or damaged.
    """
    cause: Exception | None = None
    for _ in range(_OPEN_ATTEMPTS):
        name = current_build(store, bucket)
        if name is None:
            return None
        try:
            return _open_build(store, bucket, name)
        except (OSError, RuntimeError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
            # Two swaps may have passed since CURRENT was read, and the build been collected: look again.
            cause = error
    raise ShardUnreadable(f"Build {name} of index bucket {key(bucket)} is incomplete or damaged.") from cause


def _open_build(store: DerivedStore, bucket: int, name: str) -> BucketShards:
    folder = _folder(store, bucket) / name
    manifest = json.loads((folder / MANIFEST).read_bytes())
    spaces: dict[str, Shard] = {}
    for space, report in _report(bucket, name, manifest, swapped=True).spaces.items():
        path = arrow_path(folder / f"{space}.parquet")
        rows = pq.ParquetFile(path, filesystem=filesystem(store)).read()
        index = _read_index(store, folder / f"{space}.faiss")
        if not index.ntotal == rows.num_rows == report.vectors:
            raise ValueError(f"{space}: {index.ntotal} vectors, {rows.num_rows} rows, {report.vectors} in the manifest")
        spaces[space] = Shard(bucket, report, rows, index)
    return BucketShards(bucket, name, manifest, spaces)
