"""DuckDB views named after the assets: the public SQL surface over the catalog and the per-media files.

Each live item is read from exactly one place: its bucket's catalog file when that holds the live version, else its own
file. So the views are always fresh, and fast once the catalog is. Files are reached through Arrow datasets alone, on
any storage, without extensions; DuckDB itself may touch no file, load nothing and change no setting.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
from upath import UPath

from resources.errors import MediaError, printable
from resources.files.blobs import BLOBS, lean
from resources.files.catalog_files import (
    arrow_path,
    compacted,
    data_path,
    dataset,
    filesystem,
    items_path,
)
from resources.files.derived import DerivedStore

log = logging.getLogger(__name__)

OUTCOMES = pa.schema(
    [
        pa.field("media_id", pa.string(), nullable=False),
        pa.field("asset", pa.string(), nullable=False),
        pa.field("version", pa.string(), nullable=False),
        pa.field("status", pa.string(), nullable=False),
        pa.field("attempts", pa.int32()),
        pa.field("error_class", pa.string()),
        pa.field("error", pa.string()),
        pa.field("run_id", pa.string()),
        pa.field("seconds", pa.float64()),
        pa.field("device", pa.string()),
        pa.field("units", pa.int64()),
        pa.field("rows", pa.int64()),
        pa.field("model", pa.string()),
        pa.field("bytes_out", pa.int64()),
        pa.field("copied_from", pa.string()),
        pa.field("retry_at", pa.timestamp("us", "UTC")),
        pa.field("updated_at", pa.timestamp("us", "UTC")),
    ]
)
"""Columns of the `outcomes` view."""

MEDIA, DUPLICATES = "media", "near_duplicates"
_READABLE = {duckdb.StatementType.SELECT, duckdb.StatementType.EXPLAIN}
_LOCKED = {
    "enable_external_access": "false",
    "autoinstall_known_extensions": "false",
    "autoload_known_extensions": "false",
    "temp_directory": "",
}


class BadQuery(MediaError):
    """The SQL text is not one readable statement, or DuckDB refused it."""

    code, http_status = "bad_query", 400
    remedy = (
        "`show tables` lists the views (names with an underscore are internal), `describe media` the columns of one."
    )


def outcomes_table(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Outcome records as the table `connect` wants; fields the schema does not know are ignored."""
    return pa.Table.from_pylist([{name: row.get(name) for name in OUTCOMES.names} for row in rows], schema=OUTCOMES)


def connect(
    store: DerivedStore,
    outcomes: pa.Table,
    schemas: Mapping[str, pa.Schema],
    near_duplicates: pa.Schema,
    *,
    registered: Sequence[str] = (),
    blobs: bool = False,
    memory_limit: str = "2GB",
) -> duckdb.DuckDBPyConnection:
    """A locked-down in-memory DuckDB with one view per asset, `near_duplicates` and `outcomes`.

    Args:
        store: where the tables are; an empty one gives views without rows.
        outcomes: records of live items, schema OUTCOMES (see `outcomes_table`); rows of items that are `ok` show.
        schemas: schema of each per-media asset.
        near_duplicates: schema of the near-duplicates table, stored as `<root>/near_duplicates/*.parquet`.
        registered: media IDs in the order they were registered; the first of equal files is the original that
            `media.duplicate_of` names. Without it, and among IDs not given, the smallest ID is.
        blobs: whether `frames.image` and `audio.flac` are columns; these two then come from per-media files alone.
        memory_limit: what queries may use, as DuckDB writes it; nothing is spilled to disk.

    One connection belongs to one thread. Items whose file is missing are left out and logged.
    """
    connection = duckdb.connect(config={**_LOCKED, "memory_limit": memory_limit})
    connection.register("_outcomes", outcomes)
    connection.execute("create table outcomes as select * from _outcomes")
    connection.unregister("_outcomes")
    builder = _Views(connection, store)
    builder.prepare(list(schemas))
    for asset, schema in schemas.items():
        builder.add(asset, schema, use_catalog=not (blobs and asset in BLOBS), blobs=blobs)
    _media_view(connection, schemas[MEDIA], registered)
    _duplicates_view(connection, store, near_duplicates)
    connection.execute("set python_enable_replacements = false")
    connection.execute("set lock_configuration = true")
    return connection


def query(connection: duckdb.DuckDBPyConnection, sql: str, limit: int | None = None) -> pa.Table:
    """Rows of one reading statement, at most `limit`. Raises BadQuery with what DuckDB says about it."""
    try:
        statements = connection.extract_statements(sql)
        if len(statements) != 1:
            raise BadQuery(f"Give one statement, not {len(statements)}.", "Run them one after the other.")
        if statements[0].type not in _READABLE:
            kind = statements[0].type.name
            raise BadQuery(f"{kind} statements are refused: the views can only be read.", "Use select.")
        rows = connection.sql(statements[0].query)
        return (rows if limit is None else rows.limit(limit)).to_arrow_table()
    except (duckdb.Error, pa.ArrowException, OSError) as error:
        raise BadQuery(_first_sentence(error)) from error


def _first_sentence(error: Exception) -> str:
    """DuckDB's message without the picture of the statement."""
    text = printable(str(error).split("\n\nLINE ")[0].replace("\n", " ").strip(), 400)
    return text if text.endswith((".", "!", "?")) else f"{text}."


class _Views:
    """Registers the sources of each asset and joins them into its view."""

    def __init__(self, connection: duckdb.DuckDBPyConnection, store: DerivedStore) -> None:
        self._connection = connection
        self._store = store

    def prepare(self, assets: Sequence[str]) -> None:
        """Tables of what is live, and of what the catalog holds: (asset, media_id, version)."""
        run = self._connection.execute
        run("create temp table _live as select asset, media_id, version from outcomes where status = 'ok'")
        run("create temp table _held (asset varchar, media_id varchar, version varchar, problem varchar)")
        for asset in assets:
            items = self._items(asset)
            self._connection.register("_items", items)
            run("insert into _held select ?, media_id, version, problem from _items", [asset])
            self._connection.unregister("_items")

    def add(self, asset: str, schema: pa.Schema, use_catalog: bool, blobs: bool) -> None:
        """The view of one asset (`_media` for media, whose view adds a column)."""
        columns = schema if blobs else lean(asset, schema)
        self._pairs(f"_{asset}_held", "semi join", asset, "h.problem is null" if use_catalog else "false")
        # A file the catalog could not read would fail every query: it is left out until it is mended.
        self._pairs(f"_{asset}_fresh", "anti join", asset, "true" if use_catalog else "h.problem is not null")
        self._connection.register(f"_{asset}_catalog", self._catalog(asset, columns) if use_catalog else _none(columns))
        self._connection.register(f"_{asset}_files", self._files(asset, columns))
        name = f"_{asset}" if asset == MEDIA else asset
        names = ", ".join(f't."{column}"' for column in columns.names)
        self._connection.execute(
            f'create temp view "{name}" as '  # noqa: S608 - names come from the code's own schemas
            f'select {names} from "_{asset}_catalog" t semi join "_{asset}_held" i '
            "on t.media_id = i.media_id and t.version = i.version "
            f'union all select {names} from "_{asset}_files" t semi join "_{asset}_fresh" i '
            "on t.media_id = i.media_id and t.version = i.version"
        )

    def _pairs(self, name: str, join: str, asset: str, condition: str) -> None:
        """Table of the asset's live (media_id, version) pairs that are, or are not, among the held ones."""
        self._connection.execute(
            f'create temp table "{name}" as select l.media_id, l.version '  # noqa: S608 - only constants
            f"from (select * from _live where asset = $asset) l {join} (select * from _held h where {condition}) h "
            "on l.asset = h.asset and l.media_id = h.media_id and l.version = h.version",
            {"asset": asset},
        )

    def _items(self, asset: str) -> pa.Table:
        paths = [arrow_path(items_path(self._store, asset, bucket)) for bucket in compacted(self._store, asset)]
        system = filesystem(self._store)
        columns = ["media_id", "version", "problem"]
        tables = [pq.ParquetFile(path, filesystem=system).read(columns=columns) for path in paths]
        empty = pa.table({name: pa.array([], pa.string()) for name in columns})
        return pa.concat_tables([empty, *(table.cast(empty.schema) for table in tables)])

    def _catalog(self, asset: str, schema: pa.Schema) -> object:
        paths = [data_path(self._store, asset, bucket) for bucket in compacted(self._store, asset)]
        return dataset(self._store, paths, schema) if paths else _none(schema)

    def _files(self, asset: str, schema: pa.Schema) -> object:
        fresh = self._connection.execute(f'select media_id from "_{asset}_fresh" order by 1').fetchall()  # noqa: S608
        if not fresh:
            return _none(schema)
        folder = self._store.root / asset
        present = {path.name for path in folder.iterdir()} if folder.exists() else set()
        media_ids = [row[0] for row in fresh if f"{row[0]}.parquet" in present]
        if missing := len(fresh) - len(media_ids):
            log.warning("%d tables of %s are recorded but missing; retry these items", missing, asset)
        if not media_ids:
            return _none(schema)
        paths: list[UPath] = [self._store.path(asset, media_id) for media_id in media_ids]
        return dataset(self._store, paths, schema, media_ids)


def _none(schema: pa.Schema) -> pa.Table:
    return schema.empty_table()


def _media_view(connection: duckdb.DuckDBPyConnection, schema: pa.Schema, registered: Sequence[str]) -> None:
    """`media` with `duplicate_of`: the first registered item of the same bytes, null for that item itself."""
    order = pa.table(
        {"media_id": pa.array(registered, pa.string()), "position": pa.array(range(len(registered)), pa.int64())}
    )
    connection.register("_order", order)
    connection.execute("create temp table _registered as select * from _order")
    connection.unregister("_order")
    names = ", ".join(
        "nullif(first_value(m.media_id) over (partition by m.sha256 order by r.position nulls last, m.media_id),"
        " m.media_id) as duplicate_of"
        if name == "duplicate_of"
        else f'm."{name}"'
        for name in schema.names
    )
    connection.execute(
        f"create temp view media as select {names} "  # noqa: S608 - names come from the code's own schema
        "from _media m left join _registered r using (media_id)"
    )


def _duplicates_view(connection: duckdb.DuckDBPyConnection, store: DerivedStore, schema: pa.Schema) -> None:
    folder = store.root / DUPLICATES
    paths = sorted(
        (path for path in folder.iterdir() if path.name.endswith(".parquet") and not path.name.startswith("."))
        if folder.exists()
        else (),
        key=str,
    )
    connection.register("_pairs", dataset(store, paths, schema) if paths else _none(schema))
    live = "select media_id from _live where asset = 'media'"
    connection.execute(
        f"create temp view {DUPLICATES} as select * from _pairs "  # noqa: S608 - a constant
        f"where media_id in ({live}) and other_id in ({live})"
    )
