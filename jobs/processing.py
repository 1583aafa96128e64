"""One job per group of stages: what the command line, backfills and planners launch."""

from __future__ import annotations

import dagster as dg

from media_assets.orchestration.grouping import groups
from resources.compute.needs import op_tags, run_tags
from resources.settings import Settings


def build_processing_jobs(settings: Settings) -> list[dg.UnresolvedAssetJobDefinition]:
    """The jobs, in topological order; their runs carry what launchers read of a run's needs."""
    compute = settings.compute
    return [
        dg.define_asset_job(
            name=f"process_{group.name}",
            selection=dg.AssetSelection.groups(group.name),
            description=f"The {group.name} group over a batch of media items, given by partitions or by `keys` in its"
            " config.",
            tags=run_tags(op_tags(group.name, group.needs, compute), compute.executor),
        )
        for group in groups(settings)
    ]
