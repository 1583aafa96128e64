"""The rebuild of everything that spans items: near-duplicates, catalog and index shards."""

from __future__ import annotations

import dagster as dg

from media_assets.library.buckets import key
from media_assets.orchestration.global_assets import REBUILD, library_changed, needs_of_rebuild
from media_assets.orchestration.grouping import LIBRARY
from media_assets.orchestration.partitions import range_tags
from resources.compute.needs import op_tags, run_tags
from resources.library import Library
from resources.settings import Settings


def build_rebuild_job(settings: Settings) -> dg.UnresolvedAssetJobDefinition:
    """The job; its runs carry what launchers read of a run's needs."""
    compute = settings.compute
    return dg.define_asset_job(
        name=REBUILD,
        selection=dg.AssetSelection.groups(LIBRARY),
        description="Compacts changed buckets, rebuilds and swaps their index shards, and regroups near-duplicates.",
        tags=run_tags(op_tags(LIBRARY, needs_of_rebuild(settings), compute), compute.executor),
    )


def rebuild_request(library: Library) -> dg.RunRequest | None:
    """The run of a rebuild where anything came, went or changed since the last one, else None."""
    if not library_changed(library):
        return None
    # One run per state of the library: while it is on its way, and should it fail, the schedule sees to the next.
    mark = library.outcomes.library_mark()
    tags = range_tags(key(0), key(library.settings.index.buckets - 1))
    return dg.RunRequest(run_key=f"rebuild-{mark}", job_name=REBUILD, tags=tags)


def build_rebuild_schedule(job: dg.UnresolvedAssetJobDefinition, buckets: int) -> dg.ScheduleDefinition:
    """The schedule that rebuilds all `buckets`; unchanged ones cost a look at their manifest."""

    @dg.schedule(
        name="rebuild_every_15_minutes",
        job=job,
        cron_schedule="*/15 * * * *",
        default_status=dg.DefaultScheduleStatus.RUNNING,
        description="Rebuilds what spans items when anything came, went or changed.",
        required_resource_keys={"media"},
    )
    def rebuild_every_15_minutes(context: dg.ScheduleEvaluationContext) -> dg.RunRequest | dg.SkipReason:
        library: Library = context.resources.media
        if not library_changed(library):
            return dg.SkipReason("Nothing came, went or changed since the last rebuild.")
        return dg.RunRequest(tags=range_tags(key(0), key(buckets - 1)))

    return rebuild_every_15_minutes
