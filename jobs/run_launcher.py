"""Dagster's default run launcher, with what run monitoring asks of one: is the process of a run still alive?"""

from __future__ import annotations

import json
import socket

import dagster as dg
import psutil  # type: ignore[import-untyped]

# Launchers have to answer in these types, which Dagster does not export at its top.
from dagster._core.launcher import CheckRunHealthResult, WorkerStatus

from media_assets.partitions import HOST_TAG

_GRPC_TAG = ".dagster/grpc_info"
_CLOCK_S = 2.0  # between the clocks of the event log and of the process table
_FIRST_EVENTS = 20


class MonitoredRunLauncher(dg.DefaultRunLauncher):
    """Launches runs as processes of the local code server, and finds those whose process is gone.

    The code server itself reports a run process that dies while the server lives. What is left are runs that
    died together with it (a power cut, a killed container, the out-of-memory killer) and runs of
    `media-assets run`: they would hold their slot for ever.
    """

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


def _is_local(run: dg.DagsterRun) -> bool:
    """Whether the run's process is, or was, on this machine.

    The process of a launched run is a child of its code server. There is one daemon per database, so a
    code server on loopback is the one beside this daemon, or one that is gone.
    """
    if server := run.tags.get(_GRPC_TAG):
        told = json.loads(server)
        return "socket" in told or told.get("host") in ("localhost", "127.0.0.1")
    return run.tags.get(HOST_TAG) == socket.gethostname()


def _worker(instance: dg.DagsterInstance, run_id: str) -> tuple[int, float] | None:
    """Number of the process that works on a run, and when it said so, in seconds since the epoch."""
    kinds = {dg.DagsterEventType.ENGINE_EVENT}
    for record in instance.get_records_for_run(run_id, of_type=kinds, limit=_FIRST_EVENTS).records:
        event = record.event_log_entry.dagster_event
        pid = event.engine_event_data.metadata.get("pid") if event else None
        if pid is not None:
            return int(str(pid.value)), record.timestamp
    return None


def _is_alive(pid: int, moment: float) -> bool:
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        # A process that began later only has the same number.
        return bool(process.create_time() <= moment + _CLOCK_S)
    except psutil.NoSuchProcess:
        return False
