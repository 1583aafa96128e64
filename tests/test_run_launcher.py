"""The run launcher: warm workers, and the health check: which runs are judged, and by what."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import dagster as dg
import psutil  # type: ignore[import-untyped]
import pytest
from dagster._core.launcher import LaunchRunContext, WorkerStatus

from jobs.run_launcher import WarmRunLauncher
from media_assets.orchestration.partitions import HOST_TAG
from tests.conftest import SILENT
from tests.toy_jobs import toy

LOCAL = {".dagster/grpc_info": json.dumps({"host": "localhost", "socket": "/nowhere"})}
HERE = {HOST_TAG: socket.gethostname()}


@pytest.fixture
def instance(tmp_path: Path) -> Iterator[dg.DagsterInstance]:
    """An instance with the project's launcher, as dagster.yaml names it."""
    overrides = {"run_launcher": {"module": "jobs.run_launcher", "class": "WarmRunLauncher"}}
    with dg.DagsterInstance.local_temp(str(tmp_path), overrides=overrides | SILENT) as opened:
        assert isinstance(opened.run_launcher, WarmRunLauncher)
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


class Launched:
    """Runs of the toy job, launched as the daemon would."""

    def __init__(self, instance: dg.DagsterInstance, folder: Path) -> None:
        self.instance = instance
        self.folder = folder

    def launch(self, seconds: float = 0.0) -> str:
        """Launch a run; returns its ID."""
        origin = dg.reconstructable(toy).get_python_origin()
        config = {"ops": {"note": {"config": {"folder": str(self.folder), "seconds": seconds}}}}
        run = self.instance.create_run_for_job(toy, run_config=config, job_code_origin=origin)
        self.instance.run_launcher.launch_run(LaunchRunContext(run, None))
        return run.run_id

    def status(self, run_id: str) -> dg.DagsterRunStatus:
        """What the instance knows of a run."""
        run = self.instance.get_run_by_id(run_id)
        assert run is not None
        return run.status

    def said(self, run_id: str) -> tuple[int, int]:
        """The process that works on the run, and how many it had: once it says so."""
        wait(lambda: (self.folder / run_id).exists() and (self.folder / run_id).read_text())
        pid, count = (self.folder / run_id).read_text().split()
        return int(pid), int(count)


def wait(ready: Callable[[], object]) -> None:
    end = time.monotonic() + 60
    while not ready():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.fixture
def launched(instance: dg.DagsterInstance, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Launched]:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    folder = tmp_path / "notes"
    folder.mkdir()
    yield Launched(instance, folder)
    launcher = instance.run_launcher
    assert isinstance(launcher, WarmRunLauncher)
    processes = [worker.process for worker in launcher._workers]
    launcher.dispose()
    for process in processes:
        assert process.wait(30) is not None  # a worker ends with its launcher


def test_a_worker_takes_one_run_after_another_and_dies_alone(launched: Launched) -> None:
    """Given runs, then one process works on them in turn; killed with -9, it takes one along and is replaced."""
    first = launched.launch()
    wait(lambda: launched.status(first) is dg.DagsterRunStatus.SUCCESS)
    pid, count = launched.said(first)
    assert count == 1
    wait(lambda: has_ended(launched.instance))
    second = launched.launch(seconds=60)
    assert launched.said(second) == (pid, 2)
    os.kill(pid, signal.SIGKILL)
    wait(lambda: launched.status(second) is dg.DagsterRunStatus.FAILURE)
    third = launched.launch()
    wait(lambda: launched.status(third) is dg.DagsterRunStatus.SUCCESS)
    assert launched.said(third)[0] != pid


def test_terminating_a_run_stops_it_and_leaves_the_worker(launched: Launched) -> None:
    """Given a run that is terminated, then it ends as canceled and the same process takes the next."""
    first = launched.launch(seconds=60)
    pid, _ = launched.said(first)
    assert launched.instance.run_launcher.terminate(first)
    wait(lambda: launched.status(first) is dg.DagsterRunStatus.CANCELED)
    assert not launched.instance.run_launcher.terminate(first)
    wait(lambda: has_ended(launched.instance))
    second = launched.launch()
    assert launched.said(second) == (pid, 2)
    wait(lambda: launched.status(second) is dg.DagsterRunStatus.SUCCESS)


def has_ended(instance: dg.DagsterInstance) -> bool:
    """Whether the only worker said that its run is over."""
    launcher = instance.run_launcher
    assert isinstance(launcher, WarmRunLauncher)
    (worker,) = launcher._workers
    return worker.look() and worker.run_id is None
