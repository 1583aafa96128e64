"""Derived files: per-media Parquet at a deterministic path on any fsspec location, written atomically."""

from __future__ import annotations

import os
import secrets
import threading
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq
from upath import UPath

from resources.faults import fault
from resources.files.object_store import is_s3, put_bytes

COMPRESSION = "zstd"
PART_BYTES = 16 * 2**20
DICTIONARY_ROWS = 64
PLAIN_BYTES = 16_384
"""A table whose file has no more than this beside pictures and sound, and few rows, is stored as it is.

What compression would save there is less than what it adds.
"""
RECENT_BYTES = 128 * 2**20
"""Memory for the tables lately written and read, bytes."""

LARGE = 4
"""A table of more than this part of that memory is not kept."""

Key: TypeAlias = tuple[str, str, str]
Mark: TypeAlias = tuple[int, int, int]


class DerivedStore:
    """Tables of derived artifacts below one root.

    A table lives at `<root>/<asset>/<media_id>.parquet`; a side table (bulk data that most readers do
    not want, such as the 48x27 track of `frames`) at `<root>/<asset>/<media_id>.<side>.parquet`.
    Writing goes to a temporary name and is moved, so a reader never sees half a file.

    What one stage writes the next one reads, often within the second, and the checks once more: in a local folder
    the last `recent_bytes` of tables are kept in memory, each for as long as its file is the very one.
    """

    def __init__(
        self, root: str | Path | UPath, part_bytes: int = PART_BYTES, recent_bytes: int = RECENT_BYTES
    ) -> None:
        self.root = UPath(root)
        self.part_bytes = part_bytes
        self._local = str(self.root) if isinstance(self.root, os.PathLike) else None
        self._recent = _Recent(recent_bytes)

    def path(self, asset: str, media_id: str, side: str = "") -> UPath:
        """Where the table of one asset and media item (or of one side table) lives."""
        return self.root / asset / _name(media_id, side)

    def write(self, asset: str, media_id: str, table: pa.Table, side: str = "") -> int:
        """Write `table` atomically; returns bytes written. Raises OSError (disk full, permissions), StorageFailed."""
        data, held = _parquet(table) if table.num_rows else _empty_parquet(table.schema)
        if self._local is None:
            return self.write_bytes(self.path(asset, media_id, side), data)
        mark = _put(self._file(asset, media_id, side), memoryview(data))
        self._recent.keep((asset, media_id, side), mark, table, held)
        return int(data.size)

    def write_bytes(self, path: UPath, data: bytes | memoryview | pa.Buffer) -> int:
        """Write `data` at `path` atomically: a temporary file and a rename, or one upload to an object store.

        Raises OSError, and StorageFailed when an object store keeps something else than was sent.
        """
        view = memoryview(data)
        if self._local is not None:
            _put(str(path), view)
            return view.nbytes
        with _named(str(path)):
            put_bytes(path, bytes(view), self.part_bytes)
        return view.nbytes

    def _file(self, asset: str, media_id: str, side: str) -> str:
        """`path` of a local root as text: a `UPath` takes longer to make than a small file to write."""
        return f"{self._local}/{asset}/{_name(media_id, side)}"

    def read(self, asset: str, media_id: str, side: str = "", columns: list[str] | None = None) -> pa.Table:
        """The stored table. Raises FileNotFoundError when there is none."""
        if self._local is None:
            return _read(pa.BufferReader(self.path(asset, media_id, side).read_bytes()), columns)
        path, key = self._file(asset, media_id, side), (asset, media_id, side)
        mark = _mark(os.stat(path))
        table = self._recent.get(key, mark)
        if table is not None:
            return table if columns is None else table.select(columns)
        table = _read(path, columns)
        if columns is None:
            self._recent.keep(key, mark, table, table.nbytes)
        return table

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
        self._recent.forget(wanted)
        return files, size

    def delete(self, asset: str, media_id: str) -> None:
        """Remove the table and every side table; nothing there is no error."""
        for side in list(self.sides(asset, media_id)):
            self.path(asset, media_id, side).unlink(missing_ok=True)
        self.path(asset, media_id).unlink(missing_ok=True)


class _Recent:
    """The tables last used, by key, within a number of bytes. Thread-safe."""

    def __init__(self, most_bytes: int) -> None:
        self._most = most_bytes
        self._held = 0
        self._tables: OrderedDict[Key, tuple[Mark, pa.Table, int]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Key, mark: Mark) -> pa.Table | None:
        """The table of `key` if it is of the file with this mark."""
        with self._lock:
            found = self._tables.get(key)
            if found is None:
                return None
            if found[0] != mark:
                self._drop(key)
                return None
            self._tables.move_to_end(key)
            return found[1]

    def keep(self, key: Key, mark: Mark, table: pa.Table, size: int) -> None:
        """Keep a table of `size` bytes, in place of the one of its key and of those used longest ago.

        One that would fill the place is not kept.
        """
        with self._lock:
            self._drop(key)
            if size > self._most // LARGE:
                return
            self._tables[key] = (mark, table, size)
            self._held += size
            while self._held > self._most:
                self._drop(next(iter(self._tables)))

    def forget(self, media_ids: Collection[str]) -> None:
        """Drop every table of these items."""
        with self._lock:
            for key in [key for key in self._tables if key[1] in media_ids]:
                self._drop(key)

    def _drop(self, key: Key) -> None:
        if (found := self._tables.pop(key, None)) is not None:
            self._held -= found[2]


def _name(media_id: str, side: str) -> str:
    return f"{media_id}.{side}.parquet" if side else f"{media_id}.parquet"


def _parquet(table: pa.Table) -> tuple[pa.Buffer, int]:
    """The file of a table, and about the table's own bytes in memory."""
    # Pictures and sound are compressed as they are, and a few rows repeat too little for a dictionary.
    short = table.num_rows < DICTIONARY_ROWS
    if short:
        plain = _written_as(table, "none", dictionary=False)
        bulk = sum(table.column(at).nbytes for at in _bulk_columns(table.schema))
        if plain.size - bulk <= PLAIN_BYTES:
            return plain, plain.size  # to ask every column for its size takes as long as a small file's write
    return _written_as(table, _compression(table.schema), dictionary=not short), table.nbytes


def _written_as(table: pa.Table, compression: str | dict[str, str], dictionary: bool) -> pa.Buffer:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression=compression, use_dictionary=dictionary)
    return sink.getvalue()


@lru_cache(64)
def _bulk_columns(schema: pa.Schema) -> tuple[int, ...]:
    """Where pictures and sound are."""
    return tuple(at for at, field in enumerate(schema) if pa.types.is_binary(field.type))


@lru_cache(64)
def _compression(schema: pa.Schema) -> dict[str, str]:
    return dict(leaf for entry in schema for leaf in _packed(entry.name, entry.type))


def _packed(path: str, kind: pa.DataType) -> Iterator[tuple[str, str]]:
    """Path in Parquet's schema of a column, or of those it is made of, and how each is compressed."""
    if pa.types.is_list(kind):
        yield from _packed(f"{path}.list.element", kind.value_type)
    elif pa.types.is_struct(kind):
        for part in kind:
            yield from _packed(f"{path}.{part.name}", part.type)
    else:
        yield path, "none" if pa.types.is_binary(kind) else COMPRESSION


@lru_cache(64)
def _empty_parquet(schema: pa.Schema) -> tuple[pa.Buffer, int]:
    return _parquet(schema.empty_table())


def _read(source: str | pa.BufferReader, columns: list[str] | None) -> pa.Table:
    # `pq.read_table` goes through Arrow's datasets, which take longer than a small file itself.
    with pq.ParquetFile(source) as file:
        table = file.read(columns=columns)
    return table if columns is None else table.select(columns)


def _mark(found: os.stat_result) -> Mark:
    """What no two files that take each other's place have in common."""
    return found.st_ino, found.st_mtime_ns, found.st_size


def _put(path: str, view: memoryview) -> Mark:
    """Write a local file atomically. Raises OSError."""
    folder, _, name = path.rpartition("/")
    temporary = f"{folder}/.{name}.{secrets.token_hex(4)}"
    try:
        with _named(path):
            try:
                mark = _written(temporary, view)
            except FileNotFoundError:
                os.makedirs(folder, exist_ok=True)
                mark = _written(temporary, view)
            fault("storage.before_rename")
            os.replace(temporary, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    return mark


@contextmanager
def _named(path: str) -> Iterator[None]:
    """Let an error that does not say which file it is about name this one, as that of a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = path
        raise


def _written(path: str, view: memoryview) -> Mark:
    descriptor = os.open(path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_CLOEXEC, 0o666)
    try:
        while view:
            view = view[os.write(descriptor, view) :]
        return _mark(os.fstat(descriptor))
    finally:
        os.close(descriptor)
