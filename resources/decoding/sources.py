"""Where the bytes of a media item are: a local file, or an object that is read by ranges and copied or streamed."""

from __future__ import annotations

import hashlib
import os
import tempfile
import threading
import weakref
from collections.abc import Iterator
from pathlib import PurePosixPath

from resources.errors import SourceChanged, TooLarge
from resources.files.object_store import Blocks, RemoteObject, is_s3, open_object
from resources.ingest.uploads import local_path
from resources.settings import S3


class LocalFile:
    """A file this machine can open; a temporary one is removed when the last reference is gone.

    `etag` names the version that is meant (`resources.files.local.version_of`); without it any will do. `within` is the
    folder out of which no link may lead to it.
    """

    def __init__(
        self, path: str, suffix: str, etag: str | None = None, temporary: bool = False, within: str | None = None
    ) -> None:
        self.path = path
        self.suffix = suffix
        self.etag = etag
        self.within = within
        if temporary:
            weakref.finalize(self, _remove, path)

    @property
    def path_hex(self) -> str:
        """The path's bytes in hex: names need not be UTF-8."""
        return os.fsencode(self.path).hex()

    @property
    def within_hex(self) -> str:
        """The bytes of `within`, its own links followed, in hex; empty where the file may be anywhere."""
        return os.fsencode(os.path.realpath(self.within)).hex() if self.within else ""


class RemoteFile:
    """An object too large to be fetched before it is judged.

    The probe reads ranges of it (`blocks`); then `sha256` reads it whole, once, into a temporary copy where it is
    wanted for decoding and no larger than `s3.copy_bytes`, else past the hash alone. Decoding reads the copy where
    there is one, else the object itself.
    """

    def __init__(self, remote: RemoteObject, suffix: str, s3: S3, keep: bool) -> None:
        self.bytes = remote.facts.bytes
        self.suffix = suffix
        self.copy: LocalFile | None = None
        self._remote = remote
        self._s3 = s3
        self._keep = keep and self.bytes <= s3.copy_bytes
        self._digest = ""
        self._lock = threading.Lock()

    def blocks(self) -> Blocks:
        """The object for small reads anywhere. Its methods raise Unreadable, SourceChanged."""
        return Blocks(self._remote, self._s3.block_bytes)

    def sha256(self) -> str:
        """SHA-256 of the bytes in hex. Raises Unreadable, SourceChanged, OSError (no room for the copy)."""
        with self._lock:
            if not self._digest:
                if self._keep:
                    self.copy, self._digest = _copied(self._remote, self.suffix, self._s3)
                else:
                    self._digest = _digest(_parts(self._remote, self._s3))
                self.check()
            return self._digest

    def check(self) -> None:
        """Raise SourceChanged when what was read so far may be of several versions."""
        self._remote.check()


Source = LocalFile | RemoteFile


def localize(
    uri: str,
    max_bytes: int,
    s3: S3 | None = None,
    etag: str | None = None,
    keep: bool = True,
    within: str | None = None,
) -> LocalFile | RemoteFile:
    """The file behind a path, a file:// URI (percent-encoded, see `resources.ingest.uploads.uri_of`) or a URL.

    Args:
        uri: path, file:// URI, s3:// URL or any other URL that fsspec knows.
        max_bytes: largest object accepted.
        s3: how S3 is reached, and from which size objects are probed by ranges.
        etag: the version of a local file or an object on S3 that is meant.
        keep: whether the file will be decoded after the probe, so that a copy pays.
        within: a folder out of which no link may lead to a local file.

    An object of no more than one block is copied at once. Raises Unreadable (missing, no permission, no such
    store), TooLarge beyond `max_bytes`, SourceChanged.
    """
    path = local_path(uri)
    if path is not None:
        return LocalFile(path, os.path.splitext(path)[1], etag, within=within)
    s3 = s3 or S3()
    remote = open_object(uri, s3)
    size = remote.facts.bytes
    if size > max_bytes:
        raise TooLarge(f"The object has {size} bytes, more than {max_bytes} (limits.max_bytes).")
    if etag and is_s3(uri) and remote.facts.etag != etag:
        raise SourceChanged("The object was replaced since it was registered.")
    suffix = PurePosixPath(uri).suffix
    if size > s3.block_bytes:
        return RemoteFile(remote, suffix, s3, keep)
    copy, _ = _copied(remote, suffix, s3)
    remote.check()
    return copy


def _copied(remote: RemoteObject, suffix: str, s3: S3) -> tuple[LocalFile, str]:
    """A temporary copy and its SHA-256."""
    descriptor, path = tempfile.mkstemp(prefix="media-", suffix=".download")
    copy = LocalFile(path, suffix, temporary=True)
    digest = hashlib.sha256()
    with os.fdopen(descriptor, "wb") as target:
        for part in _parts(remote, s3):
            digest.update(part)
            target.write(part)
    return copy, digest.hexdigest()


def _digest(parts: Iterator[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _parts(remote: RemoteObject, s3: S3) -> Iterator[bytes]:
    """The whole object in order, a request per part, so that one that breaks off is repeated alone."""
    size = remote.facts.bytes
    for start in range(0, size, s3.part_bytes):
        yield remote.read(start, min(s3.part_bytes, size - start))


def _remove(path: str) -> None:
    if os.path.exists(path):
        os.unlink(path)
