"""Catalog and views: many small files become a few large ones, and SQL sees each live item exactly once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from upath import UPath

from media_assets import schemas
from media_assets.library import catalog
from media_assets.library.buckets import BucketBusy, Buckets, BucketsChanged, bucket_of, exclusive
from media_assets.library.catalog import AssetReport, compact
from resources.files import views
from resources.files.catalog_files import data_path, items_path, manifest_path
from resources.files.derived import DerivedStore
from resources.files.views import BadQuery

Pairs = dict[str, str]


@pytest.fixture
def store(tmp_path: Path) -> DerivedStore:
    return DerivedStore(tmp_path / "it's [a] *store?")


def say(store: DerivedStore, media_id: str, *texts: str, version: str = "v1") -> None:
    """Write a transcript with one segment per text."""
    rows: list[dict[str, object]] = [
        {
            "media_id": media_id,
            "segment": number,
            "start_s": float(number),
            "end_s": number + 1.0,
            "text": text,
            "language": "en",
            "confidence": 0.9,
            "words": [],
            "timing": "none",
            "model": "asr@1",
            "version": version,
        }
        for number, text in enumerate(texts)
    ]
    store.write("transcript", media_id, schemas.table(schemas.TRANSCRIPT, rows))


def register(store: DerivedStore, media_id: str, sha256: str = "00") -> None:
    row: dict[str, object] = {
        "media_id": media_id,
        "uri": f"/library/{media_id}",
        "sha256": sha256,
        "kind": "image",
        "mime": "image/png",
        "bytes": 1,
        "has_audio": False,
        "version": "v1",
    }
    store.write("media", media_id, schemas.table(schemas.MEDIA, [row]))


def open_views(store: DerivedStore, live: dict[str, Pairs], **options: Any) -> duckdb.DuckDBPyConnection:
    rows = [
        {"media_id": media_id, "asset": asset, "version": version, "status": "ok", "attempts": 1}
        for asset, pairs in live.items()
        for media_id, version in pairs.items()
    ]
    return views.connect(store, views.outcomes_table(rows), schemas.PER_MEDIA, schemas.NEAR_DUPLICATES, **options)


def texts(store: DerivedStore, live: Pairs) -> list[str]:
    """Texts the view shows, in order."""
    rows = [{"media_id": key, "asset": "transcript", "version": live[key], "status": "ok"} for key in live]
    few = {asset: schemas.PER_MEDIA[asset] for asset in ("media", "transcript")}
    connection = views.connect(store, views.outcomes_table(rows), few, schemas.NEAR_DUPLICATES)
    table = views.query(connection, "select text from transcript order by media_id, segment")
    found: list[str] = table["text"].to_pylist()
    return found


def compacted(store: DerivedStore, live: Pairs) -> AssetReport:
    return compact(store, 0, {"transcript": live}, ["transcript"]).assets["transcript"]


# --- buckets


def test_a_bucket_is_stable_and_the_count_is_fixed_once_written(store: DerivedStore) -> None:
    assert [bucket_of(media_id, 4) for media_id in ("a", "b", "clip-0123456789ab")] == [3, 1, 3]
    first = Buckets(store, 4)
    groups = first.group(f"m-{number}" for number in range(200))
    assert groups == Buckets(store, 4).group(f"m-{number}" for number in range(200))
    assert sum(map(len, groups.values())) == 200
    assert min(map(len, groups.values())) > 20
    assert first.keys() == ["000", "001", "002", "003"]
    with pytest.raises(BucketsChanged, match=r"Set index\.buckets = 4"):
        Buckets(store, 8)


def test_a_damaged_bucket_count_is_told(store: DerivedStore) -> None:
    store.write_bytes(store.root / "buckets.json", b"{")
    with pytest.raises(BucketsChanged, match=r"buckets\.json does not say"):
        Buckets(store, 4)


# --- compaction


def test_live_items_are_compacted_in_order_and_others_left_out(store: DerivedStore) -> None:
    for media_id in ("c", "a", "b", "stale"):
        say(store, media_id, f"{media_id} one", f"{media_id} two")
    say(store, "silent")
    report = compacted(store, {"c": "v1", "a": "v1", "silent": "v1"})
    assert (report.items, report.rows, report.read, report.skipped) == (3, 4, 3, ())
    table = pq.ParquetFile(data_path(store, "transcript", 0)).read()
    assert table["text"].to_pylist() == ["a one", "a two", "c one", "c two"]
    assert table.schema.names == schemas.TRANSCRIPT.names


def test_an_unchanged_bucket_is_not_touched_and_a_changed_one_reads_only_what_is_new(store: DerivedStore) -> None:
    live = {"a": "v1", "b": "v1", "silent": "v1"}
    say(store, "a", "one")
    say(store, "b", "two")
    say(store, "silent")
    compacted(store, live)
    before = data_path(store, "transcript", 0).stat().st_mtime_ns
    assert compacted(store, live).unchanged
    assert data_path(store, "transcript", 0).stat().st_mtime_ns == before
    say(store, "b", "two anew", version="v2")
    say(store, "aa", "between")
    report = compacted(store, live | {"b": "v2", "aa": "v1"})
    assert (report.reused, report.read, report.rows) == (2, 2, 3)
    assert pq.ParquetFile(data_path(store, "transcript", 0)).read()["text"].to_pylist() == [
        "one",
        "between",
        "two anew",
    ]


def test_blobs_and_side_tables_stay_out(store: DerivedStore) -> None:
    row: dict[str, object] = {
        "media_id": "a",
        "frame": 0,
        "start_s": 0.0,
        "end_s": 0.0,
        "width": 1,
        "height": 1,
        "reason": "image",
        "phash": bytes(8),
        "image": b"picture",
        "version": "v1",
    }
    store.write("frames", "a", schemas.table(schemas.FRAMES, [row]))
    store.write("frames", "a", schemas.FRAMES_TRACK.empty_table(), "track")
    compact(store, 0, {"frames": {"a": "v1"}}, ["frames"])
    assert "image" not in pq.ParquetFile(data_path(store, "frames", 0)).schema_arrow.names
    live = {"frames": {"a": "v1"}}
    assert "image" not in views.query(open_views(store, live), "from frames").column_names
    assert views.query(open_views(store, live, blobs=True), "select image from frames")["image"].to_pylist() == [
        b"picture"
    ]


def test_bad_files_are_named_left_out_of_sql_and_taken_in_once_mended(store: DerivedStore) -> None:
    live = {"good": "v1", "lost": "v1", "torn": "v1", "foreign": "v1", "older": "v1"}
    say(store, "good", "fine")
    say(store, "older", "old", version="v0")
    store.path("transcript", "torn").write_bytes(b"PAR1\x00")
    store.write("transcript", "foreign", pa.table({"media_id": ["foreign"]}))
    report = compacted(store, live)
    assert {item.media_id for item in report.skipped} == {"lost", "torn", "foreign", "older"}
    reasons = {item.media_id: item.reason for item in report.skipped}
    assert "missing" in reasons["lost"]
    assert "another version" in reasons["older"]
    assert texts(store, live) == ["fine"]
    say(store, "torn", "mended")
    report = compacted(store, live)
    assert (report.unchanged, report.reused, report.read) == (False, 1, 1)
    assert texts(store, live) == ["fine", "mended"]


def test_a_damaged_catalog_file_is_rebuilt_from_the_items_own_files(store: DerivedStore) -> None:
    say(store, "a", "one")
    say(store, "b", "two")
    compacted(store, {"a": "v1"})
    path = data_path(store, "transcript", 0)
    intact = path.read_bytes()
    path.write_bytes(intact[:4] + b"\xff" * 60 + intact[64:])
    report = compacted(store, {"a": "v1", "b": "v1"})
    assert (report.skipped, report.rows) == ((), 2)
    assert texts(store, {"a": "v1", "b": "v1"}) == ["one", "two"]


def test_an_item_of_many_row_groups_stays_whole(store: DerivedStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "ROW_GROUP_ROWS", 3)
    monkeypatch.setattr(catalog, "_SCAN_ROWS", 2)
    wanted = {media_id: [f"{media_id} {number}" for number in range(5)] for media_id in ("a", "b", "c")}
    for media_id, lines in wanted.items():
        say(store, media_id, *lines)
    compacted(store, {"a": "v1", "b": "v1"})
    report = compacted(store, {"b": "v1", "c": "v1"})
    assert (report.reused, report.read) == (1, 1)
    assert pq.ParquetFile(data_path(store, "transcript", 0)).metadata.num_row_groups > 1
    assert texts(store, {"b": "v1", "c": "v1"}) == wanted["b"] + wanted["c"]


@pytest.mark.parametrize(
    "point", ["catalog.before_swap", "catalog.after_data", "catalog.after_items", "storage.before_rename"]
)
def test_a_failure_at_any_point_shows_each_row_once(
    store: DerivedStore, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    say(store, "a", "one")
    say(store, "b", "two")
    compacted(store, {"a": "v1", "b": "v1"})
    say(store, "b", "two anew", version="v2")
    live = {"a": "v1", "b": "v2"}
    monkeypatch.setenv("MEDIA_FAULT", f"{point}:disk_full")
    monkeypatch.setattr("resources.faults._hits", {})
    with pytest.raises(OSError, match="injected"):
        compacted(store, live)
    assert texts(store, live) == ["one", "two anew"]
    monkeypatch.delenv("MEDIA_FAULT")
    assert not compacted(store, live).unchanged
    assert texts(store, live) == ["one", "two anew"]
    assert compacted(store, live).unchanged


def test_a_reader_keeps_its_view_while_the_bucket_is_compacted(store: DerivedStore) -> None:
    say(store, "a", "one")
    say(store, "b", "two")
    compacted(store, {"a": "v1"})
    reader = open_views(store, {"transcript": {"a": "v1", "b": "v1"}})
    compacted(store, {"a": "v1", "b": "v1"})
    assert views.query(reader, "select text from transcript order by 1")["text"].to_pylist() == ["one", "two"]


def test_two_compactions_of_one_bucket_do_not_meet(store: DerivedStore) -> None:
    with exclusive(store, "catalog-000"), pytest.raises(BucketBusy, match="catalog-000 is being rebuilt"):
        compacted(store, {})


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    steps=st.lists(
        st.dictionaries(st.sampled_from("abcdef"), st.tuples(st.integers(0, 3), st.integers(0, 2)), max_size=6),
        min_size=1,
        max_size=4,
    )
)
def test_whatever_came_before_the_catalog_equals_the_live_files(
    tmp_path_factory: pytest.TempPathFactory, steps: list[dict[str, tuple[int, int]]]
) -> None:
    store = DerivedStore(tmp_path_factory.mktemp("steps"))
    live: Pairs = {}
    for step in steps:
        live = {media_id: f"v{version}-{rows}" for media_id, (version, rows) in step.items()}
        for media_id, (version, rows) in step.items():
            lines = [f"{media_id} {version} {row}" for row in range(rows)]
            say(store, media_id, *lines, version=live[media_id])
        wanted = [f"{key} {step[key][0]} {row}" for key in sorted(step) for row in range(step[key][1])]
        assert texts(store, live) == wanted
        report = compacted(store, live)
        assert (report.items, report.rows) == (len(live), len(wanted))
        assert pq.ParquetFile(data_path(store, "transcript", 0)).read()["text"].to_pylist() == wanted
        assert texts(store, live) == wanted


# --- views


VIEWS = [*schemas.PER_MEDIA, "near_duplicates", "outcomes"]


@pytest.mark.parametrize("view", VIEWS)
def test_an_empty_library_has_every_view_with_its_columns_and_no_rows(store: DerivedStore, view: str) -> None:
    found = views.query(open_views(store, {}), f"from {view}")
    schema = {"near_duplicates": schemas.NEAR_DUPLICATES, "outcomes": views.OUTCOMES}.get(view) or schemas.PER_MEDIA[
        view
    ]
    assert found.num_rows == 0
    assert set(found.column_names) == set(schema.names) - {"image", "flac"}


def test_only_rows_of_the_live_version_show(store: DerivedStore) -> None:
    say(store, "a", "recorded", version="v1")
    say(store, "b", "written, not recorded", version="v2")
    assert texts(store, {"a": "v1", "b": "v1", "never": "v1"}) == ["recorded"]


def test_the_first_registered_item_of_equal_bytes_is_the_original(store: DerivedStore) -> None:
    for media_id, sha256 in (("a", "x"), ("b", "x"), ("c", "x"), ("d", "y")):
        register(store, media_id, sha256)
    live = {"media": dict.fromkeys("abcd", "v1")}
    sql = "select media_id, duplicate_of from media order by 1"
    by_id = views.query(open_views(store, live), sql)["duplicate_of"].to_pylist()
    by_order = views.query(open_views(store, live, registered=["c", "b"]), sql)["duplicate_of"].to_pylist()
    assert (by_id, by_order) == ([None, "a", "a", None], ["c", "c", None, None])


def test_near_duplicates_of_items_that_are_gone_do_not_show(store: DerivedStore) -> None:
    rows: list[dict[str, object]] = [
        {"group_id": "a", "media_id": "a", "other_id": other, "method": "exact", "distance": 0.0, "evidence": "bytes"}
        for other in ("b", "gone")
    ]
    store.write("near_duplicates", "all", schemas.table(schemas.NEAR_DUPLICATES, rows))
    for media_id in ("a", "b"):
        register(store, media_id)
    connection = open_views(store, {"media": {"a": "v1", "b": "v1"}})
    assert views.query(connection, "select other_id from near_duplicates")["other_id"].to_pylist() == ["b"]


def test_outcomes_are_a_view_of_all_states(store: DerivedStore) -> None:
    rows = [
        {"media_id": "a", "asset": "media", "version": "v1", "status": status, "error": "it's \x1b bad", "extra": 1}
        for status in ("ok", "quarantined")
    ]
    connection = views.connect(store, views.outcomes_table(rows), schemas.PER_MEDIA, schemas.NEAR_DUPLICATES)
    sql = "select status, count(*) as n from outcomes group by 1 order by 1"
    assert views.query(connection, sql).to_pylist() == [{"status": "ok", "n": 1}, {"status": "quarantined", "n": 1}]


@pytest.mark.parametrize(
    ("sql", "message"),
    [
        ("select 1; select 2", "one statement, not 2"),
        ("", "one statement, not 0"),
        ("drop table outcomes", "DROP statements are refused"),
        ("create table x as select 1", "CREATE statements are refused"),
        ("copy media to '/tmp/media-out.csv'", "COPY statements are refused"),
        ("attach '/tmp/other.db'", "ATTACH statements are refused"),
        ("set threads = 1", "SET statements are refused"),
        ("install httpfs", "LOAD statements are refused"),
        ("selec 1", "syntax error"),
        ("select nope from media", '"nope" not found'),
        ("select * from read_text('/etc/passwd')", "disabled by configuration"),
        ("select * from '/etc/passwd.csv'", "disabled by configuration"),
        ("select * from glob('/*')", "disabled by configuration"),
        ("select * from outcomes_of_python", "does not exist"),
        ("select * from read_parquet('https://example.com/x.parquet')", ""),
        ("explain analyze select * from read_blob('/etc/passwd')", "disabled by configuration"),
    ],
)
def test_sql_reads_the_views_and_nothing_else(store: DerivedStore, sql: str, message: str) -> None:
    say(store, "a", "kept")
    connection = open_views(store, {"transcript": {"a": "v1"}})
    outcomes_of_python = pa.table({"secret": [1]})
    with pytest.raises(BadQuery) as raised:
        views.query(connection, sql)
    assert message in raised.value.message
    assert "\n" not in str(raised.value)
    assert outcomes_of_python.num_rows == 1
    assert views.query(connection, "select text from transcript")["text"].to_pylist() == ["kept"]


@pytest.mark.parametrize(
    "sql", ["describe media", "show tables", "explain select 1", "with x as (select 1) from x", "values (1)"]
)
def test_reading_statements_of_every_form_are_welcome(store: DerivedStore, sql: str) -> None:
    assert views.query(open_views(store, {}), sql).num_rows > 0


def test_a_limit_bounds_the_answer(store: DerivedStore) -> None:
    say(store, "a", *map(str, range(10)))
    connection = open_views(store, {"transcript": {"a": "v1"}})
    assert views.query(connection, "select segment from transcript order by 1;", limit=3)["segment"].to_pylist() == [
        0,
        1,
        2,
    ]


def test_an_object_store_reads_the_same(tmp_path: Path) -> None:
    store = DerivedStore(UPath(f"memory://catalog-{tmp_path.name}"))
    assert Buckets(store, 2).count == 2
    say(store, "a", "one")
    say(store, "b", "two")
    live = {"a": "v1", "b": "v1", "lost": "v1"}
    assert texts(store, live) == ["one", "two"]
    assert [item.media_id for item in compacted(store, {**live, "b": "v1"}).skipped] == ["lost"]
    say(store, "b", "two anew", version="v2")
    assert texts(store, {"a": "v1", "b": "v2"}) == ["one", "two anew"]
    assert compacted(store, {"a": "v1", "b": "v2"}).reused == 1
    assert json.loads(manifest_path(store, "transcript", 0).read_bytes())["rows"] == 2
    assert items_path(store, "transcript", 0).exists()
