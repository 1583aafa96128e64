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
from typing import Any
from urllib.parse import quote_from_bytes, unquote_to_bytes

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import insert

from resources.database import Database
from resources.records import uploads

_CHUNK = 5000
_FILE_SCHEME = "file://"


@dataclass(frozen=True, slots=True)
class Upload:
    """A media file as discovered. `uri` is the absolute path or the URL, always valid UTF-8."""

    uri: str
    etag: str
    bytes: int | None
    modified_at: datetime | None
    source: str = "folder"

    @property
    def media_id(self) -> str:
        """`<slug of the file name>-<12 hex of BLAKE2b(uri, etag)>`, characters [a-z0-9-]."""
        return media_id(self.uri, self.etag)


@dataclass(frozen=True, slots=True)
class Problem:
    """A path that could not be looked at while discovering, and why."""

    path: str
    reason: str


def media_id(uri: str, etag: str) -> str:
    """ID of one version of one upload; a changed object has another ID."""
    name = unicodedata.normalize("NFKD", uri.rstrip("/").rsplit("/", 1)[-1])
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:40].strip("-") or "media"
    digest = hashlib.blake2b(f"{uri}\n{etag}".encode(), digest_size=6).hexdigest()
    return f"{slug}-{digest}"


def uri_of(path: Path | str) -> str:
    """The absolute path as text; a name that is not UTF-8 becomes a percent-encoded file:// URI."""
    absolute = os.path.abspath(path)
    try:
        absolute.encode()
    except UnicodeEncodeError:
        return _FILE_SCHEME + quote_from_bytes(os.fsencode(absolute))
    return absolute


def local_path(uri: str) -> str | None:
    """The path on this machine that `uri` names, or None for a remote URL."""
    if uri.startswith(_FILE_SCHEME):
        return os.fsdecode(unquote_to_bytes(uri.removeprefix(_FILE_SCHEME)))
    return None if "://" in uri else uri


def discover(paths: Sequence[str | Path]) -> Iterator[Upload | Problem]:
    """Files below `paths`, sorted; hidden files are left out, symlink loops end, nothing raises."""
    seen: set[tuple[int, int]] = set()
    for path in paths:
        text = os.fspath(path)
        if "://" in text and not text.startswith(_FILE_SCHEME):
            yield from _discover_remote(text)
        else:
            yield from _discover(local_path(text) or text, seen)


def _discover(path: str, seen: set[tuple[int, int]]) -> Iterator[Upload | Problem]:
    try:
        info = os.stat(path)
        if stat.S_ISDIR(info.st_mode):
            if (info.st_dev, info.st_ino) in seen:
                return
            seen.add((info.st_dev, info.st_ino))
            names = sorted(name for name in os.listdir(path) if not name.startswith("."))
        elif stat.S_ISREG(info.st_mode):
            yield _upload(path, info)
            return
        else:
            yield Problem(path, "neither a file nor a folder")
            return
    except OSError as error:
        yield Problem(path, error.strerror or str(error))
        return
    for name in names:
        yield from _discover(os.path.join(path, name), seen)


def _upload(path: str, info: os.stat_result) -> Upload:
    modified = datetime.fromtimestamp(info.st_mtime, UTC)
    return Upload(uri_of(path), f"{info.st_size:x}-{info.st_mtime_ns:x}", info.st_size, modified)


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
    """Reads and writes the `uploads` table."""

    def __init__(self, database: Database) -> None:
        self._engine = database.engine

    def add(self, found: Sequence[Upload]) -> list[str]:
        """Register uploads; adding again is harmless. Older versions of the same URI are superseded.

        Returns the media IDs, in order and without repeats; two processes may add the same at once.
        """
        for start in range(0, len(found), _CHUNK):
            chunk = {upload.media_id: upload for upload in found[start : start + _CHUNK]}
            rows = [
                {
                    "media_id": key,
                    "uri": upload.uri,
                    "etag": upload.etag,
                    "bytes": upload.bytes,
                    "modified_at": upload.modified_at,
                    "source": upload.source,
                    "state": "live",
                }
                for key, upload in chunk.items()
            ]
            if not rows:
                continue
            statement = insert(uploads).values(rows)
            live = statement.on_conflict_do_update(index_elements=["media_id"], set_={"state": "live"})
            with self._engine.begin() as connection:
                connection.execute(live)
                connection.execute(
                    sa.update(uploads)
                    .where(
                        uploads.c.uri.in_([row["uri"] for row in rows]),
                        uploads.c.media_id.not_in(list(chunk)),
                        uploads.c.state == "live",
                    )
                    .values(state="superseded")
                )
        return list(dict.fromkeys(upload.media_id for upload in found))

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
