"""The run launcher of one machine: hands runs to warm workers, and tells run monitoring which processes live."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Self

import dagster as dg
import psutil  # type: ignore[import-untyped]

# Launchers have to answer in these types, which Dagster does not export at its top.
from dagster._core.events import EngineEventData
from dagster._core.launcher import CheckRunHealthResult, LaunchRunContext, WorkerStatus
from dagster._serdes import ConfigurableClassData, serialize_value

from media_assets.orchestration.partitions import HOST_TAG

_GRPC_TAG = ".dagster/grpc_info"
LOOPBACK = ("localhost", "127.0.0.1")
_CLOCK_S = 2.0  # between the clocks of the event log and of the process table
_FIRST_EVENTS = 20


@dataclass(slots=True)
class _Worker:
    """A warm worker: its process, the launcher's end of its socket, and what it works on."""

    process: subprocess.Popen[bytes]
    link: socket.socket
    code: str
    job: str = ""
    run_id: str | None = None
    answers: bytes = b""

    def look(self) -> bool:
        """Take in what the worker said meanwhile; returns whether it lives and may be given more."""
        stays = True
        with suppress(OSError):
            while select.select([self.link], [], [], 0)[0] and (said := self.link.recv(4096)):
                self.answers += said
        *lines, self.answers = self.answers.split(b"\n")
        for line in lines:
            told = json.loads(line)
            stays = told["stays"]
            self.run_id = None
        return stays and self.process.poll() is None

    def give(self, run_id: str, job: str, instance: str) -> bool:
        """Hand it a run; returns whether it took it."""
        self.run_id, self.job = run_id, job
        try:
            self.link.sendall(json.dumps({"run_id": run_id, "instance": instance}).encode() + b"\n")
        except OSError:
            return False
        return True

    def resident_bytes(self) -> int:
        """Its memory; 0 where it is gone."""
        try:
            return int(psutil.Process(self.process.pid).memory_info().rss)
        except psutil.NoSuchProcess:
            return 0

    def dismiss(self) -> None:
        """Let it end: at once when it is idle, else after its run."""
        with suppress(OSError):
            self.link.shutdown(socket.SHUT_WR)


class WarmRunLauncher(dg.DefaultRunLauncher):
    """Runs on this machine, in processes that stay: only a worker's first run imports libraries and loads models.

    A run goes to an idle worker, first to one that had the same job; without one a worker is started, up to
    `workers`. Beyond these, and where the code server is on another machine, a run gets a process of its own from
    the code server, as with Dagster's default launcher. Reloading the code location replaces the workers.

    Run monitoring learns from it of runs whose process is gone: with a code server that died (a power cut, the
    out-of-memory killer), killed workers, and runs of `media-assets run`. They would hold their slot for ever.
    """

    def __init__(
        self,
        inst_data: ConfigurableClassData | None = None,
        workers: int = 2,
        idle_s: float = 3600.0,
        memory_bytes: int = 8 * 2**30,
    ) -> None:
        super().__init__(inst_data)
        self._most = workers
        self._idle_s = idle_s
        self._memory_bytes = memory_bytes
        self._workers: list[_Worker] = []
        self._lock = threading.Lock()

    @classmethod
    def config_type(cls) -> dict[str, Any]:
        """`workers` (0: none), `idle_s` and `memory_bytes`, resident per worker."""
        return {
            "workers": dg.Field(int, is_required=False, description="warm workers at most; 0 for none"),
            "idle_s": dg.Field(float, is_required=False, description="seconds without a run after which one ends"),
            "memory_bytes": dg.Field(int, is_required=False, description="resident bytes above which one is replaced"),
        }

    @classmethod
    def from_config_value(cls, inst_data: ConfigurableClassData, config_value: Mapping[str, Any]) -> Self:
        """The launcher as dagster.yaml configures it."""
        return cls(inst_data, **config_value)

    # -- launching ----------------------------------------------------------------------------------------

    def launch_run(self, context: LaunchRunContext) -> None:
        """Hand the run to a warm worker, or to a process of its own."""
        run = context.dagster_run
        code = _code(context)
        with self._lock:
            worker = self._free_worker(code, run.job_name) if code is not None else None
            if worker is not None:
                # Told before it starts: were both to die now, run monitoring would know whose run it was.
                self._instance.add_run_tags(run.run_id, {HOST_TAG: socket.gethostname()})
                pid = worker.process.pid
                self._instance.report_engine_event(
                    f"Handed to the warm worker {pid}.", run, EngineEventData.in_process(pid), cls=type(self)
                )
                if worker.give(run.run_id, run.job_name, serialize_value(self._instance.get_ref())):
                    return
                self._workers.remove(worker)
        super().launch_run(context)

    def _free_worker(self, code: str, job: str) -> _Worker | None:
        """An idle worker of this code, started if there may be one more."""
        kept: list[_Worker] = []
        for worker in self._workers:
            if worker.look() and worker.code == code:
                kept.append(worker)
            else:
                worker.dismiss()
        self._workers = kept
        idle = [worker for worker in kept if worker.run_id is None]
        if not idle and len(kept) < self._most:
            idle = [self._start(code)]
            self._workers += idle
        # Where none had the job, the one that grew most holds the most models.
        return min(idle, key=lambda worker: (worker.job != job, -worker.resident_bytes()), default=None)

    def _start(self, code: str) -> _Worker:
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", "jobs.run_worker", "--socket", str(theirs.fileno())]
            limits = ["--idle", str(self._idle_s), "--memory", str(self._memory_bytes)]
            process = subprocess.Popen([*command, *limits], pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        worker = _Worker(process, ours, code)
        threading.Thread(target=self._watch, args=[worker], name=f"worker-{process.pid}", daemon=True).start()
        return worker

    def _watch(self, worker: _Worker) -> None:
        """Wait for the worker's end, and fail the run that it took along."""
        status = worker.process.wait()
        with self._lock:
            worker.look()
        run_id = worker.run_id
        run = self._instance.get_run_by_id(run_id) if run_id and self.has_instance else None
        if run is not None and not run.is_finished:
            how = f"was terminated by signal {-status}" if status < 0 else f"ended with exit code {status}"
            self._instance.report_run_failed(run, f"The warm worker {worker.process.pid} {how} during this run.")

    def dispose(self) -> None:
        """Dismiss the workers; one in a run ends after it."""
        with self._lock:
            for worker in self._workers:
                worker.dismiss()
            self._workers.clear()
        super().dispose()

    # -- stopping and watching ----------------------------------------------------------------------------

    def terminate(self, run_id: str) -> bool:
        """Interrupt a run; one in a warm worker by a signal to it, whoever started the worker."""
        run = self._instance.get_run_by_id(run_id) if self.has_instance else None
        if run is None or run.is_finished or _GRPC_TAG in run.tags or not _is_local(run):
            return bool(super().terminate(run_id))  # type: ignore[no-untyped-call]
        told = _worker(self._instance, run_id)
        if told is None or not _is_alive(*told):
            return False
        self._instance.report_run_canceling(run)
        os.kill(told[0], signal.SIGTERM)
        return True

    @property
    def supports_check_run_worker_health(self) -> bool:
        """Run monitoring may ask."""
        return True

    def check_run_worker_health(self, run: dg.DagsterRun) -> CheckRunHealthResult:
        """FAILED when the process that works on `run` is no more; RUNNING also where this machine cannot tell."""
        if not _is_local(run):
            return CheckRunHealthResult(WorkerStatus.RUNNING, "Its process is on another machine.")
        started = _worker(self._instance, run.run_id)
        if started is None:
            return CheckRunHealthResult(WorkerStatus.RUNNING, "Its process has not said its number yet.")
        pid, moment = started
        if _is_alive(pid, moment):
            return CheckRunHealthResult(WorkerStatus.RUNNING, run_worker_id=str(pid))
        return CheckRunHealthResult(WorkerStatus.FAILED, f"Its process {pid} is gone.", run_worker_id=str(pid))


def _code(context: LaunchRunContext) -> str | None:
    """What changes when the code location is reloaded; None for one on another machine, which has its runs as well."""
    from dagster._core.remote_representation.code_location import GrpcServerCodeLocation

    origin = context.dagster_run.remote_job_origin
    if context.workspace is None or origin is None:
        return ""
    name = origin.repository_origin.code_location_origin.location_name
    location = context.workspace.get_code_location(name)
    if not isinstance(location, GrpcServerCodeLocation):
        return name
    return location.server_id if location.socket or location.host in LOOPBACK else None


def _is_local(run: dg.DagsterRun) -> bool:
    """Whether the run's process is, or was, on this machine.

    The process of a launched run is a child of its code server. There is one daemon per database, so a
    code server on loopback is the one beside this daemon, or one that is gone.
    """
    if server := run.tags.get(_GRPC_TAG):
        told = json.loads(server)
        return "socket" in told or told.get("host") in LOOPBACK
    return run.tags.get(HOST_TAG) == socket.gethostname()


def _worker(instance: dg.DagsterInstance, run_id: str) -> tuple[int, float] | None:
    """Number of the process that works on a run, and when that was said, in seconds since the epoch."""
    kinds = {dg.DagsterEventType.ENGINE_EVENT}
    told: tuple[int, float] | None = None
    for record in instance.get_records_for_run(run_id, of_type=kinds, limit=_FIRST_EVENTS).records:
        event = record.event_log_entry.dagster_event
        pid = event.engine_event_data.metadata.get("pid") if event else None
        if pid is not None:
            told = int(str(pid.value)), record.timestamp  # the last one: a dead worker's run was launched again
    return told


def _is_alive(pid: int, moment: float) -> bool:
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        # A process that began later only has the same number.
        return bool(process.create_time() <= moment + _CLOCK_S)
    except psutil.NoSuchProcess:
        return False
