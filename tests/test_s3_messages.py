"""Reading S3 events out of queue messages: every shape they come in, odd keys, and anything that is none."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote_plus

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resources.ingest.object_versions import VersionRemoval
from resources.ingest.uploads import Removal, Upload
from sensors.s3_messages import Events, NotUnderstood, parse, sortable

MOMENT = datetime(2026, 3, 1, 12, 0, 0, 250_000, tzinfo=UTC)


def notification(name: str = "ObjectCreated:Put", key: str = "a+clip.mp4", **changes: Any) -> dict[str, Any]:
    """A record as S3 sends it; `changes` go into its `object`, None leaves a field out."""
    entry = {"key": key, "size": 5, "eTag": "aa11", "sequencer": "0055AED6DCD90281E5", **changes}
    return {
        "eventVersion": "2.1",
        "eventSource": "aws:s3",
        "eventTime": "2026-03-01T12:00:00.250Z",
        "eventName": name,
        "s3": {
            "bucket": {"name": "media"},
            "object": {name: value for name, value in entry.items() if value is not None},
        },
    }


def bridge(kind: str = "Object Created", key: str = "a+clip.mp4", **detail: Any) -> dict[str, Any]:
    """An event as EventBridge sends it."""
    return {
        "version": "0",
        "detail-type": kind,
        "source": "aws.s3",
        "time": "2026-03-01T12:00:00Z",
        "detail": {
            "bucket": {"name": "media"},
            "object": {"key": key, "size": 5, "etag": "aa11", "version-id": "v1", "sequencer": "00617F08299329D189"},
            **detail,
        },
    }


def body(*records: Any) -> str:
    return json.dumps({"Records": records})


def test_a_created_object_is_an_upload() -> None:
    """Given a notification of S3, then bucket, decoded key, etag, size, version and time are the upload's."""
    (upload,) = parse(body(notification(versionId="v1"))).uploads
    assert upload == Upload("s3://media/a clip.mp4", "aa11", 5, None, "s3_event", "v1", MOMENT, "0055AED6DCD90281E5")


def test_an_event_and_a_listing_name_the_same_media() -> None:
    """Given an etag with quotes, as listings have it, then the media ID is the one of the bare etag."""
    (upload,) = parse(body(notification(eTag='"aa11"'))).uploads
    assert upload.media_id == Upload("s3://media/a clip.mp4", "aa11", 5, None, "s3").media_id


def test_event_bridge_keys_are_not_encoded() -> None:
    """Given the same key told by EventBridge, then its plus sign is a plus sign."""
    (upload,) = parse(json.dumps(bridge())).uploads
    assert (upload.uri, upload.etag, upload.object_version) == ("s3://media/a+clip.mp4", "aa11", "v1")
    assert upload.observed_at == MOMENT.replace(microsecond=0)


@pytest.mark.parametrize("event", [notification("ObjectRemoved:Delete"), bridge("Object Deleted")])
def test_sns_wrappings_are_taken_off(event: dict[str, Any]) -> None:
    """Given an event that came through SNS, then it says what it says without."""
    plain = json.dumps({"Records": [event]} if "s3" in event else event)
    wrapped = json.dumps({"Type": "Notification", "TopicArn": "arn:aws:sns:eu-west-1:1:t", "Message": plain})
    assert parse(wrapped) == parse(plain)
    assert parse(wrapped).count == 1


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (notification("ObjectRemoved:Delete"), Removal),
        (notification("ObjectRemoved:Delete", versionId="v1"), VersionRemoval),
        (notification("ObjectRemoved:DeleteMarkerCreated", versionId="marker"), Removal),
        (notification("LifecycleExpiration:Delete"), Removal),
        (notification("LifecycleExpiration:DeleteMarkerCreated", versionId="marker"), Removal),
        (notification("s3:ObjectCreated:CompleteMultipartUpload"), Upload),
        (notification("ObjectCreated:Copy"), Upload),
        (bridge("Object Deleted", **{"deletion-type": "Delete Marker Created"}), Removal),
        (bridge("Object Deleted", **{"deletion-type": "Permanently Deleted"}), VersionRemoval),
    ],
)
def test_what_the_events_mean(record: dict[str, Any], expected: type) -> None:
    """Given an event name, then the object came, is gone, or only one version of it is."""
    events = parse(json.dumps({"Records": [record]} if "s3" in record else record))
    (event,) = (*events.uploads, *events.removals, *events.version_removals)
    assert type(event) is expected


@pytest.mark.parametrize(
    "text",
    [
        json.dumps({"Service": "Amazon S3", "Event": "s3:TestEvent", "Bucket": "media"}),
        body(notification(key="a/folder/", size=0)),
        body(notification(key="%2F%2F", size=None)),
        body(notification("ObjectTagging:Put")),
        json.dumps(bridge("Object Tags Added")),
    ],
)
def test_what_has_no_bearing_is_ignored(text: str) -> None:
    """Given the test event, a folder marker or a change of tags, then it is understood and registers nothing."""
    assert parse(text) == Events(ignored=1)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "not JSON"),
        ("hello", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[1]", "no object"),
        ("{}", "neither"),
        ('{"Records": []}', "at least one"),
        ('{"Records": "no"}', "at least one"),
        (json.dumps({"Type": "SubscriptionConfirmation", "TopicArn": "t", "Message": "m"}), "SNS"),
    ],
)
def test_what_is_no_event_is_refused_as_a_whole(text: str, reason: str) -> None:
    """Given a message that holds no events, then it is refused with the reason."""
    with pytest.raises(NotUnderstood) as refused:
        parse(text)
    assert reason in refused.value.message


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (7, "no object"),
        (notification("ObjectExploded:Now"), "'ObjectExploded:Now' is not known"),
        (notification(eTag=None), "`eTag` is missing"),
        (notification(eTag='""'), "`eTag` is empty"),
        (notification(size=-1), "`size`"),
        (notification(size=True), "`size`"),
        (notification(size=2**63), "`size`"),
        (notification(key="%FF.mp4"), "not UTF-8"),
        (notification(key="a%00.mp4"), "NUL"),
        (notification(key="a\ud800.mp4"), "surrogate"),
        (notification(key=quote_plus("ü" * 513)), "longer than 1024 bytes"),
        (notification(sequencer="later"), "not hexadecimal"),
        ({**notification(), "eventTime": "2026-03-01T12:00:00"}, "no time zone"),
        ({**notification(), "eventTime": "0001-01-01T00:00:00+14:00"}, "no ISO 8601 time"),
        ({**notification(), "eventSource": "aws:sqs"}, "not from S3"),
        ({**notification(), "s3": {"bucket": {"name": "no/bucket"}, "object": {"key": "a"}}}, "bucket name"),
        (notification("Object\x1b[31mEvil:\nNow"), r"\x1b[31mEvil:\nNow"),
    ],
)
def test_a_bad_record_does_not_cost_the_good_ones(record: Any, reason: str) -> None:
    """Given a message with a record that is not understood, then the others are, and the reason is one plain line."""
    events = parse(body(notification(key="good.mp4"), record))
    assert [upload.uri for upload in events.uploads] == ["s3://media/good.mp4"]
    assert reason in events.reason
    assert events.reason.startswith("Record 2 of 2: ")
    assert events.reason.isprintable()


@given(st.text(min_size=1).filter(lambda key: "\0" not in key and not key.endswith("/") and len(key.encode()) <= 1024))
def test_any_key_is_read_back(key: str) -> None:
    """Given a key with whatever characters, then both shapes name the same object."""
    (told,) = parse(body(notification(key=quote_plus(key)))).uploads
    (bridged,) = parse(json.dumps(bridge(key=key))).uploads
    assert told.uri == bridged.uri == f"s3://media/{key}"


@given(st.text("0123456789ABCDEFabcdef", min_size=1, max_size=24), st.text("0123456789abcdef", min_size=1, max_size=24))
def test_sequencers_sort_as_aws_says(one: str, other: str) -> None:
    """Given two sequencers of any length, then text order equals that of the numbers padded on the right."""
    width = max(len(one), len(other))
    first, second = int(one.ljust(width, "0"), 16), int(other.ljust(width, "0"), 16)
    assert (sortable(one) < sortable(other)) == (first < second)
    assert (sortable(one) == sortable(other)) == (first == second)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
odd_text = st.text() | st.sampled_from(
    ["", "ObjectCreated:Put", "9999-12-31T23:59:59-23:59", "%", "%zz", '"', "\ud800"]
)
odd = json_values | odd_text


@st.composite
def damaged(draw: st.DrawFn) -> Any:
    """An event of either shape in which a few fields are anything at all."""
    event = draw(st.sampled_from([notification, bridge]))()
    for _ in range(draw(st.integers(0, 3))):
        holder = event
        while True:
            name = draw(st.sampled_from(sorted(holder)))
            if not isinstance(holder[name], dict) or not holder[name] or draw(st.booleans()):
                holder[name] = draw(odd)
                break
            holder = holder[name]
    wrapped = event if "detail-type" in event else {"Records": [event, draw(odd)]}
    return {"Type": "Notification", "Message": json.dumps(wrapped)} if draw(st.booleans()) else wrapped


@given(json_values | damaged() | st.fixed_dictionaries({"Records": st.lists(odd)}))
def test_any_json_is_read_or_refused(value: Any) -> None:
    """Given any JSON value, however near to an event, then it is read or refused, and what is read can be stored."""
    try:
        events = parse(json.dumps(value))
    except NotUnderstood as refused:
        events = Events(rejected=(refused.message,))
    assert events.count + events.ignored + len(events.rejected) >= 1
    assert events.reason.isprintable()
    for told in (*events.uploads, *events.removals, *events.version_removals):
        assert told.uri.startswith("s3://")
        assert "\0" not in told.uri
        assert len(told.uri.encode()) <= 1285
        assert told.observed_at is not None
        assert told.observed_at.tzinfo is UTC


@given(st.text())
def test_any_text_is_read_or_refused(text: str) -> None:
    """Given any body at all, then it is refused as no event."""
    with pytest.raises(NotUnderstood):
        parse(text)
