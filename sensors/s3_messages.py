"""Reads the events out of a queue message: S3's own notification, EventBridge's shape, either wrapped by SNS."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TypeAlias
from urllib.parse import unquote_plus

from resources.errors import MediaError, printable
from resources.ingest.object_versions import VersionRemoval
from resources.ingest.uploads import Removal, Upload

SOURCE = "s3_event"
TEST_EVENT = "s3:TestEvent"

_MAX_KEY_BYTES = 1024
_MAX_ENCODED_KEY = 16 * _MAX_KEY_BYTES
_MAX_TEXT = 1024  # bytes; with a URI it still fits into an index row
_MAX_BYTES = 2**63 - 1  # the column is a bigint
_MAX_WRAPPINGS = 2
_SHOWN_REASONS = 3
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}")
_SEQUENCER = re.compile(r"[0-9A-Fa-f]{1,128}")

_CREATED = "ObjectCreated"
_REMOVED = frozenset({"ObjectRemoved", "LifecycleExpiration", "ReducedRedundancyLostObject"})
_DELETE_MARKER = "DeleteMarkerCreated"
# What happens to an object without changing its bytes.
_WITHOUT_BEARING = frozenset(
    {"ObjectRestore", "ObjectTagging", "ObjectAcl", "Replication", "LifecycleTransition", "IntelligentTiering"}
)
_BRIDGE_CREATED = "Object Created"
_BRIDGE_DELETED = "Object Deleted"
_BRIDGE_DELETE_MARKER = "Delete Marker Created"
_BRIDGE_WITHOUT_BEARING = frozenset(
    {
        "Object Restore Initiated",
        "Object Restore Completed",
        "Object Restore Expired",
        "Object Storage Class Changed",
        "Object Access Tier Changed",
        "Object ACL Updated",
        "Object Tags Added",
        "Object Tags Deleted",
    }
)

_Event: TypeAlias = Upload | Removal | VersionRemoval
_Object: TypeAlias = dict[str, Any]


class NotUnderstood(MediaError):
    """A message, or one record of it, is no S3 event that can be registered; `message` is the reason."""

    code, http_status = "message_not_understood", 422
    remedy = "Look at who sends to the queue; the message is kept with this reason."


@dataclass(frozen=True, slots=True)
class Events:
    """What one message says.

    `ignored` counts records that have no bearing on uploads (tags, access lists, folder markers), `rejected`
    has a reason per record that was not understood while others of the message were.
    """

    uploads: tuple[Upload, ...] = ()
    removals: tuple[Removal, ...] = ()
    version_removals: tuple[VersionRemoval, ...] = ()
    ignored: int = 0
    rejected: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        """Events that are registered."""
        return len(self.uploads) + len(self.removals) + len(self.version_removals)

    @property
    def reason(self) -> str:
        """The reasons of the rejected records in one line, or an empty text."""
        shown = " ".join(self.rejected[:_SHOWN_REASONS])
        more = len(self.rejected) - _SHOWN_REASONS
        return printable(f"{shown} And {more} more." if more > 0 else shown)


def parse(body: str) -> Events:
    """The events of one message body. Raises NotUnderstood, and nothing else, when the whole is no S3 event."""
    return _unwrap(body, _MAX_WRAPPINGS)


def sortable(sequencer: str) -> str:
    """A sequencer in a form in which text comparison orders the events of one key.

    AWS: sequencers are hexadecimal; pad the shorter one on the right with zeros, then compare. Without its
    trailing zeros each one compares the same whatever the other's length. Raises NotUnderstood.
    """
    if not _SEQUENCER.fullmatch(sequencer):
        raise NotUnderstood("Its `sequencer` is not hexadecimal.")
    return sequencer.upper().rstrip("0")


def _unwrap(body: str, wrappings: int) -> Events:
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise NotUnderstood("The body is not JSON.") from error
    if not isinstance(value, dict):
        raise NotUnderstood("The body is JSON, but no object.")
    if "TopicArn" in value or value.get("Type") == "Notification":
        if value.get("Type") != "Notification" or not isinstance(value.get("Message"), str):
            raise NotUnderstood(f"It is SNS' own message, of type {_shown(value.get('Type'))}, and no notification.")
        if not wrappings:
            raise NotUnderstood("SNS notifications are wrapped in each other too often.")
        return _unwrap(value["Message"], wrappings - 1)
    if value.get("Event") == TEST_EVENT:
        return Events(ignored=1)
    if "Records" in value:
        records = value["Records"]
        if not isinstance(records, list) or not records:
            raise NotUnderstood("Its `Records` is not a list of at least one record.")
        return _collect(records, _of_notification)
    if "detail-type" in value:
        return _collect([value], _of_event_bridge)
    raise NotUnderstood("It has neither `Records`, as S3 notifications have, nor EventBridge's `detail-type`.")


def _collect(records: Sequence[Any], read: Callable[[_Object], _Event | None]) -> Events:
    events: list[_Event] = []
    rejected: list[str] = []
    ignored = 0
    for number, record in enumerate(records, 1):
        try:
            if not isinstance(record, dict):
                raise NotUnderstood("It is no object.")
            event = read(record)
        except NotUnderstood as error:
            rejected.append(f"Record {number} of {len(records)}: {error.message}")
            continue
        if event is None:
            ignored += 1
        else:
            events.append(event)
    return Events(
        uploads=tuple(event for event in events if isinstance(event, Upload)),
        removals=tuple(event for event in events if isinstance(event, Removal)),
        version_removals=tuple(event for event in events if isinstance(event, VersionRemoval)),
        ignored=ignored,
        rejected=tuple(rejected),
    )


def _of_notification(record: _Object) -> _Event | None:
    source = record.get("eventSource", "aws:s3")
    # Stores that speak S3's protocol name themselves: minio:s3, ceph:s3.
    if not isinstance(source, str) or not source.endswith(":s3"):
        raise NotUnderstood(f"It comes from {_shown(source)}, not from S3.")
    name = _text(record, "eventName")
    family, _, action = name.removeprefix("s3:").partition(":")
    if family in _WITHOUT_BEARING:
        return None
    if family != _CREATED and family not in _REMOVED:
        raise NotUnderstood(f"The event {_shown(name)} is not known.")
    told = _mapping(record, "s3")
    entry = _mapping(told, "object")
    try:
        key = unquote_plus(_text(entry, "key", _MAX_ENCODED_KEY), errors="strict")
    except UnicodeDecodeError as error:
        raise NotUnderstood("Its key is not UTF-8.") from error
    uri = _uri(_mapping(told, "bucket"), key)
    moment, sequencer = _moment(record, "eventTime"), _sequencer(entry)
    version = _optional(entry, "versionId")
    if family == _CREATED:
        return _created(uri, entry, "eTag", version, moment, sequencer)
    return _removed(uri, version, action == _DELETE_MARKER, moment, sequencer)


def _of_event_bridge(event: _Object) -> _Event | None:
    if event.get("source") != "aws.s3":
        raise NotUnderstood(f"It comes from {_shown(event.get('source'))}, not from S3.")
    kind = _text(event, "detail-type")
    if kind in _BRIDGE_WITHOUT_BEARING:
        return None
    if kind not in (_BRIDGE_CREATED, _BRIDGE_DELETED):
        raise NotUnderstood(f"The event {_shown(kind)} is not known.")
    detail = _mapping(event, "detail")
    entry = _mapping(detail, "object")
    uri = _uri(_mapping(detail, "bucket"), _text(entry, "key"))  # here the key is not encoded
    moment, sequencer = _moment(event, "time"), _sequencer(entry)
    version = _optional(entry, "version-id")
    if kind == _BRIDGE_CREATED:
        return _created(uri, entry, "etag", version, moment, sequencer)
    is_marker = detail.get("deletion-type") == _BRIDGE_DELETE_MARKER
    return _removed(uri, version, is_marker, moment, sequencer)


def _created(
    uri: str, entry: _Object, etag_name: str, version: str | None, moment: datetime, sequencer: str
) -> Upload | None:
    size = entry.get("size")
    if size is not None and (not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= _MAX_BYTES):
        raise NotUnderstood("Its `size` is not a number of bytes.")
    if uri.endswith("/") and not size:
        return None  # what consoles make to show a folder
    etag = _text(entry, etag_name).strip('"')
    if not etag:
        raise NotUnderstood(f"Its `{etag_name}` is empty.")
    return Upload(uri, etag, size, None, SOURCE, version, moment, sequencer)


def _removed(
    uri: str, version: str | None, is_marker: bool, moment: datetime, sequencer: str
) -> Removal | VersionRemoval:
    """A delete marker hides the object; without one, a version ID says that only this version is gone."""
    if version is None or is_marker:
        return Removal(uri, moment, sequencer)
    return VersionRemoval(uri, version, moment, sequencer)


def _uri(bucket: _Object, key: str) -> str:
    name = _text(bucket, "name")
    if not _BUCKET.fullmatch(name):
        raise NotUnderstood("Its bucket name is none.")
    if "\0" in key:
        raise NotUnderstood("Its key has a NUL character.")
    if not key or len(key.encode()) > _MAX_KEY_BYTES:
        raise NotUnderstood(f"Its key is empty or longer than {_MAX_KEY_BYTES} bytes.")
    return f"s3://{name}/{key}"


def _sequencer(entry: _Object) -> str:
    told = _optional(entry, "sequencer")
    return "" if told is None else sortable(told)


def _moment(holder: _Object, name: str) -> datetime:
    try:
        moment = datetime.fromisoformat(_text(holder, name))
        if moment.tzinfo is None:
            raise NotUnderstood(f"Its `{name}` has no time zone.")
        return moment.astimezone(UTC)
    except (ValueError, OverflowError) as error:
        raise NotUnderstood(f"Its `{name}` is no ISO 8601 time.") from error


def _mapping(holder: _Object, name: str) -> _Object:
    value = holder.get(name)
    if not isinstance(value, dict):
        raise NotUnderstood(f"Its `{name}` is missing or no object.")
    return value


def _optional(holder: _Object, name: str) -> str | None:
    return None if holder.get(name) is None else _text(holder, name)


def _text(holder: _Object, name: str, limit: int = _MAX_TEXT) -> str:
    """A text that the database takes: not empty, bounded, encodable, without NUL."""
    value = holder.get(name)
    if not isinstance(value, str) or not value:
        raise NotUnderstood(f"Its `{name}` is missing or no text.")
    try:
        length = len(value.encode())
    except UnicodeEncodeError as error:
        raise NotUnderstood(f"Its `{name}` has half a surrogate pair.") from error
    if length > limit:
        raise NotUnderstood(f"Its `{name}` is longer than {limit} bytes.")
    if "\0" in value:
        raise NotUnderstood(f"Its `{name}` has a NUL character.")
    return value


def _shown(value: object) -> str:
    return printable(repr(value), 80) if isinstance(value, str) else "something that is no text"
