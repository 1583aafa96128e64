"""Steps in processes that stay: only the first step of a process on a Ray node imports libraries and loads models.

Ray keeps the worker processes of a job's tasks for the job's next tasks, a process per CPU of a node, for as long as
the job's driver lives. So there is one Ray job per library, the pool, whose tasks are the steps of all runs. It begins
with the first step and ends when there was none for `ray.step_idle_s`. Ray itself places the tasks, counts what they
hold, and gives it back when they end.

A step for a GPU has a process of its own: one that stayed would hold device memory that Ray takes for free.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

from resources.process import may_stay
from resources.ray_cluster import ClusterUnavailable, namespace
from resources.settings import HOME_VARIABLE, Settings

# Where a changed program is deployed, its pool stands beside the one that the old program still uses.
NAME = f"steps-{blake2b(Path(__file__).read_bytes(), digest_size=4).hexdigest()}"
ON_HEAD = {"node:__internal_head__": 0.001}
OPEN_TIMEOUT_S = 120.0
ANSWER_TIMEOUT_S = 30.0
POLL_S = 0.1
STOP_GRACE_S = 30.0  # for a step to end by itself when it is stopped
LEAVE_S = 0.5  # a process stays for so long after its last answer, which is on its way
TRIES = 5  # to find a process in which a step begins
MOST_REMEMBERED = 10_000
MOST_CALLS = 100_000  # of the pool at once: one waits per step, another per step under way; Ray's default is 1,000
STOPPED = "It was stopped."
NODE = "Ray node"


@dataclass(frozen=True, slots=True)
class Wanted:
    """A step: Dagster's arguments of it, serialized, what it holds meanwhile, and variables of its process."""

    step_id: str
    arguments: str
    cpus: float
    gpus: float
    memory_bytes: int
    resources: Mapping[str, float]
    environment: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Fate:
    """What became of a step that is over: what went wrong, other than in the step itself."""

    error: str | None = None


class PoolGone(Exception):
    """The pool ended, or was never there."""


# -- what executors use ----------------------------------------------------------------------------------------


class StepPool:
    """The pool of a library, as a driver of the cluster uses it. `submit` starts a Ray job with this command line."""

    def __init__(self, settings: Settings, submit: Callable[[str], Any]) -> None:
        self._namespace = f"{namespace(settings)}-steps"
        self._idle_s = settings.ray.step_idle_s
        self._submit = submit
        self._fates: dict[str, Any] = {}

    def start(self, wanted: Wanted) -> None:
        """Have the step run; once, whoever asks how often. Raises ClusterUnavailable."""
        deadline = time.monotonic() + OPEN_TIMEOUT_S
        while time.monotonic() < deadline:
            pool = self._opened(deadline)
            with suppress(PoolGone):
                if _answer(pool.start.remote(wanted), ANSWER_TIMEOUT_S):
                    self._fates[wanted.step_id] = pool.fate.remote(wanted.step_id)
                    return
            time.sleep(POLL_S)  # it is on its way out
        raise ClusterUnavailable(f"The pool of steps did not open within {OPEN_TIMEOUT_S:g} s.")

    def fate(self, step_id: str) -> Fate | None:
        """What became of the step; None while it is under way. Asks nobody, but for a step that was not started here.

        Raises PoolGone, upon which the step is gone too.
        """
        import ray

        if step_id not in self._fates:
            self._fates[step_id] = self._pool().fate.remote(step_id)
        if not ray.wait([self._fates[step_id]], timeout=0)[0]:
            return None
        fate: Fate = _answer(self._fates[step_id], 0)
        return fate

    def stop(self, step_id: str) -> None:
        """Interrupt the step, and end its process where that does not help."""
        with suppress(PoolGone):
            _answer(self._pool().stop.remote(step_id), ANSWER_TIMEOUT_S)

    def _pool(self) -> Any:
        import ray

        try:
            return ray.get_actor(NAME, self._namespace)
        except ValueError as error:
            raise PoolGone from error

    def _opened(self, deadline: float) -> Any:
        """The pool, whose job is started where there is none."""
        import ray

        cluster = ray.get_runtime_context().gcs_address
        job = None
        while True:
            try:
                return self._pool()
            except PoolGone:
                job = job or self._submit(
                    f"python -m jobs.step_pool {NAME} {self._namespace} {self._idle_s:g} {cluster}"
                )
            if job.has_ended():
                job = None  # another one was first, or this one has had its time meanwhile
            if time.monotonic() > deadline:
                raise ClusterUnavailable(f"The pool of steps did not open within {OPEN_TIMEOUT_S:g} s.")
            time.sleep(POLL_S)


def _answer(reference: Any, timeout_s: float) -> Any:
    """The pool's answer. Raises PoolGone when it is dead, or silent for so long."""
    import ray
    from ray.exceptions import GetTimeoutError, RayActorError

    try:
        return ray.get(reference, timeout=timeout_s)
    except (RayActorError, GetTimeoutError) as error:
        raise PoolGone from error


# -- the pool's Ray job ----------------------------------------------------------------------------------------


def main() -> int:
    """Be the driver of the pool until it is idle; nothing to do where there is one already."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="name of the pool's actor, which tells versions of this program apart")
    parser.add_argument("namespace", help="Ray namespace of the library's pool")
    parser.add_argument("idle", type=float, help="seconds without a step after which the pool ends")
    # Not Ray's "auto", which by a job's RAY_ADDRESS may be another cluster that has processes on the same machine.
    parser.add_argument("cluster", help="host:port of the cluster's GCS")
    arguments = parser.parse_args()
    if arguments.name != NAME:
        print(f"The head of the cluster has another version of this project: {NAME} instead of {arguments.name}.")
        return 1
    import ray

    # By its name there, so that Ray's workers import it instead of unpickling a copy.
    from jobs.step_pool import Pool

    # What steps print stays in the logs of their nodes, which Ray rotates; that of a job grows for as long as it lives.
    ray.init(arguments.cluster, namespace=arguments.namespace, log_to_driver=False)
    actor: Any = ray.remote(Pool)
    try:
        pool = actor.options(name=NAME, num_cpus=0, resources=ON_HEAD, max_concurrency=MOST_CALLS).remote()
    except ValueError as error:  # the name is taken
        print(error)
        return 0
    ray.get(pool.wait_until_idle.remote(arguments.idle))
    return 0


class Pool:
    """Starts steps as Ray tasks, and remembers what became of them: the body of an async Ray actor."""

    def __init__(self) -> None:
        import ray

        self._staying: Any = ray.remote(max_calls=0, max_retries=0)(execute)
        self._leaving: Any = ray.remote(max_calls=1, max_retries=0)(execute)
        self._running: dict[str, _Running] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}  # that follow them
        self._fates: dict[str, Fate] = {}
        self._is_closing = False
        self._quiet_since = time.monotonic()

    async def start(self, wanted: Wanted) -> bool:
        """Start the step unless it has been; False when the pool takes no more."""
        if self._is_closing:
            return False
        if wanted.step_id not in self._running and wanted.step_id not in self._fates:
            running = self._running[wanted.step_id] = _Running(wanted)
            self._tasks[wanted.step_id] = asyncio.create_task(self._run(running))
        return True

    async def began(self, step_id: str) -> None:
        """Called by a step's process: from here on the step is lost with it."""
        self._running[step_id].has_begun = True

    async def ended(self, step_id: str) -> None:
        """Called by a step's process when the step is over and all its events are written; it tidies up after that."""
        if running := self._running.get(step_id):
            running.has_ended.set()

    async def fate(self, step_id: str) -> Fate:
        """What became of the step, once it is over."""
        if running := self._running.get(step_id):
            await self._until(running.has_ended, step_id)
        if running and running.has_ended.is_set():
            return Fate()
        return self._fates.get(step_id) or Fate("The pool knows nothing of it.")

    async def stop(self, step_id: str) -> None:
        """Interrupt the step, and end its process when it goes on after `STOP_GRACE_S`."""
        running = self._running.get(step_id)
        if running is not None:
            running.is_stopped.set()
            if not running.has_begun:
                running.cancel(force=False)
            asyncio.get_running_loop().call_later(STOP_GRACE_S, running.cancel, True)

    async def is_stopped(self, step_id: str) -> bool:
        """Wait until the step is to stop; False when it is over before."""
        running = self._running.get(step_id)
        if running is None:
            return False
        await self._until(running.is_stopped, step_id)
        return running.is_stopped.is_set()

    async def wait_until_idle(self, idle_s: float) -> None:
        """Return when there was no step for so long; none is taken then."""
        while self._running or (rest := self._quiet_since + idle_s - time.monotonic()) > 0:
            await asyncio.sleep(1.0 if self._running else min(rest, 1.0))
        self._is_closing = True

    async def _until(self, event: asyncio.Event, step_id: str) -> None:
        """Wait for the event, or until the step's process is done with it."""
        waiting = asyncio.create_task(event.wait())
        await asyncio.wait([waiting, self._tasks[step_id]], return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()

    async def _run(self, running: _Running) -> None:
        from ray.exceptions import RayError, RayTaskError, TaskCancelledError

        fate = None
        tries = 0
        while fate is None:
            tries += 1
            try:
                await self._submitted(running)
                fate = Fate()
            except TaskCancelledError:
                fate = Fate(STOPPED)
            except RayError as error:  # lost with its process or node, unless it is of the step's own code
                is_final = running.has_begun or running.is_stopped.is_set() or tries == TRIES
                if is_final or isinstance(error, RayTaskError):
                    fate = Fate(f"{type(error).__name__}: {error}")
            except Exception as error:  # noqa: BLE001 - a step that cannot be submitted; told to its run
                fate = Fate(f"{type(error).__name__}: {error}")
        step_id = running.wanted.step_id
        self._fates[step_id] = fate
        while len(self._fates) > MOST_REMEMBERED:
            del self._fates[next(iter(self._fates))]
        del self._running[step_id], self._tasks[step_id]
        self._quiet_since = time.monotonic()

    def _submitted(self, running: _Running) -> Any:
        """A reference to the answer of the step's process, which comes when that is done with the step."""
        from ray import get_runtime_context

        wanted = running.wanted
        task = self._leaving if wanted.gpus else self._staying
        threads = str(max(1, int(wanted.cpus)))  # libraries read it once: a process has steps of as many CPUs only
        running.answer = task.options(
            name=wanted.step_id,
            num_cpus=wanted.cpus,
            num_gpus=wanted.gpus,
            memory=wanted.memory_bytes or None,
            resources=dict(wanted.resources) or None,
            runtime_env={"env_vars": {**wanted.environment, "OMP_NUM_THREADS": threads}},
        ).remote(wanted.step_id, wanted.arguments, wanted.memory_bytes, get_runtime_context().current_actor)
        return running.answer


@dataclass(eq=False, slots=True)
class _Running:
    """A step under way, and the reference to its process' answer."""

    wanted: Wanted
    answer: Any = None
    has_begun: bool = False
    is_stopped: asyncio.Event = field(default_factory=asyncio.Event)
    has_ended: asyncio.Event = field(default_factory=asyncio.Event)

    def cancel(self, force: bool) -> None:
        import ray

        if self.answer is not None:
            ray.cancel(self.answer, force=force)


# -- a step's process ------------------------------------------------------------------------------------------


def execute(step_id: str, arguments: str, most_bytes: int, pool: Any) -> None:
    """Execute a step in this process, as `dagster api execute_step` would in one of its own.

    A process whose code has changed on disk ends instead, before the step begins: the pool then finds another one.
    It also ends after a step that left a hung call behind, or more than `most_bytes` resident (0: any).
    """
    import ray

    number = _this_process.begin()
    ray.get(pool.began.remote(step_id))
    heed = threading.Thread(target=_heed, args=[pool, step_id, number], name="heed", daemon=True)
    heed.start()
    try:
        _execute(arguments, number)
        pool.ended.remote(step_id)
    finally:
        gc.collect()
        _this_process.end(most_bytes)


def _heed(pool: Any, step_id: str, number: int) -> None:
    """Interrupt the step when the pool says so. Ray's own interrupt would not wake a thread that waits."""
    import ray
    from ray.exceptions import RayActorError

    with suppress(RayActorError):  # the pool is gone; Ray ends this process
        if ray.get(pool.is_stopped.remote(step_id)):
            _this_process.interrupt(number)


def _execute(serialized: str, number: int) -> None:
    # What Dagster's own command does; it has no public name.
    from dagster._cli.api import _execute_step_command_body
    from dagster._cli.utils import get_instance_for_cli
    from dagster._core.errors import DagsterExecutionInterruptedError
    from dagster._core.events import EngineEventData
    from dagster._grpc.types import ExecuteStepArgs
    from dagster._serdes import deserialize_value
    from dagster._utils import interrupts
    from ray import get_runtime_context

    # By SIGTERM Ray ends a process whose pool or node is no more. Dagster would take that for SIGINT, by which a step
    # is stopped here: the step would have failed, instead of being lost and started again.
    signal.signal(signal.SIGTERM, _end)
    interrupts.setup_interrupt_handlers = _nothing
    arguments = deserialize_value(serialized, ExecuteStepArgs)
    (step_key,) = arguments.step_keys_to_execute or []
    with get_instance_for_cli(instance_ref=arguments.instance_ref) as instance, interrupts.capture_interrupts():
        run = instance.get_run_by_id(arguments.run_id)
        if run is None:
            raise RuntimeError(f"There is no run {arguments.run_id}.")
        os.environ |= {"DAGSTER_RUN_JOB_NAME": run.job_name, "DAGSTER_RUN_STEP_KEY": step_key}
        node = get_runtime_context().get_node_id()
        told = f"In process {os.getpid()} of Ray node {node}, its step number {number}."
        instance.report_engine_event(told, run, EngineEventData({NODE: node}), step_key=step_key)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # Ray's workers block it
        try:
            for _ in _execute_step_command_body(arguments, instance, run):
                pass  # events are in the instance; nobody listens to their stream
        except (KeyboardInterrupt, DagsterExecutionInterruptedError):
            pass  # the run has been told
        finally:
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})


def _end(*_: Any) -> None:
    os._exit(1)


def _nothing() -> None:
    """In place of Dagster's function that gives SIGTERM the handler of SIGINT."""


class _Process:
    """What this process remembers from one step to the next."""

    def __init__(self) -> None:
        self._steps = 0
        self._leaves = False
        self._works = False
        self._lock = threading.Lock()
        self._modules: dict[str, tuple[int, int] | None] = {}
        self._settings: dict[str, tuple[int, int] | None] = {}

    def begin(self) -> int:
        """Number of the step that begins; there is no return where it must not begin here."""
        if not self._steps:
            self._settings = _settings()
        if self._leaves or self._has_changed():
            os._exit(0)
        self._steps += 1
        self._works = True
        return self._steps

    def interrupt(self, number: int) -> None:
        """Send SIGINT to this process if it still works on this step."""
        with self._lock:
            if self._works and self._steps == number:
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)  # another would not wake it

    def end(self, most_bytes: int) -> None:
        """Take note of what the step imported, and of what it left behind."""
        with self._lock:
            self._works = False
        for module in list(sys.modules.values()):
            if (path := getattr(module, "__file__", None)) and path not in self._modules:
                self._modules[path] = _state(path)
        if not may_stay(most_bytes):
            self._leaves = True
            threading.Timer(LEAVE_S, os._exit, [0]).start()

    def _has_changed(self) -> bool:
        return self._settings != _settings() or any(_state(path) != state for path, state in self._modules.items())


def _settings() -> dict[str, tuple[int, int] | None]:
    home = Path(os.environ.get(HOME_VARIABLE) or "var")
    return {str(path): _state(str(path)) for path in home.glob("*.toml")}


def _state(path: str) -> tuple[int, int] | None:
    try:
        told = os.stat(path)
    except OSError:
        return None
    return told.st_mtime_ns, told.st_size


_this_process = _Process()


if __name__ == "__main__":
    sys.exit(main())
