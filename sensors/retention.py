"""`retention_sensor`: deletes what Dagster keeps of past runs and ticks, as far as nothing that is shown depends on it.

Dagster keeps the events of a run with the run. One that holds the last materialization of a partition, or an
observation made after it, stays therefore, however old: pictures, provenance and staleness are read from it.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Collection, Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import dagster as dg
from pydantic import BaseModel, ConfigDict, ValidationError

from resources.records.erasure import text_files
from resources.settings import Retention, Settings

NAME = "retention_sensor"
INTERVAL_S = 3600
_BUDGET_S = 25.0  # of a tick, which Dagster ends after 60
_REST = timedelta(days=1)  # between two passes over the old runs
_PAGE = 100  # runs
_EVENTS = 50  # of a run, read at once; one may hold pictures of some 100 kB
_DAY_S = 86_400
_CAPTURED = {".out", ".err", ".complete"}  # suffixes of what Dagster captures to files
_FINISHED = [dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.CANCELED]
_MADE, _SEEN = dg.DagsterEventType.ASSET_MATERIALIZATION, dg.DagsterEventType.ASSET_OBSERVATION
_UNFINISHED = [status for status in dg.DagsterRunStatus if status not in _FINISHED]


class Place(BaseModel):
    """The sensor's cursor: runs made until `after` were looked at in this pass over the old ones; the next one begins
    at `rest_until`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    after: datetime | None = None
    rest_until: datetime | None = None


def build_retention_sensor(settings: Settings) -> dg.SensorDefinition:
    """The sensor of one installation; it requests no runs."""
    retention = settings.retention

    @dg.sensor(
        name=NAME,
        minimum_interval_seconds=INTERVAL_S,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Deletes old runs that nothing shown depends on, and old captured logs.",
    )
    def retention_sensor(context: dg.SensorEvaluationContext) -> dg.SensorResult:
        now, deadline = datetime.now(UTC), time.monotonic() + _BUDGET_S
        files = delete_logs(context.instance, retention, now)
        place, kept, deleted = delete_runs(context.instance, retention, _place(context.cursor), now, deadline)
        told = f"Deleted {deleted} old runs and {files} log files; {kept} old runs are needed."
        return dg.SensorResult(skip_reason=dg.SkipReason(told), cursor=place.model_dump_json())

    return retention_sensor


def _place(cursor: str | None) -> Place:
    try:
        return Place.model_validate_json(cursor) if cursor else Place()
    except ValidationError:
        return Place()


def delete_runs(
    instance: dg.DagsterInstance, retention: Retention, place: Place, now: datetime, deadline: float
) -> tuple[Place, int, int]:
    """Delete finished runs older than `runs_days` that are not needed, from `place` on, until `deadline` (of the
    monotonic clock). Returns where to go on, and how many were kept and deleted."""
    kept = deleted = 0
    if not retention.runs_days or (place.rest_until is not None and now < place.rest_until):
        return place, kept, deleted
    after, before = place.after, now - timedelta(days=retention.runs_days)
    while True:
        wanted = dg.RunsFilter(statuses=_FINISHED, created_after=after, created_before=before)
        page = instance.get_run_records(wanted, limit=_PAGE, ascending=True)
        for record in page:
            if time.monotonic() >= deadline:
                return Place(after=after), kept, deleted
            if is_needed(instance, record.dagster_run.run_id):
                kept += 1
            else:
                instance.delete_run(record.dagster_run.run_id)
                deleted += 1
            after = record.create_timestamp
        if not page:
            return Place(rest_until=now + _REST), kept, deleted


def is_needed(instance: dg.DagsterInstance, run_id: str) -> bool:
    """Whether a run holds the last materialization of some partition of an asset, or an observation made after it."""
    for key, partitions in _events(instance, run_id, _MADE):
        if any(run == run_id for _, run in _last(instance, key, _MADE, partitions).values()):
            return True
    for key, partitions in _events(instance, run_id, _SEEN):
        made = _last(instance, key, _MADE, partitions)
        for partition, (number, run) in _last(instance, key, _SEEN, partitions).items():
            if run == run_id and number > made.get(partition, (0, ""))[0]:
                return True
    return False


def _events(
    instance: dg.DagsterInstance, run_id: str, kind: dg.DagsterEventType
) -> Iterator[tuple[dg.AssetKey, set[str | None]]]:
    """Partitions of which the run has an event of a kind, asset by asset, some events at a time; None stands for an
    asset without any."""
    cursor: str | None = None
    while True:
        page = instance.get_records_for_run(run_id, cursor, kind, limit=_EVENTS)
        found: defaultdict[dg.AssetKey, set[str | None]] = defaultdict(set)
        for record in page.records:
            event = record.event_log_entry.get_dagster_event()
            if event.asset_key is not None:
                found[event.asset_key].add(event.partition)
        yield from found.items()
        if not page.has_more:
            return
        cursor = page.cursor


def _last(
    instance: dg.DagsterInstance, key: dg.AssetKey, kind: dg.DagsterEventType, partitions: Collection[str | None]
) -> dict[str | None, tuple[int, str]]:
    """Number and run of the last event of a kind, by partition."""
    fetch = instance.fetch_materializations if kind is _MADE else instance.fetch_observations
    records: list[dg.EventLogRecord] = []
    if named := {partition for partition in partitions if partition is not None}:
        numbers = [*instance.get_latest_storage_id_by_partition(key, kind, named).values()]
        wanted = dg.AssetRecordsFilter(key, storage_ids=numbers)
        records += fetch(wanted, limit=len(numbers)).records if numbers else ()
    if None in partitions:
        records += fetch(key, limit=1).records
    return {record.partition_key: (record.storage_id, record.run_id) for record in records}


def delete_logs(instance: dg.DagsterInstance, retention: Retention, now: datetime) -> int:
    """Delete captured logs of runs and ticks not written to for `logs_days`, those of runs under way excepted, and the
    folders that are empty then; returns how many files."""
    if not retention.logs_days:
        return 0
    folder = Path(instance.storage_directory())
    oldest = now.timestamp() - retention.logs_days * _DAY_S
    old = [path for path in text_files(folder) if path.suffix in _CAPTURED and path.stat().st_mtime < oldest]
    if not old:
        return 0
    running = {run.run_id for run in instance.get_runs(dg.RunsFilter(statuses=_UNFINISHED))}
    gone = [path for path in old if path.relative_to(folder).parts[0] not in running]
    for path in gone:
        path.unlink(missing_ok=True)
    for parent in sorted({parent for path in gone for parent in path.relative_to(folder).parents}, reverse=True):
        if parent.parts:
            with suppress(OSError):  # not empty
                (folder / parent).rmdir()
    return len(gone)
