"""What is asked of the outcome records; their transitions are in `resources.records.outcomes`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import sqlalchemy as sa

from resources.records.database import Database
from resources.records.leases import Liveness
from resources.records.outcome import Outcome, Status
from resources.records.tables import outcomes

CHUNK = 5000  # rows per statement, well below Postgres' limit of 65,535 parameters
_PAGE = 10_000  # rows a server-side cursor fetches at once
FIELDS = [outcomes.c[name] for name in Outcome.__slots__]


class OutcomeQueries:
    """Reads outcome records."""

    def __init__(self, database: Database) -> None:
        self._engine = database.engine

    def load(self, media_ids: Sequence[str], assets: Sequence[str] | None = None) -> dict[tuple[str, str], Outcome]:
        """Records of these items, keyed by (media_id, asset)."""
        found: dict[tuple[str, str], Outcome] = {}
        with self._engine.connect() as connection:
            for chunk in chunks(media_ids):
                query = sa.select(*FIELDS).where(outcomes.c.media_id.in_(chunk))
                if assets is not None:
                    query = query.where(outcomes.c.asset.in_(assets))
                for row in connection.execute(query).mappings():
                    found[row["media_id"], row["asset"]] = outcome_of(row)
        return found

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


def outcome_of(row: sa.RowMapping) -> Outcome:
    """A row of the table as a record."""
    return Outcome(**{**dict(row), "status": Status(row["status"])})


def chunks(values: Sequence[str]) -> Iterable[Sequence[str]]:
    """The values, as many at a time as a statement takes."""
    return (values[start : start + CHUNK] for start in range(0, len(values), CHUNK))
