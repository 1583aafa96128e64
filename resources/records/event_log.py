"""What Dagster's own tables hold of media items, found and erased there: Dagster has no call that does it.

They lie in the same database (see dagster.yaml). A materialization carries previews of its item, a check the worst
rows of its batch, a log line the error of an item; run configs, tags and ticks hold IDs alone and are left as they are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from resources.errors import printable
from resources.records.database import Database
from resources.records.erasure import mention

PURGED_TEXT = "(purged)"
_CHUNK = 200  # events read at once; one may hold pictures of some 100 kB
_PICTURE = "data:image/"
_RECORD = "TableRecord"
_UNFINISHED = ("NOT_STARTED", "QUEUED", "STARTING", "STARTED", "CANCELING", "MANAGED")


_LAST_RUNS = 1000  # how far back a failed run of an item is looked for


@dataclass(frozen=True, slots=True)
class FailedRun:
    """A run that failed as a whole, and why, in a sentence."""

    run_id: str
    job: str
    ended_at: datetime
    error: str


class EventLog:
    """Dagster's tables of events, checks, assets, partitions and runs."""

    def __init__(self, database: Database) -> None:
        self._engine = database.engine

    def erase(self, media_ids: Sequence[str]) -> dict[str, int]:
        """Erase every event, log line, check row and partition of these items; returns counts.

        Events of a whole batch stay, without the rows and sentences that name an item.
        """
        if not self._exists():
            return {}
        counts = {"events": 0, "events_redacted": 0}
        ids, patterns = list(media_ids), [f"%{media_id}%" for media_id in media_ids]
        named = mention(media_ids)
        where = "event like any(:patterns) or partition = any(:ids)"
        for chunk in self._found("event_logs", where, {"patterns": patterns, "ids": ids}):
            with self._engine.begin() as connection:
                rows = connection.execute(
                    sa.text(
                        "select id, event, dagster_event_type is null or coalesce(partition = any(:ids), false)"
                        " from event_logs where id = any(:chunk)"
                    ),
                    {"ids": ids, "chunk": chunk},
                ).all()
                own = [number for number, _, is_own in rows if is_own]
                connection.execute(sa.text("delete from asset_event_tags where event_id = any(:own)"), {"own": own})
                connection.execute(sa.text("delete from event_logs where id = any(:own)"), {"own": own})
                for number, event, is_own in rows:
                    if not is_own:
                        _update(connection, "event_logs", "event", number, redacted(event, named))
                counts["events"] += len(own)
                counts["events_redacted"] += len(rows) - len(own)
        counts["checks_redacted"] = self._redact_checks(named, patterns)
        counts |= self._forget(ids, patterns)
        return counts

    def erase_pictures(self, asset_keys: Collection[Sequence[str]]) -> int:
        """Take the pictures out of all events of these assets; returns how many events had some."""
        if not asset_keys or not self._exists():
            return 0
        keys, count = [json.dumps(list(key)) for key in asset_keys], 0
        where = "asset_key = any(:keys) and event like :picture"
        pictures = re.compile(re.escape(_PICTURE))
        for chunk in self._found("event_logs", where, {"keys": keys, "picture": f"%{_PICTURE}%"}):
            with self._engine.begin() as connection:
                rows = connection.execute(
                    sa.text("select id, event from event_logs where id = any(:chunk)"), {"chunk": chunk}
                ).all()
                for number, event in rows:
                    _update(connection, "event_logs", "event", number, redacted(event, pictures))
            count += len(rows)
        with self._engine.begin() as connection:
            statement = "update asset_keys set last_materialization = null where asset_key = any(:keys)"
            connection.execute(sa.text(statement), {"keys": keys})
        return count

    def unfinished_runs(self) -> list[str]:
        """Runs that Dagster does not hold for ended; some may be dead."""
        if not self._exists():
            return []
        query = sa.text("select run_id from runs where status = any(:unfinished) order by id")
        with self._engine.connect() as connection:
            return list(connection.execute(query, {"unfinished": list(_UNFINISHED)}).scalars())

    def failed_run(self, media_id: str) -> FailedRun | None:
        """The newest run whose batch names the item, if it failed: the reason why there is no outcome of it.

        Runs over a range of partitions do not name their items.
        """
        if not self._exists():
            return None
        newest = sa.text(
            "select run_id, pipeline_name, status, update_timestamp at time zone 'utc' from"
            " (select * from runs order by id desc limit :most) as last"
            " where strpos(run_body, :named) > 0 order by id desc limit 1"
        )
        failures = sa.text(
            "select event from event_logs where run_id = :run_id"
            " and dagster_event_type in ('STEP_FAILURE', 'PIPELINE_FAILURE') order by id"
        )
        with self._engine.connect() as connection:
            run = connection.execute(newest, {"most": _LAST_RUNS, "named": json.dumps(media_id)}).first()
            if run is None or run[2] != "FAILURE":
                return None
            events = list(connection.execute(failures, {"run_id": run[0]}).scalars())
        told = next(filter(None, map(_failure, events)), "No reason was recorded.")
        return FailedRun(run[0], run[1], run[3], told)

    def _exists(self) -> bool:
        with self._engine.connect() as connection:
            return sa.inspect(connection).has_table("event_logs")

    def _found(self, table: str, where: str, values: dict[str, Any]) -> Iterable[list[int]]:
        """Row IDs in chunks."""
        with self._engine.connect() as connection:
            query = sa.text(f"select id from {table} where {where} order by id")  # noqa: S608 - constants
            ids = list(connection.execute(query, values).scalars())
        return [ids[start : start + _CHUNK] for start in range(0, len(ids), _CHUNK)]

    def _redact_checks(self, named: re.Pattern[str], patterns: list[str]) -> int:
        count = 0
        for chunk in self._found(
            "asset_check_executions", "evaluation_event like any(:patterns)", {"patterns": patterns}
        ):
            with self._engine.begin() as connection:
                query = sa.text("select id, evaluation_event from asset_check_executions where id = any(:chunk)")
                for number, event in connection.execute(query, {"chunk": chunk}).all():
                    text = redacted(event, named)
                    _update(connection, "asset_check_executions", "evaluation_event", number, text)
            count += len(chunk)
        return count

    def _forget(self, ids: list[str], patterns: list[str]) -> dict[str, int]:
        """Copies of events that Dagster keeps beside them, and the partitions."""
        statements = {
            "asset_event_tags": "delete from asset_event_tags where value like any(:patterns)",
            "last_materializations": "update asset_keys set last_materialization = null"
            " where last_materialization like any(:patterns)",
            "status_caches": "update asset_keys set cached_status_data = null where cached_status_data is not null",
            # A run that is not over may begin its range of partitions with this one, and fails without it.
            "partitions": "delete from dynamic_partitions where partition = any(:ids) and partition not in ("
            "select t.value from run_tags t join runs r using (run_id) where r.status = any(:unfinished)"
            " and t.key in ('dagster/partition', 'dagster/asset_partition_range_start',"
            " 'dagster/asset_partition_range_end'))",
        }
        counts: dict[str, int] = {}
        with self._engine.begin() as connection:
            for name, statement in statements.items():
                used = {"patterns": patterns, "ids": ids, "unfinished": list(_UNFINISHED)}
                used = {key: value for key, value in used.items() if f":{key}" in statement}
                counts[name] = connection.execute(sa.text(statement), used).rowcount
        return counts


def _failure(event: str) -> str:
    """What a stored failure says: the message of the error within Dagster's own, else of that, else of the event."""
    told = json.loads(event)["dagster_event"]
    error = (told.get("event_specific_data") or {}).get("error") or told
    return printable(" ".join((error.get("cause") or error).get("message", "").split()))


def redacted(event: str, pattern: re.Pattern[str]) -> str:
    """A serialized event without the entries of lists that match `pattern`, and with every other match taken out."""
    return json.dumps(_redact(json.loads(event), pattern))


def _redact(value: Any, pattern: re.Pattern[str]) -> Any:
    if isinstance(value, dict):
        return {key: _redact(entry, pattern) for key, entry in value.items()}
    if isinstance(value, list):
        return [_redact(entry, pattern) for entry in value if not (_is_entry(entry) and _matches(entry, pattern))]
    return PURGED_TEXT if isinstance(value, str) and pattern.search(value) else value


def _is_entry(value: Any) -> bool:
    """Whether a list may go without this: a text, a pair of a mapping, a row of a table."""
    return isinstance(value, str | list) or (isinstance(value, dict) and value.get("__class__") == _RECORD)


def _matches(value: Any, pattern: re.Pattern[str]) -> bool:
    if isinstance(value, dict):
        return any(pattern.search(key) or _matches(entry, pattern) for key, entry in value.items())
    if isinstance(value, list):
        return any(_matches(entry, pattern) for entry in value)
    return isinstance(value, str) and pattern.search(value) is not None


def _update(connection: sa.Connection, table: str, column: str, number: int, text: str) -> None:
    statement = sa.text(f"update {table} set {column} = :text where id = :number")  # noqa: S608 - constants
    connection.execute(statement, {"text": text, "number": number})
