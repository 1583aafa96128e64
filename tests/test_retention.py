"""What is kept of the past: old runs go, except where their events are the last word; so do old captured logs."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import dagster as dg
import pytest
import yaml

from media_assets.orchestration.partitions import add_partitions
from resources.ingest.discovery import discover
from resources.ingest.uploads import Upload
from resources.library import Library
from resources.settings import Retention
from sensors import retention as module
from sensors.retention import Place, build_retention_sensor, delete_logs, delete_runs
from tests.conftest import SILENT
from tests.local import DECODED, Local

PROJECT = Path(__file__).parents[1]
KEEP = Retention(runs_days=10, logs_days=10)
LATER = datetime.now(UTC) + timedelta(days=11)


@pytest.fixture
def local(library: Library, tmp_path: Path) -> Iterator[Local]:
    """Two documents and one that is empty, and an instance with a folder of its own."""
    folder = tmp_path / "media"
    folder.mkdir()
    (folder / "a.txt").write_text("The harbour is quiet.")
    (folder / "b.txt").write_text("Bread rests before baking.")
    (folder / "c.txt").write_text("")
    ids = library.registry.add([found for found in discover([folder]) if isinstance(found, Upload)])
    (tmp_path / "dagster").mkdir()
    with dg.DagsterInstance.local_temp(str(tmp_path / "dagster"), overrides=SILENT) as instance:
        add_partitions(instance, library.settings, ids)
        yield Local(library, instance, ids)


def left(local: Local, now: datetime = LATER) -> set[str]:
    """Runs that are there after a whole pass."""
    place, kept, deleted = delete_runs(local.instance, KEEP, Place(), now, time.monotonic() + 60)
    assert place.after is None
    assert place.rest_until is not None
    runs = {run.run_id for run in local.instance.get_runs()}
    assert kept + deleted >= len(runs) if now == LATER else (kept, deleted) == (0, 0)
    return runs


def test_runs_go_when_others_have_the_last_word(local: Local) -> None:
    """Given old runs, then those whose every partition was told of again later go with their events, and each
    partition still has its latest materialization."""
    first = local.run(*DECODED, keys=local.ids[:1]).run_id
    second = local.run(*DECODED, keys=local.ids[1:2]).run_id
    assert left(local) == {first, second}
    third = local.run("media").run_id  # not `frames` and `audio`
    assert left(local) == {first, second, third}
    fourth = local.run(*DECODED).run_id
    assert left(local) == {fourth}
    for asset in DECODED:
        assert local.instance.get_materialized_partitions(dg.AssetKey(asset)) == set(local.ids[:2])
    assert local.instance.all_logs(first) == []


def test_why_something_failed_is_kept_until_it_is_made(local: Local, library: Library) -> None:
    """Given an old run that only told why an item failed, then it stays; once a later run made the item, it goes."""
    empty = local.ids[2]
    failed = local.run("media", keys=[empty]).run_id
    assert left(local) == {failed}
    local.instance.report_runless_asset_event(dg.AssetMaterialization("media", partition=empty))
    assert left(local) == set()


def test_young_and_unfinished_runs_stay(local: Local) -> None:
    """Given runs without any asset, then old finished ones go, and those that are young or not over stay."""

    @dg.job
    def nothing() -> None:
        pass

    done = nothing.execute_in_process(instance=local.instance).run_id
    under_way = local.instance.create_run_for_job(nothing, status=dg.DagsterRunStatus.STARTED).run_id
    assert left(local, datetime.now(UTC)) == {done, under_way}
    assert left(local) == {under_way}


def test_a_pass_goes_on_where_its_time_was_up_and_rests(local: Local) -> None:
    """Given a tick without time, then nothing is deleted and the next goes on; after a pass comes a rest."""
    run = local.run("media", keys=local.ids[:1]).run_id
    again = local.run("media").run_id
    assert delete_runs(local.instance, KEEP, Place(), LATER, time.monotonic() - 1) == (Place(), 0, 0)
    place, kept, deleted = delete_runs(local.instance, KEEP, Place(), LATER, time.monotonic() + 60)
    assert (kept, deleted) == (1, 1)
    assert {r.run_id for r in local.instance.get_runs()} == {again} != {run}
    assert delete_runs(local.instance, KEEP, place, LATER, time.monotonic() + 60) == (place, 0, 0)
    never = Retention(runs_days=0, logs_days=0)
    assert delete_runs(local.instance, never, Place(), LATER, time.monotonic() + 60) == (Place(), 0, 0)


def test_old_captured_logs_go(local: Local) -> None:
    """Given captured logs of ticks and runs, then old ones go with their folders, and what is young, of a run under way
    or no log stays."""

    @dg.job
    def nothing() -> None:
        pass

    under_way = local.instance.create_run_for_job(nothing, status=dg.DagsterRunStatus.STARTED).run_id
    folder = Path(local.instance.storage_directory())
    old = [folder / "repository" / "planner_sensor" / "5.err", folder / "old-run" / "compute_logs" / "x.complete"]
    kept = [
        folder / "repository" / "folder_sensor" / "6.err",
        folder / under_way / "compute_logs" / "x.err",
        folder / "of-somebody" / "notes.txt",
    ]
    for path in (*old, *kept):
        path.parent.mkdir(parents=True)
        path.write_text("a line\n")
        os.utime(path, (1.0, 1.0))
    os.utime(kept[0])
    now = datetime.now(UTC)
    assert delete_logs(local.instance, Retention(runs_days=0, logs_days=0), now) == 0
    assert delete_logs(local.instance, KEEP, now) == 2
    assert not any(path.parent.exists() for path in old)
    assert not (folder / "old-run").exists()
    assert all(path.exists() for path in kept)
    assert delete_logs(local.instance, KEEP, LATER) == 1


def test_the_sensor_says_what_it_did(local: Local, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given an installation, when the sensor ticks, then it says what was deleted, and remembers its rest."""
    local.run("media", keys=local.ids[:1])
    local.run("media")
    settings = local.library.settings.model_copy(update={"retention": Retention(runs_days=1e-9)})
    sensor = build_retention_sensor(settings)
    context = dg.build_sensor_context(instance=local.instance)
    result = sensor.evaluate_tick(context)
    assert result.skip_message == "Deleted 1 old runs and 0 log files; 1 old runs are needed."
    monkeypatch.setattr(module, "delete_logs", lambda *_: 0)
    again = sensor.evaluate_tick(dg.build_sensor_context(instance=local.instance, cursor=result.cursor))
    assert again.skip_message == "Deleted 0 old runs and 0 log files; 0 old runs are needed."


@pytest.mark.parametrize("name", ["dagster.yaml", *(f"deploy/{at}/dagster.yaml" for at in ("ray", "ecs", "k8s"))])
def test_ticks_are_kept_for_some_days(name: str, tmp_path: Path) -> None:
    """Given an instance of the project, then no kind of tick is kept for ever."""
    given = yaml.safe_load((PROJECT / name).read_text())
    overrides = {"retention": given["retention"]} | SILENT
    with dg.DagsterInstance.local_temp(str(tmp_path), overrides=overrides) as instance:
        for kind in ("sensor", "schedule"):
            kept = instance.get_settings("retention")[kind]["purge_after_days"]
            assert set(kept) == {"skipped", "started", "success", "failure"}
            assert all(days > 0 for days in kept.values())
