"""Runs on a Ray cluster: each step is a Ray job on a node with what its group needs, refused where there is none.

The step's needs are its `dagster-ray/config` tag (see resources.compute). Ray waits for ever for what no node has, and
Dagster for a job that was stopped from outside; here both end in a message. A step whose node died is started again:
finished items are in their outcome records, so that only those in flight are computed anew.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import dagster as dg

# Executors are made of these, which Dagster does not export at its top.
from dagster._core.execution.plan.objects import StepFailureData, StepRetryData
from dagster._core.execution.retries import RetryMode
from dagster._core.executor.base import Executor
from dagster._core.executor.step_delegating import (
    CheckStepHealthResult,
    StepDelegatingExecutor,
    StepHandlerContext,
)
from dagster_ray.configs import RayExecutionConfig
from dagster_ray.core.executor import RayStepHandler
from dagster_shared.error import SerializableErrorInfo

from resources.ray_cluster import ClusterUnavailable, address, check_fits, check_reachable
from resources.settings import Settings

REQUEST_TIMEOUT_S = 30
HEALTH_EVERY_S = 5
LOOK_EVERY_S = 0.25  # for the step's end
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
            client = _client(settings)
        except ClusterUnavailable as error:
            # Of an executor that cannot be made, Dagster puts only its own errors into the run.
            raise dg.DagsterError(str(error)) from error
        handed_on = [name for name in os.environ if name.startswith("MEDIA_") or name == "DAGSTER_HOME"]
        return _RayExecutor(
            _Steps(client, handed_on, None, None, None, None, None),
            retries=RetryMode.ENABLED,
            sleep_seconds=LOOK_EVERY_S,
            check_step_health_interval_seconds=HEALTH_EVERY_S,
        )

    return on_ray


class _RayExecutor(StepDelegatingExecutor):
    """Starts a step again whose process is gone; a step that failed by itself is not retried."""

    def _pop_events(self, instance: dg.DagsterInstance, run_id: str, seen_storage_ids: set[int]) -> list[Any]:
        """New events of the run. What a step tells of its assets, some events per item, is of no use to an executor."""
        del seen_storage_ids  # by which the base class knows what it has read, where it is told to read some twice
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


class _Steps(RayStepHandler):
    """Submits steps as Ray jobs and watches them."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._seen_ended: set[str] = set()

    def launch_step(self, step_handler_context: StepHandlerContext) -> Iterator[dg.DagsterEvent]:
        """Submit the step, or fail it when no node has what it needs."""
        step_key = self._get_step_key(step_handler_context)
        needs = RayExecutionConfig.from_tags(step_handler_context.step_tags[step_key])
        wanted = {"CPU": needs.num_cpus or 0, "GPU": needs.num_gpus or 0, "memory": needs.memory or 0}
        try:
            check_fits(_nodes(self.client.get_address()), wanted | (needs.resources or {}))
        except ClusterUnavailable as error:
            told = SerializableErrorInfo(str(error), [], type(error).__name__)
            step = step_handler_context.get_step_context(step_key)
            failure = StepFailureData(told, None)  # type: ignore[no-untyped-call]
            yield dg.DagsterEvent.step_failure_event(step, failure)
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


def _client(settings: Settings) -> Any:
    """A client of the cluster's job server whose requests end. Raises ClusterUnavailable."""
    where = address(settings)
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
