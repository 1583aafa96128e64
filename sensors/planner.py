"""planner_sensor: launches the planner's batches, and the rebuild of what spans items once the backlog is quiet."""

from collections.abc import Mapping, Sequence
from typing import Any

import dagster as dg

from jobs.express import EXPRESS
from jobs.planner import Batch, Planner
from jobs.rebuild import rebuild_request
from media_assets.orchestration.lost import report_lost
from media_assets.orchestration.partitions import add_partitions, explicit_batch_tags
from resources.ingest.registry import CHANGES
from resources.library import Library
from resources.records.backlog import BatchRecord
from resources.settings import Settings
from sensors.intervals import every, stay_s

BATCH_TAG = "media/batch"
LANE_TAG = "media/lane"
_REQUEST_AGAIN_S = 30.0


def build_planner_sensor(settings: Settings, jobs: Sequence[Any]) -> dg.SensorDefinition:
    """The sensor over the asset jobs of the groups and of the rebuild (Dagster has no public name for their type)."""
    planners: list[Planner] = []  # one per process: it keeps what past work cost

    @dg.sensor(
        name="planner_sensor",
        jobs=list(jobs),
        minimum_interval_seconds=every(settings.planner.interval_s),
        default_status=dg.DefaultSensorStatus.RUNNING if settings.planner.enabled else dg.DefaultSensorStatus.STOPPED,
        description="Packs pending, stale and due uploads into batches, at most so many in flight per group.",
        required_resource_keys={"media"},
    )
    def planner_sensor(context: dg.SensorEvaluationContext) -> dg.SensorResult | dg.SkipReason:
        library: Library = context.resources.media
        if not planners:
            planners.append(Planner(library))
        with library.database.listening(CHANGES) as told:
            decision, is_idle = _decide(context, library, planners[0])
            if is_idle and told(stay_s(context.instance)):
                decision, _ = _decide(context, library, planners[0])
        return decision

    return planner_sensor


def _decide(
    context: dg.SensorEvaluationContext, library: Library, planner: Planner
) -> tuple[dg.SensorResult | dg.SkipReason, bool]:
    """What to launch now, and whether the system is idle: nothing in flight and no item with work left."""
    lost_requests = follow(library, context.instance)
    tick = planner.tick()
    batches = [*lost_requests, *tick.batches]
    if batches:
        # Of a tick that launches nothing they are the reason why; a log would be a file for every tick.
        for line in tick.explanations:
            context.log.info(line)
        # Uploads registered by the command line may not be partitions yet.
        add_partitions(context.instance, library.settings, [key for batch in batches for key in batch.keys])
        return dg.SensorResult(run_requests=[request(batch, library.settings) for batch in batches]), False
    is_quiet = not library.backlog.open_batches()
    if is_quiet and (rebuild := rebuild_request(library)) is not None:
        context.log.info("rebuild: the library changed and nothing is in flight")
        return dg.SensorResult(run_requests=[rebuild]), False
    return dg.SkipReason("; ".join(tick.explanations)), is_quiet and tick.looked_at == tick.settled


def request(batch: Batch, settings: Settings) -> dg.RunRequest:
    """The run of one batch; asking for it twice launches it once."""
    return dg.RunRequest(
        run_key=f"batch-{batch.id}",
        job_name=f"process_{batch.group}",
        run_config={"ops": {batch.group: {"config": {"keys": list(batch.keys), "careful": batch.is_careful}}}},
        tags={
            **({} if batch.group == EXPRESS else explicit_batch_tags(batch.keys, settings)),
            BATCH_TAG: str(batch.id),
            LANE_TAG: batch.lane,
            # A lost process's items come back through the planner, which then takes them one at a time.
            "dagster/max_retries": "0",
        },
    )


def follow(library: Library, instance: dg.DagsterInstance) -> list[Batch]:
    """Bring open batches to the state of their runs; returns those whose run has to be asked for again.

    A tick that dies after its batches were committed leaves them without a run.
    """
    open_batches = library.backlog.open_batches()
    if not open_batches:
        return []
    runs = _runs(instance, [batch.id for batch in open_batches])
    base = library.settings.engine.retry_base_s
    again: list[Batch] = []
    for batch in open_batches:
        run = runs.get(batch.id)
        if run is None:
            age = library.backlog.age_s(batch.id)
            if age > library.settings.planner.lost_after_s:
                library.backlog.ended(batch.id, "lost", base)
            elif age > _REQUEST_AGAIN_S and (keys := library.backlog.members(batch.id)):
                again.append(_again(batch, keys))
        elif run.is_finished:
            if not run.is_success and library.settings.partitions == "media":  # of buckets, runs report sums alone
                report_lost(library, instance, run.run_id, library.backlog.members(batch.id))
            library.backlog.ended(batch.id, "finished" if run.is_success else "failed", base, run.run_id)
        else:
            library.backlog.started(batch.id, run.run_id)
    return again


def _again(batch: BatchRecord, keys: list[str]) -> Batch:
    return Batch(batch.id, batch.group, batch.lane, tuple(keys), batch.seconds, batch.reason)


def _runs(instance: dg.DagsterInstance, batch_ids: list[int]) -> Mapping[int, dg.DagsterRun]:
    wanted = dg.RunsFilter(tags={BATCH_TAG: [str(batch_id) for batch_id in batch_ids]})
    return {int(run.tags[BATCH_TAG]): run for run in instance.get_runs(wanted)}
