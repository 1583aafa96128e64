"""One job per group of stages: what the command line, backfills and planners launch."""

from __future__ import annotations

import dagster as dg

from media_assets.groups import GROUPS


def _job(name: str) -> dg.UnresolvedAssetJobDefinition:
    return dg.define_asset_job(
        name=f"process_{name}",
        selection=dg.AssetSelection.groups(name),
        description=f"The {name} group over a batch of media items, given by partitions or by `keys` in its config.",
        tags={"media/group": name},
    )


processing_jobs = [_job(group.name) for group in GROUPS]
