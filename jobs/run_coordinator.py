"""Dagster's run queue, with what this project needs of it.

On clusters every run says what it needs: launchers read the tags of runs, not those of steps. The jobs of this project
carry such tags. A backfill or a materialization from the UI runs Dagster's own job of all assets, which has none.

On one machine an express run does not wait in the queue for the daemon's next look, a second apart, while all is idle.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import dagster as dg

from jobs.express import EXPRESS_JOB
from jobs.quiet_sensors import hush
from resources.compute import ECS_PREFIX, GROUP_TAG, K8S_TAG, KIND_TAG, RAY_TAG

_UNDER_WAY = [
    dg.DagsterRunStatus.QUEUED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
]
_LAUNCHERS = (GROUP_TAG, KIND_TAG, ECS_PREFIX, K8S_TAG)


class _QuietRunCoordinator(dg.QueuedRunCoordinator):
    """Dagster's own queue. The daemon, which has no setting for what it logs, loads it before its first tick."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        hush()


class DirectRunCoordinator(_QuietRunCoordinator):
    """Queues runs, but for an express run that nothing could hold back: no other run, and no limit of 0 or by tag."""

    def submit_run(self, context: dg.SubmitRunContext) -> dg.DagsterRun:
        """Queue the run, or launch it; one that cannot be launched is reported as failed."""
        run = context.dagster_run
        if run.job_name != EXPRESS_JOB or run.status != dg.DagsterRunStatus.NOT_STARTED or self._may_wait():
            return super().submit_run(context)
        with suppress(Exception):  # the run has failed then, and says why
            self._instance.launch_run(run.run_id, context.workspace)
        launched = self._instance.get_run_by_id(run.run_id)
        assert launched is not None
        return launched

    def _may_wait(self) -> bool:
        concurrency = self._instance.get_concurrency_config()
        queue = concurrency.run_queue_config
        pools = [pool.limit for pool in self._instance.event_log_storage.get_pool_limits()]
        return (
            queue is None
            or 0 in (queue.max_concurrent_runs, concurrency.pool_config.default_pool_limit, *pools)
            or bool(queue.tag_concurrency_limits)
            or self._instance.get_runs_count(dg.RunsFilter(statuses=_UNDER_WAY)) > 0
        )


class NeedsRunCoordinator(_QuietRunCoordinator):
    """Queues a run with the tags of its most demanding step, unless it has them already."""

    def submit_run(self, context: dg.SubmitRunContext) -> dg.DagsterRun:
        """Tag the run and queue it."""
        run = context.dagster_run
        if KIND_TAG not in run.tags and (tags := self._of_its_steps(run)):
            self._instance.add_run_tags(run.run_id, tags)
        return super().submit_run(context)

    def _of_its_steps(self, run: dg.DagsterRun) -> dict[str, str]:
        if run.execution_plan_snapshot_id is None:
            return {}
        plan = self._instance.get_execution_plan_snapshot(run.execution_plan_snapshot_id)
        wanted = [dict(step.tags or {}) for step in plan.steps if step.key in plan.step_keys_to_execute]
        tagged = [tags for tags in wanted if KIND_TAG in tags]
        if not tagged:
            return {}
        return {name: value for name, value in max(tagged, key=_demand).items() if name.startswith(_LAUNCHERS)}


def _demand(tags: Mapping[str, str]) -> tuple[float, float]:
    """GPUs and memory that a step wants; the tag for Ray has them as plain numbers."""
    wanted = json.loads(tags[RAY_TAG])
    return wanted.get("num_gpus", 0), wanted["memory"]
