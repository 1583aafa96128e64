"""What failed since the last look: runs, outcomes, checks, planned batches and ingest messages."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import dagster as dg
import sqlalchemy as sa
from pydantic import BaseModel, ConfigDict

from resources.errors import UpstreamFailed, printable
from resources.records.database import Database
from resources.records.outcome import Status
from resources.records.tables import batches, outcome_history, rejected_messages

SETTLED_S = 10.0
"""Records younger than this wait for the next look: one with a lower number may not be committed yet."""
EXAMPLES = 5
KINDS_LISTED = 10
RECORDS = 1_000  # of Dagster's, read per look; it gives no more at once
_ERROR_CHARACTERS = 300
_NAME_CHARACTERS = 120
_GROUP_TAG = "media/group"
_WILL_RETRY_TAG = "dagster/will_retry"  # Dagster has no public name for it


class Position(BaseModel):
    """How far failures were read: numbers of the last record of each kind, and a time for batches."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    runs: int
    checks: int
    outcomes: int
    messages: int
    batches: datetime


@dataclass(frozen=True, slots=True)
class Example:
    """One failure: what failed, and a sentence."""

    what: str
    error: str
    run_id: str | None = None


@dataclass(frozen=True, slots=True)
class Failures:
    """Failures of one kind: how many, how many of which class, and some of them."""

    kind: str
    count: int
    by: tuple[tuple[str, int], ...]
    examples: tuple[Example, ...]


def current_position(instance: dg.DagsterInstance, database: Database) -> Position:
    """The position behind everything there is."""
    last = instance.event_log_storage.get_maximum_record_id() or 0
    with database.engine.connect() as connection:
        return Position(
            runs=last,
            checks=last,
            outcomes=connection.execute(sa.select(sa.func.max(outcome_history.c.id))).scalar() or 0,
            messages=connection.execute(sa.select(sa.func.max(rejected_messages.c.id))).scalar() or 0,
            batches=connection.execute(sa.select(sa.func.now())).scalar_one(),
        )


def failures_since(
    position: Position, instance: dg.DagsterInstance, database: Database, now: float
) -> tuple[list[Failures], Position]:
    """Failures after `position` by kind, kinds without any left out, and the position behind them.

    `now` is in seconds since the epoch. Nothing is skipped: what is too young or too much comes with the
    next position.
    """
    runs, last_run = _failed_runs(instance, position.runs, now - SETTLED_S)
    checks, last_check = _failed_checks(instance, position.checks, now - SETTLED_S)
    with database.engine.connect() as connection:
        outcomes, last_outcome = _quarantined(connection, position.outcomes)
        messages, last_message = _rejected(connection, position.messages)
        lost, until = _lost_batches(connection, position.batches)
    found = [part for part in (runs, outcomes, checks, lost, messages) if part.count]
    return found, Position(
        runs=last_run, checks=last_check, outcomes=last_outcome, messages=last_message, batches=until
    )


def _failed_runs(instance: dg.DagsterInstance, after: int, before: float) -> tuple[Failures, int]:
    changes = dg.RunStatusChangeRecordsFilter(dg.DagsterEventType.RUN_FAILURE, after_storage_id=after)
    page = instance.fetch_run_status_changes(changes, limit=RECORDS, ascending=True).records
    records = _settled(page, before)
    found = instance.get_run_records(dg.RunsFilter(run_ids=[r.run_id for r in records[:EXAMPLES]])) if records else []
    runs = {record.dagster_run.run_id: record.dagster_run for record in found}
    examples = [
        Example(_run_name(runs.get(record.run_id)), _run_error(instance, record), record.run_id)
        for record in records[:EXAMPLES]
    ]
    jobs = _counted(record.event_log_entry.job_name or "?" for record in records)
    last = records[-1].storage_id if records else after
    return Failures("runs failed", len(records), jobs, tuple(examples)), last


def _run_name(run: dg.DagsterRun | None) -> str:
    if run is None:
        return "a deleted run"
    group = run.tags.get(_GROUP_TAG)
    keys = _batch(run.run_config, group)
    details = [f"group {group}"] if group else []
    details += [f"{len(keys)} items"] if keys else []
    details += ["Dagster tries it again"] if run.tags.get(_WILL_RETRY_TAG) == "true" else []
    return _name(run.job_name + (f" ({', '.join(details)})" if details else ""))


def _batch(config: Any, group: str | None) -> list[str]:
    """Media IDs in a run's configuration: the batch of a planned run."""
    try:
        keys = config["ops"][group]["config"]["keys"]
    except (KeyError, TypeError):
        return []
    return keys if isinstance(keys, list) else []


def _run_error(instance: dg.DagsterInstance, record: dg.EventLogRecord) -> str:
    event = record.event_log_entry.dagster_event
    data = event.job_failure_data if event and event.event_specific_data else None
    step = data.first_step_failure_event if data else None
    error = step.step_failure_data.error if step else data.error if data else None
    if error is not None:
        return _sentence((error.cause or error).message)
    # A run whose process died has no error of its own; the last engine event tells how it ended.
    kinds = {dg.DagsterEventType.ENGINE_EVENT}
    last = instance.get_records_for_run(record.run_id, of_type=kinds, limit=1, ascending=False).records
    told = [entry.event_log_entry.message for entry in last] + [event.message if event and event.message else ""]
    return _sentence(next((text for text in told if text), "No reason was recorded."))


def _failed_checks(instance: dg.DagsterInstance, after: int, before: float) -> tuple[Failures, int]:
    wanted = dg.EventRecordsFilter(dg.DagsterEventType.ASSET_CHECK_EVALUATION, after_cursor=after)
    records = _settled(instance.event_log_storage.get_event_records(wanted, RECORDS, ascending=True), before)
    failed = []
    for record in records:
        event = record.event_log_entry.dagster_event
        if event is None:
            continue
        check = event.asset_check_evaluation_data
        if not check.passed and check.severity is dg.AssetCheckSeverity.ERROR:
            failed.append((_name(f"{check.asset_key.to_user_string()}: {check.check_name}"), check, record.run_id))
    examples = (
        Example(name, _sentence(check.description or "It did not pass."), run_id)
        for name, check, run_id in failed[:EXAMPLES]
    )
    last = records[-1].storage_id if records else after
    return Failures("checks failed", len(failed), _counted(name for name, _, _ in failed), tuple(examples)), last


def _settled(records: Iterable[dg.EventLogRecord], before: float) -> list[dg.EventLogRecord]:
    """The records up to the first one that is too young."""
    kept = []
    for record in records:
        if record.timestamp > before:
            break
        kept.append(record)
    return kept


def _quarantined(connection: sa.Connection, after: int) -> tuple[Failures, int]:
    table = outcome_history.c
    last = _last_settled(connection, outcome_history, after)
    # What merely waits for a failed input is not a failure of its own.
    mine = (
        table.id > after,
        table.id <= last,
        table.status == Status.QUARANTINED,
        table.error_class.is_distinct_from(UpstreamFailed.code),
    )
    counts = _count_by(connection, sa.select(table.asset, table.error_class).where(*mine))
    rows = connection.execute(sa.select(outcome_history).where(*mine).order_by(table.id).limit(EXAMPLES)).mappings()
    examples = tuple(
        Example(_name(f"{row['asset']} of {row['media_id']}"), _sentence(row["error"] or ""), row["run_id"])
        for row in rows
    )
    return Failures("outcomes quarantined", sum(n for _, n in counts), counts, examples), last


def _rejected(connection: sa.Connection, after: int) -> tuple[Failures, int]:
    table = rejected_messages.c
    last = _last_settled(connection, rejected_messages, after)
    mine = (table.id > after, table.id <= last)
    counts = _count_by(connection, sa.select(table.source, table.reason).where(*mine))
    rows = connection.execute(sa.select(rejected_messages).where(*mine).order_by(table.id).limit(EXAMPLES)).mappings()
    examples = tuple(Example(_name(f"{r['source']} message {r['message_id']}"), _sentence(r["reason"])) for r in rows)
    return Failures("ingest messages rejected", sum(n for _, n in counts), counts, examples), last


def _lost_batches(connection: sa.Connection, after: datetime) -> tuple[Failures, datetime]:
    table = batches.c
    settled = sa.func.now() - sa.func.make_interval(0, 0, 0, 0, 0, 0, SETTLED_S)
    until = max(after, connection.execute(sa.select(settled)).scalar_one())
    mine = (table.finished_at > after, table.finished_at <= until, table.state.in_(("failed", "lost")))
    counts = _count_by(connection, sa.select(table.group, table.state).where(*mine))
    rows = connection.execute(
        sa.select(batches).where(*mine).order_by(table.finished_at, table.id).limit(EXAMPLES)
    ).mappings()
    examples = tuple(
        Example(
            _name(f"batch {row['id']} of {row['group']} ({row['items']} items)"),
            "Its run failed." if row["state"] == "failed" else "Its run never began, or is gone.",
            row["run_id"],
        )
        for row in rows
    )
    return Failures("planned batches failed or lost", sum(n for _, n in counts), counts, examples), until


def _last_settled(connection: sa.Connection, table: sa.Table, after: int) -> int:
    """The last number below which every row is settled."""
    young = table.c.at > sa.func.now() - sa.func.make_interval(0, 0, 0, 0, 0, 0, SETTLED_S)
    first_young = sa.select(sa.func.min(table.c.id) - 1).where(table.c.id > after, young).scalar_subquery()
    newest = sa.select(sa.func.max(table.c.id)).where(table.c.id > after).scalar_subquery()
    last = connection.execute(sa.select(sa.func.coalesce(first_young, newest, after))).scalar_one()
    return max(after, int(last))


def _count_by(connection: sa.Connection, query: sa.Select[Any]) -> tuple[tuple[str, int], ...]:
    columns = list(query.selected_columns)
    counted = query.add_columns(sa.func.count()).group_by(*columns)
    found: dict[str, int] = {}
    for first, second, count in connection.execute(counted):
        name = _name(f"{first}: {second}")
        found[name] = found.get(name, 0) + count
    return _most_first(found)


def _counted(names: Iterable[str]) -> tuple[tuple[str, int], ...]:
    found: dict[str, int] = {}
    for name in names:
        found[_name(name)] = found.get(_name(name), 0) + 1
    return _most_first(found)


def _most_first(counts: dict[str, int]) -> tuple[tuple[str, int], ...]:
    return tuple(sorted(counts.items(), key=lambda entry: (-entry[1], entry[0])))


def _name(text: str) -> str:
    return printable(text, _NAME_CHARACTERS)


def _sentence(text: str) -> str:
    return printable(" ".join(text.split()), _ERROR_CHARACTERS)


def utc(seconds: float) -> str:
    """Seconds since the epoch as ISO 8601."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
