"""Runs on a Ray cluster: each step goes to a node with what its group needs, and is refused where there is none.

A process that Ray accepts as a driver has its steps run in processes that stay (see jobs.step_pool). One that reaches
the cluster's job server alone, at http://, submits each step as a Ray job with dagster-ray: a new process every time.

The step's needs are its `dagster-ray/config` tag (see resources.compute). Ray waits for ever for what no node has, and
Dagster for a job that was stopped from outside; here both end in a message. A step whose node died is started again:
finished items are in their outcome records, so that only those in flight are computed anew.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import dagster as dg

# Executors are made of these, which Dagster does not export at its top.
from dagster._core.events import EngineEventData
from dagster._core.execution.plan.objects import StepFailureData, StepRetryData
from dagster._core.execution.retries import RetryMode
from dagster._core.executor.base import Executor
from dagster._core.executor.step_delegating import (
    CheckStepHealthResult,
    StepDelegatingExecutor,
    StepHandler,
    StepHandlerContext,
)
from dagster._serdes import serialize_value
from dagster_ray.configs import RayExecutionConfig
from dagster_ray.core.executor import RayStepHandler
from dagster_shared.error import SerializableErrorInfo

from jobs.step_pool import Fate, PoolGone, StepPool, Wanted
from resources.ray_cluster import ClusterUnavailable, address, check_fits, check_reachable, connect
from resources.settings import Settings

REQUEST_TIMEOUT_S = 30
SELDOM_S = 5.0  # between two looks at the events of a run whose steps are all under way
MAX_RESTARTS = 2
RESTART_WAIT_S = 1.0
_OF_ASSETS = {kind for kind in dg.DagsterEventType if kind.name.startswith("ASSET_")}
_FOLLOWED = set(dg.DagsterEventType) - _OF_ASSETS


def executor(settings: Settings) -> dg.ExecutorDefinition:
    """The executor of an existing cluster, that of `ray.address` or RAY_ADDRESS.

    A run fails with ClusterUnavailable when the cluster does not answer within `ray.connect_timeout_s`, or has no node
    with the CPUs, GPUs and memory its step asks for.
    """

    @dg.executor(name="ray", requirements=dg.multiple_process_executor_requirements())
    def on_ray(_: dg.InitExecutorContext) -> Executor:
        try:
            steps = _steps(settings)
        except ClusterUnavailable as error:
            # Of an executor that cannot be made, Dagster puts only its own errors into the run.
            raise dg.DagsterError(str(error)) from error
        return _RayExecutor(steps)

    return on_ray


def _steps(settings: Settings) -> _Pooled | _Jobs:
    """What runs steps on the cluster of these settings. Raises ClusterUnavailable."""
    where = address(settings)
    handed_on = {name: value for name, value in os.environ.items() if name.startswith("MEDIA_")}
    if home := os.environ.get("DAGSTER_HOME"):
        handed_on["DAGSTER_HOME"] = home
    if where.startswith(("http://", "https://")):
        return _Jobs(_client(settings, where), list(handed_on), None, None, None, None, None)
    connect(settings)

    def submit(command: str) -> _Job:
        import ray

        # A client of "auto" would look for a cluster once more.
        known = where if "://" in where else ray.get_runtime_context().gcs_address
        return _Job.of(_client(settings, known), command)

    return _Pooled(StepPool(settings, submit), handed_on)


class _RayExecutor(StepDelegatingExecutor):
    """Starts a step again whose process is gone; a step that failed by itself is not retried."""

    def __init__(self, steps: _Pooled | _Jobs) -> None:
        super().__init__(
            steps,
            retries=RetryMode.ENABLED,
            sleep_seconds=steps.look_every_s,
            check_step_health_interval_seconds=steps.health_every_s,
        )
        self._steps = steps

    def _pop_events(self, instance: dg.DagsterInstance, run_id: str, seen_storage_ids: set[int]) -> list[Any]:
        """New events of the run. What a step tells of its assets, some events per item, is of no use to an executor."""
        del seen_storage_ids  # by which the base class knows what it has read, where it is told to read some twice
        if not self._steps.has_news():
            return []
        found = instance.get_records_for_run(run_id, self._event_cursor, _FOLLOWED, self._pop_events_limit)
        self._event_cursor = found.cursor
        events = [record.event_log_entry.dagster_event for record in found.records]
        return [event for event in events if event is not None]

    def log_failure_or_retry_event_after_error(self, step_context: Any, err_info: Any, known_state: Any) -> Any:
        """Called by the base class for steps that failed their health check."""
        if known_state.get_retry_state().get_attempt_count(step_context.step.key) >= MAX_RESTARTS:
            return super().log_failure_or_retry_event_after_error(step_context, err_info, known_state)
        again = StepRetryData(err_info, RESTART_WAIT_S)  # type: ignore[no-untyped-call]
        return dg.DagsterEvent.step_retry_event(step_context, again)


class _Pooled(StepHandler):
    """Has steps run in the processes of the library's pool, which says when they end."""

    look_every_s, health_every_s = 0.1, 1

    def __init__(self, pool: StepPool, environment: Mapping[str, str]) -> None:
        self._pool = pool
        self._environment = environment
        self._under_way: set[str] = set()
        self._seen_ended: set[str] = set()
        self._looked_at = -math.inf

    @property
    def name(self) -> str:
        """Name of this way in the event log."""
        return "step pool"

    def has_news(self) -> bool:
        """Whether a step ended, or it is time to look anyway."""
        over = {step for step in self._under_way if self._is_over(step)}
        if not over and time.monotonic() - self._looked_at < SELDOM_S:
            return False
        self._under_way -= over
        self._looked_at = time.monotonic()
        return True

    def launch_step(self, step_handler_context: StepHandlerContext) -> Iterator[dg.DagsterEvent]:
        """Start the step, or fail it when no node has what it needs."""
        import ray

        step = _StepOf(step_handler_context)
        try:
            alive = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
            needs = step.needs([node["Resources"] for node in alive])
            yield step.starting()
            told = serialize_value(step_handler_context.execute_step_args)
            self._pool.start(Wanted(step.attempt, told, environment=self._environment, **needs))
            self._under_way.add(step.attempt)
        except ClusterUnavailable as error:
            yield step.refused(error)
            self._looked_at = -math.inf

    def check_step_health(self, step_handler_context: StepHandlerContext) -> CheckStepHealthResult:
        """Unhealthy when the step's process or node is gone, or ended without a word of the step."""
        step = _StepOf(step_handler_context).attempt
        try:
            fate = self._pool.fate(step)
        except PoolGone:
            fate = Fate("The pool of steps is gone.")
        if fate is None:
            return CheckStepHealthResult.healthy()
        error = fate.error
        if error is None and step in self._seen_ended:
            error = "Its process was done with it, but the step did not end."
        self._seen_ended.add(step)  # its last events may have come since they were asked for: a second look counts
        self._looked_at = -math.inf
        return CheckStepHealthResult.unhealthy(error) if error is not None else CheckStepHealthResult.healthy()

    def terminate_step(self, step_handler_context: StepHandlerContext) -> Iterator[dg.DagsterEvent]:
        """Interrupt the step."""
        step = _StepOf(step_handler_context)
        yield step.stopping()
        self._pool.stop(step.attempt)

    def _is_over(self, step: str) -> bool:
        try:
            return self._pool.fate(step) is not None
        except PoolGone:
            return True


class _StepOf:
    """The one step that a handler's call is about."""

    def __init__(self, context: StepHandlerContext) -> None:
        (self._key,) = context.execute_step_args.step_keys_to_execute or []
        self._context = context

    @property
    def attempt(self) -> str:
        """An ID of this attempt at the step."""
        arguments = self._context.execute_step_args
        state = arguments.known_state
        attempts = state.get_retry_state().get_attempt_count(self._key) if state else 0
        return f"{arguments.run_id}:{self._key}:{attempts}"

    def needs(self, nodes: Sequence[Mapping[str, float]]) -> dict[str, Any]:
        """What the step holds while it runs, by the field names of Wanted.

        Raises ClusterUnavailable when none of the nodes has it.
        """
        said = RayExecutionConfig.from_tags(self._context.step_tags[self._key])
        resources = said.resources or {}
        needs = {"cpus": said.num_cpus or 0, "gpus": said.num_gpus or 0, "memory_bytes": said.memory or 0}
        wanted = {"CPU": needs["cpus"], "GPU": needs["gpus"], "memory": needs["memory_bytes"]}
        check_fits(nodes, wanted | resources)
        return needs | {"resources": resources}

    def starting(self) -> dg.DagsterEvent:
        """Written: the step is handed over."""
        return dg.DagsterEvent.step_worker_starting(self._step, f'Handing step "{self._key}" to the pool on Ray.', {})

    def stopping(self) -> dg.DagsterEvent:
        """Written: the step is told to stop."""
        return dg.DagsterEvent.engine_event(self._step, f'Stopping step "{self._key}".', EngineEventData())

    def refused(self, error: ClusterUnavailable) -> dg.DagsterEvent:
        """Written: the step failed before it began."""
        told = SerializableErrorInfo(str(error), [], type(error).__name__)
        failure = StepFailureData(told, None)  # type: ignore[no-untyped-call]
        return dg.DagsterEvent.step_failure_event(self._step, failure)

    @property
    def _step(self) -> Any:
        return self._context.get_step_context(self._key)


class _Jobs(RayStepHandler):
    """Submits steps as Ray jobs and watches them."""

    look_every_s, health_every_s = 0.25, 5

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._seen_ended: set[str] = set()

    def has_news(self) -> bool:
        """Jobs say nothing; a look at the events may."""
        return True

    def launch_step(self, step_handler_context: StepHandlerContext) -> Iterator[dg.DagsterEvent]:
        """Submit the step, or fail it when no node has what it needs."""
        step = _StepOf(step_handler_context)
        try:
            step.needs(_nodes(self.client.get_address()))
        except ClusterUnavailable as error:
            yield step.refused(error)
            return
        yield from super().launch_step(step_handler_context)

    def check_step_health(self, step_handler_context: StepHandlerContext) -> CheckStepHealthResult:
        """Unhealthy also when the job was stopped, or ended without a word of the step."""
        health = super().check_step_health(step_handler_context)
        if not health.is_healthy:
            return health
        job = self._get_ray_job_submission_id(step_handler_context)
        status = self.client.get_job_status(job)
        if status == "STOPPED":
            return CheckStepHealthResult.unhealthy(f"Ray job {job} was stopped.")
        if status == "SUCCEEDED":
            # Its last events may be on their way: only the second look counts.
            if job in self._seen_ended:
                return CheckStepHealthResult.unhealthy(f"Ray job {job} ended, but the step did not.")
            self._seen_ended.add(job)
        return health


@dataclass(frozen=True, slots=True)
class _Job:
    """A Ray job. Its methods raise ClusterUnavailable when the job server does not answer."""

    client: Any
    submission_id: str
    is_ours: bool = True

    @classmethod
    def of(cls, client: Any, command: str) -> Self:
        """The job of this command line: one that is under way, else a new one."""
        with _asking_job_server():
            for job in client.list_jobs():
                if job.submission_id and job.entrypoint == command and not job.status.is_terminal():
                    return cls(client, job.submission_id, is_ours=False)
            return cls(client, client.submit_job(entrypoint=command))

    def has_ended(self) -> bool:
        """Whether it is over. Raises ClusterUnavailable when it failed, unless another process started it."""
        with _asking_job_server():
            job = self.client.get_job_info(self.submission_id)
        if job.status == "FAILED" and self.is_ours:
            raise ClusterUnavailable(
                f"Ray job {self.submission_id}, the pool of steps, failed: {job.message}",
                "Its log says more. Start Ray in the project's environment on every node.",
            )
        return bool(job.status.is_terminal())


@contextmanager
def _asking_job_server() -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError) as error:
        raise ClusterUnavailable(f"The job server of the Ray cluster does not answer: {error}") from error


def _client(settings: Settings, where: str) -> Any:
    """A client of the cluster's job server whose requests end. Raises ClusterUnavailable."""
    check_reachable(where, settings.ray.connect_timeout_s)
    from ray.exceptions import RayError
    from ray.job_submission import JobSubmissionClient

    class Client(JobSubmissionClient):
        def _do_request(self, *arguments: Any, **options: Any) -> Any:
            return super()._do_request(*arguments, **{"timeout": REQUEST_TIMEOUT_S, **options})

    try:
        return Client(where)
    except (OSError, RuntimeError, ValueError, RayError) as error:
        raise ClusterUnavailable(
            f"The job server of the Ray cluster at {where} cannot be used: {error}",
            "Start the head with its dashboard (ray[default]), and check that its port is open.",
        ) from error


def _nodes(job_server: str) -> list[dict[str, float]]:
    """Total resources of every living node."""
    from ray.util.state import list_nodes

    states = list_nodes(job_server, limit=10_000, timeout=REQUEST_TIMEOUT_S)
    return [dict(state.resources_total) for state in states if state.state == "ALIVE"]
