"""What executes runs: one setting decides on Dagster's executor and, through dagster.yaml, on its run launcher."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from media_assets.orchestration.grouping import groups
from resources.compute import devices
from resources.errors import MediaError
from resources.settings import Settings

if TYPE_CHECKING:
    import dagster as dg

PROJECT = Path(__file__).parents[1]
# Packages beyond those every installation has, by executor: what it imports, and the extra that installs it.
_EXTRAS = {"ray": ("dagster_ray", "ray"), "k8s": ("dagster_k8s", "k8s")}


class ExecutorUnavailable(MediaError):
    """The chosen executor is not installed."""

    code, http_status = "executor_unavailable", 503
    remedy = "Install the extra the message names, or choose another compute.executor."


def executor(settings: Settings) -> dg.ExecutorDefinition:
    """Dagster's executor of steps. Raises ExecutorUnavailable.

    A run is one batch of one group, which is one step. Only Ray is given that step; elsewhere the launcher has
    brought the run to a machine that suits it, and the step runs there within the run's own process.
    """
    _installed(settings.compute.executor)
    if settings.compute.executor == "ray":
        from jobs import on_ray

        return on_ray.executor(settings)
    from dagster import in_process_executor

    return in_process_executor


def instance_file(settings: Settings) -> Path:
    """The dagster.yaml that belongs to the chosen executor. Raises ExecutorUnavailable."""
    name = settings.compute.executor
    _installed(name)
    return PROJECT / "dagster.yaml" if name == "local" else PROJECT / "deploy" / name / "dagster.yaml"


def pool_limits(settings: Settings) -> dict[str, int]:
    """Runs at once in each pool of steps that share this machine's GPUs: as many as there are devices for.

    Empty on a cluster, whose scheduler knows its devices, and where this machine has none. Raises DeviceUnavailable.
    """
    if settings.compute.executor != "local":
        return {}
    limits: dict[str, int] = {}
    for group in groups(settings):
        if found := devices.candidates(group.needs, settings.profile):
            limit = len(found) // devices.count(group.needs)
            limits[group.needs.pool_name] = min(limit, limits.get(group.needs.pool_name, limit))
    return limits


def _installed(name: str) -> None:
    package, extra = _EXTRAS.get(name, ("", ""))
    if package and find_spec(package) is None:
        raise ExecutorUnavailable(
            f'compute.executor = "{name}" needs {package}, which is not installed.',
            f'Install the extra: pip install "media-assets[{extra}]"',
        )
