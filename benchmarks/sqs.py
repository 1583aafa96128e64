"""S3 events through SQS into the registry and Dagster's partitions, against the stock way, in one invocation.

    python benchmarks/sqs.py [--events 100000] [--stock 500] [--wave 1000]

1. sensor: the sensor's own tick function, until the queue is empty, into a real Postgres in a temporary home.
   Of the messages 10 % are duplicates and 1 % are garbage; uploads, changes and removals come out of order.
2. stock: a loop over `receive_message` that, per message, inserts one row into the same table in a transaction
   of its own, adds one partition, and deletes the message; on messages without duplicates or garbage.

SQS is moto's server in a process of its own, with its two slowest passes over the queue replaced. It still scans
the whole queue for every call, so the queue is filled in waves, outside the clock. At the end every valid key must be
registered exactly once and in the state its last event left it, and the garbage must be in the dead-letter queue
with a reason, or the benchmark fails. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from dagster import DagsterInstance
from rich.console import Console
from sqlalchemy.dialects.postgresql import insert

from cli.instance import prepare_environment
from media_assets.orchestration.partitions import MEDIA
from resources.ingest.uploads import media_id
from resources.library import Library
from resources.records.tables import rejected_messages, uploads
from resources.settings import S3, Ingestion, Settings
from sensors.s3_events import drain
from sensors.s3_messages import SOURCE, parse
from sensors.sqs_resource import SQSResource

DUPLICATES = 0.10
GARBAGE = 0.01
CHANGED = 0.03
REMOVED = 0.02
REORDER = 2000  # a message is overtaken by at most about this many others
SERVER = """
import logging
import time

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from moto.sqs import models
from werkzeug.serving import make_server


def is_fresh(self, queue_name, message):
    return self.get_queue(queue_name).message_retention_period + message.sent_timestamp / 1000 > time.time()


def delete(self, receipt_handle):
    for place, message in enumerate(self._messages):
        if message.had_receipt_handle(receipt_handle):
            self.pending_messages.discard(message)
            self.deleted_messages.update(message.all_receipt_handles)
            del self._messages[place]
            return
    if receipt_handle not in self.deleted_messages:
        raise models.ReceiptHandleIsInvalid()


# moto counts the whole queue several times per received message to look at its age, with a slow clock, and goes
# through all of it twice per deletion: seconds per message in a queue of thousands.
models.Queue.delete_message = delete
models.SQSBackend.is_message_valid_based_on_retention_period = is_fresh
models.unix_time = time.time
models.unix_time_millis = lambda: time.time() * 1000
logging.getLogger("werkzeug").setLevel(logging.ERROR)
application = DomainDispatcherApplication(create_backend_app)
# One request at a time: its queues lose deletions when several threads change them.
server = make_server("127.0.0.1", 0, application, threaded=False, request_handler=MotoRequestHandler)
print(server.server_port, flush=True)
server.serve_forever()
"""


@dataclass
class Traffic:
    """Messages, and what must be registered in the end."""

    messages: list[str] = field(default_factory=list)
    registered: set[str] = field(default_factory=set)
    live: dict[str, str] = field(default_factory=dict)
    garbage: int = 0


def event(name: str, key: str, number: int, etag: str = "") -> str:
    """A notification as S3 sends it, as the `number`-th thing that happened."""
    moment = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(milliseconds=number)
    entry = {"key": key, "size": 1000 + number, "eTag": etag, "sequencer": f"{number:018X}"}
    record = {
        "eventVersion": "2.1",
        "eventSource": "aws:s3",
        "awsRegion": "us-east-1",
        "eventTime": moment.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "eventName": name,
        "userIdentity": {"principalId": "AWS:AIDA"},
        "requestParameters": {"sourceIPAddress": "127.0.0.1"},
        "s3": {
            "s3SchemaVersion": "1.0",
            "configurationId": "uploads",
            "bucket": {"name": "media", "arn": "arn:aws:s3:::media"},
            "object": entry,
        },
    }
    return json.dumps({"Records": [record]})


def traffic(count: int) -> Traffic:
    """`count` messages, the same in every invocation."""
    chance = random.Random(11)
    made = Traffic(garbage=int(count * GARBAGE))
    distinct = count - made.garbage - int(count * DUPLICATES)
    told: list[str] = []
    keys: list[str] = []
    for number in range(distinct):
        dice = chance.random() if keys else 1.0
        key = chance.choice(keys) if dice < CHANGED + REMOVED else f"clips/{number // 1000:04}/clip+{number}.mp4"
        uri = f"s3://media/{key.replace('+', ' ')}"
        if dice < REMOVED:
            told.append(event("ObjectRemoved:Delete", key, number))
            made.live.pop(uri, None)
            continue
        keys.append(key)
        etag = f"{chance.getrandbits(128):032x}"
        told.append(event("ObjectCreated:Put", key, number, etag))
        made.live[uri] = media_id(uri, etag)
        made.registered.add(made.live[uri])
    places = [(number + chance.random() * REORDER, text) for number, text in enumerate(told)]
    places += [(chance.random() * distinct, text) for text in chance.choices(told, k=int(count * DUPLICATES))]
    places += [(chance.random() * distinct, f"garbage {n}: {{" + "x" * 200) for n in range(made.garbage)]
    made.messages = [text for _, text in sorted(places)]
    return made


@contextmanager
def sqs_server() -> Iterator[str]:
    """moto's server in a process of its own; its endpoint."""
    child = subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        yield f"http://127.0.0.1:{int(child.stdout.readline())}"
    finally:
        child.terminate()
        child.wait()


def send(client: Any, url: str, texts: Sequence[str]) -> None:
    """Put messages into a queue."""
    for start in range(0, len(texts), 10):
        entries = [{"Id": str(n), "MessageBody": text} for n, text in enumerate(texts[start : start + 10])]
        client.send_message_batch(QueueUrl=url, Entries=entries)


@dataclass
class Measured:
    """What the sensor's ticks took together, seconds by step."""

    wall_s: float = 0.0
    messages: int = 0
    events: int = 0
    new: int = 0
    duplicates: int = 0
    removed: int = 0
    ticks: int = 0
    seconds: dict[str, float] = field(default_factory=dict)


def sensor(library: Library, client: Any, instance: DagsterInstance, made: Traffic, wave: int) -> Measured:
    """Fill a wave, tick until it is gone, and so on."""
    measured = Measured()
    queue = library.settings.ingestion.queue_url
    assert queue
    for first in range(0, len(made.messages), wave):
        texts = made.messages[first : first + wave]
        send(client, queue, texts)
        left = len(texts)
        while left > 0:
            done = drain(library, client, instance)
            assert done.messages, f"{left} messages do not come"
            left -= done.messages
            measured.ticks += 1
            measured.wall_s += done.wall_s
            for name in ("messages", "events", "new", "duplicates", "removed"):
                setattr(measured, name, getattr(measured, name) + getattr(done, name))
            for step, seconds in done.seconds.items():
                measured.seconds[step] = measured.seconds.get(step, 0.0) + seconds
    return measured


def stock(library: Library, client: Any, instance: DagsterInstance, url: str, count: int) -> float:
    """Seconds of the plain loop over `count` messages."""
    send(client, url, [event("ObjectCreated:Put", f"stock/{n}.mp4", n, f"{n:032x}") for n in range(count)])
    start = time.perf_counter()
    handled = 0
    while handled < count:
        answer = client.receive_message(QueueUrl=url, MaxNumberOfMessages=10)
        for message in answer["Messages"]:
            (upload,) = parse(message["Body"]).uploads
            row = {"media_id": upload.media_id, "uri": upload.uri, "etag": upload.etag, "bytes": upload.bytes}
            with library.database.engine.begin() as connection:
                connection.execute(insert(uploads).values(**row, source="stock", state="live").on_conflict_do_nothing())
            instance.add_dynamic_partitions(MEDIA, [upload.media_id])
            client.delete_message(QueueUrl=url, ReceiptHandle=message["ReceiptHandle"])
            handled += 1
    return time.perf_counter() - start


def verify(library: Library, client: Any, instance: DagsterInstance, made: Traffic, queues: Sequence[str]) -> int:
    """Raise unless all is registered once, in its last state, with its partition; returns the dead letters."""
    with library.database.engine.connect() as connection:
        mine = uploads.c.source == SOURCE
        rows = connection.execute(sa.select(uploads.c.media_id).where(mine)).scalars().all()
        alive = connection.execute(sa.select(uploads.c.uri, uploads.c.media_id).where(mine, uploads.c.state == "live"))
        live = {row[0]: row[1] for row in alive}
        reasons = connection.execute(sa.select(rejected_messages.c.reason)).scalars().all()
    partitions = set(instance.get_dynamic_partitions(MEDIA))
    dead = 0
    while found := client.receive_message(
        QueueUrl=queues[1], MaxNumberOfMessages=10, MessageAttributeNames=["All"]
    ).get("Messages"):
        dead += len(found)
        assert all(m["MessageAttributes"]["reason"]["StringValue"] and m["Body"][:7] == "garbage" for m in found)
        entries = [{"Id": str(n), "ReceiptHandle": m["ReceiptHandle"]} for n, m in enumerate(found)]
        client.delete_message_batch(QueueUrl=queues[1], Entries=entries)
    names = ["ApproximateNumberOfMessages", "ApproximateNumberOfMessagesNotVisible"]
    rest = client.get_queue_attributes(QueueUrl=queues[0], AttributeNames=names)["Attributes"]
    checks = {
        "every version once": len(rows) == len(made.registered) and set(rows) == made.registered,
        "every key in its last state": live == made.live,
        "a partition for each live one": set(live.values()) <= partitions,
        "no partition of nothing": partitions <= made.registered,
        "garbage in the dead-letter queue": dead == made.garbage,
        "garbage kept with its reason": len(reasons) == made.garbage and all(reasons),
        "the queue is empty": all(int(rest[name]) == 0 for name in names),
    }
    failed = [name for name, holds in checks.items() if not holds]
    if failed:
        raise SystemExit(f"not so: {', '.join(failed)}")
    return dead


def main() -> None:
    """Measure, verify, print a table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=100_000)
    parser.add_argument("--stock", type=int, default=500, help="messages of the stock way; 0 leaves it out")
    parser.add_argument("--wave", type=int, default=1000, help="messages in the queue at once, and per tick")
    arguments = parser.parse_args()
    console = Console(stderr=True)
    os.environ |= {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing"}
    with tempfile.TemporaryDirectory(prefix="sqs-") as folder, sqs_server() as endpoint:
        bare = Settings(home=Path(folder), s3=S3(region="us-east-1"), ingestion=Ingestion(queue_endpoint_url=endpoint))
        client = SQSResource.of(bare).get_client()
        attributes = {"VisibilityTimeout": "600"}
        urls = [
            client.create_queue(QueueName=name, Attributes=attributes)["QueueUrl"]
            for name in ("events", "dead-letters", "stock")
        ]
        ingestion = Ingestion(
            queue_url=urls[0],
            dead_letter_url=urls[1],
            queue_endpoint_url=endpoint,
            max_messages_per_tick=arguments.wave,  # so that a tick ends as one of a loaded queue does
        )
        library = Library(bare.model_copy(update={"ingestion": ingestion}))
        instance = DagsterInstance.from_config(str(prepare_environment(library)))
        instance.add_dynamic_partitions("warm-up", ["1"])
        console.print(f"making {arguments.events} messages")
        made = traffic(arguments.events)
        console.print("sensor")
        measured = sensor(library, client, instance, made, arguments.wave)
        dead = verify(library, client, instance, made, urls)
        figures: dict[str, Any] = {
            "messages": measured.messages,
            "events": measured.events,
            "registered": measured.new,
            "duplicates": measured.duplicates,
            "removed": measured.removed,
            "dead_letters": dead,
            "ticks": measured.ticks,
            "wave": arguments.wave,
            "wall_s": round(measured.wall_s, 1),
            **{f"{step}_s": round(seconds, 1) for step, seconds in measured.seconds.items()},
            "events_per_s": round(measured.events / measured.wall_s),
        }
        own = measured.seconds["register"] + measured.seconds["partitions"]
        figures["events_per_s_without_sqs"] = round(measured.events / own)
        if arguments.stock:
            console.print("stock")
            seconds = stock(library, client, instance, urls[2], arguments.stock)
            figures["stock_messages"] = arguments.stock
            figures["stock_events_per_s"] = round(arguments.stock / seconds, 1)
            figures["ratio"] = round(measured.events / measured.wall_s / (arguments.stock / seconds), 1)
        figures["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        instance.dispose()
        library.close()
    for name, value in figures.items():
        print(f"{name:>26}  {value}")
    versions = {name: version(name) for name in ("media-assets", "dagster", "boto3", "moto")}
    print(json.dumps({"name": "sqs", **figures, "python": platform.python_version(), "versions": versions}))


if __name__ == "__main__":
    main()
