"""The outcome record: one row per media item and asset, and the only legal ways to change it.

Transitions (`claim` grows with every claim, so a worker that lost its item cannot write any more):

    (none) ──claim──▶ running ──finish──▶ ok | not_applicable | retryable | quarantined
    ok, not_applicable ──claim (new version)──▶ running
    retryable ──claim──▶ running
    running ──claim (its worker is gone)──▶ running, or quarantined once attempts are used up
    running ──release (clean shutdown)──▶ retryable, the attempt given back
    quarantined ──claim (new version)──▶ running
    quarantined, retryable (ok, not_applicable on demand) ──reset──▶ retryable, attempts 0
    any but running ──block──▶ retryable | quarantined, class upstream_failed

A worker that died while it loaded a model made no attempt. Every transition is guarded in SQL and written to
`outcome_history` in the same transaction. An upload that is not live any more is neither claimed nor blocked, and of a
purged one nothing is finished. A claim, a block and a reset make the planner look at the item again. Locks are taken
in the order uploads, outcomes, and of several rows of a table in the order of their keys.

Claims and endings come many at a time, in one statement each: an engine with small items waits for little else.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from types import TracebackType
from typing import Any, Self

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import insert

from resources.errors import Failure, UpstreamFailed, WorkerLost
from resources.records.database import LOCK_NAMESPACE, Database
from resources.records.model_loads import ModelLoads, died_loading
from resources.records.tables import outcome_history, outcomes, uploads
from resources.settings import Engine

_CHUNK = 5000  # rows per statement, well below Postgres' limit of 65,535 parameters
_PAGE = 10_000  # rows a server-side cursor fetches at once
LIVE, PURGED = "live", "purged"
EVALUATION = "media-assets evaluate"
"""The lease of whoever evaluates outside Dagster, where a run would have its ID."""
BACKLOG = 1  # planner's priority of what is made again: after fresh uploads


class Status(StrEnum):
    """State of one asset of one media item."""

    RUNNING = "running"
    OK = "ok"
    NOT_APPLICABLE = "not_applicable"
    RETRYABLE = "retryable"
    QUARANTINED = "quarantined"

    @property
    def done(self) -> bool:
        """Whether there is a table to read."""
        return self in (Status.OK, Status.NOT_APPLICABLE)


class LostClaim(Exception):
    """The item was claimed by another run meanwhile; what this worker made is discarded."""


class Withdrawn(LostClaim):
    """The upload was removed, superseded or purged meanwhile; nothing is made from it any more."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """One row of the `outcomes` table. `content` identifies the output; it feeds its dependants' versions."""

    media_id: str
    asset: str
    version: str
    content: str
    status: Status
    attempts: int
    claim: int
    error_class: str | None = None
    error: str | None = None
    run_id: str | None = None
    seconds: float | None = None
    units: int | None = None
    rows: int | None = None
    device: str | None = None
    model: str | None = None
    bytes_out: int | None = None
    copied_from: str | None = None
    retry_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class Claim:
    """The right to finish one asset of one item. `twin` is an item that has the very same already."""

    media_id: str
    asset: str
    version: str
    number: int
    attempts: int
    twin: str | None = None


@dataclass(frozen=True, slots=True)
class Cost:
    """What an item's asset took: seconds of work, model units, rows and bytes written, and on what."""

    seconds: float = 0.0
    units: int = 0
    rows: int = 0
    bytes_out: int = 0
    device: str | None = None
    model: str | None = None
    copied_from: str | None = None


@dataclass(frozen=True, slots=True)
class Ending:
    """How a claimed asset of an item ended; made by `succeeded` and `failed`.

    `content` and `attempts` stay as they are where None; `retry_s` are seconds until a retry is due.
    """

    claim: Claim
    status: Status
    cost: Cost | None = None
    content: str | None = None
    attempts: int | None = None
    error_class: str | None = None
    error: str | None = None
    retry_s: float | None = None


def succeeded(claim: Claim, status: Status, content: str, cost: Cost, note: str | None = None) -> Ending:
    """`ok` or `not_applicable`. Raises ValueError for any other status."""
    if not status.done:
        raise ValueError(f"{status} is not a success")
    return Ending(claim, status, cost, content, error=note)


def failed(claim: Claim, failure: Failure, cost: Cost, settings: Engine) -> Ending:
    """`retryable`, due after a growing delay, as long as there are attempts left; else `quarantined`."""
    retry = failure.retryable and claim.attempts < settings.max_attempts
    delay_s = settings.retry_base_s * 2 ** (claim.attempts - 1) * random.uniform(0.5, 1.5)  # noqa: S311
    return Ending(
        claim,
        Status.RETRYABLE if retry else Status.QUARANTINED,
        cost,
        error_class=failure.error_class,
        error=failure.message,
        retry_s=delay_s if retry else None,
    )


_FIELDS = [outcomes.c[name] for name in Outcome.__slots__]
_HISTORY = ("media_id", "asset", "version", "claim", "status", "error_class", "error", "run_id")
# First claims of outcomes, by far the most frequent, in one round trip; any other finds a row in its way.
_CLAIM_FIRST = sa.text(
    """
    with wanted as (
        select * from unnest(cast(:media_ids as text[]), cast(:assets as text[]), cast(:versions as text[]))
            as w(media_id, asset, version)
    ), held as materialized (
        select media_id from uploads where media_id in (select media_id from wanted) and state = 'live'
        order by media_id for no key update
    ), made as (
        insert into outcomes (media_id, asset, version, status, attempts, claim, run_id)
        select media_id, asset, version, 'running', 1, 1, :run_id
        from wanted where media_id in (select media_id from held)
            or not exists (select from uploads where uploads.media_id = wanted.media_id)
        order by media_id, asset
        on conflict do nothing
        returning media_id, asset, version, claim, status, run_id
    ), noted as (
        insert into outcome_history (media_id, asset, version, claim, status, run_id) select * from made
    ), unsettled as (
        update uploads set plan = null where plan is not null and media_id in (select media_id from made)
    )
    select media_id, asset, (
        select min(o.media_id) from outcomes o where o.asset = made.asset and o.version = made.version
            and o.status = 'ok'
    ) as twin from made
    """
)
_TWIN = sa.text("select min(media_id) from outcomes where asset = :asset and version = :version and status = 'ok'")
# The record and its history are one transaction and one round trip.
_END = sa.text(
    f"""
    with given as (
        select * from jsonb_to_recordset(cast(:endings as jsonb)) as g(
            media_id text, asset text, version text, claim bigint, status text, content text, attempts int,
            error_class text, error text, retry_s float8, costs boolean, seconds float8, units int, rows bigint,
            device text, model text, bytes_out bigint, copied_from text)
    ), held as materialized (
        -- By key, from arrays whose length the planner knows: the index of states is full of rows that left theirs.
        select o.media_id, o.asset, o.version, o.claim, o.status
        from unnest(cast(:media_ids as text[]), cast(:assets as text[])) as k(media_id, asset)
        join outcomes o using (media_id, asset) order by o.media_id, o.asset for no key update of o
    ), written as (
        update outcomes o set
            status = g.status, content = coalesce(g.content, o.content), attempts = coalesce(g.attempts, o.attempts),
            error_class = g.error_class, error = g.error, retry_at = now() + make_interval(secs => g.retry_s),
            {", ".join(f"{name} = case when g.costs then g.{name} else o.{name} end" for name in Cost.__slots__)},
            updated_at = now()
        from given g join held h using (media_id, asset, version, claim)
        where o.media_id = h.media_id and o.asset = h.asset and h.status = 'running'
            and not exists (select from uploads u where u.media_id = h.media_id and u.state = 'purged')
        returning {", ".join(f"o.{name}" for name in Outcome.__slots__)}
    ), noted as (
        insert into outcome_history ({", ".join(_HISTORY)}) select {", ".join(_HISTORY)} from written
    )
    select * from written
    """  # noqa: S608 - names of columns, of this module
)


class OutcomeStore:
    """Reads and transitions outcome records."""

    def __init__(self, database: Database, settings: Engine) -> None:
        self._engine = database.engine
        self._transitions = database.transitions
        self._settings = settings

    def load(self, media_ids: Sequence[str], assets: Sequence[str] | None = None) -> dict[tuple[str, str], Outcome]:
        """Records of these items, keyed by (media_id, asset)."""
        found: dict[tuple[str, str], Outcome] = {}
        with self._engine.connect() as connection:
            for chunk in _chunks(media_ids):
                query = sa.select(*_FIELDS).where(outcomes.c.media_id.in_(chunk))
                if assets is not None:
                    query = query.where(outcomes.c.asset.in_(assets))
                for row in connection.execute(query).mappings():
                    found[row["media_id"], row["asset"]] = _outcome(row)
        return found

    @contextmanager
    def _transition(self) -> Iterator[sa.Connection]:
        """A transaction that does not wait for the disk, see `Database.transitions`."""
        with self._engine.begin() as connection:
            connection.execute(sa.text("set local synchronous_commit to off"))
            yield connection

    def claim(self, media_id: str, asset: str, version: str, run_id: str, alive: Liveness) -> Claim | Outcome:
        """`claim_many` of one. Raises LostClaim, Withdrawn."""
        [answer] = self.claim_many([(media_id, asset, version)], run_id, alive)
        if isinstance(answer, LostClaim):
            raise answer
        return answer

    def claim_many(
        self, wanted: Sequence[tuple[str, str, str]], run_id: str, alive: Liveness
    ) -> list[Claim | Outcome | LostClaim]:
        """Claim assets of items, (media_id, asset, version) each, for this run; an answer for each, in order.

        It is the existing record where that must not be claimed: finished or quarantined at this version, in
        flight in another live run, or out of attempts after its workers were lost; LostClaim where another run
        was faster, Withdrawn where the upload is not live. An item never registered has no upload that could
        forbid it.
        """
        columns = zip(("media_ids", "assets", "versions"), zip(*wanted, strict=True), strict=True)
        with self._transitions.connect() as connection:
            made = connection.execute(_CLAIM_FIRST, {"run_id": run_id, **{name: [*values] for name, values in columns}})
            twins = {(row.media_id, row.asset): row.twin for row in made}
        answers: list[Claim | Outcome | LostClaim] = []
        for media_id, asset, version in wanted:
            if (media_id, asset) in twins:
                answers.append(Claim(media_id, asset, version, 1, 1, twins[media_id, asset]))
                continue
            try:
                answers.append(self._claim_again(media_id, asset, version, run_id, alive))
            except LostClaim as error:
                answers.append(error)
        return answers

    def _claim_again(self, media_id: str, asset: str, version: str, run_id: str, alive: Liveness) -> Claim | Outcome:
        """Claim what has a record already, or has an upload that is not live."""
        with self._transition() as connection:
            planned = _hold(connection, media_id)
            row = (
                connection.execute(
                    sa.select(*_FIELDS)
                    .where(outcomes.c.media_id == media_id, outcomes.c.asset == asset)
                    .with_for_update()
                )
                .mappings()
                .first()
            )
            current = _outcome(row) if row else None
            attempts, number = 1, 1
            if current:
                number = current.claim + 1
                if current.status is Status.RUNNING and current.run_id != run_id and alive.is_alive(current.run_id):
                    return current
                if current.version == version:
                    if current.status.done:
                        return current
                    if current.status is Status.QUARANTINED and current.error_class != UpstreamFailed.code:
                        return current
                    was_tried = current.status is not Status.RUNNING or not died_loading(connection, current.run_id)
                    attempts = max(current.attempts + was_tried, 1)
                    if current.status is Status.RUNNING and attempts > self._settings.max_attempts:
                        return self._lost(connection, current)
            values = {
                "media_id": media_id,
                "asset": asset,
                "version": version,
                "status": Status.RUNNING,
                "attempts": attempts,
                "claim": number,
                "run_id": run_id,
                "error_class": None,
                "error": None,
                "retry_at": None,
                "updated_at": sa.func.now(),
            }
            statement = (
                insert(outcomes)
                .values(values)
                .on_conflict_do_update(
                    index_elements=["media_id", "asset"], set_=values, where=outcomes.c.claim == number - 1
                )
            )
            if connection.execute(statement).rowcount != 1:
                raise LostClaim(f"{asset} of {media_id} was claimed by another run")
            if planned:
                _unsettle(connection, media_id)
            _record(connection, values)
            twin = connection.execute(_TWIN, {"asset": asset, "version": version}).scalar()
            return Claim(media_id, asset, version, number, attempts, twin)

    def _lost(self, connection: sa.Connection, current: Outcome) -> Outcome:
        error = f"Its process died {current.attempts} times with this item in flight. {WorkerLost.remedy}"
        claim = Claim(current.media_id, current.asset, current.version, current.claim, current.attempts)
        return _only(_end(connection, [Ending(claim, Status.QUARANTINED, error_class=WorkerLost.code, error=error)]))

    def succeed(self, claim: Claim, status: Status, content: str, cost: Cost, note: str | None = None) -> Outcome:
        """Commit `ok` or `not_applicable`. Raises LostClaim, Withdrawn."""
        return _only(self.end([succeeded(claim, status, content, cost, note)]))

    def fail(self, claim: Claim, failure: Failure, cost: Cost) -> Outcome:
        """Commit a failure: `retryable` with a due time, or `quarantined`. Raises LostClaim, Withdrawn."""
        return _only(self.end([failed(claim, failure, cost, self._settings)]))

    def end(self, endings: Sequence[Ending]) -> list[Outcome | LostClaim]:
        """Commit endings, all in one transaction: for each, in order, its record, LostClaim or Withdrawn."""
        with self._transitions.connect() as connection:
            return _end(connection, endings)

    def release(self, claim: Claim) -> None:
        """Give the item back on a clean shutdown; the attempt does not count. Raises Withdrawn."""
        ended = self.end([Ending(claim, Status.RETRYABLE, attempts=claim.attempts - 1, retry_s=0.0)])[0]
        if isinstance(ended, Withdrawn):
            raise ended

    def block(self, media_id: str, asset: str, version: str, cause: str, retryable: bool, run_id: str) -> Outcome:
        """Record that an input of this asset failed; costs no attempt and follows when the input is mended.

        Raises LostClaim, Withdrawn.
        """
        status = Status.RETRYABLE if retryable else Status.QUARANTINED
        values = {
            "media_id": media_id,
            "asset": asset,
            "version": version,
            "status": status,
            "attempts": 0,
            "claim": 0,
            "error_class": UpstreamFailed.code,
            "error": cause,
            "run_id": run_id,
        }
        changed = {k: v for k, v in values.items() if k != "claim"} | {"updated_at": sa.func.now(), "retry_at": None}
        statement = (
            insert(outcomes)
            .values(values)
            .on_conflict_do_update(
                index_elements=["media_id", "asset"], set_=changed, where=outcomes.c.status != Status.RUNNING
            )
            .returning(*_FIELDS)
        )
        with self._transition() as connection:
            planned = _hold(connection, media_id)
            row = connection.execute(statement).mappings().first()
            if row is None:
                raise LostClaim(f"{asset} of {media_id} is in flight elsewhere")
            if planned:
                _unsettle(connection, media_id)
            _record(connection, row)
            return _outcome(row)

    def reset(
        self,
        media_ids: Sequence[str] | None = None,
        assets: Sequence[str] | None = None,
        error_classes: Sequence[str] | None = None,
        finished: bool = False,
    ) -> int:
        """Give failed records (quarantined or waiting; `finished` ones too) a fresh start; returns how many."""
        statuses = [Status.QUARANTINED, Status.RETRYABLE, *([Status.OK, Status.NOT_APPLICABLE] if finished else [])]
        condition: sa.ColumnElement[bool] = outcomes.c.status.in_(statuses)
        for column, wanted in (
            (outcomes.c.media_id, media_ids),
            (outcomes.c.asset, assets),
            (outcomes.c.error_class, error_classes),
        ):
            if wanted is not None:
                condition &= column.in_(wanted)
        return self._restart(condition)

    def replay(self, letters: Sequence[tuple[str, str]]) -> int:
        """Give these quarantined records, (media_id, asset) each, a fresh start; returns how many still were."""
        key = sa.tuple_(outcomes.c.media_id, outcomes.c.asset)
        return sum(
            self._restart(key.in_(letters[start : start + _CHUNK]) & (outcomes.c.status == Status.QUARANTINED))
            for start in range(0, len(letters), _CHUNK)
        )

    def _restart(self, condition: sa.ColumnElement[bool]) -> int:
        items = sa.select(outcomes.c.media_id).where(condition)
        held = sa.select(uploads.c.media_id).where(uploads.c.media_id.in_(items)).order_by(uploads.c.media_id)
        statement = (
            sa.update(outcomes)
            .where(condition)
            .values(status=Status.RETRYABLE, attempts=0, retry_at=sa.func.now(), updated_at=sa.func.now())
            .returning(*_FIELDS)
        )
        with self._transition() as connection:
            # The registry locks several uploads at once as well; it takes turns with whoever else does.
            connection.execute(sa.text("select pg_advisory_xact_lock(:space, 1)"), {"space": LOCK_NAMESPACE})
            connection.execute(held.with_for_update(key_share=True)).all()
            rows = connection.execute(statement).mappings().all()
            for start in range(0, len(rows), _CHUNK):
                _record_all(connection, rows[start : start + _CHUNK])
            for chunk in _chunks(sorted({row["media_id"] for row in rows})):
                _unsettle(connection, *chunk, due_at=None, launches=0, priority=BACKLOG)
        return len(rows)

    def content_of(self, asset: str) -> dict[str, str]:
        """Content identity of every finished item of one asset, by media ID."""
        query = sa.select(outcomes.c.media_id, outcomes.c.content).where(
            outcomes.c.asset == asset, outcomes.c.status == Status.OK
        )
        with self._engine.connect() as connection:
            return {row[0]: row[1] for row in connection.execute(query)}

    def finished(self) -> Iterator[tuple[str, str, str]]:
        """(media_id, asset, version) of every `ok` record of a live upload, ordered by media ID and asset.

        Read through a server-side cursor: memory holds one page, however large the library is.
        """
        query = sa.text(
            "select o.media_id, o.asset, o.version from outcomes o join uploads u using (media_id)"
            " where u.state = 'live' and o.status = 'ok' order by o.media_id, o.asset"
        )
        with self._engine.connect() as connection:
            for row in connection.execution_options(yield_per=_PAGE).execute(query):
                yield row[0], row[1], row[2]

    def failed(self) -> Iterator[dict[str, Any]]:
        """Records of live uploads that are quarantined or wait for a failed input, with URI and etag, by media ID."""
        query = sa.text(
            "select o.media_id, u.uri, u.etag, o.asset, o.version, o.status, o.error_class, o.error, o.updated_at"
            " from outcomes o join uploads u using (media_id)"
            " where u.state = 'live' and (o.status = 'quarantined'"
            " or (o.status = 'retryable' and o.error_class = 'upstream_failed')) order by o.media_id, o.asset"
        )
        with self._engine.connect() as connection:
            for row in connection.execution_options(yield_per=_PAGE).execute(query).mappings():
                yield dict(row)

    def library_mark(self) -> str:
        """A text that stays the same as long as no record and no upload changes; two index lookups.

        Ids and times are given out before their transaction commits. While some are under way the mark names
        them, so that it differs from the mark after they are done.
        """
        query = sa.text(
            "select (select max(id) from outcome_history), (select max(changed_at) from uploads),"
            " case when pg_snapshot_xmin(s) = pg_snapshot_xmax(s) then 'settled' else s::text end"
            " from pg_current_snapshot() s"
        )
        with self._engine.connect() as connection:
            history, changed, pending = connection.execute(query).one()
        return f"{history} {changed and changed.isoformat()} {pending}"

    def exist(self) -> bool:
        """Whether anything was ever worked on."""
        with self._engine.connect() as connection:
            return bool(connection.execute(sa.text("select exists (select from outcome_history)")).scalar())

    def rows(self) -> list[dict[str, Any]]:
        """Every record of a live item, as plain rows for the `outcomes` view."""
        query = sa.text(
            "select o.media_id, o.asset, o.version, o.status, o.attempts, o.error_class, o.error, o.run_id, o.seconds,"
            " o.units, o.rows, o.device, o.model, o.bytes_out, o.copied_from, o.retry_at, o.updated_at"
            " from outcomes o join uploads u using (media_id) where u.state = 'live' order by o.media_id, o.asset"
        )
        with self._engine.connect() as connection:
            return [dict(row) for row in connection.execute(query).mappings()]

    def summary(self) -> list[dict[str, Any]]:
        """Count of live items by asset, status and error class, with the seconds they took."""
        query = sa.text(
            "select o.asset, o.status, o.error_class, count(*) as items, sum(o.seconds) as seconds, sum(o.rows) as rows"
            " from outcomes o join uploads u using (media_id) where u.state = 'live'"
            " group by 1, 2, 3 order by 1, 2, 3"
        )
        with self._engine.connect() as connection:
            return [dict(row) for row in connection.execute(query).mappings()]

    def alive(self, run_ids: Sequence[str]) -> list[str]:
        """Those of these runs whose process holds its lease."""
        with self._engine.connect() as connection:
            liveness = Liveness(connection)
            return [run_id for run_id in run_ids if liveness.is_alive(run_id)]

    def lease(self, run_id: str) -> Lease:
        """A lease that says this run is alive; hold it while items are in flight."""
        return Lease(self._engine, run_id)

    def model_loads(self, run_id: str) -> ModelLoads:
        """Where this process, which works for this run, notes that it loads a model."""
        return ModelLoads(self._engine, run_id)


class Liveness:
    """Tells which runs are alive. Each lives as long as its database session holds an advisory lock."""

    def __init__(self, connection: sa.Connection) -> None:
        self._connection = connection

    def is_alive(self, run_id: str | None) -> bool:
        """Whether a process holds the lease of `run_id`."""
        if run_id is None:
            return False
        query = sa.text(
            "select exists (select from pg_locks where locktype = 'advisory' and classid = :space"
            " and objid = :key and objsubid = 2 and granted"
            " and database = (select oid from pg_database where datname = current_database()))"
        )
        values = {"space": LOCK_NAMESPACE, "key": _lock_key(run_id)}
        alive: bool = self._connection.execute(query, values).scalar_one()
        self._connection.commit()
        return alive


class Lease(AbstractContextManager["Lease"]):
    """An advisory lock of the database session, gone the moment the process dies."""

    def __init__(self, engine: sa.Engine, run_id: str) -> None:
        self._engine = engine
        self.run_id = run_id
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        connection = self._stack.enter_context(self._engine.connect())
        values = {"space": LOCK_NAMESPACE, "key": _signed(_lock_key(self.run_id))}
        connection.execute(sa.text("select pg_advisory_lock_shared(:space, :key)"), values)
        connection.commit()
        self.liveness = Liveness(connection)
        self._stack.callback(self._release, connection, values)
        return self

    @staticmethod
    def _release(connection: sa.Connection, values: dict[str, int]) -> None:
        connection.execute(sa.text("select pg_advisory_unlock_shared(:space, :key)"), values)
        connection.commit()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()


def _lock_key(run_id: str) -> int:
    return int.from_bytes(hashlib.blake2b(run_id.encode(), digest_size=4).digest())


def _signed(value: int) -> int:
    return value - (1 << 32) if value >= 1 << 31 else value


def _end(connection: sa.Connection, endings: Sequence[Ending]) -> list[Outcome | LostClaim]:
    values = {
        "endings": json.dumps([_row(ending) for ending in endings]),
        "media_ids": [ending.claim.media_id for ending in endings],
        "assets": [ending.claim.asset for ending in endings],
    }
    records = {(row["media_id"], row["asset"]): _outcome(row) for row in connection.execute(_END, values).mappings()}
    lost = {e.claim.media_id for e in endings if (e.claim.media_id, e.claim.asset) not in records}
    states = (
        {
            row.media_id: row.state
            for row in connection.execute(
                sa.select(uploads.c.media_id, uploads.c.state).where(uploads.c.media_id.in_(lost))
            )
        }
        if lost
        else {}
    )
    return [_ended(ending.claim, records, states) for ending in endings]


def _ended(claim: Claim, records: Mapping[tuple[str, str], Outcome], states: Mapping[str, str]) -> Outcome | LostClaim:
    record = records.get((claim.media_id, claim.asset))
    if record is not None and record.claim == claim.number:
        return record
    if states.get(claim.media_id) == PURGED:
        return Withdrawn(f"{claim.media_id} was purged")
    return LostClaim(f"{claim.asset} of {claim.media_id} was claimed by another run")


def _row(ending: Ending) -> dict[str, Any]:
    """The ending as `_END` reads it; of a message, what Postgres' texts cannot hold is escaped."""
    claim = ending.claim
    return {
        "media_id": claim.media_id,
        "asset": claim.asset,
        "version": claim.version,
        "claim": claim.number,
        "status": ending.status,
        "content": ending.content,
        "attempts": ending.attempts,
        "error_class": ending.error_class,
        "error": ending.error and ending.error.replace("\0", r"\0").encode("utf-8", "backslashreplace").decode(),
        "retry_s": ending.retry_s,
        "costs": ending.cost is not None,
        **({name: getattr(ending.cost, name) for name in Cost.__slots__} if ending.cost else {}),
    }


def _only(answers: Sequence[Outcome | LostClaim]) -> Outcome:
    [answer] = answers
    if isinstance(answer, LostClaim):
        raise answer
    return answer


def _hold(connection: sa.Connection, media_id: str) -> bool:
    """Keep the upload as it is until the transaction ends; whether the planner thinks that it is settled.

    Raises Withdrawn unless it is live.
    """
    query = sa.select(uploads.c.state, uploads.c.plan).where(uploads.c.media_id == media_id)
    row = connection.execute(query.with_for_update(key_share=True)).first()
    if row is None:
        return False
    if row.state != LIVE:
        raise Withdrawn(f"{media_id} is {row.state}")
    return row.plan is not None


def _unsettle(connection: sa.Connection, *media_ids: str, **values: Any) -> None:
    """Make the planner look at these items again."""
    connection.execute(sa.update(uploads).where(uploads.c.media_id.in_(media_ids)).values(plan=None, **values))


def _record(connection: sa.Connection, row: sa.RowMapping | Mapping[str, Any]) -> None:
    _record_all(connection, [row])


def _record_all(connection: sa.Connection, rows: Sequence[sa.RowMapping | Mapping[str, Any]]) -> None:
    connection.execute(sa.insert(outcome_history), [{name: row.get(name) for name in _HISTORY} for row in rows])


def _outcome(row: sa.RowMapping) -> Outcome:
    return Outcome(**{**dict(row), "status": Status(row["status"])})


def _chunks(values: Sequence[str]) -> Iterable[Sequence[str]]:
    return (values[start : start + _CHUNK] for start in range(0, len(values), _CHUNK))
