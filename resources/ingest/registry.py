"""The registry of uploads: which media exist, under which ID, and whether they are still there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import insert

from resources.errors import MediaError
from resources.ingest.uploads import Removal, Upload
from resources.records.database import LOCK_NAMESPACE, Database
from resources.records.tables import removals, uploads

CHANGES = "media_uploads"
"""Channel of the database on which commits that registered or removed something are told."""
_CHUNK = 5000


class UnknownMedia(MediaError):
    """No live media item has this ID, or it lacks what was asked of it."""

    code, http_status = "unknown_media", 404
    remedy = '`media-assets search` and `media-assets sql "select media_id, uri from media"` show IDs.'


@dataclass(frozen=True, slots=True)
class Registered:
    """What one call of `Registry.register` changed."""

    media_ids: tuple[str, ...]
    new: tuple[str, ...]
    removed: tuple[str, ...]


class Registry:
    """Reads and writes the `uploads` table.

    Whatever the order, the number of times and the number of processes in which uploads and removals are
    told: of all versions of a URI, the one observed last is `live`, the older ones are `superseded`; a
    removal observed later makes it `removed`. A purged version stays purged.
    """

    def __init__(self, database: Database) -> None:
        self._engine = database.engine

    def add(self, found: Sequence[Upload]) -> list[str]:
        """Register uploads; returns their media IDs, in order and without repeats."""
        return list(self.register(found).media_ids)

    def register(self, found: Sequence[Upload] = (), gone: Sequence[Removal] = (), priority: int = 0) -> Registered:
        """Register uploads and removals; telling the same again is harmless.

        Each chunk of 5,000 is one transaction; those that change something are told on `CHANGES`. `priority` is
        the planner's for new uploads: lower goes first.
        """
        now = datetime.now(UTC)
        new: list[str] = []
        removed: list[str] = []
        for start in range(0, max(len(found), len(gone)), _CHUNK):
            chunk, lost = found[start : start + _CHUNK], gone[start : start + _CHUNK]
            before = len(new) + len(removed)
            with self._engine.begin() as connection:
                # Writers take turns: two of them could otherwise judge the versions of one URI at once.
                connection.execute(sa.text("select pg_advisory_xact_lock(:space, 1)"), {"space": LOCK_NAMESPACE})
                new += _upsert_uploads(connection, chunk, now, priority)
                _upsert_removals(connection, lost, now)
                removed += _settle_versions(connection, {e.uri for e in chunk} | {e.uri for e in lost})
                if len(new) + len(removed) > before:
                    connection.execute(sa.text(f"notify {CHANGES}"))
        ids = dict.fromkeys(upload.media_id for upload in found)
        return Registered(tuple(ids), tuple(new), tuple(removed))

    def live(self, media_ids: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """Rows of live uploads (all, or these), by discovery and then by ID."""
        query = sa.select(uploads).where(uploads.c.state == "live")
        found: list[dict[str, Any]] = []
        with self._engine.connect() as connection:
            if media_ids is None:
                ordered = query.order_by(uploads.c.discovered_at, uploads.c.media_id)
                return [dict(row) for row in connection.execute(ordered).mappings()]
            for start in range(0, len(media_ids), _CHUNK):
                chunk = query.where(uploads.c.media_id.in_(media_ids[start : start + _CHUNK]))
                found.extend(dict(row) for row in connection.execute(chunk).mappings())
        return found

    def known(self, keys: Sequence[str]) -> dict[str, str]:
        """State of these media IDs, where they are registered."""
        found: dict[str, str] = {}
        with self._engine.connect() as connection:
            for start in range(0, len(keys), _CHUNK):
                query = sa.select(uploads.c.media_id, uploads.c.state).where(
                    uploads.c.media_id.in_(keys[start : start + _CHUNK])
                )
                found.update({row[0]: row[1] for row in connection.execute(query)})
        return found

    def live_below(self, prefix: str) -> dict[str, str]:
        """Media ID of every live upload whose URI begins with `prefix`, by URI."""
        query = sa.select(uploads.c.uri, uploads.c.media_id).where(
            uploads.c.state == "live", uploads.c.uri.startswith(prefix, autoescape=True)
        )
        with self._engine.connect() as connection:
            return {row[0]: row[1] for row in connection.execute(query)}

    def live_between(self, prefix: str, after: str, upto: str | None, limit: int) -> list[str]:
        """The first `limit` URIs of live uploads below `prefix`, in the order of their bytes.

        Those behind `after` and up to and including `upto`; to the end of the prefix without it.
        """
        uri = uploads.c.uri
        end = uri < _behind(prefix) if upto is None else uri <= upto
        query = sa.select(uri).where(uploads.c.state == "live", uri >= prefix, uri > after, end)
        query = query.where(sa.func.starts_with(uri, prefix)).order_by(uri).limit(limit)
        with self._engine.connect() as connection:
            return list(connection.execute(query).scalars())


def _behind(prefix: str) -> str:
    """The least text that sorts behind everything that begins with `prefix`."""
    last = ord(prefix[-1]) + 1
    if 0xD800 <= last <= 0xDFFF:
        last = 0xE000
    return prefix[:-1] + chr(last) if last <= 0x10FFFF else _behind(prefix[:-1])


# Arrays, because a statement with thousands of values is compiled anew each time, and many statements are many trips.
# The state holds until the versions of the URI are settled.
_UPSERT = sa.text(
    """
    insert into uploads (media_id, uri, etag, object_version, bytes, modified_at, source, observed_at, sequencer,
        state, priority)
    select *, 'superseded', :priority from unnest(
        cast(:media_ids as text[]), cast(:uris as text[]), cast(:etags as text[]), cast(:object_versions as text[]),
        cast(:sizes as bigint[]), cast(:times as timestamptz[]), cast(:sources as text[]),
        cast(:moments as timestamptz[]), cast(:sequencers as text[])
    )
    on conflict (media_id) do update set observed_at = excluded.observed_at, sequencer = excluded.sequencer,
        object_version = coalesce(excluded.object_version, uploads.object_version)
    where (uploads.observed_at, uploads.sequencer) < (excluded.observed_at, excluded.sequencer)
    """
)


def _upsert_uploads(connection: sa.Connection, found: Sequence[Upload], now: datetime, priority: int) -> list[str]:
    latest: dict[str, Upload] = {}
    for upload in found:
        known = latest.get(upload.media_id)
        if known is None or _order(upload, now) >= _order(known, now):
            latest[upload.media_id] = upload
    if not latest:
        return []
    known_ids: set[str] = set(
        connection.execute(sa.select(uploads.c.media_id).where(uploads.c.media_id.in_(list(latest)))).scalars()
    )
    columns: dict[str, list[Any]] = {
        "media_ids": list(latest),
        "uris": [upload.uri for upload in latest.values()],
        "etags": [upload.etag for upload in latest.values()],
        "object_versions": [upload.object_version for upload in latest.values()],
        "sizes": [upload.bytes for upload in latest.values()],
        "times": [upload.modified_at for upload in latest.values()],
        "sources": [upload.source for upload in latest.values()],
        "moments": [upload.observed_at or now for upload in latest.values()],
        "sequencers": [upload.sequencer for upload in latest.values()],
    }
    connection.execute(_UPSERT, {**columns, "priority": priority})
    return [key for key in latest if key not in known_ids]


def _upsert_removals(connection: sa.Connection, gone: Sequence[Removal], now: datetime) -> None:
    latest: dict[str, Removal] = {}
    for removal in gone:
        known = latest.get(removal.uri)
        if known is None or _order(removal, now) >= _order(known, now):
            latest[removal.uri] = removal
    if not latest:
        return
    statement = insert(removals).values(
        [
            {"uri": uri, "observed_at": removal.observed_at or now, "sequencer": removal.sequencer}
            for uri, removal in latest.items()
        ]
    )
    connection.execute(
        statement.on_conflict_do_update(
            index_elements=["uri"],
            set_={"observed_at": statement.excluded.observed_at, "sequencer": statement.excluded.sequencer},
            where=sa.tuple_(removals.c.observed_at, removals.c.sequencer)
            < sa.tuple_(statement.excluded.observed_at, statement.excluded.sequencer),
        )
    )


def _order(entry: Upload | Removal, now: datetime) -> tuple[datetime, str]:
    return entry.observed_at or now, entry.sequencer


_SETTLE = sa.text(
    """
    with ranked as (
        select u.media_id, u.state,
            row_number() over (partition by u.uri order by u.observed_at desc, u.sequencer desc, u.media_id) as place,
            coalesce((r.observed_at, r.sequencer) > (u.observed_at, u.sequencer), false) as gone
        from uploads u left join removals r using (uri)
        where u.uri = any(:uris)
    ), judged as (
        select media_id, state as before,
            case when state = 'purged' then 'purged' when place > 1 then 'superseded'
                when gone then 'removed' else 'live' end as state
        from ranked
    )
    update uploads u set state = j.state, changed_at = clock_timestamp()
    from judged j where u.media_id = j.media_id and u.state <> j.state
    returning u.media_id, j.before, j.state
    """
)


def _settle_versions(connection: sa.Connection, uris: set[str]) -> list[str]:
    """Judge every version of these URIs; returns the media IDs that were live and are not any more."""
    changed = connection.execute(_SETTLE, {"uris": sorted(uris)})
    return [row[0] for row in changed if row[1] == "live"]
