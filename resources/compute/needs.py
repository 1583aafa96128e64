"""Compute needs, stated once per group, and what they mean to the executors and launchers."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from resources.errors import MediaError
from resources.settings import Compute

GROUP_TAG = "media/group"
KIND_TAG = "media/compute"
RAY_TAG = "dagster-ray/config"
K8S_TAG = "dagster-k8s/config"
ECS_PREFIX = "ecs/"
_MEBIBYTE = 2**20
_GIBIBYTE = 2**30
# What Fargate sells: CPU units to the least and the most memory, MiB, in steps of 1 GiB or more.
_FARGATE = ((256, 512, 2048), (512, 1024, 4096), (1024, 2048, 8192), (2048, 4096, 16384), (4096, 8192, 30720))
_FARGATE_LARGE = ((8192, 16384, 61440, 4096), (16384, 32768, 122880, 8192))
# Micro-batches are sized for a GPU of this much memory.
_USUAL_GPU_BYTES = 8 * _GIBIBYTE
_MOST_SCALE = 8


class BadNeeds(MediaError):
    """What the settings say of groups and their needs does not fit together."""

    code, http_status = "bad_needs", 422
    remedy = "Mend [compute] in settings.toml."


@dataclass(frozen=True, slots=True)
class Needs:
    """What one step of a group wants.

    `cpus` are cores; `gpus` a whole number or a fraction of one; memory is in bytes, `gpu_memory_bytes` for each
    GPU, 0 where any will do. With `gpu_required` a run that finds no GPU is refused. `pool` is the concurrency
    pool, by default `gpu` or `cpu`.
    """

    cpus: float = 1
    gpus: float = 0
    memory_bytes: int = 4 * _GIBIBYTE
    gpu_memory_bytes: int = 0
    gpu_required: bool = False
    pool: str = ""

    @property
    def pool_name(self) -> str:
        """Concurrency pool of the step."""
        return self.pool or self.kind

    @property
    def kind(self) -> str:
        """`gpu` or `cpu`: the kind of machine."""
        return "gpu" if self.gpus else "cpu"


def stated(compute: Compute, group: str, default: Needs) -> Needs:
    """Needs of `group`: its own, with what the settings say otherwise. Raises BadNeeds on a contradiction."""
    said = compute.groups.get(group)
    if said is None:
        return default
    needs = replace(default, **said.model_dump(exclude={"stages"}, exclude_none=True))
    if needs.gpu_required and not needs.gpus:
        raise BadNeeds(f"compute.groups.{group}: gpu_required contradicts gpus = 0.")
    return needs


def op_tags(group: str, needs: Needs, compute: Compute) -> dict[str, Any]:
    """Tags that Ray, Kubernetes and ECS read to place a step, and the ones runs are limited by. Raises BadNeeds."""
    return {
        KIND_TAG: needs.kind,
        GROUP_TAG: group,
        RAY_TAG: _ray(needs),
        K8S_TAG: _kubernetes(needs, compute),
        **(_ecs(needs, compute) if compute.executor == "ecs" else {}),
    }


def run_tags(tags: Mapping[str, Any], executor: str) -> dict[str, Any]:
    """Those of a step's tags that its run needs as well: ECS and Kubernetes launch runs, Ray places steps."""
    wanted = (GROUP_TAG, KIND_TAG, *{"ecs": (ECS_PREFIX,), "k8s": (K8S_TAG,)}.get(executor, ()))
    return {name: value for name, value in tags.items() if name.startswith(wanted)}


def micro_batch_scale(needs: Needs, device_bytes: int) -> int:
    """By how much a stage's micro-batch grows on a GPU: the power of two that its share of 8 GiB units allows, 1 to 8.

    `device_bytes` is the memory of the GPU at hand, 0 on the CPU. What does not fit after all is halved by the engine.
    """
    share = needs.gpu_memory_bytes or device_bytes * min(needs.gpus, 1.0)
    units = min(share, device_bytes) / _USUAL_GPU_BYTES
    return int(min(_MOST_SCALE, 2 ** math.floor(math.log2(units)))) if units >= 1 else 1


def _ray(needs: Needs) -> dict[str, Any]:
    ray: dict[str, Any] = {"num_cpus": needs.cpus, "memory": needs.memory_bytes}
    if needs.gpus:
        ray["num_gpus"] = needs.gpus
    return ray


def _kubernetes(needs: Needs, compute: Compute) -> dict[str, Any]:
    """A container's resources, and for GPUs where its pod may go. Kubernetes knows whole GPUs only."""
    memory = f"{needs.memory_bytes // _MEBIBYTE}Mi"
    requests = {"cpu": f"{needs.cpus:g}", "memory": memory}
    # No limit of CPU: idle cores are there to be used.
    limits = {"memory": memory}
    if not needs.gpus:
        return {"container_config": {"resources": {"requests": requests, "limits": limits}}}
    limits["nvidia.com/gpu"] = str(math.ceil(needs.gpus))
    pod: dict[str, Any] = {
        "node_selector": dict(compute.k8s_gpu_node_selector),
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
    }
    if needs.gpu_memory_bytes:
        # The label is set by NVIDIA's GPU feature discovery, in MiB; cards have a little less than their name says.
        enough = str(int(needs.gpu_memory_bytes * 0.9) // _MEBIBYTE)
        memory_label = {"key": "nvidia.com/gpu.memory", "operator": "Gt", "values": [enough]}
        terms = [{"match_expressions": [memory_label]}]
        pod["affinity"] = {
            "node_affinity": {"required_during_scheduling_ignored_during_execution": {"node_selector_terms": terms}}
        }
    return {
        "container_config": {"resources": {"requests": requests, "limits": limits}},
        "pod_spec_config": pod,
    }


def _ecs(needs: Needs, compute: Compute) -> dict[str, str]:
    """Size of the task, and for GPUs its task definition and capacity provider; both win over the launcher's own.

    How many GPUs a task gets stands in its task definition, which no override can change.
    """
    units, mebibytes = math.ceil(needs.cpus * 1024), needs.memory_bytes // _MEBIBYTE
    if needs.gpus:
        provider = {"capacityProvider": compute.ecs_gpu_capacity_provider, "weight": 1}
        kwargs = {
            "taskDefinition": compute.ecs_gpu_task_definition,
            "capacityProviderStrategy": [provider],
        }
        return {"ecs/cpu": str(units), "ecs/memory": str(mebibytes), "ecs/run_task_kwargs": json.dumps(kwargs)}
    units, mebibytes = _fargate(units, mebibytes)
    return {"ecs/cpu": str(units), "ecs/memory": str(mebibytes)}


def _fargate(units: int, mebibytes: int) -> tuple[int, int]:
    """The smallest size Fargate sells that holds both: CPU units, MiB. Raises BadNeeds beyond its largest."""
    sizes = [(*size, 1024) for size in _FARGATE] + list(_FARGATE_LARGE)
    for sold, least, most, step in sizes:
        if units <= sold and mebibytes <= most:
            return sold, max(least, least + math.ceil((mebibytes - least) / step) * step)
    raise BadNeeds(f"Fargate has no machine of {units / 1024:g} CPUs and {mebibytes} MiB.")
