"""The catalog: per-media Parquet files compacted into one file per asset and bucket, for SQL and search.

A hundred thousand small files take minutes to query, a few large ones milliseconds. Compaction is incremental: rows of
items that did not change are taken from the previous catalog file, only new ones are read from their own files.
"""

from __future__ import annotations

import hashlib
import heapq
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from operator import itemgetter
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from media_assets import schemas
from media_assets.library.buckets import exclusive, key
from resources.errors import MediaError, printable
from resources.faults import fault
from resources.files.blobs import lean
from resources.files.catalog_files import (
    ITEMS,
    arrow_path,
    data_path,
    filesystem,
    items_path,
    manifest_path,
    publishing,
)
from resources.files.derived import COMPRESSION, DerivedStore

ROW_GROUP_ROWS = 65_536
ROW_GROUP_BYTES = 32 * 2**20
_SCAN_ROWS = 8_192

Live = Mapping[str, str]
"""Version of every live item of one asset, by media ID."""


@dataclass(frozen=True, slots=True)
class Skipped:
    """An item that was left out, and why."""

    media_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class AssetReport:
    """What became of one asset of a bucket: `reused` items came from the previous catalog, `read` from their files."""

    items: int
    rows: int
    bytes: int
    reused: int = 0
    read: int = 0
    unchanged: bool = False
    skipped: tuple[Skipped, ...] = ()


@dataclass(frozen=True, slots=True)
class CatalogReport:
    """What one compaction did, by asset."""

    bucket: int
    assets: Mapping[str, AssetReport]

    @property
    def skipped(self) -> list[tuple[str, Skipped]]:
        """Items left out, each with its asset."""
        return [(asset, item) for asset, report in self.assets.items() for item in report.skipped]


def content_digest(live: Live, *context: object) -> str:
    """Digest (hex) of the (media_id, version) pairs and of anything else that shapes what is built from them."""
    digest = hashlib.blake2b(json.dumps([str(part) for part in context]).encode(), digest_size=10)
    for pair in sorted(live.items()):
        digest.update(json.dumps(pair).encode())
    return digest.hexdigest()


def compact(
    store: DerivedStore,
    bucket: int,
    live: Mapping[str, Live],
    assets: Sequence[str] = tuple(schemas.PER_MEDIA),
) -> CatalogReport:
    """Bring the bucket's catalog files up to the live items.

    Args:
        store: where the tables are.
        bucket: number of the bucket; `live` holds items of this bucket alone.
        live: per asset, the version of every item whose outcome is `ok`.
        assets: the assets to compact.

    An item whose file is missing, corrupt or of another version is reported and left out; it is tried again next time.
    A bucket whose items did not change is not touched. Memory holds one row group, whatever the size of the bucket.
    Raises BucketBusy, OSError (disk full, permissions).
    """
    with exclusive(store, f"catalog-{key(bucket)}"):
        return CatalogReport(
            bucket, {asset: _compact_asset(store, bucket, asset, live.get(asset, {})) for asset in assets}
        )


def _compact_asset(store: DerivedStore, bucket: int, asset: str, live: Live) -> AssetReport:
    schema = lean(asset, schemas.PER_MEDIA[asset])
    digest = content_digest(live, "catalog", asset, schema)
    manifest = _manifest(store, asset, bucket)
    if manifest.get("digest") == digest and not manifest.get("skipped"):
        return AssetReport(manifest["items"], manifest["rows"], manifest["bytes"], unchanged=True)
    try:
        return _write(store, bucket, asset, live, digest, reuse=True)
    except _CatalogCorrupt:
        return _write(store, bucket, asset, live, digest, reuse=False)


def _write(store: DerivedStore, bucket: int, asset: str, live: Live, digest: str, reuse: bool) -> AssetReport:
    source = Source(store, bucket, asset, live, reuse=reuse)
    counts: dict[str, int] = {}
    data = data_path(store, asset, bucket)
    with publishing(store, data) as temporary:
        with pq.ParquetWriter(temporary, source.schema, compression=COMPRESSION) as writer:
            for group in _row_groups(source.tables(), counts):
                writer.write_table(group, row_group_size=ROW_GROUP_ROWS)
        size = temporary.stat().st_size
        fault("catalog.before_swap")
        manifest_path(store, asset, bucket).unlink(missing_ok=True)
    fault("catalog.after_data")
    _write_items(store, bucket, asset, live, counts, source.skipped)
    fault("catalog.after_items")
    report = AssetReport(
        items=len(live) - len(source.skipped),
        rows=sum(counts.values()),
        bytes=size,
        reused=len(source.reused),
        read=len(live) - len(source.reused) - len(source.skipped),
        skipped=tuple(source.skipped),
    )
    manifest = {
        "asset": asset,
        "bucket": bucket,
        "digest": digest,
        "items": report.items,
        "rows": report.rows,
        "bytes": size,
        "skipped": len(report.skipped),
    }
    store.write_bytes(manifest_path(store, asset, bucket), json.dumps(manifest, indent=1).encode())
    return report


def _write_items(
    store: DerivedStore, bucket: int, asset: str, live: Live, counts: Mapping[str, int], skipped: Sequence[Skipped]
) -> None:
    problems = {item.media_id: item.reason for item in skipped}
    media_ids = sorted(live)
    table = pa.table(
        {
            "media_id": media_ids,
            "version": [live[media_id] for media_id in media_ids],
            "rows": [counts.get(media_id, 0) for media_id in media_ids],
            "problem": [problems.get(media_id) for media_id in media_ids],
        },
        schema=ITEMS,
    )
    with publishing(store, items_path(store, asset, bucket)) as temporary:
        pq.write_table(table, temporary, compression=COMPRESSION)


def _row_groups(tables: Iterator[tuple[str, pa.Table]], counts: dict[str, int]) -> Iterator[pa.Table]:
    """Tables of many items joined into row groups of bounded size; counts rows by media ID on the way."""
    pending: list[pa.Table] = []
    rows = size = 0
    for media_id, table in tables:
        counts[media_id] = table.num_rows
        if not table.num_rows:
            continue
        pending.append(table)
        rows, size = rows + table.num_rows, size + table.nbytes
        if rows >= ROW_GROUP_ROWS or size >= ROW_GROUP_BYTES:
            yield pa.concat_tables(pending).combine_chunks()
            pending, rows, size = [], 0, 0
    if pending:
        yield pa.concat_tables(pending).combine_chunks()


def _manifest(store: DerivedStore, asset: str, bucket: int) -> dict[str, Any]:
    try:
        found = json.loads(manifest_path(store, asset, bucket).read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


class _CatalogCorrupt(Exception):
    """The previous catalog file cannot be read; everything is read from the items' own files instead."""


@dataclass
class Source:
    """Live rows of one asset and bucket, item by item in the order of their IDs.

    Rows come from the catalog where it holds the live version of an item, else from the item's own file. After the
    iteration `skipped` names the items that could not be read.
    """

    store: DerivedStore
    bucket: int
    asset: str
    live: Live
    reuse: bool = True
    skipped: list[Skipped] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.schema = lean(self.asset, schemas.PER_MEDIA[self.asset])
        held = self._catalogued() if self.reuse else {}
        self.reused = {media_id for media_id, version in self.live.items() if held.get(media_id) == version}

    def tables(self) -> Iterator[tuple[str, pa.Table]]:
        """(media_id, rows) in the order of the IDs; catalogued items without rows are left out."""
        fresh = sorted(self.live.keys() - self.reused)
        return heapq.merge(self._from_catalog(), self._from_files(fresh), key=itemgetter(0))

    def _catalogued(self) -> dict[str, str]:
        if not _manifest(self.store, self.asset, self.bucket):
            return {}
        try:
            items = self._open(items_path).read()
            if self._open(data_path).schema_arrow.remove_metadata().equals(self.schema.remove_metadata()):
                good = items.filter(pc.is_null(items["problem"]))
                return dict(zip(good["media_id"].to_pylist(), good["version"].to_pylist(), strict=True))
        except (OSError, pa.ArrowException, KeyError):
            return {}
        return {}

    def _open(self, where: Any) -> pq.ParquetFile:
        path = arrow_path(where(self.store, self.asset, self.bucket))
        return pq.ParquetFile(path, filesystem=filesystem(self.store))

    def _from_catalog(self) -> Iterator[tuple[str, pa.Table]]:
        if not self.reused:
            return
        try:
            batches = self._open(data_path).iter_batches(batch_size=_SCAN_ROWS)
            for media_id, table in _by_item(batches):
                if media_id in self.reused:
                    yield media_id, table
        except (OSError, pa.ArrowException) as error:
            raise _CatalogCorrupt from error

    def _from_files(self, media_ids: Sequence[str]) -> Iterator[tuple[str, pa.Table]]:
        for media_id in media_ids:
            try:
                yield media_id, self._read(media_id)
            except FileNotFoundError:
                self.skipped.append(Skipped(media_id, "its file is missing; retry the item"))
            except (OSError, pa.ArrowException, KeyError, ValueError) as error:
                reason = f"its file cannot be read ({type(error).__name__}: {error}); retry the item"
                self.skipped.append(Skipped(media_id, printable(reason, 200)))

    def _read(self, media_id: str) -> pa.Table:
        path = arrow_path(self.store.path(self.asset, media_id))
        file = pq.ParquetFile(path, filesystem=filesystem(self.store))
        stored = file.read(columns=self.schema.names, use_threads=False)
        table = stored.select(self.schema.names).cast(self.schema)
        version = self.live[media_id]
        if table.num_rows and pc.unique(table["version"]).to_pylist() != [version]:
            raise ValueError(f"it holds another version than the recorded {version}")
        return table


def _by_item(batches: Iterator[pa.RecordBatch]) -> Iterator[tuple[str, pa.Table]]:
    """Runs of equal media IDs as one table each; an item's rows may span batches."""
    current: str | None = None
    parts: list[pa.Table] = []
    for batch in batches:
        runs = pc.run_end_encode(batch["media_id"])
        starts = [0, *runs.run_ends.to_pylist()]
        table = pa.Table.from_batches([batch])
        for media_id, (start, end) in zip(runs.values.to_pylist(), pairwise(starts), strict=True):
            if media_id != current and current is not None:
                yield current, pa.concat_tables(parts)
                parts = []
            current = media_id
            parts.append(table.slice(start, end - start))
    if current is not None:
        yield current, pa.concat_tables(parts)


def read_items(
    store: DerivedStore, bucket: int, asset: str, live: Live
) -> tuple[Source, Iterator[tuple[str, pa.Table]]]:
    """Live rows of one asset and bucket, item by item, wherever they are; see Source.

    Raises MediaError (retryable) while iterating when the catalog file is corrupt; compacting the bucket mends it.
    """
    source = Source(store, bucket, asset, live)

    def rows() -> Iterator[tuple[str, pa.Table]]:
        try:
            yield from source.tables()
        except _CatalogCorrupt as error:
            raise CatalogUnreadable(f"The catalog of {asset}, bucket {key(bucket)}, cannot be read.") from error

    return source, rows()


class CatalogUnreadable(MediaError):
    """A catalog file is damaged."""

    code, retryable, http_status = "catalog_unreadable", True, 503
    remedy = "Materialize the catalog of this bucket; it is rebuilt from the per-media files."
