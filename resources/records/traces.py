"""Proof that nothing is left of media items: looks for their IDs in all files and tables, and says what it read."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY

from resources.files.catalog_files import arrow_path, filesystem, is_local
from resources.files.derived import DerivedStore
from resources.records.database import Database

_BLOCK = 4 * 2**20
_TEXT_TYPES = ("text", "character varying", "character", "json", "jsonb", "ARRAY")
_WEIGHTS, _SERVER, _SERVER_LOG = "models", "postgres", "log"
_VECTORS = ".faiss"

REFERENCES = frozenset(
    {
        ("uploads", None),
        ("purges", None),
        ("removals", "uri"),
        ("rejected_messages", "body"),
        ("batches", "reason"),
        ("outcomes", "copied_from"),
        ("runs", None),
        ("run_tags", "value"),
        ("bulk_actions", None),
        ("backfill_tags", "value"),
        ("job_ticks", "tick_body"),
        ("jobs", "job_body"),
        ("instigators", "instigator_body"),
        ("kvs", "value"),
        ("asset_daemon_asset_evaluations", "asset_evaluation_body"),
        ("dynamic_partitions", "partition"),
    }
)
"""Columns that name items and hold nothing derived from them (None: every column of the table)."""


@dataclass(slots=True)
class Scan:
    """What was read, where IDs remain as mere references (table.column: rows), and what is left that must not be.

    `files` counts those whose names were looked at, `bytes` the sizes of those that were looked into.
    """

    files: int = 0
    bytes: int = 0
    tables: int = 0
    rows: int = 0
    references: dict[str, int] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)


def scan(store: DerivedStore, home: Path, database: Database, media_ids: Sequence[str]) -> Scan:
    """Look for the IDs in the names and contents of all files of the store and the home, and in all tables.

    Of Parquet files the ID columns are read where their statistics do not exclude it, of other files every byte. Not
    read are the files of the embedded server (its tables are), model weights, and FAISS vectors (their sidecars are).
    """
    found = Scan()
    _scan_home(found, store, home, media_ids)
    if not is_local(store):
        _scan_remote(found, store, media_ids)
    _scan_tables(found, database, media_ids)
    return found


def _scan_home(found: Scan, store: DerivedStore, home: Path, media_ids: Sequence[str]) -> None:
    named = _anywhere(media_ids)
    roots = [home]
    if is_local(store) and home not in (root := Path(str(store.root))).parents:
        roots.append(root)
    unread = {home / _WEIGHTS, home / _SERVER}
    for path, readable in (entry for root in roots for entry in _walk(root, unread)):
        try:
            size = path.stat().st_size
            readable = (readable and path.suffix != _VECTORS) or path == home / _SERVER / _SERVER_LOG
            what = _trace(path, named, media_ids) if readable else ""
        except FileNotFoundError:
            continue  # a temporary file of a writer
        found.files += 1
        found.bytes += size if readable else 0
        if named.search(path.name):
            found.left.append(f"file {path}")
        elif what:
            found.left.append(f"{what} {path}")


def _anywhere(media_ids: Sequence[str]) -> re.Pattern[str]:
    """Matches the IDs inside other words as well: rather one trace too many."""
    return re.compile("|".join(map(re.escape, media_ids)))


def _walk(root: Path, unread: set[Path]) -> Iterator[tuple[Path, bool]]:
    """Regular files below `root`, and whether their content is to be read."""
    for parent, _, names in os.walk(root):
        folder = Path(parent)
        readable = not unread & {folder, *folder.parents}
        for name in names:
            path = folder / name
            if path.is_file() and not path.is_symlink():
                yield path, readable


def _trace(path: Path, named: re.Pattern[str], media_ids: Sequence[str]) -> str:
    """In what way the content names an item; empty if it does not."""
    if path.suffix == ".parquet":
        return _trace_parquet(str(path), pafs.LocalFileSystem(), media_ids)
    with path.open("rb") as file:
        return "text in" if _in_stream(file, re.compile(named.pattern.encode())) else ""


def _in_stream(file: Any, named: re.Pattern[bytes]) -> bool:
    tail = b""
    while block := file.read(_BLOCK):
        if named.search(tail + block):
            return True
        tail = block[-256:]  # longer than any ID
    return False


def _trace_parquet(path: str, system: pafs.FileSystem, media_ids: Sequence[str]) -> str:
    try:
        file = pq.ParquetFile(path, filesystem=system)
    except pa.ArrowInvalid:
        return "unreadable Parquet file, not searched:"
    wanted = pa.array(media_ids, pa.string())
    with file:
        for index in range(file.metadata.num_row_groups):
            group = file.metadata.row_group(index)
            columns = [group.column(number) for number in range(group.num_columns)]
            suspects = [column.path_in_schema for column in columns if _may_hold(column, media_ids)]
            if suspects:
                table = file.read_row_group(index, columns=suspects)
                if any(pc.any(pc.is_in(column, value_set=wanted)).as_py() for column in table.columns):
                    return "rows in"
    return ""


def _may_hold(column: Any, media_ids: Sequence[str]) -> bool:
    """Whether a column chunk is one of IDs, and its statistics do not exclude all of `media_ids`."""
    if column.physical_type != "BYTE_ARRAY" or not (
        column.path_in_schema.endswith("_id") or column.path_in_schema == "duplicate_of"
    ):
        return False
    known = column.statistics
    if known is None or not known.has_min_max:
        return True
    return any(known.min <= media_id <= known.max for media_id in media_ids)


def _scan_remote(found: Scan, store: DerivedStore, media_ids: Sequence[str]) -> None:
    named = _anywhere(media_ids)
    files, system = store.root.fs, filesystem(store)
    for name, entry in files.find(arrow_path(store.root), detail=True).items():
        found.files += 1
        found.bytes += 0 if name.endswith(_VECTORS) else int(entry.get("size") or 0)
        what = ""
        if named.search(name.rsplit("/", 1)[-1]):
            what = "file"
        elif name.endswith(".parquet"):
            what = _trace_parquet(name, system, media_ids)
        elif not name.endswith(_VECTORS):
            with files.open(name, "rb") as file:
                what = "text in" if _in_stream(file, re.compile(named.pattern.encode())) else ""
        if what:
            found.left.append(f"{what} {name}")


def _scan_tables(found: Scan, database: Database, media_ids: Sequence[str]) -> None:
    patterns = sa.literal([f"%{media_id}%" for media_id in media_ids], ARRAY(sa.Text))
    with database.engine.connect() as connection:
        for name, columns in _text_columns(connection).items():
            table = sa.table(name, *(sa.column(column) for column in columns))
            hits = [
                sa.func.count().filter(sa.cast(column, sa.Text).op("like")(sa.func.any(patterns)))
                for column in table.columns
            ]
            rows, *counts = connection.execute(sa.select(sa.func.count(), *hits).select_from(table)).one()
            found.tables += 1
            found.rows += rows
            for column, count in zip(columns, counts, strict=True):
                if not count:
                    continue
                if (name, column) in REFERENCES or (name, None) in REFERENCES:
                    found.references[f"{name}.{column}"] = count
                else:
                    found.left.append(f"{count} rows of table {name}, column {column}")


def _text_columns(connection: sa.Connection) -> dict[str, list[str]]:
    """Columns of every table that can hold text."""
    query = sa.text(
        "select c.table_name, c.column_name from information_schema.columns c join information_schema.tables t"
        " using (table_schema, table_name) where table_schema = current_schema() and t.table_type = 'BASE TABLE'"
        " and c.data_type = any(:types) order by 1, c.ordinal_position"
    )
    found: dict[str, list[str]] = {}
    for table, column in connection.execute(query, {"types": list(_TEXT_TYPES)}):
        found.setdefault(table, []).append(column)
    return found
