"""Discovery: the media files below a path on this machine or a URL, and what could not be looked at."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from resources.errors import MediaError
from resources.files.local import version_of
from resources.files.object_store import SCHEME, Listed, find_object, is_s3, list_all, split
from resources.ingest.uploads import FILE_SCHEME, Upload, absolute_uri, local_path
from resources.settings import S3, Ingestion

LEADS_OUT = "a link that leads out of the folder is not followed; set ingestion.follow_links if that is meant"


class LocalFile(NamedTuple):
    """A regular file on this machine: its absolute path and what `stat` says of it, links followed."""

    path: str
    info: os.stat_result

    @property
    def uri(self) -> str:
        """As `uri_of` of its path."""
        return absolute_uri(self.path)

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
        if "://" in text and not text.startswith(FILE_SCHEME):
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
