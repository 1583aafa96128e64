"""s3_event_sensor against a real SQS and S3 server: what S3 tells becomes uploads and partitions, whatever happens."""

from __future__ import annotations

import itertools
import json
import re
import threading
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote_plus

import dagster as dg
import pytest
import sqlalchemy as sa

from media_assets.orchestration.partitions import MEDIA
from resources import faults
from resources.errors import DatabaseUnavailable
from resources.ingest import queues
from resources.ingest.discovery import discover
from resources.ingest.object_versions import VersionedRegistry, VersionRemoval
from resources.ingest.queues import Queue, QueueUnavailable
from resources.ingest.registry import Registry
from resources.ingest.uploads import Upload
from resources.library import Library
from resources.records.database import Database
from resources.records.tables import rejected_messages
from resources.settings import S3, Ingestion, Settings
from sensors.s3_events import build_s3_event_sensor, drain
from sensors.s3_messages import SOURCE
from sensors.sqs_resource import SQSResource
from tests.test_s3_messages import body, notification

MAX_RECEIVES = 2
START = datetime(2026, 3, 1, tzinfo=UTC)


@pytest.fixture(scope="session")
def endpoint() -> Iterator[str]:
    """A server that speaks S3 and SQS, on a free loopback port."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
    from werkzeug.serving import make_server

    application = DomainDispatcherApplication(create_backend_app)
    # One request at a time: its queues are not made for several threads.
    server = make_server("127.0.0.1", 0, application, threaded=False, request_handler=MotoRequestHandler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@dataclass(frozen=True)
class Wired:
    """A bucket whose events go to a queue with a dead-letter queue, and the library that reads it."""

    s3: Any
    sqs: Any
    bucket: str
    queue: str
    dead_letters: str
    library: Library
    instance: dg.DagsterInstance

    def send(self, *texts: str) -> None:
        for text in texts:
            self.sqs.send_message(QueueUrl=self.queue, MessageBody=text)

    def set(self, **attributes: str) -> None:
        self.sqs.set_queue_attributes(QueueUrl=self.queue, Attributes=attributes)

    def count(self, url: str) -> int:
        """Messages in a queue, hidden ones included."""
        names = ["ApproximateNumberOfMessages", "ApproximateNumberOfMessagesNotVisible"]
        found = self.sqs.get_queue_attributes(QueueUrl=url, AttributeNames=names)["Attributes"]
        return sum(int(found[name]) for name in names)

    def dead(self) -> dict[str, dict[str, str]]:
        """Attributes of the messages in the dead-letter queue, by body."""
        answer = self.sqs.receive_message(
            QueueUrl=self.dead_letters, MaxNumberOfMessages=10, MessageAttributeNames=["All"], VisibilityTimeout=0
        )
        return {
            found["Body"]: {name: a["StringValue"] for name, a in found.get("MessageAttributes", {}).items()}
            for found in answer.get("Messages", ())
        }

    def tick(self, cursor: str | None = None) -> tuple[str, dict[str, int]]:
        """One tick of the sensor: what it says, and its cursor."""
        context = dg.build_sensor_context(instance=self.instance, resources={"media": self.library}, cursor=cursor)
        done = build_s3_event_sensor(self.library.settings).evaluate_tick(context)
        assert not done.run_requests
        return str(done.skip_message), json.loads(done.cursor or "{}")

    def ticks_until(self, condition: Callable[[], bool]) -> None:
        """Tick until it holds; needs `long_polls`, with which a tick waits a second for messages to become visible."""
        for _ in range(30):
            if condition():
                return
            self.tick()
        raise AssertionError("it never came to hold")

    def live(self) -> dict[str, str]:
        """Media ID by URI of the live uploads."""
        return {row["uri"]: row["media_id"] for row in self.library.registry.live()}

    def partitions(self) -> list[str]:
        return sorted(self.instance.get_dynamic_partitions(MEDIA))

    def rejected(self) -> dict[str, str]:
        """Reason by body of the rejected messages that were kept."""
        query = sa.select(rejected_messages.c.body, rejected_messages.c.reason).where(
            rejected_messages.c.source == SOURCE
        )
        with self.library.database.engine.connect() as connection:
            rows = connection.execute(query).all()
        assert len({row[0] for row in rows}) == len(rows)
        return {row[0]: row[1] for row in rows}


@pytest.fixture
def aws(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """AWS' variables with credentials that are none."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    return endpoint


@pytest.fixture
def short_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    """This server, unlike AWS, shows every message to a short poll: nothing has to be waited for."""
    monkeypatch.setattr(queues, "_POLL_S", 0)


@pytest.fixture
def long_polls(short_polls: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last look at a queue waits a second, as it does in production."""
    monkeypatch.setattr(queues, "_POLL_S", 1)


@pytest.fixture
def wired(aws: str, short_polls: None, database_url: str, tmp_path: Path) -> Iterator[Wired]:
    """Everything connected as the runbook says, nothing uploaded yet."""
    import boto3

    s3 = boto3.client("s3", endpoint_url=aws, region_name="us-east-1")
    sqs = boto3.client("sqs", endpoint_url=aws, region_name="us-east-1")
    name = f"b{uuid.uuid4().hex[:12]}"
    dead_letters = sqs.create_queue(QueueName=f"{name}-dead")["QueueUrl"]
    arn = f"arn:aws:sqs:us-east-1:123456789012:{name}"
    redrive = {"deadLetterTargetArn": f"{arn}-dead", "maxReceiveCount": MAX_RECEIVES}
    queue = sqs.create_queue(
        QueueName=name, Attributes={"VisibilityTimeout": "120", "RedrivePolicy": json.dumps(redrive)}
    )["QueueUrl"]
    s3.create_bucket(Bucket=name)
    events = {"QueueArn": arn, "Events": ["s3:ObjectCreated:*", "s3:ObjectRemoved:*"]}
    s3.put_bucket_notification_configuration(Bucket=name, NotificationConfiguration={"QueueConfigurations": [events]})
    library = Library(
        Settings(
            home=tmp_path / "home",
            database_url=database_url,
            s3=S3(region="us-east-1", max_attempts=1),
            ingestion=Ingestion(queue_url=queue, dead_letter_url=dead_letters, queue_endpoint_url=aws),
        )
    )
    with dg.DagsterInstance.ephemeral() as instance:
        yield Wired(s3, sqs, name, queue, dead_letters, library, instance)
    library.close()


def with_ingestion(wired: Wired, **changes: Any) -> Wired:
    """The same, with other settings of ingestion."""
    settings = wired.library.settings
    changed = settings.model_copy(update={"ingestion": settings.ingestion.model_copy(update=changes)})
    return Wired(wired.s3, wired.sqs, wired.bucket, wired.queue, wired.dead_letters, Library(changed), wired.instance)


def test_an_upload_becomes_a_partition(wired: Wired, monkeypatch: pytest.MonkeyPatch, aws: str) -> None:
    """Given objects with odd keys, when the sensor ticks, then each is registered under the ID a listing gives it."""
    import s3fs

    keys = ["plain.mp4", "a b+c & d%20.mp4", "日本語/café 🎬.mp4", "deep/er//x.mp4"]
    for key in keys:
        wired.s3.put_object(Bucket=wired.bucket, Key=key, Body=key.encode())
    wired.s3.put_object(Bucket=wired.bucket, Key="folder/", Body=b"")

    said, counted = wired.tick()

    assert set(wired.live()) == {f"s3://{wired.bucket}/{key}" for key in keys}
    assert wired.partitions() == sorted(wired.live().values())
    assert (counted["events"], counted["new"], counted["ignored"]) == (4, 4, 2)  # the test event, the folder
    assert "4 new" in said
    assert wired.count(wired.queue) == 0
    assert {row["bytes"] for row in wired.library.registry.live()} == {len(key.encode()) for key in keys}
    monkeypatch.setenv("AWS_ENDPOINT_URL", aws)
    listed = [found for found in discover([f"s3://{wired.bucket}"]) if isinstance(found, Upload)]
    s3fs.S3FileSystem.clear_instance_cache()
    assert {upload.media_id for upload in listed if not upload.uri.endswith("/")} == set(wired.live().values())


def test_keys_no_listing_would_show_well_are_registered(wired: Wired) -> None:
    """Given keys of control characters and slashes alone, then each is registered, and its partition has a plain ID."""
    keys = ["a\nnew\tline.mp4", "///", "\x1b[31m.mp4", "\u202egnp.exe", "-", ",", "'; drop table uploads; --"]
    wired.send(*(body(notification(key=quote_plus(key))) for key in keys))
    wired.tick()
    assert set(wired.live()) == {f"s3://media/{key}" for key in keys}
    assert wired.partitions() == sorted(wired.live().values())
    assert all(re.fullmatch(r"[a-z0-9-]+", name) for name in wired.partitions())


def test_a_removed_object_is_removed(wired: Wired) -> None:
    """Given a registered object, when it is changed and then deleted, then nothing of it is live; counters add up."""
    wired.s3.put_object(Bucket=wired.bucket, Key="a.mp4", Body=b"one")
    _, cursor = wired.tick()
    wired.s3.put_object(Bucket=wired.bucket, Key="a.mp4", Body=b"two")
    wired.s3.delete_object(Bucket=wired.bucket, Key="a.mp4")
    _, cursor = wired.tick(json.dumps(cursor))
    assert wired.live() == {}
    assert (cursor["events"], cursor["new"], cursor["removed"]) == (3, 2, 1)


def test_duplicates_and_reordering_change_nothing(wired: Wired) -> None:
    """Given a removal told before the creation and everything told twice, then the last event of a key decides."""

    def told(name: str, key: str, minute: int, **changes: Any) -> str:
        return body({**notification(name, key, **changes), "eventTime": f"2026-03-01T12:{minute:02}:00Z"})

    messages = [
        told("ObjectRemoved:Delete", "gone.mp4", 2),
        told("ObjectCreated:Put", "gone.mp4", 1),
        told("ObjectCreated:Put", "back.mp4", 3, eTag="new"),
        told("ObjectRemoved:Delete", "back.mp4", 2),
        told("ObjectCreated:Put", "back.mp4", 1, eTag="old"),
        told("ObjectCreated:Put", "tie.mp4", 1, eTag="second", sequencer="0B"),
        told("ObjectCreated:Put", "tie.mp4", 1, eTag="first", sequencer="0A00"),
    ]
    wired.send(*messages)
    wired.tick()
    wired.send(*messages, *messages)
    _, counted = wired.tick()
    expected = {
        "s3://media/back.mp4": Upload("s3://media/back.mp4", "new", 5, None).media_id,
        "s3://media/tie.mp4": Upload("s3://media/tie.mp4", "second", 5, None).media_id,
    }
    assert wired.live() == expected
    assert wired.partitions() == sorted(expected.values())
    assert (counted["new"], counted["duplicates"]) == (0, 10)


def test_garbage_goes_to_the_dead_letter_queue_with_its_reason(wired: Wired) -> None:
    """Given another application's messages between events, then the events are registered and the rest set aside."""
    mixed = body(notification(key="mixed.mp4"), {"eventSource": "aws:sns"})
    wired.send("not for you", body(notification(key="good.mp4")), '{"order": 7}', mixed)
    said, counted = wired.tick()
    assert set(wired.live()) == {"s3://media/good.mp4", "s3://media/mixed.mp4"}
    assert counted["rejected"] == 3
    assert "3 rejected" in said
    assert wired.count(wired.queue) == 0
    dead = wired.dead()
    assert wired.rejected() == {text: attributes["reason"] for text, attributes in dead.items()}
    assert dead["not for you"]["reason"] == "The body is not JSON."
    assert dead[mixed]["reason"].startswith("Record 2 of 2: It comes from 'aws:sns'")
    assert all(attributes["source_message_id"] for attributes in dead.values())


def test_without_a_dead_letter_queue_the_rejected_are_kept_as_rows(wired: Wired) -> None:
    """Given no dead-letter queue and a large body, then its first 16 KiB and the reason stay in the database."""
    alone = with_ingestion(wired, dead_letter_url=None)
    alone.send("ü" * 20_000)
    alone.tick()
    ((kept, reason),) = alone.rejected().items()
    assert kept == "ü" * 8192
    assert reason == "The body is not JSON."
    assert wired.count(wired.queue) == wired.count(wired.dead_letters) == 0
    alone.library.close()


def test_large_bodies_are_cut_for_the_dead_letter_queue(wired: Wired) -> None:
    """Given a rejected body too large to carry its reason as well, then it is sent on cut, and says so."""
    wired.send("x" * 256_000, "y" * 200_000, "z" * 200_000)
    wired.tick()
    dead = wired.dead()
    assert sorted(len(text) for text in dead) == [200_000, 200_000, 240 * 1024]
    assert dead["x" * 240 * 1024]["cut"] == "true"
    assert wired.count(wired.queue) == 0


def test_a_missing_dead_letter_queue_keeps_the_garbage_and_stops_nothing_else(wired: Wired) -> None:
    """Given a dead-letter queue that is gone, then events are registered, garbage stays, and the tick says why."""
    broken = with_ingestion(wired, dead_letter_url=wired.dead_letters + "-gone")
    broken.send("garbage", body(notification(key="good.mp4")))
    with pytest.raises(QueueUnavailable, match=r"-gone does not exist .* Create it"):
        broken.tick()
    assert set(broken.live()) == {"s3://media/good.mp4"}
    assert list(broken.rejected()) == ["garbage"]
    assert wired.count(wired.queue) == 1
    broken.library.close()


@pytest.mark.parametrize("point", ["registered", "partitioned", "rejected"])
def test_dying_before_the_messages_are_deleted_loses_and_doubles_nothing(
    wired: Wired, long_polls: None, point: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given a tick that dies between two commits, then the next ones get the messages again and complete it."""
    wired.set(VisibilityTimeout="1", RedrivePolicy="")
    wired.send(body(notification(key="a.mp4")), "garbage")
    monkeypatch.setattr(faults, "_hits", {})
    monkeypatch.setenv(faults.VARIABLE, f"s3_events.{point}:raise")
    with pytest.raises(RuntimeError, match=point):
        wired.ticks_until(lambda: False)
    assert wired.count(wired.queue) > 0
    assert set(wired.live()) == {"s3://media/a.mp4"}
    wired.ticks_until(lambda: wired.count(wired.queue) == 0)
    assert set(wired.live()) == {"s3://media/a.mp4"}
    assert wired.partitions() == list(wired.live().values())
    assert list(wired.rejected()) == list(wired.dead()) == ["garbage"]


def test_events_that_could_not_be_registered_survive_the_redrive_policy(wired: Wired, long_polls: None) -> None:
    """Given a registry that fails until SQS sets an event aside, when it is moved back, then it is registered."""
    wired.set(VisibilityTimeout="1")
    event = body(notification(key="a.mp4"))
    wired.send(event)
    engine = wired.library.database.engine

    def rename(old: str, new: str) -> None:
        with engine.begin() as connection:
            connection.execute(sa.text(f"alter table {old} rename to {new}"))

    rename("uploads", "elsewhere")
    for _ in range(20):
        if wired.count(wired.dead_letters) == 2:  # the bucket's test event is the other one
            break
        try:
            wired.tick()
        except sa.exc.ProgrammingError:
            continue
    rename("elsewhere", "uploads")
    assert event in wired.dead()
    assert wired.live() == {}
    # What `aws sqs start-message-move-task` does.
    wired.send(*wired.dead())
    wired.tick()
    assert set(wired.live()) == {"s3://media/a.mp4"}


def test_a_database_that_is_down_costs_no_delivery(wired: Wired) -> None:
    """Given no database, then the tick says so and the message has not been received at all."""
    wired.send(body(notification()))
    settings = wired.library.settings.model_copy(update={"database_url": "postgresql://nobody@127.0.0.1:1/none"})
    library = Library(settings)
    with pytest.raises(DatabaseUnavailable):
        drain(library, wired.sqs, wired.instance)
    answer = wired.sqs.receive_message(
        QueueUrl=wired.queue, MaxNumberOfMessages=10, AttributeNames=["ApproximateReceiveCount"]
    )
    assert {found["Attributes"]["ApproximateReceiveCount"] for found in answer["Messages"]} == {"1"}


def test_a_tick_takes_no_more_than_it_may(wired: Wired) -> None:
    """Given more messages than a tick may take, then several receivers take exactly that many, and the rest next."""
    texts = [body(notification(key=f"{number}.mp4")) for number in range(95)]
    for first in range(0, len(texts), 10):
        entries = [{"Id": str(n), "MessageBody": text} for n, text in enumerate(texts[first : first + 10])]
        wired.sqs.send_message_batch(QueueUrl=wired.queue, Entries=entries)
    bounded = with_ingestion(wired, max_messages_per_tick=57)
    said, counted = bounded.tick()
    assert counted["messages"] == 57
    assert "about 39 left" in said  # the test event is one of the 96
    wired.tick()
    assert len(wired.live()) == len(wired.partitions()) == 95
    assert wired.count(wired.queue) == 0
    bounded.library.close()


class Refusing:
    """The real client, which refuses the first deletions of a batch."""

    def __init__(self, client: Any, times: int) -> None:
        self._client = client
        self._times = times

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def delete_message_batch(self, QueueUrl: str, Entries: list[dict[str, str]]) -> dict[str, Any]:  # noqa: N803
        if not self._times:
            answer: dict[str, Any] = self._client.delete_message_batch(QueueUrl=QueueUrl, Entries=Entries)
            return answer
        self._times -= 1
        refused, *rest = Entries
        if rest:
            self._client.delete_message_batch(QueueUrl=QueueUrl, Entries=rest)
        return {"Failed": [{"Id": refused["Id"], "Code": "InternalError", "SenderFault": False}]}


@pytest.mark.parametrize(("times", "left"), [(2, 0), (3, 1)])
def test_refused_deletions_are_tried_again_and_then_left(wired: Wired, times: int, left: int) -> None:
    """Given SQS refusing to delete a message, then it is tried three times; what is left is only delivered again."""
    wired.tick()
    wired.send(*(body(notification(key=f"{number}.mp4")) for number in range(3)))
    done = drain(wired.library, Refusing(wired.sqs, times), wired.instance)
    assert (done.events, done.left_to_redelivery) == (3, left)
    assert wired.count(wired.queue) == left


def test_a_queue_that_cannot_be_used_says_what_to_do(wired: Wired, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given a queue that is gone, unreachable or forbidden, then the tick fails with a sentence and a remedy."""
    for changes, sentence in (
        ({"queue_url": wired.queue + "-gone"}, "does not exist .* Create it"),
        ({"queue_endpoint_url": "http://127.0.0.1:1"}, "cannot be reached .* network"),
        ({"queue_endpoint_url": "nonsense"}, "cannot be reached"),
    ):
        broken = with_ingestion(wired, **changes)
        with pytest.raises(QueueUnavailable, match=sentence):
            broken.tick()
        broken.library.close()
    wired.set(VisibilityTimeout="0")
    with pytest.raises(QueueUnavailable, match="visibility timeout is 0"):
        wired.tick()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    with pytest.raises(QueueUnavailable, match=r"no AWS credentials .* role"):
        wired.tick()


def test_refused_access_names_the_permissions() -> None:
    """Given a client that is denied, then the error says so without its text."""
    from botocore.exceptions import ClientError

    class Denied:
        def get_queue_attributes(self, **_: Any) -> Any:
            raise ClientError({"Error": {"Code": "AccessDenied", "Message": "secret"}}, "GetQueueAttributes")

    with pytest.raises(QueueUnavailable, match=r"refuses access .* permissions") as refused:
        Queue(Denied(), "https://sqs.eu-west-1.amazonaws.com/1/q").visibility_s()
    assert "secret" not in str(refused.value)


def test_a_short_visibility_timeout_shortens_the_tick(wired: Wired) -> None:
    """Given messages hidden for less than twice the tick's budget, then the tick is shorter and warns."""
    wired.set(VisibilityTimeout="30")
    done = drain(wired.library, wired.sqs, wired.instance)
    assert ["shortened to 15 s" in text for text in done.warnings] == [True]
    wired.set(VisibilityTimeout="50")
    assert drain(wired.library, wired.sqs, wired.instance).warnings == []


def test_an_installation_without_a_queue_has_the_sensor_stopped(wired: Wired) -> None:
    """Given no queue, then the sensor is stopped, and started by hand it names the setting."""
    without = with_ingestion(wired, queue_url=None)
    assert build_s3_event_sensor(without.library.settings).default_status is dg.DefaultSensorStatus.STOPPED
    assert build_s3_event_sensor(wired.library.settings).default_status is dg.DefaultSensorStatus.RUNNING
    said, _ = without.tick()
    assert "ingestion.queue_url" in said
    without.library.close()
    with pytest.raises(ValueError, match="another queue"):
        Settings(ingestion=Ingestion(queue_url="https://q", dead_letter_url="https://q"))


@pytest.mark.parametrize(
    ("url", "region"),
    [
        ("https://sqs.eu-west-3.amazonaws.com/1/q", "eu-west-3"),
        ("https://eu-west-3.queue.amazonaws.com/1/q", "eu-west-3"),
        ("https://sqs.cn-north-1.amazonaws.com.cn/1/q", "cn-north-1"),
        ("http://localhost:9324/1/q", None),
    ],
)
def test_the_region_is_that_of_the_queue(url: str, region: str | None) -> None:
    """Given no region in the settings, then the queue's URL tells it where it is AWS'."""
    assert SQSResource.of(Settings(ingestion=Ingestion(queue_url=url))).region_name == region
    chosen = Settings(ingestion=Ingestion(queue_url=url), s3=S3(region="us-east-2"))
    assert SQSResource.of(chosen).region_name == "us-east-2"


def versioned(uri: str, version: str, second: int) -> Upload:
    return Upload(uri, f"etag of {version}", 1, None, SOURCE, version, START + timedelta(seconds=second), "0A")


def states(database: Database, uri: str) -> dict[str, str]:
    """State by object version."""
    query = sa.text("select object_version, state from uploads where uri = :uri")
    with database.engine.connect() as connection:
        return {row[0]: row[1] for row in connection.execute(query, {"uri": uri})}


@pytest.mark.parametrize(
    ("deleted", "expected"),
    [("v1", {"v1": "superseded", "v2": "live"}), ("v2", {"v1": "superseded", "v2": "removed"})],
)
def test_deleting_one_version_settles_the_same_in_any_order(
    database: Database, deleted: str, expected: dict[str, str]
) -> None:
    """Given two versions and the permanent deletion of one, told in every order, then only that one is removed."""
    registry = VersionedRegistry(database, Registry(database))
    for place, order in enumerate(itertools.permutations(range(3))):
        uri = f"s3://bucket/{place}.mp4"
        events: list[Upload | VersionRemoval] = [
            versioned(uri, "v1", 1),
            versioned(uri, "v2", 2),
            VersionRemoval(uri, deleted, START + timedelta(seconds=3), "0B"),
        ]
        for number in (*order, *order):
            event = events[number]
            found, gone = ([event], []) if isinstance(event, Upload) else ([], [event])
            registry.register(found, [], gone)
        assert states(database, uri) == expected, order


def test_an_unknown_version_removes_nothing_and_null_comes_back(database: Database) -> None:
    """Given a deleted delete marker, and version `null` deleted and made again, then what is there stays live."""
    registry = VersionedRegistry(database, Registry(database))
    uri = "s3://bucket/a.mp4"
    marker = VersionRemoval(uri, "marker", START + timedelta(seconds=5), "0C")
    assert registry.register([versioned(uri, "null", 1)], [], [marker]).removed == ()
    gone = registry.register([], [], [VersionRemoval(uri, "null", START + timedelta(seconds=6), "0D")])
    assert len(gone.removed) == 1
    registry.register([versioned(uri, "null", 7)], [], [])
    assert states(database, uri) == {"null": "live"}


def test_values_at_their_limits_can_be_stored(wired: Wired) -> None:
    """Given the longest key, version and sequencer and the earliest and latest times, then they are registered."""
    longest = {"versionId": "v" * 1024, "sequencer": "F" * 128, "eTag": "e" * 1024, "size": 2**63 - 1}
    key = "%F0%9F%8E%AC" * 255 + "abc"  # 1,023 bytes
    early = {**notification(key=key, **longest), "eventTime": "0001-01-01T00:00:00Z"}
    late = {**notification("ObjectRemoved:Delete", key, **longest), "eventTime": "9999-12-31T23:59:59.999999Z"}
    wired.send(body(early), body(late))
    _, counted = wired.tick()
    assert (counted["new"], counted["removed"], counted["rejected"]) == (1, 1, 0)
