"""Where compacted tables live beside the per-media ones, and how bulk files are read and published on any storage.

Per asset and bucket, `<root>/catalog/<asset>/` holds `bucket=NNN.parquet` (rows, sorted by media ID, without blobs),
`items/bucket=NNN.parquet` (which version of which item is in it) and `bucket=NNN.json` (the manifest). The manifest is
removed first and written last, so while it is there the three files belong together.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.fs as pafs
from upath import UPath

from resources.files.derived import DerivedStore
from resources.files.local import replacing
from resources.files.object_store import put_file

CATALOG = "catalog"

ITEMS = pa.schema(
    [
        pa.field("media_id", pa.string(), nullable=False),
        pa.field("version", pa.string(), nullable=False),
        pa.field("rows", pa.int64(), nullable=False),
        pa.field("problem", pa.string()),
    ]
)
"""Items of a compacted bucket; `problem` says why an item's file could not be read (it then has no rows)."""


def data_path(store: DerivedStore, asset: str, bucket: int) -> UPath:
    """Compacted rows of one bucket."""
    return store.root / CATALOG / asset / f"bucket={bucket:03d}.parquet"


def items_path(store: DerivedStore, asset: str, bucket: int) -> UPath:
    """Items (schema ITEMS) of one compacted bucket."""
    return store.root / CATALOG / asset / "items" / f"bucket={bucket:03d}.parquet"


def manifest_path(store: DerivedStore, asset: str, bucket: int) -> UPath:
    """Manifest of one compacted bucket."""
    return store.root / CATALOG / asset / f"bucket={bucket:03d}.json"


def compacted(store: DerivedStore, asset: str) -> list[int]:
    """Buckets of `asset` whose compaction is complete, in order."""
    folder = store.root / CATALOG / asset
    if not folder.exists():
        return []
    names = [path.name for path in folder.iterdir() if path.name.startswith("bucket=") and path.name.endswith(".json")]
    return sorted(int(name.removeprefix("bucket=").removesuffix(".json")) for name in names)


def is_local(store: DerivedStore) -> bool:
    """Whether the store is a folder of this machine."""
    return isinstance(store.root, os.PathLike)


def filesystem(store: DerivedStore) -> pafs.FileSystem:
    """The store's file system, for Arrow."""
    if is_local(store):
        return pafs.LocalFileSystem()
    return pafs.PyFileSystem(pafs.FSSpecHandler(store.root.fs))


def arrow_path(path: UPath) -> str:
    """`path` as `filesystem` names it. Nothing in it is a pattern: `[`, `*` and quotes are plain characters."""
    return str(path) if isinstance(path, os.PathLike) else path.path


def dataset(
    store: DerivedStore, paths: list[UPath], schema: pa.Schema, media_ids: list[str] | None = None
) -> ds.Dataset:
    """Parquet files as one lazy table of `schema`; no file is opened here.

    With `media_ids` (one per path) a filter on media_id opens the matching files alone.
    """
    format_, system = ds.ParquetFileFormat(), filesystem(store)
    guarantees = [ds.field("media_id") == key for key in media_ids] if media_ids else [None] * len(paths)
    fragments = [
        format_.make_fragment(arrow_path(path), system, partition_expression=guarantee)
        for path, guarantee in zip(paths, guarantees, strict=True)
    ]
    return ds.FileSystemDataset(fragments, schema, format_, system)


@contextmanager
def publishing(store: DerivedStore, path: UPath) -> Iterator[Path]:
    """A local file to write; when the block ends well it appears at `path` in one step."""
    if is_local(store):
        with replacing(Path(str(path))) as temporary:
            yield temporary
        return
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder) / path.name
        yield local
        put_file(path, local, store.part_bytes)
