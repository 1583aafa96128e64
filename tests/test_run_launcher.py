"""The health check of the run launcher: which runs are judged, and by what."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import psutil  # type: ignore[import-untyped]
import pytest
from dagster._core.launcher import WorkerStatus

from jobs.run_launcher import MonitoredRunLauncher
from media_assets.partitions import HOST_TAG

LOCAL = {".dagster/grpc_info": json.dumps({"host": "localhost", "socket": "/nowhere"})}
HERE = {HOST_TAG: socket.gethostname()}


@pytest.fixture
def instance(tmp_path: Path) -> Iterator[dg.DagsterInstance]:
    """An instance with the project's launcher, as dagster.yaml names it."""
    overrides = {"run_launcher": {"module": "jobs.run_launcher", "class": "MonitoredRunLauncher"}}
    with dg.DagsterInstance.local_temp(str(tmp_path), overrides=overrides) as opened:
        assert isinstance(opened.run_launcher, MonitoredRunLauncher)
        assert opened.run_launcher.supports_check_run_worker_health
        yield opened


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """A process that lives until it is killed."""
    process = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
    yield process
    process.kill()
    process.wait()


def health(instance: dg.DagsterInstance, tags: dict[str, str], pid: int | None) -> WorkerStatus:
    """What the launcher says of a run with these tags whose process said that it is `pid`."""
    from dagster._core.events import EngineEventData

    run = instance.create_run_for_job(dg.JobDefinition(name="job", graph_def=dg.GraphDefinition("graph")), tags=tags)
    instance.report_engine_event("Queued", run)
    if pid is not None:
        instance.report_engine_event("Started process for run", run, EngineEventData.in_process(pid))
    return instance.run_launcher.check_run_worker_health(run).status


@pytest.mark.parametrize("tags", [LOCAL, HERE], ids=["launched", "command line"])
def test_a_run_lives_and_dies_with_its_process(
    instance: dg.DagsterInstance, sleeper: subprocess.Popen[bytes], tags: dict[str, str]
) -> None:
    """Given a run on this machine, then it is well while its process lives, and failed once that got kill -9."""
    assert health(instance, tags, sleeper.pid) is WorkerStatus.RUNNING
    os.kill(sleeper.pid, signal.SIGKILL)
    os.waitid(os.P_PID, sleeper.pid, os.WEXITED | os.WNOWAIT)  # dead, but not reaped by its parent
    assert psutil.Process(sleeper.pid).status() == psutil.STATUS_ZOMBIE
    assert health(instance, tags, sleeper.pid) is WorkerStatus.FAILED
    sleeper.wait()
    assert health(instance, tags, sleeper.pid) is WorkerStatus.FAILED


def test_a_number_that_another_process_has_now_is_not_taken_for_the_run(
    instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given a process that began after the run's said its number, then the run is dead."""
    began = psutil.Process().create_time()
    monkeypatch.setattr(psutil.Process, "create_time", lambda self: began + 86_400)
    assert health(instance, LOCAL, os.getpid()) is WorkerStatus.FAILED


@pytest.mark.parametrize(
    ("tags", "pid"),
    [
        (LOCAL, None),
        ({}, 2**22 + 1),
        ({HOST_TAG: "elsewhere.example"}, 2**22 + 1),
        ({".dagster/grpc_info": json.dumps({"host": "code-server", "port": 4000})}, 2**22 + 1),
    ],
    ids=["no number yet", "unknown machine", "another machine", "remote code server"],
)
def test_what_this_machine_cannot_tell_is_left_alone(
    instance: dg.DagsterInstance, tags: dict[str, str], pid: int | None
) -> None:
    """Given a run of another machine, or one that only just started, then it is not called dead."""
    assert health(instance, tags, pid) is WorkerStatus.RUNNING
