"""`media-assets tune`: measures micro-batches on this machine and keeps the fastest for later runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console

from resources.library import Library

if TYPE_CHECKING:
    from media_assets.engine.contract import Stage


def tune(library: Library, tasks: Sequence[str], budget_s: float, console: Console) -> list[dict[str, Any]]:
    """Tune the stages that use one of `tasks` (all with models when empty); what was found, a line per trial.

    Of all stages, those that cannot be tuned are said and left out. Raises NothingToTune for one of `tasks`, and where
    none could be.
    """
    from media_assets.engine.tuning import NothingToTune
    from media_assets.orchestration.grouping import groups

    settings, models = library.settings, library.models
    if unknown := sorted(set(tasks) - set(models.tasks())):
        known = ", ".join(models.tasks())
        raise typer.BadParameter(f"no task {', '.join(unknown)}; the profile has: {known}", param_hint="TASK")
    stages = [stage for group in groups(settings) for stage in group.load(settings, models) if stage.tasks]
    found: list[dict[str, Any]] = []
    for stage in stages:
        if tasks and not set(tasks) & set(stage.tasks):
            continue
        try:
            found.append(_tuned(library, stage, budget_s, console))
        except NothingToTune as nothing:
            if tasks:
                raise
            console.print(f"{stage.name} is not tuned: {nothing}")
    if not found:
        raise NothingToTune("No stage could be tuned.")
    return found


def _tuned(library: Library, stage: Stage[Any, Any], budget_s: float, console: Console) -> dict[str, Any]:
    from media_assets.engine.tuning import best_of, sample, trials
    from resources.models.tuning import device_name, record

    console.print(f"{stage.name}: preparing inputs and loading models")
    units = sample(library, stage)
    stage.load()
    tried = []
    for trial in trials(stage, units, budget_s):
        tried.append(trial)
        said = trial.stopped or f"{trial.units_per_s:.2f} per second"
        console.print(f"{stage.name}: {trial.batch_size} per call, {said}")
    best = best_of(tried)
    record(library.settings, stage.specs(), best)
    return {
        "asset": stage.name,
        "models": [spec.identity for spec in stage.specs()],
        "device": device_name(library.settings),
        "batch_size": best.batch_size,
        "units_per_s": best.units_per_s,
        "default": stage.micro_batch,
    }
