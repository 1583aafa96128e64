"""`media-assets tune`: measures micro-batches on this machine and keeps the fastest for later runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import typer
from rich.console import Console

from resources.library import Library


def tune(library: Library, tasks: Sequence[str], budget_s: float, console: Console) -> list[dict[str, Any]]:
    """Tune the stages that use one of `tasks` (all with models when empty); what was found, a line per trial."""
    from media_assets.grouping import groups
    from media_assets.tuning import best_of, sample, trials
    from resources.tuning import device_name, record

    settings, models = library.settings, library.models
    if unknown := sorted(set(tasks) - set(models.tasks())):
        known = ", ".join(models.tasks())
        raise typer.BadParameter(f"no task {', '.join(unknown)}; the profile has: {known}", param_hint="TASK")
    stages = [stage for group in groups(settings) for stage in group.load(settings, models) if stage.tasks]
    found = []
    for stage in stages:
        if tasks and not set(tasks) & set(stage.tasks):
            continue
        console.print(f"{stage.name}: preparing inputs and loading models", highlight=False)
        units = sample(library, stage)
        stage.load()
        tried = []
        for trial in trials(stage, units, budget_s):
            tried.append(trial)
            said = trial.stopped or f"{trial.units_per_s:.2f} per second"
            console.print(f"{stage.name}: {trial.batch_size} per call, {said}", highlight=False)
        best = best_of(tried)
        record(settings, stage.specs(), best)
        found.append(
            {
                "asset": stage.name,
                "models": [spec.identity for spec in stage.specs()],
                "device": device_name(settings),
                "batch_size": best.batch_size,
                "units_per_s": best.units_per_s,
                "default": stage.micro_batch,
            }
        )
    return found
