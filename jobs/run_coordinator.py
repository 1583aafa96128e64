"""Dagster's run queue, with what this project needs of it.

On clusters every run says what it needs: launchers read the tags of runs, not those of steps. The jobs of this project
carry such tags. A backfill or a materialization from the UI runs Dagster's own job of all assets, which has none.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import dagster as dg

from jobs.quiet_sensors import hush
from resources.compute.needs import ECS_PREFIX, GROUP_TAG, K8S_TAG, KIND_TAG, RAY_TAG

_LAUNCHERS = (GROUP_TAG, KIND_TAG, ECS_PREFIX, K8S_TAG)


class QuietRunCoordinator(dg.QueuedRunCoordinator):
    """Dagster's own queue. The daemon, which has no setting for what it logs, loads it before its first tick."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        hush()


class NeedsRunCoordinator(QuietRunCoordinator):
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
