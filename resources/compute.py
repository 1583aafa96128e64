"""Compute needs, stated once per group, and what they mean to the executors and launchers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from resources.settings import Settings


@dataclass(frozen=True, slots=True)
class Needs:
    """What one step of a group wants: CPU cores, GPUs (fractions allowed) and memory in bytes."""

    cpus: float = 1
    gpus: float = 0
    memory_bytes: int = 4 * 2**30


def op_tags(group: str, needs: Needs) -> dict[str, Any]:
    """Tags that Ray, Kubernetes and ECS read to place the step."""
    mebibytes = needs.memory_bytes // 2**20
    limits: dict[str, Any] = {"cpu": str(needs.cpus), "memory": f"{mebibytes}Mi"}
    if needs.gpus:
        limits["nvidia.com/gpu"] = str(max(1, round(needs.gpus)))
    ray: dict[str, Any] = {"num_cpus": needs.cpus, "memory": needs.memory_bytes}
    if needs.gpus:
        ray["num_gpus"] = needs.gpus
    return {
        "media/compute": "gpu" if needs.gpus else "cpu",
        "media/group": group,
        "dagster-ray/config": ray,
        "dagster-k8s/config": {"container_config": {"resources": {"limits": limits}}},
        "ecs/cpu": str(int(needs.cpus * 1024)),
        "ecs/memory": str(mebibytes),
    }


def pool(needs: Needs) -> str:
    """Concurrency pool of a step: `gpu` or `cpu`."""
    return "gpu" if needs.gpus else "cpu"


@cache
def _has_cuda() -> bool:
    import torch

    return bool(torch.cuda.is_available())


def device(settings: Settings) -> str:
    """Device models run on: `cuda` where there is one, else `cpu`; the `offline` profile never needs torch to know."""
    return "cuda" if settings.profile == "gpu" and _has_cuda() else "cpu"
