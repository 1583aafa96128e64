"""Buckets: a stable hash of the media ID groups items into compaction units and index shards."""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

from resources.errors import MediaError
from resources.files.catalog_files import is_local
from resources.files.derived import DerivedStore

FILE = "buckets.json"


class BucketsChanged(MediaError):
    """The configured number of buckets is not the one the stored data was made with."""

    code, http_status = "buckets_changed", 409


class BucketBusy(MediaError):
    """Another process is compacting or indexing the same bucket."""

    code, retryable, http_status = "bucket_busy", True, 409
    remedy: ClassVar[str] = "Wait for the other run to finish, then start this one again."


def bucket_of(media_id: str, count: int) -> int:
    """Bucket of a media item: BLAKE2b of its ID modulo `count`; the same in every process and version."""
    return int.from_bytes(hashlib.blake2b(media_id.encode(), digest_size=8).digest()) % count


class Buckets:
    """The fixed bucket count of one store. Raises BucketsChanged when `count` differs from what is stored."""

    def __init__(self, store: DerivedStore, count: int) -> None:
        path = store.root / FILE
        if not path.exists():
            store.write_bytes(path, json.dumps({"buckets": count}).encode())
        try:
            stored = int(json.loads(path.read_bytes())["buckets"])
        except (ValueError, KeyError, TypeError) as error:
            raise BucketsChanged(
                f"{path} does not say how many buckets there are.", f'Write {{"buckets": {count}}} into it.'
            ) from error
        if stored != count:
            raise BucketsChanged(
                f"index.buckets is {count}, but the data at {store.root} was made with {stored} buckets.",
                f"Set index.buckets = {stored}; or, to change it, stop all runs, delete {FILE}, catalog/ and index/"
                f" there, and rebuild the catalog and the index.",
            )
        self.count = count

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.count))

    def of(self, media_id: str) -> int:
        """Bucket of a media item."""
        return bucket_of(media_id, self.count)

    def group(self, media_ids: Iterable[str]) -> dict[int, list[str]]:
        """Media IDs by bucket, in the order given; every bucket is there, empty ones too."""
        groups: dict[int, list[str]] = {bucket: [] for bucket in self}
        for media_id in media_ids:
            groups[self.of(media_id)].append(media_id)
        return groups

    def keys(self) -> list[str]:
        """Partition keys: the bucket numbers with three digits or more."""
        return [key(bucket) for bucket in self]


def key(bucket: int) -> str:
    """Partition key and folder name of a bucket."""
    return f"{bucket:03d}"


@contextmanager
def exclusive(store: DerivedStore, name: str) -> Iterator[None]:
    """Hold the right to rebuild `name` on this machine; a dead holder frees it. Raises BucketBusy.

    An object store has no such lock: there only the database's lock on rebuilds keeps them apart.
    """
    if not is_local(store):
        yield
        return
    path = Path(str(store.root)) / "locks" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BucketBusy(f"{name} is being rebuilt by another process.") from error
        yield
