"""Derived files: per-media Parquet at a deterministic path on any fsspec location, written atomically."""

from __future__ import annotations

import os
import secrets
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from upath import UPath

from resources.faults import fault
from resources.object_store import is_s3, put_bytes

COMPRESSION = "zstd"
PART_BYTES = 16 * 2**20


class DerivedStore:
    """Tables of derived artifacts below one root.

    A table lives at `<root>/<asset>/<media_id>.parquet`; a side table (bulk data that most readers do
    not want, such as the 48x27 track of `frames`) at `<root>/<asset>/<media_id>.<side>.parquet`.
    Writing goes to a temporary name and is moved, so a reader never sees half a file.
    """

    def __init__(self, root: str | Path | UPath, part_bytes: int = PART_BYTES) -> None:
        self.root = UPath(root)
        self.part_bytes = part_bytes
        self._local = isinstance(self.root, os.PathLike)

    def path(self, asset: str, media_id: str, side: str = "") -> UPath:
        """Where the table of one asset and media item (or of one side table) lives."""
        return self.root / asset / (f"{media_id}.{side}.parquet" if side else f"{media_id}.parquet")

    def write(self, asset: str, media_id: str, table: pa.Table, side: str = "") -> int:
        """Write `table` atomically; returns bytes written. Raises OSError (disk full, permissions), StorageFailed."""
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression=COMPRESSION)
        return self.write_bytes(self.path(asset, media_id, side), sink.getvalue())

    def write_bytes(self, path: UPath, data: bytes | memoryview | pa.Buffer) -> int:
        """Write `data` at `path` atomically: a temporary file and a rename, or one upload to an object store.

        Raises OSError, and StorageFailed when an object store keeps something else than was sent.
        """
        view = memoryview(data)
        try:
            self._put(path, view)
        except OSError as error:
            if error.filename is None:  # a full disk does not say which one it is
                error.filename = str(path)
            raise
        return view.nbytes

    def _put(self, path: UPath, view: memoryview) -> None:
        if not self._local:
            put_bytes(path, bytes(view), self.part_bytes)
            return
        final = Path(str(path))
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary = final.with_name(f".{final.name}.{secrets.token_hex(4)}")
        try:
            temporary.write_bytes(view)
            fault("storage.before_rename")
            os.replace(temporary, final)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    def read(self, asset: str, media_id: str, side: str = "", columns: list[str] | None = None) -> pa.Table:
        """The stored table. Raises FileNotFoundError when there is none."""
        path = self.path(asset, media_id, side)
        # `pq.read_table` goes through Arrow's datasets, which take longer than a small file itself.
        with pq.ParquetFile(str(path) if self._local else pa.BufferReader(path.read_bytes())) as file:
            table = file.read(columns=columns)
        return table if columns is None else table.select(columns)

    def exists(self, asset: str, media_id: str, side: str = "") -> bool:
        """Whether the table is there."""
        return self.path(asset, media_id, side).exists()

    def sides(self, asset: str, media_id: str) -> Iterator[str]:
        """Names of the side tables stored for one asset and media item."""
        for name in self._names(asset, f"{media_id}."):
            if (side := name.removeprefix(f"{media_id}.").removesuffix(".parquet")) != "parquet":
                yield side

    def _names(self, asset: str, prefix: str) -> Iterator[str]:
        """File names of an asset that begin with `prefix`; an object store lists these alone."""
        folder = self.root / asset
        if is_s3(str(folder)):
            yield from (name.rsplit("/", 1)[-1] for name in folder.fs.find(folder.path, maxdepth=1, prefix=prefix))
        elif folder.exists():
            yield from (path.name for path in folder.iterdir() if path.name.startswith(prefix))

    def copy(self, asset: str, source_id: str, target_id: str, sides: Mapping[str, object] | tuple[str, ...]) -> int:
        """Copy a twin's tables, rewriting `media_id`; returns bytes written."""
        written = 0
        for side in (*sides, ""):
            table = self.read(asset, source_id, side)
            index = table.schema.get_field_index("media_id")
            column = pa.array([target_id] * table.num_rows, pa.string())
            table = table.set_column(index, table.schema.field(index), column)
            written += self.write(asset, target_id, table, side)
        return written

    def erase(self, media_ids: Collection[str]) -> tuple[int, int]:
        """Remove every table of these items, of assets the code no longer knows too, and what writers left behind.

        Returns how many files, and their bytes. Lists each asset's folder once.
        """
        wanted, files, size = set(media_ids), 0, 0
        for folder in self.root.iterdir() if self.root.exists() else ():
            if not folder.is_dir():
                continue
            for path in list(folder.iterdir()):
                # <media_id>[.<side>].parquet, or .<that name>.<random> of a writer that died; IDs hold no dot.
                if path.name.removeprefix(".").split(".", 1)[0] in wanted:
                    size += path.stat().st_size
                    path.unlink(missing_ok=True)
                    files += 1
        return files, size

    def delete(self, asset: str, media_id: str) -> None:
        """Remove the table and every side table; nothing there is no error."""
        for side in list(self.sides(asset, media_id)):
            self.path(asset, media_id, side).unlink(missing_ok=True)
        self.path(asset, media_id).unlink(missing_ok=True)
