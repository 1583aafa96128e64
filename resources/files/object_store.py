"""S3 and every store that speaks its protocol: how it is reached, read by ranges, listed and written.

The one place that turns the settings' section `s3` into clients and file systems. Credentials come from AWS' own
chain alone. URLs of other schemes are fsspec's business and pass through.
"""

from __future__ import annotations

import base64
import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, Protocol

import fsspec
from upath import UPath

from resources.errors import MediaError, SourceChanged, StorageFailed, Unreadable, printable
from resources.settings import S3

SCHEME = "s3://"
MAX_PARTS = 10_000
_BODY_PAUSE_S = 0.2
_GONE = frozenset({"404", "NoSuchKey", "NotFound", "NoSuchVersion"})
_DENIED = frozenset({"403", "AccessDenied", "Forbidden", "AllAccessDisabled"})
_REJECTED = frozenset({"InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "TokenRefresh"})
_REPLACED = frozenset({"412", "PreconditionFailed"})

# s3fs' own class lets botocore's connection errors through as they are; this one speaks OSError throughout.
fsspec.register_implementation("s3", "resources.files.s3_filesystem.S3Store", clobber=True)


class StoreUnavailable(StorageFailed, OSError):
    """An object store that does not answer, or not as it should. For whoever catches OSError of files, it is one."""

    remedy = "Check s3.endpoint_url, s3.region, the credentials and the network, then retry."


def is_s3(url: str) -> bool:
    """Whether `url` names something on S3."""
    return url.startswith(SCHEME)


def split(url: str) -> tuple[str, str]:
    """Bucket and key of an s3:// URL. The key is taken as it is: `?`, `#`, `::` and `%` are plain characters."""
    bucket, _, key = url.removeprefix(SCHEME).partition("/")
    return bucket, key


def botocore_config(s3: S3, patience_s: float | None = None) -> dict[str, Any]:
    """Arguments of `botocore.config.Config`; with `patience_s` a request gives up in about that time."""
    config: dict[str, Any] = {
        "retries": {"mode": "adaptive", "max_attempts": s3.max_attempts},
        "connect_timeout": s3.connect_timeout_s,
        "read_timeout": s3.read_timeout_s,
        "request_checksum_calculation": s3.checksums,
        "response_checksum_validation": s3.checksums,
    }
    if patience_s is not None:
        config["retries"] = {"mode": "standard", "max_attempts": min(2, s3.max_attempts)}
        config["connect_timeout"] = min(s3.connect_timeout_s, patience_s / 4)
        config["read_timeout"] = min(s3.read_timeout_s, patience_s / 2)
    if s3.endpoint_url:
        # Stores other than AWS rarely have a host name per bucket.
        config["s3"] = {"addressing_style": "path"}
    return config


def options(url: str, s3: S3) -> dict[str, Any]:
    """fsspec's storage options for `url`; none for other schemes."""
    if not is_s3(url):
        return {}
    return {
        "endpoint_url": s3.endpoint_url,
        "client_kwargs": {"region_name": s3.region} if s3.region else {},
        "config_kwargs": botocore_config(s3),
        "default_block_size": s3.block_bytes,
        # Another process may have written since the last listing.
        "use_listings_cache": False,
    }


def location(url: str | Path, s3: S3) -> UPath:
    """`url` as a path on its file system."""
    text = str(url)
    return UPath(text, **options(text, s3)) if is_s3(text) else UPath(url)


_clients: dict[tuple[S3, float | None], Any] = {}
_clients_lock = threading.Lock()


def client(s3: S3, patience_s: float | None = None) -> Any:
    """A boto3 client, made once per process; safe to use from several threads."""
    with _clients_lock:
        if (s3, patience_s) not in _clients:
            import boto3
            from botocore.config import Config

            config = Config(**botocore_config(s3, patience_s))
            _clients[s3, patience_s] = boto3.session.Session().client(
                "s3", endpoint_url=s3.endpoint_url, region_name=s3.region, config=config
            )
        return _clients[s3, patience_s]


def error_code(error: BaseException) -> str:
    """The store's code of a botocore error; empty where there was no answer."""
    response = getattr(error, "response", None)
    return str(response.get("Error", {}).get("Code", "")) if isinstance(response, dict) else ""


def explained(error: BaseException, s3: S3, what: str) -> MediaError:
    """A botocore error about `what` (already printable) as the error a person reads."""
    from botocore import exceptions

    code = error_code(error)
    if code in _GONE:
        return Unreadable(f"{what} is gone from its store.")
    if code == "NoSuchBucket":
        return Unreadable(f"The bucket of {what} does not exist.", "Check the bucket's name and the endpoint.")
    if code in _DENIED:
        return Unreadable(f"Access to {what} is denied.", "Check the permissions of the credentials in use.")
    if code in _REJECTED:
        return Unreadable(f"The store does not accept the credentials ({code}).", "Check AWS' credential chain.")
    if code in _REPLACED:
        return SourceChanged(f"{what} was replaced while it was read.")
    if isinstance(error, exceptions.NoCredentialsError | exceptions.PartialCredentialsError):
        return Unreadable("No AWS credentials were found.", "Set AWS_ACCESS_KEY_ID and its secret, or use a role.")
    if isinstance(error, exceptions.ConnectionError | exceptions.HTTPClientError):
        where = printable(s3.endpoint_url or "AWS", 200)
        return Unreadable(
            f"No store answers at {where} ({type(error).__name__}).",
            "Check s3.endpoint_url, s3.region and the network.",
        )
    return Unreadable(f"{what} cannot be read from its store ({printable(code or type(error).__name__, 100)}).")


@dataclass(frozen=True, slots=True)
class Facts:
    """What a store says about an object before it is read; `etag` is empty where it has none."""

    bytes: int
    etag: str


class RemoteObject(Protocol):
    """One object of a store, pinned to the version that was there when it was opened."""

    facts: Facts

    def read(self, offset: int, size: int) -> bytes:
        """Exactly `size` bytes from `offset`. Raises Unreadable, SourceChanged."""

    def check(self) -> None:
        """Raise SourceChanged when what was read may be of several versions."""


def open_object(url: str, s3: S3) -> RemoteObject:
    """The object behind an s3:// or fsspec URL; costs one request. Raises Unreadable."""
    return S3Object(url, s3) if is_s3(url) else FsspecObject(url)


class S3Object:
    """An object on S3, read by ranges; If-Match pins every read to its etag."""

    def __init__(self, url: str, s3: S3) -> None:
        self._bucket, self._key = split(url)
        self._s3 = s3
        self._client = client(s3)
        found = self._ask(self._client.head_object)
        self.facts = Facts(int(found["ContentLength"]), str(found.get("ETag", "")).strip('"'))

    def read(self, offset: int, size: int) -> bytes:
        """Exactly `size` bytes from `offset`; an answer that breaks off is asked for again."""
        from botocore import exceptions

        torn = (exceptions.HTTPClientError, exceptions.IncompleteReadError, exceptions.ResponseStreamingError)
        pinned = {"IfMatch": f'"{self.facts.etag}"'} if self.facts.etag else {}
        failure: Exception | None = None
        for attempt in range(self._s3.max_attempts):
            if attempt:
                time.sleep(_BODY_PAUSE_S * 2**attempt)
            answer = self._ask(self._client.get_object, Range=f"bytes={offset}-{offset + size - 1}", **pinned)
            try:
                data: bytes = answer["Body"].read()
            except torn as error:
                failure = error
                continue
            if len(data) == size:
                return data
        raise Unreadable(f"The object breaks off while it is read ({type(failure).__name__ if failure else 'short'}).")

    def check(self) -> None:
        """Nothing to do: every read was pinned."""

    def _ask(self, call: Callable[..., dict[str, Any]], **arguments: object) -> dict[str, Any]:
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            return call(Bucket=self._bucket, Key=self._key, **arguments)
        except (BotoCoreError, ClientError) as error:
            raise explained(error, self._s3, "The object") from error


class FsspecObject:
    """An object behind any other fsspec URL; a change is noticed by what the store says before and after."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._filesystem, self._path, self._identity = self._look()
        self.facts = Facts(int(self._identity[0]), "")

    def read(self, offset: int, size: int) -> bytes:
        """Exactly `size` bytes from `offset`."""
        try:
            data: bytes = self._filesystem.cat_file(self._path, offset, offset + size)
        except Exception as error:
            raise _unreadable(error) from error
        if len(data) != size:
            raise SourceChanged("The object became shorter while it was read.")
        return data

    def check(self) -> None:
        """Raise SourceChanged when the store tells another size, etag or time than at first."""
        if self._look()[2] != self._identity:
            raise SourceChanged("The object was replaced while it was read.")

    def _look(self) -> tuple[Any, str, tuple[Any, ...]]:
        try:
            filesystem, path = fsspec.core.url_to_fs(self._url)
            info = filesystem.info(path)
            size = int(info["size"])
        except Exception as error:
            raise _unreadable(error) from error
        keys = ("ETag", "etag", "LastModified", "mtime", "modified", "created")
        return filesystem, path, (size, *(info.get(key) for key in keys))


def _unreadable(error: Exception) -> Unreadable:
    return Unreadable(f"The object cannot be read from its store ({type(error).__name__}).")


class Blocks:
    """Small reads of an object served from the last few blocks fetched, each one ranged request."""

    KEPT = 4

    def __init__(self, remote: RemoteObject, block_bytes: int) -> None:
        self._remote = remote
        self._block_bytes = block_bytes
        self._blocks: dict[int, bytes] = {}

    def read(self, offset: int, size: int) -> bytes:
        """Bytes from `offset`, at most `size` and at most to the end of the object."""
        end = min(offset + size, self._remote.facts.bytes)
        parts: list[bytes] = []
        while offset < end:
            number, start = divmod(offset, self._block_bytes)
            part = self._block(number)[start : start + end - offset]
            parts.append(part)
            offset += len(part)
        return b"".join(parts)

    def _block(self, number: int) -> bytes:
        block = self._blocks.pop(number, None)
        if block is None:
            start = number * self._block_bytes
            block = self._remote.read(start, min(self._block_bytes, self._remote.facts.bytes - start))
        self._blocks[number] = block
        if len(self._blocks) > self.KEPT:
            del self._blocks[next(iter(self._blocks))]
        return block


@dataclass(frozen=True, slots=True)
class Listed:
    """One object of a listing; `etag` without quotes, as in events."""

    key: str
    etag: str
    bytes: int
    modified_at: datetime | None


@dataclass(frozen=True, slots=True)
class Page:
    """One page of a listing: what was there at `observed_at`. `last` is its last key."""

    objects: tuple[Listed, ...]
    last: str | None
    more: bool
    observed_at: datetime


def list_page(s3: S3, bucket: str, prefix: str, after: str, size: int, patience_s: float | None = None) -> Page:
    """The page of at most `size` keys behind the key `after`, which need not exist. Folder markers are left out.

    Raises Unreadable: no such bucket, access denied, no answer.
    """
    from botocore.exceptions import BotoCoreError, ClientError

    before = datetime.now(UTC)
    arguments = {"Bucket": bucket, "Prefix": prefix, "MaxKeys": size, **({"StartAfter": after} if after else {})}
    try:
        answer = client(s3, patience_s).list_objects_v2(**arguments)
    except (BotoCoreError, ClientError) as error:
        raise explained(error, s3, f"s3://{printable(bucket, 80)}") from error
    entries = answer.get("Contents", [])
    objects = tuple(
        Listed(str(e["Key"]), str(e["ETag"]).strip('"'), int(e["Size"]), e.get("LastModified"))
        for e in entries
        if not e["Key"].endswith("/") and "\0" not in e["Key"]
    )
    last = str(entries[-1]["Key"]) if entries else None
    return Page(objects, last, bool(answer.get("IsTruncated")) and bool(entries), _observed(before, answer))


def _observed(before: datetime, answer: dict[str, Any]) -> datetime:
    """The moment before a request, by the store's clock where ours runs ahead of it.

    Ours would let this listing win over an event that happened after it. The store tells whole seconds, so that is
    how finely the clocks can be compared.
    """
    try:
        date = parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"])
    except (KeyError, ValueError):
        return before
    now = datetime.now(UTC)
    return before if now < date + timedelta(seconds=1) else before - (now - date)


def list_all(s3: S3, bucket: str, prefix: str) -> Iterator[tuple[Listed, datetime]]:
    """Every object below `prefix` in the store's order, with the time at which it was seen. Raises Unreadable."""
    after, more = "", True
    while more:
        page = list_page(s3, bucket, prefix, after, 1000)
        yield from ((found, page.observed_at) for found in page.objects)
        after, more = page.last or after, page.more


def find_object(s3: S3, url: str) -> tuple[Listed, datetime] | None:
    """The object at exactly this URL and when it was seen, None where there is none. Raises Unreadable."""
    from botocore.exceptions import BotoCoreError, ClientError

    bucket, key = split(url)
    before = datetime.now(UTC)
    try:
        found = client(s3).head_object(Bucket=bucket, Key=key)
    except (BotoCoreError, ClientError) as error:
        if error_code(error) in _GONE:
            return None
        raise explained(error, s3, f"s3://{printable(bucket, 80)}") from error
    listed = Listed(key, str(found.get("ETag", "")).strip('"'), int(found["ContentLength"]), found.get("LastModified"))
    return listed, _observed(before, found)


def is_gone(s3: S3, url: str, patience_s: float | None = None) -> bool:
    """Whether the store says that there is no such object; an object nobody may look at is not gone.

    Raises Unreadable where the store gives no answer.
    """
    from botocore.exceptions import BotoCoreError, ClientError

    bucket, key = split(url)
    try:
        client(s3, patience_s).head_object(Bucket=bucket, Key=key)
    except (BotoCoreError, ClientError) as error:
        if error_code(error) in _GONE | _DENIED:
            return error_code(error) in _GONE
        raise explained(error, s3, f"s3://{printable(bucket, 80)}") from error
    return False


def put_bytes(path: UPath, data: bytes, part_bytes: int) -> None:
    """Store `data` at `path` of an object store in one step: one PUT, or parts from twice `part_bytes` on.

    The store checks what it gets against checksums (CRC32 per request, MD5 of a single PUT). Raises OSError,
    StoreUnavailable when it keeps another number of bytes.
    """
    if not is_s3(str(path)):
        path.write_bytes(data)
        return
    digest = {} if len(data) >= 2 * part_bytes else {"ContentMD5": _md5(data)}
    path.fs.pipe_file(path.path, data, chunksize=_part(len(data), part_bytes), **digest)
    _check_length(path, len(data))


def put_file(path: UPath, local: Path, part_bytes: int) -> None:
    """Store a local file at `path`; otherwise as `put_bytes`."""
    size = local.stat().st_size
    if not is_s3(str(path)):
        path.fs.put_file(str(local), path.path)
    elif size < 2 * part_bytes:
        put_bytes(path, local.read_bytes(), part_bytes)
    else:
        path.fs.put_file(str(local), path.path, chunksize=_part(size, part_bytes))
        _check_length(path, size)


def _part(size: int, part_bytes: int) -> int:
    return max(part_bytes, -(-size // MAX_PARTS))


def _md5(data: bytes) -> str:
    return base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()


def _check_length(path: UPath, size: int) -> None:
    stored = path.fs.info(path.path)["size"]
    if stored != size:
        raise StoreUnavailable(f"The store keeps {stored} bytes of {path.name}, but {size} were sent.")
