"""Purge: every derived byte of an item goes, nobody else's does, a kill is repaired, and what is left is found."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sqlalchemy as sa
from PIL import Image
from rich.console import Console

from cli import evaluating
from cli.exit_codes import Exit
from cli.instance import open_instance
from cli.purging import purge
from cli.run import Work
from cli.searching import open_views
from evals.result import EvalResult, NotProcessedError
from media_assets import schemas
from media_assets.orchestration.grouping import groups
from media_assets.orchestration.groups import build_group
from media_assets.orchestration.partitions import MEDIA, add_partitions, explicit_batch_tags
from resources.files.views import query
from resources.ingest.discovery import discover
from resources.ingest.registry import UnknownMedia
from resources.ingest.uploads import Removal, Upload
from resources.library import Library
from resources.records.outcomes import EVALUATION
from resources.records.tables import purges
from resources.settings import Engine, Settings
from tests.shelf import fill, put, rebuild

PROJECT = Path(__file__).parents[1]
SAMPLES = PROJECT / "samples" / "media"
DECODE = ("media", "frames", "audio")
SECRET = "xylophonist"  # a word that only the purged item says
PICTURE = base64.b64encode(b"a picture of the purged item alone").decode()
QUIET = Console(quiet=True)
KILLED = """
import json, os, sys
import alembic.command, alembic.config, duckdb, faiss, pandas, psycopg2, pyarrow.dataset  # once for all children
from rich.console import Console
from cli.purging import purge
from cli.searching import open_views
from resources.library import Library
from resources.files.views import query

home, media_id, *points = sys.argv[1:]
def call(fault, died=None):
    os.environ["MEDIA_FAULT"] = fault
    library = Library.open(home)
    if died is not None:
        state = library.registry.known([media_id])[media_id]
        shown = media_id in query(open_views(library), "select media_id from outcomes")["media_id"].to_pylist()
        print(json.dumps({"signal": os.WTERMSIG(died), "state": state, "shown": shown}), flush=True)
    purge(library, [media_id], yes=True, with_duplicates=False, as_json=True, console=Console(quiet=True))

died = None
for point in points:
    child = os.fork()  # a process of its own that need not import everything anew
    if child == 0:
        call(f"purge.{point}:kill", died)
        os._exit(0)
    _, died = os.waitpid(child, 0)
call("", died)
"""


@dataclass(frozen=True, slots=True)
class Home:
    """A library whose decode group really ran, with its Dagster instance, and IDs by file name."""

    library: Library
    instance: dg.DagsterInstance
    ids: dict[str, str]
    folder: Path

    def purge(self, *media_ids: str, code: Exit = Exit.OK, duplicates: bool = False) -> dict[str, Any]:
        """What `purge --yes --json` prints."""
        sys.stdout, kept = io.StringIO(), sys.stdout
        try:
            done = purge(self.library, media_ids, yes=True, with_duplicates=duplicates, as_json=True, console=QUIET)
            printed = sys.stdout.getvalue()
        finally:
            sys.stdout = kept
        assert done is code, printed
        report: dict[str, Any] = json.loads(printed)
        return report


@pytest.fixture(scope="module")
def home(server_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    """Photos (one a copy of another, one broken) and notes, decoded by a real run with previews and catalog."""
    admin = sa.create_engine(server_url, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(sa.text("create database purging"))
    admin.dispose()
    url = sa.make_url(server_url).set(database="purging").render_as_string(hide_password=False)
    folder = tmp_path_factory.mktemp("media")
    rng = np.random.default_rng(3)
    for name in ("one.jpg", "two.jpg", "three.jpg"):
        Image.fromarray(rng.integers(0, 255, (12, 16, 3), dtype=np.uint8)).resize((320, 240)).save(folder / name)
    (folder / "one_copy.jpg").write_bytes((folder / "one.jpg").read_bytes())
    (folder / "broken.jpg").write_bytes((folder / "two.jpg").read_bytes()[:300])
    (folder / "notes.txt").write_bytes((SAMPLES / "notes.txt").read_bytes())
    one_by_one = Engine(prepare_threads=1)  # so that the copy is made from the original, which comes first
    library = Library(Settings(home=tmp_path_factory.mktemp("home"), database_url=url, engine=one_by_one))
    environment = {key: os.environ.get(key) for key in ("DAGSTER_HOME", "MEDIA_DATABASE_URL", "MEDIA_HOME")}
    found = [upload for upload in discover([folder]) if isinstance(upload, Upload)]
    with open_instance(library) as instance:
        decode(library, instance, library.registry.add(found))
        rebuild(library, instance)
        ids = {Path(row["uri"]).name: row["media_id"] for row in library.registry.live()}
        assert len(ids) == 6
        yield Home(library, instance, ids, folder)
    library.close()
    for name, value in environment.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


def decode(library: Library, instance: dg.DagsterInstance, ids: list[str]) -> None:
    """Run the decode group without its checks."""
    group = groups(library.settings)[0]
    job = dg.Definitions(
        assets=[build_group(group, library.settings, library.models)],
        jobs=[dg.define_asset_job("decode_job", dg.AssetSelection.assets(*DECODE).without_checks())],
        resources={"media": dg.ResourceDefinition(lambda _: library)},
    ).resolve_job_def("decode_job")
    add_partitions(instance, library.settings, ids)
    config = {"ops": {group.name: {"config": {"keys": ids}}}}
    job.execute_in_process(instance=instance, run_config=config, tags=explicit_batch_tags(ids, library.settings))


def places(library: Library, needle: str) -> list[str]:
    """Every table and file that holds `needle`, found without the code under test."""
    found: list[str] = []
    with library.database.engine.connect() as connection:
        for table in sa.inspect(connection).get_table_names():
            count = connection.execute(
                sa.text(f'select count(*) from "{table}" t where strpos(t::text, :needle) > 0'), {"needle": needle}
            ).scalar_one()
            found += [f"table {table}"] * bool(count)
    for path in library.settings.home.rglob("*"):
        if not path.is_file():
            continue
        data = path.read_bytes()
        if path.suffix == ".parquet":
            data += str(pq.read_table(str(path), partitioning=None).to_pylist()).encode()
        if needle in str(path) or needle.encode() in data:
            found.append(f"file {path.relative_to(library.settings.home)}")
    return sorted(found)


def quote(home: Home, name: str) -> None:
    """Give an item all that a full run would leave: text, vectors, previews, check rows, logs, an evaluation."""
    media_id, library = home.ids[name], home.library
    uri = str(home.folder / name)
    sha256 = library.store.read("media", media_id)["sha256"][0].as_py()
    with library.database.engine.begin() as connection:
        connection.execute(sa.text("delete from outcomes where media_id = :id and asset = 'media'"), {"id": media_id})
    fill(library, media_id, uri, "lighthouse", sha256)
    said = library.store.read("transcript", media_id).to_pylist()
    said[0]["text"] = f"the {SECRET} plays"
    library.store.write("transcript", media_id, schemas.table(schemas.TRANSCRIPT, said))
    report = home.instance.report_runless_asset_event
    preview = {"picture: strip": dg.MetadataValue.md(f"![strip](data:image/png;base64,{PICTURE})")}
    report(dg.AssetMaterialization("shots", partition=media_id, metadata=preview, tags={"note": SECRET}))
    rows = [
        dg.TableRecord({"media_id": key, "value": text})
        for key, text in ((media_id, SECRET), (home.ids["three.jpg"], "somebody else's words"))
    ]
    report(
        dg.AssetCheckEvaluation(
            asset_key=dg.AssetKey("transcript"),
            check_name="expectations",
            passed=False,
            description=f"worst is {media_id}, {SECRET}",
            metadata={"worst rows": dg.MetadataValue.table(rows), "items": 2},
        )
    )
    logs = library.settings.home / "dagster" / "storage" / "some-run" / "compute_logs"
    logs.mkdir(parents=True)
    (logs / "step.err").write_text(f"started\ntranscript of {media_id}: {SECRET}\nended\n")
    hypothesis = pa.table({"file": [name, "film.mp4"], "hypothesis": [SECRET, "other words"]})
    EvalResult("asr", "golden", "0" * 64, "asr@1", {}, hypothesis).write(library.settings.home)
    pictured = {"picture": dg.MetadataValue.md(f"![bars](data:image/png;base64,{PICTURE})"), "wer": 0.5}
    report(dg.AssetMaterialization(["evals", "asr"], metadata=pictured))
    rebuild(library, home.instance)
    # What writers leave that die: temporary files, and an index build that never served.
    root = Path(str(library.store.root))
    (root / "frames" / f".{media_id}.parquet.0a1b2c3d").write_bytes(SECRET.encode())
    for path in list((root / "catalog" / "transcript").glob("bucket=*.parquet")):
        if SECRET in str(pq.read_table(str(path), partitioning=None).to_pylist()):
            path.with_name(f".{path.name}.0a1b2c3d").write_bytes(SECRET.encode())


@dataclass(frozen=True, slots=True)
class Purged:
    """A purge of `one.jpg`: what it reported, and where secret and picture stood before.

    `untouched` has the files of another item as they were, `original` the bytes of the upload.
    """

    report: dict[str, Any]
    before: dict[str, list[str]]
    untouched: dict[Path, bytes]
    original: bytes


@pytest.fixture(scope="module")
def purged(home: Home) -> Purged:
    """The purge of an item with words, pictures, records and logs everywhere."""
    quote(home, "one.jpg")
    before = {needle: places(home.library, needle) for needle in (SECRET, PICTURE)}
    others = home.library.settings.home.rglob(f"*{home.ids['three.jpg']}*")
    untouched = {path: path.read_bytes() for path in others if path.is_file()}
    original = (home.folder / "one.jpg").read_bytes()
    return Purged(home.purge(home.ids["one.jpg"]), before, untouched, original)


def test_every_derived_byte_of_an_item_goes_and_nobody_elses(home: Home, purged: Purged) -> None:
    """Given an item with words, pictures, records and logs everywhere, when it is purged, then nothing is left."""
    media_id, other = home.ids["one.jpg"], home.ids["three.jpg"]
    before, report, untouched = purged.before, purged.report, purged.untouched
    tables = {"asset_check_executions", "asset_keys", "event_logs"}
    assert {f"table {name}" for name in tables} <= set(before[SECRET]) | set(before[PICTURE])
    folders = {Path(place.removeprefix("file ")).parts[1] for place in before[SECRET] if place.startswith("file ")}
    assert {"transcript", "catalog", "frames", "storage", "asr"} <= folders
    assert report["complete"]
    assert (report["left"], report["problems"], report["running"]) == ([], [], [])
    assert places(home.library, SECRET) == []
    assert places(home.library, PICTURE) == []
    references = {place.removeprefix("table ") for place in places(home.library, media_id)}
    assert references - {"run_tags"} == {"uploads", "purges", "runs", "outcomes"}
    assert {name.split(".")[0] for name in report["references"]} == references
    assert "outcomes.copied_from" in report["references"]  # of its copy, which keeps its own files
    assert report["erased"]["files"] >= 6
    assert report["erased"]["checks_redacted"] == 1
    assert report["scanned"]["files"] > 20
    assert report["scanned"]["rows"] > 100
    with home.library.database.engine.connect() as connection:
        stray = "select count(*) from asset_event_tags where event_id not in (select id from event_logs)"
        assert connection.execute(sa.text(stray)).scalar_one() == 0
    # Neighbours, shared files and the original are as they were.
    assert {path: path.read_bytes() for path in untouched} == untouched
    assert (home.folder / "one.jpg").read_bytes() == purged.original
    assert "somebody else" in str(home.instance.event_log_storage.get_asset_check_execution_history(
        dg.AssetCheckKey(dg.AssetKey("transcript"), "expectations"), limit=1)[0].event)  # fmt: skip
    logs = home.library.settings.home / "dagster" / "storage" / "some-run" / "compute_logs" / "step.err"
    assert logs.read_text() == "started\nended\n"
    kept = query(open_views(home.library), "select media_id from media")["media_id"].to_pylist()
    assert media_id not in kept
    assert other in kept


def test_dagster_reads_its_events_after_a_purge(home: Home, purged: Purged) -> None:
    """Given events that were erased and redacted, then Dagster still answers for its assets, and the item is gone."""
    gone, other = home.ids["one.jpg"], home.ids["three.jpg"]
    for asset in DECODE:
        materialized = home.instance.get_materialized_partitions(dg.AssetKey(asset))
        assert gone not in materialized
    assert other in home.instance.get_materialized_partitions(dg.AssetKey("frames"))
    # A copy keeps what it shows, as it keeps its tables.
    wanted = dg.AssetRecordsFilter(dg.AssetKey("frames"), asset_partitions=[home.ids["one_copy.jpg"]])
    (copied,) = home.instance.fetch_materializations(wanted, limit=1).records
    assert copied.asset_materialization is not None
    assert "picture: contact sheet" in copied.asset_materialization.metadata
    records = home.instance.get_asset_records([dg.AssetKey("frames"), dg.AssetKey("shots")])
    assert records
    assert not home.instance.has_dynamic_partition(MEDIA, gone)
    assert home.instance.has_dynamic_partition(MEDIA, other)
    for run in home.instance.get_run_records():
        assert home.instance.all_logs(run.dagster_run.run_id)
    (latest,) = home.instance.fetch_materializations(dg.AssetKey(["evals", "asr"]), limit=1).records
    assert latest.asset_materialization is not None
    assert latest.asset_materialization.metadata["wer"].value == 0.5


def test_a_purged_version_is_not_taken_in_again(home: Home, purged: Purged) -> None:
    """Given a purged file that still lies where it was, when the folder is run again, then it is left alone."""
    work = Work(home.library, QUIET, DECODE)
    work._instance = home.instance
    summary = work.run([str(home.folder)])
    assert summary.registered == 0
    assert home.ids["one.jpg"] not in {failure["media_id"] for failure in summary.failures}
    assert home.library.outcomes.load([home.ids["one.jpg"]]) == {}


def test_failures_leave_no_sentence_behind(home: Home) -> None:
    """Given a quarantined file, whose error stands in the log of its run and on its partitions' pages, when it is
    purged, then the log is clean and nothing is observed of it any more."""
    media_id = home.ids["broken.jpg"]
    seen = [dg.AssetRecordsFilter(dg.AssetKey(asset), asset_partitions=[media_id]) for asset in DECODE]
    assert all(home.instance.fetch_observations(wanted, limit=10).records for wanted in seen)
    assert {"table event_logs", "table outcome_history", "table outcomes"} <= set(places(home.library, media_id))
    report = home.purge(media_id)
    assert report["erased"]["events"] + report["erased"]["events_redacted"] >= 1
    left = {place.removeprefix("table ") for place in places(home.library, media_id)}
    assert left <= {"uploads", "purges", "runs", "run_tags"}
    assert not any(home.instance.fetch_observations(wanted, limit=10).records for wanted in seen)


def test_copies_are_told_and_purged_on_demand(home: Home) -> None:
    """Given two uploads of the same bytes, when one is purged, then the other is named; with the option it goes too."""
    first = put(home.library, "first.mp3", "tram", "c" * 64)
    second = put(home.library, "second.mp3", "tram", "c" * 64)
    home.library.registry.register([], [Removal("/shelf/second.mp3")])
    report = home.purge(first)
    assert [(twin["media_id"], twin["state"], twin["of"]) for twin in report["duplicates"]] == [
        (second, "removed", first)
    ]
    assert home.library.store.exists("transcript", second)
    third = put(home.library, "third.mp3", "tram", "c" * 64)
    report = home.purge(third, duplicates=True)
    assert {entry["media_id"]: entry["state_before"] for entry in report["purged"]} == {
        third: "live",
        second: "removed",
    }
    assert report["duplicates"] == []
    assert not home.library.store.exists("transcript", second)


def test_the_copies_of_a_purge_that_died_are_not_forgotten(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given a purge with copies that died half-way, when another item is purged, then it is brought to its end too."""
    one, two = (put(home.library, f"{name}.mp3", "tram", "b" * 64) for name in ("left", "right"))
    other = put(home.library, "unrelated.mp3", "orchard", "9" * 64)
    rebuild(home.library, home.instance)
    monkeypatch.setenv("MEDIA_FAULT", "purge.after_records:raise")
    with pytest.raises(RuntimeError, match="injected"):
        home.purge(one, duplicates=True)
    monkeypatch.delenv("MEDIA_FAULT")
    assert home.library.registry.known([one, two]) == {one: "purged", two: "purged"}
    assert any(place.startswith("file derived/catalog/") for place in places(home.library, two))
    report = home.purge(other)
    assert [entry["media_id"] for entry in report["purged"]] == [other, one, two]
    assert report["complete"]
    assert set(places(home.library, two)) == {"table uploads", "table purges"}


def test_what_is_left_is_found_and_told(home: Home) -> None:
    """Given copies somebody made of an item, when it is purged, then each is named and the purge is not complete."""
    media_id = put(home.library, "copied.mp3", "orchard", "d" * 64)
    root = Path(str(home.library.store.root))
    (root / "exports").mkdir()
    planted = [root / "exports" / name for name in (f"old-{media_id}.bin", "notes.json", "x.parquet")]
    planted[0].write_bytes(b"")
    planted[1].write_text(json.dumps({"of": media_id}))
    home.library.store.write_bytes(root / "exports" / "x.parquet", _parquet(pa.table({"media_id": ["a", media_id]})))
    with home.library.database.engine.begin() as connection:
        connection.execute(sa.text("create table notes (id int, body jsonb)"))
        connection.execute(sa.text("insert into notes values (1, :body)"), {"body": json.dumps([media_id])})
    report = home.purge(media_id, code=Exit.ITEMS_FAILED)
    assert not report["complete"]
    assert sorted(report["left"]) == sorted(
        [
            "1 rows of table notes, column body",
            f"file {planted[0]}",
            f"text in {planted[1]}",
            f"rows in {planted[2]}",
        ]
    )
    for path in planted:
        path.unlink()
    with home.library.database.engine.begin() as connection:
        connection.execute(sa.text("drop table notes"))
    assert home.purge(media_id)["complete"]


def _parquet(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()


def test_a_run_that_may_still_write_keeps_a_purge_from_being_complete(home: Home) -> None:
    """Given a run under way whose process lives, then the purge says so; a run whose process died does not count."""
    media_id = put(home.library, "busy.mp3", "orchard", "e" * 64)
    with home.library.database.engine.begin() as connection:
        for run_id in ("living-run", "dead-run"):
            values = {"run_id": run_id, "status": "STARTED", "run_body": "{}"}
            statement = "insert into runs (run_id, status, run_body) values (:run_id, :status, :run_body)"
            connection.execute(sa.text(statement), values)
    try:
        with home.library.outcomes.lease("living-run"):
            report = home.purge(media_id, code=Exit.ITEMS_FAILED)
            assert report["running"] == ["living-run"]
        assert home.purge(media_id)["running"] == []
    finally:
        with home.library.database.engine.begin() as connection:
            connection.execute(sa.text("delete from runs where run_id in ('living-run', 'dead-run')"))


def test_an_evaluation_that_may_still_write_counts_as_a_run(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given an evaluation from the command line under way, then a purge names it, and is complete once it is over."""
    media_id = put(home.library, "judged.mp3", "orchard", "9" * 64)
    running: list[str] = []

    def purges(*_: Any) -> None:
        running.extend(home.purge(media_id, code=Exit.ITEMS_FAILED)["running"])
        raise NotProcessedError("interrupted here")

    monkeypatch.setattr(evaluating, "evaluate", purges)
    with pytest.raises(NotProcessedError):
        evaluating.evaluate_all(home.library, None, False, QUIET)
    assert running == [EVALUATION]
    assert home.purge(media_id)["running"] == []


def test_unknown_items_and_unconfirmed_purges_change_nothing(home: Home) -> None:
    """Given an unknown ID, or nobody who confirms, then the exit code says so and nothing is purged."""
    media_id = put(home.library, "kept.mp3", "orchard", "f" * 64)
    known = {"yes": True, "with_duplicates": False, "as_json": False, "console": QUIET}
    with pytest.raises(UnknownMedia, match="No media item no-such-item; nothing was purged"):
        purge(home.library, [media_id, "no-such-item"], **known)  # type: ignore[arg-type]
    assert purge(home.library, [media_id], **{**known, "yes": False}) is Exit.USAGE  # type: ignore[arg-type]
    assert home.library.registry.known([media_id]) == {media_id: "live"}


def test_a_kill_anywhere_is_repaired_by_running_again(home: Home) -> None:
    """Given a purge killed at each of its steps in turn, when it is run once more, then nothing is left."""
    media_id = put(home.library, "killed.mp3", "harbour", "1" * 64)
    said = home.library.store.read("transcript", media_id).to_pylist()
    said[0]["text"] = f"the {SECRET} again"
    home.library.store.write("transcript", media_id, schemas.table(schemas.TRANSCRIPT, said))
    rebuild(home.library, home.instance)
    points = ("after_tombstone", "after_files", "after_records", "after_catalog", "before_verify")
    arguments = [str(home.library.settings.home), media_id, *points]
    environment = {**os.environ, "MEDIA_DATABASE_URL": str(home.library.database.url)}
    command = [sys.executable, "-c", KILLED, *arguments]
    done = subprocess.run(command, env=environment, cwd=PROJECT, capture_output=True, text=True, check=True)
    *killed, last = map(json.loads, done.stdout.splitlines())
    assert killed == [{"signal": signal.SIGKILL, "state": "purged", "shown": False}] * len(points)
    assert last["complete"]
    assert places(home.library, SECRET) == []
    with home.library.database.engine.connect() as connection:
        steps = sa.select(purges.c.step).where(purges.c.media_id == media_id).order_by(purges.c.id)
        assert list(connection.execute(steps).scalars()) == ["begun"] * (len(points) + 1) + ["erased"]


def test_derived_files_on_an_object_store_are_purged_and_searched(database_url: str, tmp_path: Path) -> None:
    """Given derived files on a remote file system, when an item is purged, then its files go and copies are found."""
    settings = Settings(home=tmp_path, database_url=database_url, storage_url=f"memory://purge-{tmp_path.name}")
    library = Library(settings)
    with dg.DagsterInstance.ephemeral() as instance:
        media_id, other = put(library, "gone.mp3", "tram", "7" * 64), put(library, "kept.mp3", "tram", "8" * 64)
        rebuild(library, instance)
    remote = Home(library, instance, {}, tmp_path)
    planted = library.store.root / "exports" / "x.parquet"
    library.store.write_bytes(planted, _parquet(pa.table({"media_id": [media_id]})))
    report = remote.purge(media_id, code=Exit.ITEMS_FAILED)
    assert [line.split()[0] for line in report["left"]] == ["rows"]
    assert "exports/x.parquet" in report["left"][0]
    planted.unlink()
    assert remote.purge(media_id)["complete"]
    names = library.store.root.fs.find(library.store.root.path)
    assert not [name for name in names if media_id in name]
    assert [name for name in names if other in name]
    library.close()
