"""The Ray executor on a real cluster: steps go where their tags say, outlive their node, or are refused."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest
from dagster._core.execution.retries import RetryMode

from jobs.on_ray import _RayExecutor
from resources.ray_cluster import ClusterUnavailable, check_fits, check_reachable
from tests.cluster import ray_job
from tests.cluster.ray_cluster import Cluster

DEADLINE_S = 60.0


@pytest.fixture
def folder(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the steps leave word; the executor knows the cluster by RAY_ADDRESS."""
    monkeypatch.setenv("RAY_ADDRESS", cluster.dashboard)
    monkeypatch.setenv(ray_job.FOLDER, str(tmp_path))
    return tmp_path


@pytest.fixture
def instance(tmp_path: Path) -> Iterator[dg.DagsterInstance]:
    """An instance that other processes can open."""
    (tmp_path / "dagster").mkdir()
    with dg.DagsterInstance.local_temp(str(tmp_path / "dagster")) as opened:
        yield opened


def run(job: dg.JobDefinition, instance: dg.DagsterInstance) -> dg.JobExecutionResult:
    """The run of one of the jobs of tests/cluster/ray_job.py."""
    return dg.execute_job(dg.reconstructable(job), instance, raise_on_error=False)


def said(folder: Path, step: str) -> list[str]:
    """The visible devices of each time a step ran."""
    return [file.read_text() for file in folder.glob(f"{step}-*")]


def places(cluster: Cluster, step: str) -> list[int]:
    """Numbers of the nodes that a step's jobs ran on. (A driver on one machine may connect by any of its raylets.)"""
    from ray.job_submission import JobSubmissionClient

    nodes = [node.node_id for node in cluster.nodes]
    jobs = JobSubmissionClient(cluster.dashboard).list_jobs()
    return sorted(nodes.index(job.driver_node_id) for job in jobs if job.metadata["dagster/op"] == step)


def failure(result: dg.JobExecutionResult) -> str:
    """The event log's account of a failed run."""
    assert not result.success
    return str([event.event_specific_data for event in result.all_events])


def test_the_executor_reads_no_events_of_assets(instance: dg.DagsterInstance) -> None:
    """Given a step's events, among them its materializations, then the executor sees the others, once and in order."""

    @dg.asset
    def shots(context) -> None:  # type: ignore[no-untyped-def]
        for _ in range(3):
            context.log_event(dg.AssetMaterialization("ocr_text"))

    result = dg.materialize([shots], instance=instance)
    following = _RayExecutor(None, retries=RetryMode.ENABLED)  # type: ignore[arg-type]
    seen = [event.event_type_value for event in following._pop_events(instance, result.run_id, set())]
    told = [event.event_type_value for event in result.all_events]
    assert told.count("ASSET_MATERIALIZATION") == 4
    assert [kind for kind in told if not kind.startswith("ASSET_")] == [kind for kind in seen if kind in told]
    assert not any(kind.startswith("ASSET_") for kind in seen)
    assert following._pop_events(instance, result.run_id, set()) == []


def test_steps_go_where_their_tags_say_and_outlive_their_node(
    cluster: Cluster, folder: Path, instance: dg.DagsterInstance
) -> None:
    """Given a step for half a GPU and one for none, when the node of the first is killed with -9 in the middle of it,
    then it ends on the other node with a GPU; it saw one device each time, the other step none."""

    def kill() -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not said(folder, "lasting"):
            if time.monotonic() > deadline:
                return
            time.sleep(0.1)
        (node,) = places(cluster, "lasting")
        cluster.kill(node)

    killer = threading.Thread(target=kill)
    killer.start()
    result = run(ray_job.placed, instance)
    killer.join()
    assert result.success
    assert places(cluster, "lasting") == [1, 2]
    assert [len(devices.split(",")) for devices in said(folder, "lasting") if devices] == [1, 1]
    assert said(folder, "cpu") == [""]


@pytest.mark.usefixtures("folder")
def test_a_step_no_node_can_take_fails_the_run_with_both_amounts(
    cluster: Cluster, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given a step for eight GPUs and the address of the GCS, then the run ends at once and says what was asked and
    what there is."""
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
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
