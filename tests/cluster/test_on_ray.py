"""The Ray executor on a real cluster: steps go where their tags say, outlive their node, or are refused."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dagster as dg
import pytest
from dagster._serdes import serialize_value

from jobs import step_pool
from jobs.on_ray import _Job, _RayExecutor, _steps
from jobs.step_pool import NAME, NODE, PoolGone, StepPool, Wanted, _Process
from resources.ray_cluster import ClusterUnavailable, check_fits, check_reachable
from resources.settings import Ray, Settings
from tests.cluster import ray_job
from tests.cluster.ray_cluster import PROJECT, Cluster, ray_cluster
from tests.conftest import SILENT

DEADLINE_S = 120.0
CPUS = 6  # of the cluster


@pytest.fixture
def folder(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the steps leave word; the executor knows the cluster by RAY_ADDRESS."""
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    monkeypatch.setenv(ray_job.FOLDER, str(tmp_path))
    monkeypatch.setenv("MEDIA_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def instance(tmp_path: Path) -> Iterator[dg.DagsterInstance]:
    """An instance that other processes can open."""
    (tmp_path / "dagster").mkdir()
    with dg.DagsterInstance.local_temp(str(tmp_path / "dagster"), overrides=SILENT) as opened:
        yield opened


def run(job: dg.JobDefinition, instance: dg.DagsterInstance) -> dg.JobExecutionResult:
    """The run of one of the jobs of tests/cluster/ray_job.py."""
    return dg.execute_job(dg.reconstructable(job), instance, raise_on_error=False)


def said(folder: Path, step: str) -> list[str]:
    """The visible devices of each time a step ran."""
    return [line for file in folder.glob(f"{step}-*") for line in file.read_text().splitlines()]


def places(instance: dg.DagsterInstance) -> list[tuple[str, str]]:
    """Step and node of each time a step of the latest run began."""
    (run, *_) = instance.get_runs()
    found = []
    for entry in instance.all_logs(run.run_id, of_type=dg.DagsterEventType.ENGINE_EVENT):
        event = entry.get_dagster_event()
        if node := event.engine_event_data.metadata.get(NODE):
            found.append((str(event.step_key), str(node.value)))
    return found


def places_of_jobs(cluster: Cluster) -> list[tuple[str, str]]:
    """Step and node of each job of dagster-ray. (A driver on one machine may connect by any of its raylets.)"""
    from ray.job_submission import JobSubmissionClient

    jobs = JobSubmissionClient(cluster.dashboard).list_jobs()
    return [(job.metadata["dagster/op"], str(job.driver_node_id)) for job in jobs if "dagster/op" in job.metadata]


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


class Steps:
    """Stands for a handler of steps."""

    look_every_s, health_every_s = 0.1, 1
    news = True

    def has_news(self) -> bool:
        """As told."""
        return self.news


def test_the_executor_reads_no_events_of_assets(instance: dg.DagsterInstance) -> None:
    """Given a step's events, among them its materializations, then the executor sees the others, once and in order,
    and asks for none while its steps have no news."""

    @dg.asset
    def shots(context) -> None:  # type: ignore[no-untyped-def]
        for _ in range(3):
            context.log_event(dg.AssetMaterialization("ocr_text"))

    result = dg.materialize([shots], instance=instance)
    steps = Steps()
    following = _RayExecutor(steps)  # type: ignore[arg-type]
    steps.news = False
    assert following._pop_events(instance, result.run_id, set()) == []
    steps.news = True
    seen = [event.event_type_value for event in following._pop_events(instance, result.run_id, set())]
    told = [event.event_type_value for event in result.all_events]
    assert told.count("ASSET_MATERIALIZATION") == 4
    assert [kind for kind in told if not kind.startswith("ASSET_")] == [kind for kind in seen if kind in told]
    assert not any(kind.startswith("ASSET_") for kind in seen)
    assert following._pop_events(instance, result.run_id, set()) == []


def outlives_its_node(
    cluster: Cluster, folder: Path, instance: dg.DagsterInstance, places: Callable[[], list[tuple[str, str]]]
) -> None:
    """Given a step for half a GPU and one for none, when the node of the first is killed with -9 in the middle of it,
    then it ends on the other node with a GPU; it saw one device each time, the other step none."""

    def kill() -> None:
        wait_for(lambda: said(folder, "lasting"))
        (node,) = [node for step, node in places() if step == "lasting"]
        cluster.kill([each.node_id for each in cluster.nodes].index(node))

    killer = threading.Thread(target=kill)
    killer.start()
    result = run(ray_job.placed, instance)
    killer.join()
    assert result.success
    nodes = [node for step, node in places() if step == "lasting"]
    assert sorted(nodes) == sorted(node.node_id for node in cluster.nodes[1:])
    assert [len(devices.split(",")) for devices in said(folder, "lasting") if devices] == [1, 1]
    assert said(folder, "cpu") == [""]


def test_steps_go_where_their_tags_say_and_outlive_their_node(
    cluster: Cluster, folder: Path, instance: dg.DagsterInstance
) -> None:
    """Given steps in the pool, see outlives_its_node."""
    outlives_its_node(cluster, folder, instance, lambda: places(instance))


def test_steps_as_jobs_go_where_their_tags_say_and_outlive_their_node(
    folder: Path, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given a cluster of which only the job server is known, see outlives_its_node."""
    import ray

    ray.shutdown()  # of the other cluster
    with ray_cluster((2, 0), (2, 1), (2, 1), dashboard=True) as cluster:
        monkeypatch.setenv("RAY_ADDRESS", cluster.dashboard)
        outlives_its_node(cluster, folder, instance, lambda: places_of_jobs(cluster))


def test_a_process_stays_for_the_next_step_unless_what_it_read_has_changed(
    folder: Path, instance: dg.DagsterInstance
) -> None:
    """Given more runs than the cluster has CPUs, then a process has two of their steps; after new settings the next
    step has a new one, without its run having noticed that those before would not have it."""
    runs = 0
    while len(set(folder.glob("cpu-*"))) == runs:
        assert runs <= CPUS
        assert run(ray_job.plain, instance).success
        runs += 1
    before = {file: file.read_text() for file in folder.glob("cpu-*")}
    (folder / "settings.toml").write_text("[engine]\nmax_attempts = 2\n")
    result = run(ray_job.plain, instance)
    assert result.success
    assert not any(event.is_step_up_for_retry for event in result.all_events)
    after = {file: file.read_text() for file in folder.glob("cpu-*")}
    assert {file: after[file] for file in before} == before
    assert len(after) == len(before) + 1


def test_a_pool_of_another_version_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Given a head whose program is not that of the run's process, then the pool does not open and says why."""
    monkeypatch.setattr(sys, "argv", ["step_pool", "steps-of-old", "namespace", "1", "head:6379"])
    assert step_pool.main() == 1
    assert f"another version of this project: {NAME} instead of steps-of-old" in capsys.readouterr().out


def test_a_pool_joins_the_cluster_of_its_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """Given a RAY_ADDRESS of another cluster, as Ray gives it to jobs beside several, then the pool is not there."""
    import ray

    def init(where: str, **_: Any) -> None:
        raise ConnectionError(where)

    monkeypatch.setenv("RAY_ADDRESS", "other:6379")
    monkeypatch.setattr(sys, "argv", ["step_pool", NAME, "namespace", "1", "head:6379"])
    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(ConnectionError, match="head:6379"):
        step_pool.main()


def test_a_step_outlives_its_pool(folder: Path, instance: dg.DagsterInstance) -> None:
    """Given a pool that is killed while a step is under way, then the step runs again in a new one."""

    def kill() -> None:
        import ray

        wait_for(lambda: said(folder, "endless"))
        for entry in ray.util.list_named_actors(all_namespaces=True):
            if entry["name"] == NAME:
                ray.kill(ray.get_actor(entry["name"], entry["namespace"]))

    killer = threading.Thread(target=kill)
    killer.start()
    result = run(ray_job.waiting, instance)
    killer.join()
    assert result.success
    assert any(event.is_step_up_for_retry for event in result.all_events)
    assert len(said(folder, "endless")) == 2


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


def test_an_idle_pool_ends_and_opens_again(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given a step that cannot be read, then its fate says so; the pool ends when idle, and the next has another."""
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    pool = _steps(Settings(home=tmp_path, ray=Ray(step_idle_s=1)))._pool  # type: ignore[union-attr]
    for name in ("first", "second"):
        pool.start(Wanted(name, "no step", 1, 0, 0, {}, {}))
        wait_for(lambda name=name: pool.fate(name))
        fate = pool.fate(name)
        assert fate is not None
        assert "JSONDecodeError" in str(fate.error)
        wait_for(lambda: _is_gone(pool))


def _is_gone(pool: StepPool) -> bool:
    try:
        pool._pool()
    except PoolGone:
        return True
    return False


def test_a_pool_that_cannot_start_is_told() -> None:
    """Given a job server whose job fails, then the message has what it says of the job."""

    class Client:
        def list_jobs(self) -> list[Any]:
            return []

        def submit_job(self, entrypoint: str) -> str:
            return entrypoint

        def get_job_info(self, _: str) -> Any:
            return SimpleNamespace(status="FAILED", message="python: command not found")

    with pytest.raises(ClusterUnavailable, match="command not found"):
        _Job.of(Client(), "python -m jobs.step_pool").has_ended()


def test_a_job_server_that_falls_silent_is_told() -> None:
    """Given a job server that stops answering while the pool is to be opened, then the message says so."""

    class Client:
        def list_jobs(self) -> list[Any]:
            raise ConnectionError("refused")

        def get_job_info(self, _: str) -> Any:
            raise RuntimeError("status code 500")

    with pytest.raises(ClusterUnavailable, match="does not answer: refused"):
        _Job.of(Client(), "python -m jobs.step_pool")
    with pytest.raises(ClusterUnavailable, match="does not answer: status code 500"):
        _Job(Client(), "pool").has_ended()


def test_a_process_knows_what_it_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given a module that changes on disk after a step, or new settings, then no step begins there any more; nor does
    one after a call that hangs."""
    monkeypatch.setenv("MEDIA_HOME", str(tmp_path))
    monkeypatch.setattr(os, "_exit", sys.exit)
    file = tmp_path / "module.py"
    file.write_text("")
    monkeypatch.setitem(sys.modules, "module_of_a_test", SimpleNamespace(__file__=str(file)))  # type: ignore[arg-type]
    process = _Process()
    for number in (1, 2):
        assert process.begin() == number
        process.end(0)
    file.write_text("changed")
    with pytest.raises(SystemExit):
        process.begin()
    process = _Process()
    process.begin()
    process.end(0)
    (tmp_path / "settings.toml").touch()
    with pytest.raises(SystemExit):
        process.begin()
    monkeypatch.setattr(step_pool, "may_stay", lambda _: False)
    monkeypatch.setattr(threading, "Timer", lambda *_: SimpleNamespace(start=lambda: None))
    process = _Process()
    process.begin()
    process.end(0)
    with pytest.raises(SystemExit):
        process.begin()


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


def test_a_server_that_is_no_cluster_is_found_out() -> None:
    """Given a port that accepts and says nothing, upon which Ray waits for ever, then it is refused in time."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        where = f"127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(ClusterUnavailable, match="is no Ray cluster"):
            check_reachable(where, 0.5)


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
