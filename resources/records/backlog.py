"""The backlog: uploads whose outcomes are not all settled, and the batches the planner made of them.

An upload is settled for a plan (the digest of all stages' code and models) once every outcome of it is final
for that plan; whatever claims one of its outcomes unsettles it. So a look at the backlog costs by what is
waiting, not by what the library holds.

    requested ──its run starts──▶ running ──its run ends──▶ finished | failed
    requested ──no run for long──▶ lost

An upload belongs to one batch at most; the end of the batch sets it free.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import insert

from resources.records.database import Database
from resources.records.tables import batches, library_state, uploads

OPEN = ("requested", "running")
_CHUNK = 5000
_NOTES = "planner"
_LONGEST_BACKOFF_S = 3600.0
_LAUNCHES_FREE = 3  # an item's way through the groups


@dataclass(frozen=True, slots=True)
class Waiting:
    """An upload that is not settled, not in a batch and due. `was_settled`: for another plan (code, model)."""

    media_id: str
    uri: str
    etag: str
    bytes: int | None
    priority: int
    discovered_at: datetime
    due_at: datetime | None
    was_settled: bool


@dataclass(frozen=True, slots=True)
class BatchRecord:
    """One row of `batches`. `seconds` is the work expected when it was made."""

    id: int
    group: str
    lane: str
    items: int
    seconds: float
    reason: str
    state: str
    run_id: str | None
    created_at: datetime
    finished_at: datetime | None


@dataclass(frozen=True, slots=True)
class Depth:
    """How many live uploads are unsettled: ready to go, waiting for their retry, or in a batch."""

    ready: int
    waiting: int
    in_batches: int


_LOCK = sa.text("select media_id from uploads where media_id = any(:ids) order by media_id for no key update")
_SETTLE = sa.text(
    """
    update uploads u set plan = :plan, due_at = null, launches = 0, priority = 0
    where u.media_id = any(:ids) and not exists (
        select from outcomes o where o.media_id = u.media_id and (
            o.updated_at >= :read_at or o.status = 'running'
            or (o.status = 'retryable' and o.retry_at <= now() and o.error_class is distinct from 'upstream_failed')
        )
    )
    """
)
_BATCH_FIELDS = [batches.c[name] for name in BatchRecord.__slots__]


class Backlog:
    """Reads and writes the planner's side of `uploads`, and `batches`."""

    def __init__(self, database: Database) -> None:
        self._engine = database.engine

    def waiting(self, plan: str, limit: int) -> list[Waiting]:
        """The first `limit` uploads to work on: by priority, then those never settled, then the oldest."""
        query = sa.text(
            "select media_id, uri, etag, bytes, priority, discovered_at, due_at, plan is not null as was_settled"
            " from uploads where state = 'live' and plan is distinct from :plan and batch_id is null"
            " and (due_at is null or due_at <= now())"
            " order by priority, plan is not null, discovered_at, media_id limit :limit"
        )
        with self._engine.connect() as connection:
            rows = connection.execute(query, {"plan": plan, "limit": limit})
            return [Waiting(*row) for row in rows]

    def depth(self, plan: str) -> Depth:
        """Counts of unsettled live uploads."""
        query = sa.text(
            "select count(*) filter (where batch_id is null and (due_at is null or due_at <= now())),"
            " count(*) filter (where batch_id is null and due_at > now()), count(batch_id)"
            " from uploads where state = 'live' and plan is distinct from :plan"
        )
        with self._engine.connect() as connection:
            return Depth(*connection.execute(query, {"plan": plan}).one())

    def settle(self, media_ids: Sequence[str], plan: str, read_at: datetime) -> None:
        """Nothing is left to do for these uploads under this plan, as their outcomes said at `read_at`.

        Those whose outcomes changed meanwhile are left for the next look.
        """
        for start in range(0, len(media_ids), _CHUNK):
            chunk = {"ids": list(media_ids[start : start + _CHUNK])}
            with self._engine.begin() as connection:
                # Whatever claims an outcome locks its upload: from here on it finds the plan and takes it away.
                connection.execute(_LOCK, chunk).all()
                connection.execute(_SETTLE, {**chunk, "plan": plan, "read_at": read_at})

    def now(self) -> datetime:
        """The database's clock."""
        with self._engine.connect() as connection:
            moment: datetime = connection.execute(sa.select(sa.func.clock_timestamp())).scalar_one()
            return moment

    def defer(self, due: Mapping[str, datetime]) -> None:
        """Look at these uploads again at their time."""
        if not due:
            return
        statement = sa.text(
            "update uploads u set due_at = d.due_at"
            " from unnest(cast(:ids as text[]), cast(:times as timestamptz[])) as d(media_id, due_at)"
            " where u.media_id = d.media_id"
        )
        with self._engine.begin() as connection:
            connection.execute(statement, {"ids": list(due), "times": list(due.values())})

    # -- batches ------------------------------------------------------------------------------------------

    def create(
        self, group: str, lane: str, media_ids: Sequence[str], seconds: float, reason: str
    ) -> tuple[int, list[str]]:
        """Put uploads into a new batch; returns its ID and those that were still free to take, in order."""
        with self._engine.begin() as connection:
            values = {"group": group, "lane": lane, "items": 0, "seconds": seconds, "reason": reason}
            statement = sa.insert(batches).values(**values, state="requested").returning(batches.c.id)
            batch_id: int = connection.execute(statement).scalar_one()
            taken = sa.update(uploads).where(
                uploads.c.media_id.in_(media_ids), uploads.c.batch_id.is_(None), uploads.c.state == "live"
            )
            assigned = taken.values(batch_id=batch_id, launches=uploads.c.launches + 1, due_at=None)
            got = set(connection.execute(assigned.returning(uploads.c.media_id)).scalars())
            connection.execute(sa.update(batches).where(batches.c.id == batch_id).values(items=len(got)))
        return batch_id, [key for key in media_ids if key in got]

    def open_batches(self) -> list[BatchRecord]:
        """Batches whose run has not ended, oldest first."""
        return self._batches(batches.c.state.in_(OPEN), batches.c.id.asc())

    def recent_batches(self, limit: int = 10) -> list[BatchRecord]:
        """The newest batches, whatever their state."""
        return self._batches(sa.true(), batches.c.id.desc(), limit)

    def _batches(
        self, condition: sa.ColumnElement[bool], order: sa.ColumnElement[Any], limit: int | None = None
    ) -> list[BatchRecord]:
        query = sa.select(*_BATCH_FIELDS).where(condition).order_by(order).limit(limit)
        with self._engine.connect() as connection:
            return [BatchRecord(*row) for row in connection.execute(query)]

    def members(self, batch_id: int) -> list[str]:
        """Media IDs of the uploads in an open batch."""
        query = sa.select(uploads.c.media_id).where(uploads.c.batch_id == batch_id).order_by(uploads.c.media_id)
        with self._engine.connect() as connection:
            return list(connection.execute(query).scalars())

    def age_s(self, batch_id: int) -> float:
        """Seconds since the batch was made, by the database's clock."""
        query = sa.text("select extract(epoch from now() - created_at) from batches where id = :id")
        with self._engine.connect() as connection:
            return float(connection.execute(query, {"id": batch_id}).scalar_one())

    def started(self, batch_id: int, run_id: str) -> None:
        """The batch's run exists."""
        with self._engine.begin() as connection:
            connection.execute(
                sa.update(batches)
                .where(batches.c.id == batch_id, batches.c.state == "requested")
                .values(state="running", run_id=run_id)
            )

    def ended(self, batch_id: int, state: str, retry_base_s: float, run_id: str | None = None) -> int:
        """Close a batch as `finished`, `failed` or `lost` and free its uploads; returns how many those are.

        `run_id` is its run, which may have ended before anybody saw it start. After a failure the uploads wait,
        twice as long each time, one hour at most.
        """
        delay = sa.func.least(
            _LONGEST_BACKOFF_S,
            retry_base_s * sa.func.power(2, sa.func.greatest(uploads.c.launches - _LAUNCHES_FREE, 0)),
        )
        due = None if state == "finished" else sa.func.now() + sa.func.make_interval(0, 0, 0, 0, 0, 0, delay)
        with self._engine.begin() as connection:
            closed = connection.execute(
                sa.update(batches)
                .where(batches.c.id == batch_id, batches.c.state.in_(OPEN))
                .values(state=state, finished_at=sa.func.now(), run_id=run_id or batches.c.run_id)
            )
            if closed.rowcount == 0:
                return 0
            freed = sa.update(uploads).where(uploads.c.batch_id == batch_id).values(batch_id=None, due_at=due)
            return connection.execute(freed).rowcount

    # -- costs and notes ----------------------------------------------------------------------------------

    def past_work(self, limit: int) -> list[tuple[str, str, float, int]]:
        """(asset, uri, seconds, bytes of the upload) of the newest finished outcomes that were computed."""
        query = sa.text(
            "select o.asset, u.uri, o.seconds, coalesce(u.bytes, 0) from"
            " (select media_id, asset, seconds, status, copied_from from outcomes"
            " order by updated_at desc limit :limit)"
            " o join uploads u using (media_id)"
            " where o.status = 'ok' and o.copied_from is null and o.seconds is not null"
        )
        with self._engine.connect() as connection:
            return [(row[0], row[1], row[2], row[3]) for row in connection.execute(query, {"limit": limit})]

    def note(self, lines: Sequence[str]) -> None:
        """Keep the last decisions for `status`."""
        statement = insert(library_state).values(name=_NOTES, value=json.dumps(list(lines)))
        changed = {"value": statement.excluded.value, "updated_at": sa.func.now()}
        with self._engine.begin() as connection:
            connection.execute(statement.on_conflict_do_update(index_elements=["name"], set_=changed))

    def notes(self) -> tuple[datetime, list[str]] | None:
        """When the planner decided last, and what; None before its first tick."""
        query = sa.select(library_state.c.updated_at, library_state.c.value).where(library_state.c.name == _NOTES)
        with self._engine.connect() as connection:
            row = connection.execute(query).first()
        return None if row is None else (row[0], json.loads(row[1]))
