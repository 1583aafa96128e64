"""The Ray executor on a real cluster: steps go where their tags say, or are refused; what is lost comes back."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import sqlalchemy as sa
from dagster._serdes import serialize_value

from jobs.on_ray import executor
from jobs.planner import CAREFUL, Batch, Planner
from media_assets.orchestration.partitions import add_partitions, range_tags
from resources import faults
from resources.compute.ray_cluster import ClusterUnavailable, check_fits, check_reachable
from resources.ingest.discovery import discover
from resources.ingest.uploads import Upload
from resources.library import Library
from resources.settings import Ray, Settings
from sensors.planner import follow, request
from tests.cluster import ray_job
from tests.cluster.ray_cluster import PROJECT, Cluster
from tests.conftest import SILENT

DEADLINE_S = 120.0
PHOTOS = PROJECT / "samples" / "media"


@pytest.fixture
def folder(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the steps leave word; the executor knows the cluster by RAY_ADDRESS."""
    monkeypatch.setenv("RAY_ADDRESS", cluster.dashboard)
    monkeypatch.setenv(ray_job.FOLDER, str(tmp_path))
    monkeypatch.setenv("MEDIA_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def instance(tmp_path: Path) -> Iterator[dg.DagsterInstance]:
    """An instance that other processes can open."""
    (tmp_path / "dagster").mkdir()
    with dg.DagsterInstance.local_temp(str(tmp_path / "dagster"), overrides=SILENT) as opened:
        yield opened


@pytest.fixture
def photos(folder: Path, database_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Library]:
    """A library with the photos of the samples, whose failures wait for nothing."""
    monkeypatch.setenv("MEDIA_DATABASE_URL", database_url)
    monkeypatch.setenv("MEDIA_ENGINE__RETRY_BASE_S", "0")
    opened = Library(Settings.load(folder))
    found = [upload for upload in discover([str(PHOTOS)]) if isinstance(upload, Upload)]
    opened.registry.add([upload for upload in found if upload.uri.endswith(".jpg")])
    yield opened
    opened.close()


def run(job: Callable[..., Any], instance: dg.DagsterInstance, **options: Any) -> dg.JobExecutionResult:
    """The run of one of the jobs of tests/cluster/ray_job.py."""
    return dg.execute_job(dg.reconstructable(job), instance, raise_on_error=False, **options)


def run_batch(batch: Batch, library: Library, instance: dg.DagsterInstance) -> dg.JobExecutionResult:
    """The run that planner_sensor asks for."""
    add_partitions(instance, library.settings, batch.keys)
    wanted = request(batch, library.settings)
    return run(ray_job.decode, instance, run_config=wanted.run_config, tags=wanted.tags)


def finished(library: Library) -> dict[tuple[str, str], int]:
    """How often each outcome was finished, by media ID and asset."""
    done = "select media_id, asset from outcome_history where status in ('ok', 'not_applicable')"
    query = f"select media_id, asset, count(*) from ({done}) done group by 1, 2"
    with library.database.engine.connect() as connection:
        return {(media_id, asset): times for media_id, asset, times in connection.execute(sa.text(query))}


def said(folder: Path, step: str) -> list[str]:
    """The visible devices of each time a step ran."""
    return [line for file in folder.glob(f"{step}-*") for line in file.read_text().splitlines()]


def wait_for(condition: Callable[[], Any]) -> None:
    """Wait until it holds."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def failure(result: dg.JobExecutionResult) -> str:
    """The event log's account of a failed run."""
    assert not result.success
    return str([event.event_specific_data for event in result.all_events])


@pytest.mark.parametrize("known", ["address", "dashboard"])
def test_steps_go_where_their_tags_say(
    cluster: Cluster, folder: Path, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch, known: str
) -> None:
    """Given a step for half a GPU and one for none, then the first sees one device and the other none; the cluster may
    be known by its own address or by that of its job server."""
    monkeypatch.setenv("RAY_ADDRESS", getattr(cluster, known))
    assert run(ray_job.placed, instance).success
    (devices,) = said(folder, "gpu")
    assert len([device for device in devices.split(",") if device]) == 1
    assert said(folder, "cpu") == [""]


def test_a_backfill_materializes_its_partitions(photos: Library, instance: dg.DagsterInstance) -> None:
    """Given a run over a range of partitions, as a backfill makes them, then each of them is materialized."""
    keys = sorted(row["media_id"] for row in photos.registry.live())
    add_partitions(instance, photos.settings, keys)
    assert run(ray_job.decode, instance, tags=range_tags(keys[0], keys[-1])).success
    assert instance.get_materialized_partitions(dg.AssetKey("frames")) == set(keys)


def test_a_killed_step_fails_its_run_and_the_next_one_finishes_its_items(
    photos: Library, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given a batch whose step is killed with -9 in the middle of it, then its run fails and the planner's next batches
    do what it left, those that were in flight one at a time; nothing is finished twice."""
    planner = Planner(photos, [ray_job.DECODE.name])
    (batch,) = planner.tick().batches
    with monkeypatch.context() as patch:
        patch.setenv(faults.VARIABLE, "engine.after_commit:kill:2")
        assert "failed health check: Discovered failed Ray job" in failure(run_batch(batch, photos, instance))
    done = finished(photos)
    assert done
    assert len(done) < 3 * len(batch.keys)
    lanes = []
    assert follow(photos, instance) == []
    while again := planner.tick().batches:
        lanes += [each.lane for each in again]
        assert all(run_batch(each, photos, instance).success for each in again)
        assert follow(photos, instance) == []
    assert CAREFUL in lanes
    after = finished(photos)
    assert len(after) == 3 * len(batch.keys)
    assert set(after.values()) == {1}


def test_a_run_that_is_told_to_stop_stops_its_step(folder: Path, instance: dg.DagsterInstance) -> None:
    """Given a step under way, when the run's process is sent SIGTERM, then the step is interrupted where it was."""
    job = dg.reconstructable(ray_job.waiting)
    launched = instance.create_run_for_job(job.get_definition(), job_code_origin=job.get_python_origin())
    code = "import sys; from jobs.run_worker import execute; execute(*sys.argv[1:])"
    process = subprocess.Popen(
        [sys.executable, "-c", code, launched.run_id, serialize_value(instance.get_ref())], cwd=PROJECT
    )
    try:
        wait_for(lambda: said(folder, "endless"))
        instance.report_run_canceling(launched)
        process.send_signal(signal.SIGTERM)
        assert process.wait(DEADLINE_S) == 0
        wait_for(lambda: said(folder, "interrupted"))
    finally:
        process.kill()
        process.wait()
    stopped = instance.get_run_by_id(launched.run_id)
    assert stopped is not None
    assert stopped.status == dg.DagsterRunStatus.CANCELED


def test_a_job_that_is_stopped_from_outside_fails_its_run(
    cluster: Cluster, folder: Path, instance: dg.DagsterInstance
) -> None:
    """Given a step under way, when its Ray job is stopped, then the step is interrupted and its run fails."""
    from ray.job_submission import JobSubmissionClient

    def stop() -> None:
        wait_for(lambda: said(folder, "endless"))
        client = JobSubmissionClient(cluster.dashboard)
        for job in client.list_jobs():
            if job.status == "RUNNING" and job.submission_id:
                client.stop_job(job.submission_id)

    stopper = threading.Thread(target=stop)
    stopper.start()
    result = run(ray_job.waiting, instance)
    stopper.join()
    assert not result.success
    assert said(folder, "interrupted")


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("known", ["address", "dashboard"])
def test_a_step_no_node_can_take_fails_the_run_with_both_amounts(
    cluster: Cluster, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch, known: str
) -> None:
    """Given a step for eight GPUs, then the run ends at once and says what was asked and what there is."""
    monkeypatch.setenv("RAY_ADDRESS", getattr(cluster, known))
    assert "has 1 CPU and 8 GPU and" in failure(run(ray_job.oversized, instance))


def test_a_wrong_address_fails_the_run(instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given an address where nothing listens, then the run ends and names it."""
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:1")
    assert "Nothing answers at http://127.0.0.1:1" in failure(run(ray_job.oversized, instance))


@pytest.mark.parametrize(("scheme", "told"), [("", "is no Ray cluster"), ("http://", "cannot be used")])
def test_a_server_that_is_no_cluster_is_found_out(
    instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch, scheme: str, told: str
) -> None:
    """Given a port that accepts and says nothing, upon which Ray waits for ever, then it is refused in time."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        where = f"{scheme}127.0.0.1:{silent.getsockname()[1]}"
        refusing = executor(Settings(ray=Ray(address=where, connect_timeout_s=0.5)))
        assert refusing.executor_creation_fn is not None
        with pytest.raises(dg.DagsterError, match=told):
            refusing.executor_creation_fn(
                dg.InitExecutorContext(dg.reconstructable(ray_job.oversized), refusing, {}, instance)
            )


@pytest.mark.parametrize("where", ["head", "head:port", "ray://", "://:6379"])
def test_what_is_no_address_is_refused(where: str) -> None:
    """Given something without host or port, then the message says what an address looks like."""
    with pytest.raises(ClusterUnavailable, match="host:port"):
        check_reachable(where, 0.5)


def test_all_that_is_asked_for_must_be_on_one_node() -> None:
    """Given CPUs on one node and a GPU on another, then a step for both fits nowhere."""
    nodes = [{"CPU": 8.0, "memory": 2.0**30}, {"CPU": 1.0, "GPU": 1.0, "memory": 2.0**30}]
    check_fits(nodes, {"CPU": 1, "GPU": 0.5})
    check_fits(nodes, {"CPU": 8, "GPU": 0})
    with pytest.raises(ClusterUnavailable, match="8 CPU and 1 GPU; of 2 nodes the most is 8 CPU and 1 GPU"):
        check_fits(nodes, {"CPU": 8, "GPU": 1})
    with pytest.raises(ClusterUnavailable, match=r"2\.0 GiB memory; of 2 nodes the most is 1\.0 GiB memory"):
        check_fits(nodes, {"memory": 2.0**31})
