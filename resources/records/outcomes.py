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

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import insert

from resources.errors import Failure, UpstreamFailed, WorkerLost
from resources.records.database import LOCK_NAMESPACE, Database
from resources.records.leases import Lease, Liveness
from resources.records.model_loads import ModelLoads, died_loading
from resources.records.outcome import Claim, Cost, Ending, LostClaim, Outcome, Status, Withdrawn, failed, succeeded
from resources.records.outcome_queries import CHUNK, FIELDS, OutcomeQueries, chunks, outcome_of
from resources.records.outcome_sql import CLAIM_FIRST, END, HISTORY, TWIN
from resources.records.tables import outcome_history, outcomes, uploads
from resources.settings import Engine

LIVE, PURGED = "live", "purged"
EVALUATION = "media-assets evaluate"
"""The lease of whoever evaluates outside Dagster, where a run would have its ID."""
BACKLOG = 1  # planner's priority of what is made again: after fresh uploads


class OutcomeStore(OutcomeQueries):
    """Reads and transitions outcome records."""

    def __init__(self, database: Database, settings: Engine) -> None:
        super().__init__(database)
        self._transitions = database.transitions
        self._settings = settings

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
            made = connection.execute(CLAIM_FIRST, {"run_id": run_id, **{name: [*values] for name, values in columns}})
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
                    sa.select(*FIELDS)
                    .where(outcomes.c.media_id == media_id, outcomes.c.asset == asset)
                    .with_for_update()
                )
                .mappings()
                .first()
            )
            current = outcome_of(row) if row else None
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
            twin = connection.execute(TWIN, {"asset": asset, "version": version}).scalar()
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
            .returning(*FIELDS)
        )
        with self._transition() as connection:
            planned = _hold(connection, media_id)
            row = connection.execute(statement).mappings().first()
            if row is None:
                raise LostClaim(f"{asset} of {media_id} is in flight elsewhere")
            if planned:
                _unsettle(connection, media_id)
            _record(connection, row)
            return outcome_of(row)

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
            self._restart(key.in_(letters[start : start + CHUNK]) & (outcomes.c.status == Status.QUARANTINED))
            for start in range(0, len(letters), CHUNK)
        )

    def _restart(self, condition: sa.ColumnElement[bool]) -> int:
        items = sa.select(outcomes.c.media_id).where(condition)
        held = sa.select(uploads.c.media_id).where(uploads.c.media_id.in_(items)).order_by(uploads.c.media_id)
        statement = (
            sa.update(outcomes)
            .where(condition)
            .values(status=Status.RETRYABLE, attempts=0, retry_at=sa.func.now(), updated_at=sa.func.now())
            .returning(*FIELDS)
        )
        with self._transition() as connection:
            # The registry locks several uploads at once as well; it takes turns with whoever else does.
            connection.execute(sa.text("select pg_advisory_xact_lock(:space, 1)"), {"space": LOCK_NAMESPACE})
            connection.execute(held.with_for_update(key_share=True)).all()
            rows = connection.execute(statement).mappings().all()
            for start in range(0, len(rows), CHUNK):
                _record_all(connection, rows[start : start + CHUNK])
            for chunk in chunks(sorted({row["media_id"] for row in rows})):
                _unsettle(connection, *chunk, due_at=None, launches=0, priority=BACKLOG)
        return len(rows)

    def lease(self, run_id: str) -> Lease:
        """A lease that says this run is alive; hold it while items are in flight."""
        return Lease(self._engine, run_id)

    def model_loads(self, run_id: str) -> ModelLoads:
        """Where this process, which works for this run, notes that it loads a model."""
        return ModelLoads(self._engine, run_id)


def _end(connection: sa.Connection, endings: Sequence[Ending]) -> list[Outcome | LostClaim]:
    values = {
        "endings": json.dumps([_row(ending) for ending in endings]),
        "media_ids": [ending.claim.media_id for ending in endings],
        "assets": [ending.claim.asset for ending in endings],
    }
    records = {(row["media_id"], row["asset"]): outcome_of(row) for row in connection.execute(END, values).mappings()}
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
    """The ending as `END` reads it; of a message, what Postgres' texts cannot hold is escaped."""
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
    connection.execute(sa.insert(outcome_history), [{name: row.get(name) for name in HISTORY} for row in rows])
