"""The registry of uploads: which media exist, under which ID, and whether they are still there."""

from __future__ import annotations

import hashlib
import os
import re
import stat
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote_from_bytes, unquote_to_bytes

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import insert

from resources.errors import MediaError
from resources.files.local import version_of
from resources.files.object_store import SCHEME, Listed, find_object, is_s3, list_all, split
from resources.records.database import LOCK_NAMESPACE, Database
from resources.records.tables import removals, uploads
from resources.settings import S3, Ingestion

CHANGES = "media_uploads"
"""Channel of the database on which commits that registered or removed something are told."""
_CHUNK = 5000
_FILE_SCHEME = "file://"


class UnknownMedia(MediaError):
    """No live media item has this ID, or it lacks what was asked of it."""

    code, http_status = "unknown_media", 404
    remedy = '`media-assets search` and `media-assets sql "select media_id, uri from media"` show IDs.'


@dataclass(frozen=True, slots=True)
class Upload:
    """One version of a media file as discovered. `uri` is the absolute path or the URL, always valid UTF-8.

    `observed_at` is when this version was known to be the current one: the time of an S3 event, the moment
    before a listing; None means now. `sequencer` orders events of one key within the same instant.
    """

    uri: str
    etag: str
    bytes: int | None
    modified_at: datetime | None
    source: str = "folder"
    object_version: str | None = None
    observed_at: datetime | None = None
    sequencer: str = ""

    @property
    def media_id(self) -> str:
        """`<slug of the file name>-<12 hex of BLAKE2b(uri, etag)>`, characters [a-z0-9-]."""
        return media_id(self.uri, self.etag)


@dataclass(frozen=True, slots=True)
class Removal:
    """A URI whose object is gone since `observed_at` (None: now); older versions of it stay gone."""

    uri: str
    observed_at: datetime | None = None
    sequencer: str = ""


@dataclass(frozen=True, slots=True)
class Registered:
    """What one call of `Registry.register` changed."""

    media_ids: tuple[str, ...]
    new: tuple[str, ...]
    removed: tuple[str, ...]


class LocalFile(NamedTuple):
    """A regular file on this machine: its absolute path and what `stat` says of it, links followed."""

    path: str
    info: os.stat_result

    @property
    def uri(self) -> str:
        """As `uri_of` of its path."""
        return _absolute_uri(self.path)

    @property
    def etag(self) -> str:
        """Its size and its time of modification."""
        return version_of(self.info)

    def upload(self, observed_at: datetime | None = None) -> Upload:
        """The file as an upload."""
        modified = datetime.fromtimestamp(self.info.st_mtime, UTC)
        return Upload(self.uri, self.etag, self.info.st_size, modified, observed_at=observed_at)


@dataclass(frozen=True, slots=True)
class Problem:
    """A path that could not be looked at while discovering, and why."""

    path: str
    reason: str


def media_id(uri: str, etag: str) -> str:
    """ID of one version of one upload; a changed object has another ID."""
    name = unicodedata.normalize("NFKD", uri.rstrip("/").rsplit("/", 1)[-1])
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:40].strip("-") or "media"
    return f"{slug}-{version_digest(uri, etag)}"


def version_digest(uri: str, etag: str) -> str:
    """The 12 hexadecimal digits at the end of a media ID, which alone tell one version of one upload."""
    return hashlib.blake2b(f"{uri}\n{etag}".encode(), digest_size=6).hexdigest()


def uri_of(path: Path | str) -> str:
    """The absolute path as text; a name that is not UTF-8 becomes a percent-encoded file:// URI."""
    return _absolute_uri(os.path.abspath(path))


def _absolute_uri(path: str) -> str:
    try:
        path.encode()
    except UnicodeEncodeError:
        return encoded_uri(path)
    return path


def encoded_uri(path: str) -> str:
    """An absolute path as a percent-encoded file:// URI, whatever bytes are in it."""
    return _FILE_SCHEME + quote_from_bytes(os.fsencode(path))


def local_path(uri: str) -> str | None:
    """The path on this machine that `uri` names, or None for a remote URL."""
    if uri.startswith(_FILE_SCHEME):
        return os.fsdecode(unquote_to_bytes(uri.removeprefix(_FILE_SCHEME)))
    return None if "://" in uri else uri


LEADS_OUT = "a link that leads out of the folder is not followed; set ingestion.follow_links if that is meant"


def discover(
    paths: Sequence[str | Path], s3: S3 | None = None, follow_links: bool = False
) -> Iterator[Upload | Problem]:
    """Files below `paths`, sorted; hidden files are left out, symlink loops end, nothing raises.

    `s3://bucket/name` is the object of that name, or else the folder: every key below `name/`. `follow_links` is that
    of `walk`.
    """
    seen: set[tuple[int, int]] = set()
    for path in paths:
        text = os.fspath(path)
        if "://" in text and not text.startswith(_FILE_SCHEME):
            yield from _discover_s3(text, s3 or S3()) if is_s3(text) else _discover_remote(text)
        else:
            for found in walk([os.path.abspath(local_path(text) or text)], seen, follow_links):
                yield found.upload() if isinstance(found, LocalFile) else found


def walk(
    paths: Sequence[str], seen: set[tuple[int, int]] | None = None, follow_links: bool = False
) -> Iterator[LocalFile | Problem]:
    """Regular files at and below absolute local `paths`, in the order of their names; nothing raises.

    Hidden entries below them are left out. A folder reached twice, through a link, is listed once: `seen`
    holds device and inode of those listed so far. A path of `paths` may be a link itself; of links below it, one that
    leads out of it is a Problem, unless `follow_links`.
    """
    listed = set() if seen is None else seen
    waiting = [(path, path) for path in reversed(paths)]
    while waiting:
        path, root = waiting.pop()
        try:
            info = os.lstat(path)
            if stat.S_ISLNK(info.st_mode):
                info = os.stat(path)
                if not follow_links and path != root and not leads_into(path, root):
                    yield Problem(path, LEADS_OUT)
                    continue
            if stat.S_ISREG(info.st_mode):
                yield LocalFile(path, info)
            elif not stat.S_ISDIR(info.st_mode):
                yield Problem(path, "neither a file nor a folder")
            elif (info.st_dev, info.st_ino) not in listed:
                listed.add((info.st_dev, info.st_ino))
                names = [name for name in os.listdir(path) if not name.startswith(".")]
                waiting.extend((os.path.join(path, name), root) for name in sorted(names, reverse=True))
        except OSError as error:
            yield Problem(path, error.strerror or str(error))


def leads_into(path: str, folder: str) -> bool:
    """Whether `path`, links followed, is `folder` or below it."""
    real, root = os.path.realpath(path), os.path.realpath(folder)
    return real == root or real.startswith(root.rstrip("/") + "/")


def confinement(uri: str, ingestion: Ingestion) -> str | None:
    """The watched folder that the local file `uri` must not lead out of, or None where it may lead anywhere."""
    path = local_path(uri)
    if path is None or ingestion.follow_links:
        return None
    folders = (os.path.abspath(local_path(folder) or folder) for folder in ingestion.folders)
    above = [folder for folder in folders if path.startswith(folder.rstrip("/") + "/")]
    return min(above, key=len, default=None)


def _discover_s3(url: str, s3: S3) -> Iterator[Upload | Problem]:
    bucket, key = split(url)
    try:
        single = find_object(s3, url) if key and not key.endswith("/") else None
        folder = f"{key.rstrip('/')}/" if key.rstrip("/") else ""
        for found, observed_at in [single] if single else list_all(s3, bucket, folder):
            yield upload_of(bucket, found, observed_at)
    except MediaError as error:
        yield Problem(url, str(error))


def upload_of(bucket: str, found: Listed, observed_at: datetime, source: str = "s3") -> Upload:
    """A listed object as an upload, under the same ID that its event gives it."""
    uri = f"{SCHEME}{bucket}/{found.key}"
    return Upload(uri, found.etag, found.bytes, found.modified_at, source, observed_at=observed_at)


def _discover_remote(url: str) -> Iterator[Upload | Problem]:
    import fsspec

    try:
        system, root = fsspec.core.url_to_fs(url)
        entries = [system.info(root)] if system.isfile(root) else system.find(root, detail=True).values()
        scheme = url.split("://", 1)[0]
        for entry in sorted(entries, key=lambda entry: entry["name"]):
            modified = entry.get("LastModified") or entry.get("mtime")
            moment = modified if isinstance(modified, datetime) else None
            etag = str(entry.get("ETag") or entry.get("etag") or f"{entry['size']:x}-{modified}").strip('"')
            yield Upload(f"{scheme}://{entry['name'].lstrip('/')}", etag, entry["size"], moment, scheme)
    except Exception as error:  # noqa: BLE001 - storage back ends raise what they like; the path is reported
        yield Problem(url, f"{type(error).__name__}: {error}")


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
