"""Runs on a Ray cluster: dagster-ray submits each step as a Ray job, to a node with what the step's group needs.

Ray waits for ever for an address where nothing answers and for resources that no node has; here both fail the run at
once, before a step is submitted. A step whose node dies fails its run; the planner brings its items back.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from typing import Any

import dagster as dg
from dagster_ray import ray_executor
from dagster_ray.configs import RayExecutionConfig

from resources.compute.ray_cluster import ClusterUnavailable, address, check_fits, check_reachable
from resources.settings import Settings

MOST_NODES = 10_000
# Ray kills a stopped job after 3 s; a step then ends in the middle of a model call and cannot say so.
GRACE = "RAY_JOB_STOP_WAIT_TIME_S=30"


def executor(settings: Settings) -> dg.ExecutorDefinition:
    """The executor of an existing cluster, that of `ray.address` or RAY_ADDRESS: dagster-ray's, checked before.

    A run fails with ClusterUnavailable when the cluster does not answer within `ray.connect_timeout_s`, or has no node
    with the CPUs, GPUs and memory that one of the run's steps asks for.
    """

    @dg.executor(name="ray", requirements=dg.multiple_process_executor_requirements())
    def on_ray(context: dg.InitExecutorContext) -> dg.Executor:
        where = address(settings)
        try:
            nodes = _nodes(where, settings.ray.connect_timeout_s)
            for needs in _needs(context.job.get_definition()):
                check_fits(nodes, needs)
        except ClusterUnavailable as error:
            # Of an executor that cannot be made, Dagster puts only its own errors into the run.
            raise dg.DagsterError(str(error)) from error
        create = ray_executor.executor_creation_fn
        assert create is not None
        config = {"ray": {"address": where, "env_vars": _handed_on()}, "retries": {"enabled": {}}}
        return create(dg.InitExecutorContext(context.job, ray_executor, config, context.instance))

    return on_ray


def _nodes(where: str, timeout_s: float) -> list[dict[str, float]]:
    """Total resources of every living node, as the cluster's job server knows them. Raises ClusterUnavailable."""
    check_reachable(where, timeout_s)
    from ray.exceptions import RayError
    from ray.util.state import list_nodes
    from ray.util.state.exception import RayStateApiException

    try:
        states = list_nodes(where, limit=MOST_NODES, timeout=math.ceil(timeout_s))
    except (OSError, RuntimeError, ValueError, RayError, RayStateApiException) as error:
        raise ClusterUnavailable(
            f"The job server of the Ray cluster at {where} cannot be used: {error}",
            "Start the head with its dashboard (ray[default]), and check that its port is open.",
        ) from error
    return [dict(state.resources_total) for state in states if state.state == "ALIVE"]


def _needs(job: dg.JobDefinition) -> Iterator[Mapping[str, float]]:
    """What each step of the job asks Ray for, by Ray's names."""
    for node in job.nodes:
        said = RayExecutionConfig.from_tags(node.tags)
        usual: dict[str, Any] = {"CPU": said.num_cpus, "GPU": said.num_gpus, "memory": said.memory}
        yield {name: amount or 0 for name, amount in usual.items()} | (said.resources or {})


def _handed_on() -> list[str]:
    """What a step's process gets of this one's environment, in dagster-ray's notation."""
    return [GRACE, *(name for name in os.environ if name.startswith("MEDIA_") or name == "DAGSTER_HOME")]
