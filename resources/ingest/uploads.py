"""One version of a media file: what is known of it before its bytes are read, its ID, and URIs as paths."""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from urllib.parse import quote_from_bytes, unquote_to_bytes

FILE_SCHEME = "file://"


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
    return absolute_uri(os.path.abspath(path))


def absolute_uri(path: str) -> str:
    """As `uri_of`, of a path that is absolute already."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return encoded_uri(path)
    return path


def encoded_uri(path: str) -> str:
    """An absolute path as a percent-encoded file:// URI, whatever bytes are in it."""
    return FILE_SCHEME + quote_from_bytes(os.fsencode(path))


def local_path(uri: str) -> str | None:
    """The path on this machine that `uri` names, or None for a remote URL."""
    if uri.startswith(FILE_SCHEME):
        return os.fsdecode(unquote_to_bytes(uri.removeprefix(FILE_SCHEME)))
    return None if "://" in uri else uri
