"""The rebuild of everything that spans items: near-duplicates, catalog and index shards."""

from __future__ import annotations

import dagster as dg

from media_assets.buckets import key
from media_assets.global_assets import library_changed
from media_assets.partitions import range_tags
from resources.library import Library

rebuild_job = dg.define_asset_job(
    name="rebuild",
    selection=dg.AssetSelection.groups("library"),
    description="Compacts changed buckets, rebuilds and swaps their index shards, and regroups near-duplicates.",
)


def rebuild_request(library: Library) -> dg.RunRequest | None:
    """The run of a rebuild where anything came, went or changed since the last one, else None."""
    if not library_changed(library):
        return None
    # One run per state of the library: while it is on its way, and should it fail, the schedule sees to the next.
    mark = library.outcomes.library_mark()
    tags = range_tags(key(0), key(library.settings.index.buckets - 1))
    return dg.RunRequest(run_key=f"rebuild-{mark}", job_name=rebuild_job.name, tags=tags)


def build_rebuild_schedule(buckets: int) -> dg.ScheduleDefinition:
    """The schedule that rebuilds all `buckets`; unchanged ones cost a look at their manifest."""

    @dg.schedule(
        name="rebuild_every_15_minutes",
        job=rebuild_job,
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
