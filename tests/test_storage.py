"""The store of derived tables: what is written is what is read, from memory or from the file."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from media_assets import schemas
from resources.files import derived as storage
from resources.files.derived import DICTIONARY_ROWS, LARGE, PLAIN_BYTES, DerivedStore

TABLES = {(asset, ""): schema for asset, schema in schemas.PER_MEDIA.items()} | {
    (asset, side): schema for asset, sides in schemas.SIDES.items() for side, schema in sides.items()
}


def numbers(*values: int) -> pa.Table:
    return pa.table({"media_id": ["a"] * len(values), "value": pa.array(values, pa.int64())})


@pytest.fixture
def store(tmp_path: Path) -> DerivedStore:
    return DerivedStore(tmp_path)


@pytest.mark.parametrize(("asset", "side"), TABLES)
def test_the_kept_table_is_the_one_in_the_file(store: DerivedStore, tmp_path: Path, asset: str, side: str) -> None:
    """Given any table of the project, then the writer and another process read the same, down to the schema."""
    store.write(asset, "a", TABLES[asset, side].empty_table(), side)
    kept, read = store.read(asset, "a", side), DerivedStore(tmp_path).read(asset, "a", side)
    assert str(kept.schema) == str(read.schema)
    assert kept.schema.equals(read.schema, check_metadata=True)


def value(kind: pa.DataType) -> object:
    """Something of an Arrow type."""
    if pa.types.is_list(kind):
        return [value(kind.value_type)] * 2
    if pa.types.is_struct(kind):
        return {field.name: value(field.type) for field in kind}
    if pa.types.is_string(kind):
        return "été"
    return (
        b"12345678"
        if pa.types.is_binary(kind) or pa.types.is_fixed_size_binary(kind)
        else pa.scalar(1).cast(kind).as_py()
    )


@pytest.mark.parametrize(("asset", "side"), TABLES)
def test_rows_become_the_table_that_arrow_makes_of_them(asset: str, side: str) -> None:
    """Given rows with all fields and with the required ones alone, or none, then the table is the one Arrow makes."""
    schema = TABLES[asset, side]
    full = {field.name: value(field.type) for field in schema}
    least = {field.name: full[field.name] for field in schema if not field.nullable}
    for rows in ([full, least, full], []):
        made = schemas.table(schema, rows)
        assert made.equals(pa.Table.from_pylist(rows, schema=schema), check_metadata=True)
        made.validate(full=True)
    for wrong in ({**full, "other": 1}, {**full, "media_id": None}):
        with pytest.raises(ValueError, match="fields"):
            schemas.table(schema, [wrong])


def test_what_was_just_written_is_not_read_again(store: DerivedStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given a table in memory, then no file is opened for it or for some of its columns, as long as it is the same."""
    store.write("numbers", "a", numbers(1, 2))
    monkeypatch.setattr(storage, "_read", lambda *_: pytest.fail("the file was read"))
    assert store.read("numbers", "a") == numbers(1, 2)
    assert store.read("numbers", "a", columns=["value"]) == numbers(1, 2).select(["value"])


def test_a_file_that_was_replaced_or_removed_counts(store: DerivedStore, tmp_path: Path) -> None:
    """Given another process that writes, deletes or erases the table, then memory does not hide it."""
    other = DerivedStore(tmp_path)
    store.write("numbers", "a", numbers(1, 2))
    other.write("numbers", "a", numbers(3, 4))
    assert store.read("numbers", "a") == numbers(3, 4)
    other.delete("numbers", "a")
    with pytest.raises(FileNotFoundError):
        store.read("numbers", "a")
    store.write("numbers", "a", numbers(5))
    assert store.erase({"a"})[0] == 1
    assert not store._recent._tables
    with pytest.raises(FileNotFoundError):
        store.read("numbers", "a")


def test_memory_for_tables_is_bounded(tmp_path: Path) -> None:
    """Given more tables than there is room for, then those used last are kept, and none that would fill the place."""
    size = DerivedStore(tmp_path / "other").write("numbers", "a", numbers(*range(10)))
    store = DerivedStore(tmp_path, recent_bytes=LARGE * size)
    for media_id in "abcdef":
        store.write("numbers", media_id, numbers(*range(10)))
        store.read("numbers", "a")
    assert [key[1] for key in store._recent._tables] == ["d", "e", "f", "a"]
    store.write("numbers", "a", numbers(*range(11)))
    assert [key[1] for key in store._recent._tables] == ["d", "e", "f"]
    assert store._recent._held == 3 * size
    assert store.read("numbers", "a") == numbers(*range(11))


@pytest.mark.parametrize(("asset", "side"), TABLES)
def test_all_but_encoded_bytes_is_compressed(tmp_path: Path, asset: str, side: str) -> None:
    """Given a table of many rows, then every column is compressed once: pictures and sound as they came."""
    store = DerivedStore(tmp_path)
    fields = [field.with_nullable(True) for field in TABLES[asset, side]]
    rows = pa.table([pa.nulls(DICTIONARY_ROWS, field.type) for field in fields], schema=pa.schema(fields))
    store.write(asset, "a", rows, side)
    group = pq.ParquetFile(str(store.path(asset, "a", side))).metadata.row_group(0)
    columns = [group.column(index) for index in range(group.num_columns)]
    plain = {column.path_in_schema for column in columns if column.compression != "ZSTD"}
    assert plain == {field.name for field in fields if pa.types.is_binary(field.type)}


@pytest.mark.parametrize(("text", "compression"), [("short", "UNCOMPRESSED"), ("long " * PLAIN_BYTES, "ZSTD")])
def test_a_few_rows_are_compressed_where_it_pays(tmp_path: Path, text: str, compression: str) -> None:
    """Given two rows, then they are stored as they are, unless what is to be compressed is large."""
    store = DerivedStore(tmp_path)
    written = pa.table({"text": [text, text], "image": [bytes(2 * PLAIN_BYTES)] * 2})
    store.write("texts", "a", written)
    columns = pq.ParquetFile(str(store.path("texts", "a"))).metadata.row_group(0)
    assert [columns.column(at).compression for at in range(2)] == [compression, "UNCOMPRESSED"]
    assert DerivedStore(tmp_path).read("texts", "a") == written
