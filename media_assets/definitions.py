"""Composition root: everything Dagster loads. Imports from everywhere; nothing imports it but the command line."""

from __future__ import annotations

import warnings
from functools import cache

import dagster as dg

# BackfillPolicy and pools are marked beta by Dagster; the project relies on both knowingly.
warnings.filterwarnings("ignore", category=dg.BetaWarning)
warnings.filterwarnings("ignore", category=dg.PreviewWarning)

from evals.assets import eval_assets, eval_checks  # noqa: E402
from jobs.executors import executor  # noqa: E402
from jobs.express import build_express_job, build_whole_job  # noqa: E402
from jobs.processing import build_processing_jobs  # noqa: E402
from jobs.rebuild import build_rebuild_job, build_rebuild_schedule  # noqa: E402
from media_assets.orchestration.global_assets import build_global_assets  # noqa: E402
from media_assets.orchestration.grouping import groups  # noqa: E402
from media_assets.orchestration.groups import build_group  # noqa: E402
from resources.library import Library  # noqa: E402
from sensors.alerts import build_alert_sensor  # noqa: E402
from sensors.folder import build_folder_sensor  # noqa: E402
from sensors.planner import build_planner_sensor  # noqa: E402
from sensors.retention import build_retention_sensor  # noqa: E402
from sensors.s3_events import build_s3_event_sensor  # noqa: E402
from sensors.s3_inventory import build_s3_inventory_sensor  # noqa: E402

uploads = dg.AssetSpec(
    "uploads",
    group_name="sources",
    kinds={"s3", "file"},
    description="Registered media files: the rows of the `uploads` table with state `live`.",
)


def build(library: Library) -> dg.Definitions:
    """All definitions of one library; its database is opened only when a run needs it."""
    settings, models = library.settings, library.models
    rebuild_job = build_rebuild_job(settings)
    jobs = [*build_processing_jobs(settings), build_express_job(settings), rebuild_job]
    return dg.Definitions(
        assets=[
            uploads,
            *(build_group(group, settings, models) for group in groups(settings)),
            *build_global_assets(settings),
            *eval_assets,
        ],
        asset_checks=eval_checks,
        jobs=[*jobs, build_whole_job(settings)],
        schedules=[build_rebuild_schedule(rebuild_job, settings.index.buckets)],
        sensors=[
            build_alert_sensor(settings),
            build_folder_sensor(settings),
            build_s3_event_sensor(settings),
            build_s3_inventory_sensor(settings),
            build_planner_sensor(settings, jobs),
            build_retention_sensor(settings),
        ],
        resources={"media": dg.ResourceDefinition(lambda _: library)},
        executor=executor(settings),
    )


@dg.definitions
def defs() -> dg.Definitions:
    """What Dagster's code location loads: the installation of $MEDIA_HOME (default ./var)."""
    return build(_library())


@cache
def _library() -> Library:
    """One per process: a warm worker loads the definitions for every run, and its models once."""
    return Library.open()
