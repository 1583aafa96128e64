"""Where the bytes of a media item are: a local path, or a URL that is copied to a temporary file first."""

from __future__ import annotations

import os
import tempfile
import weakref
from pathlib import PurePosixPath
from typing import Any

from resources.errors import MediaError, SourceChanged, TooLarge, Unreadable
from resources.registry import local_path

COPY_BYTES = 8 * 2**20


class LocalFile:
    """A file this machine can open; a temporary one is removed when the last reference is gone."""

    def __init__(self, path: str, suffix: str, temporary: bool = False) -> None:
        self.path = path
        self.suffix = suffix
        if temporary:
            weakref.finalize(self, _remove, path)

    @property
    def path_hex(self) -> str:
        """The path's bytes in hex: names need not be UTF-8."""
        return os.fsencode(self.path).hex()


def localize(uri: str, max_bytes: int) -> LocalFile:
    """The file behind a path, a file:// URI (percent-encoded, see `resources.registry.uri_of`) or an fsspec URL.

    Raises Unreadable (missing, no permission, no such store), TooLarge beyond `max_bytes`, SourceChanged.
    """
    path = local_path(uri)
    if path is not None:
        return LocalFile(path, os.path.splitext(path)[1])
    return _download(uri, max_bytes)


def _download(uri: str, max_bytes: int) -> LocalFile:
    import fsspec

    try:
        filesystem, path = fsspec.core.url_to_fs(uri)
        before = filesystem.info(path)
        if (size := before.get("size")) is not None and size > max_bytes:
            raise TooLarge(f"The object has {size} bytes, more than {max_bytes} (limits.max_bytes).")
        suffix = PurePosixPath(path).suffix
        descriptor, local = tempfile.mkstemp(prefix="media-", suffix=".download")
        copy = LocalFile(local, suffix, temporary=True)
        with filesystem.open(path, "rb") as source, os.fdopen(descriptor, "wb") as target:
            _copy(source, target, max_bytes)
        if _identity(filesystem.info(path)) != _identity(before):
            raise SourceChanged("The object was replaced while it was downloaded.")
        return copy
    except MediaError:
        raise
    except Exception as error:  # noqa: BLE001 - every store has its own exceptions; all mean the same here
        raise Unreadable(f"The object cannot be read from its store ({type(error).__name__}).") from None


def _copy(source: Any, target: Any, max_bytes: int) -> None:
    copied = 0
    while block := source.read(COPY_BYTES):
        copied += len(block)
        if copied > max_bytes:
            raise TooLarge(f"The object has more than {max_bytes} bytes (limits.max_bytes).")
        target.write(block)


def _identity(info: dict[str, Any]) -> tuple[object, ...]:
    return tuple(info.get(key) for key in ("size", "ETag", "etag", "LastModified", "mtime", "modified"))


def _remove(path: str) -> None:
    if os.path.exists(path):
        os.unlink(path)
