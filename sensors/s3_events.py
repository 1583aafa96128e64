"""s3_event_sensor: S3 event notifications from an SQS queue become registered uploads and partitions."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import dagster as dg
import sqlalchemy as sa

from media_assets.orchestration.partitions import add_partitions
from resources.errors import DatabaseUnavailable, MediaError
from resources.faults import fault
from resources.ingest.object_versions import VersionedRegistry
from resources.ingest.queues import Message, Queue, QueueUnavailable
from resources.library import Library
from resources.records.rejected import Rejected, RejectedMessages
from resources.settings import Settings
from sensors.intervals import every, stay_s
from sensors.s3_messages import SOURCE, Events, NotUnderstood, parse

_INTERVAL_S = 5
_CHUNK = 500  # messages per transaction of the registry; large enough for it, small enough to overlap
# A message that was not understood, and its deliveries.
_Rejection: TypeAlias = tuple[Rejected, list[Message]]
_COUNTERS = ("messages", "events", "new", "duplicates", "removed", "ignored", "rejected", "left_to_redelivery")


@dataclass
class Drained:
    """What one tick did with the queue: counts, and seconds by step."""

    messages: int = 0
    events: int = 0
    new: int = 0
    duplicates: int = 0
    removed: int = 0
    ignored: int = 0
    rejected: int = 0
    left_to_redelivery: int = 0
    backlog: int = 0
    wall_s: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @property
    def summary(self) -> str:
        """One line of counts."""
        rate = self.events / self.wall_s if self.wall_s else 0.0
        steps = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.seconds.items())
        return (
            f"{self.messages} messages, {self.events} events: {self.new} new, {self.duplicates} duplicates,"
            f" {self.removed} removed; {self.ignored} ignored, {self.rejected} rejected;"
            f" about {self.backlog} left in the queue; {rate:.0f} events/s ({steps})"
        )

    @contextmanager
    def timed(self, step: str) -> Iterator[None]:
        """Add the wall seconds of the block to `step`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[step] = self.seconds.get(step, 0.0) + time.perf_counter() - start


def drain(library: Library, client: Any, instance: dg.DagsterInstance) -> Drained:
    """Take what the queue has, within the tick's budget of messages and seconds.

    One chunk is received while the one before is dealt with. Per chunk: the registry commits, then partitions
    are added, then the messages are deleted. Dying in between makes SQS deliver them again, which changes
    nothing but completes what was missing. Raises QueueUnavailable, DatabaseUnavailable; nothing is lost then.
    """
    ingestion = library.settings.ingestion
    if ingestion.queue_url is None:
        raise ValueError("ingestion.queue_url is not set")
    with _database_errors():
        # It must answer first: a delivery in vain counts towards the queue's redrive policy.
        library.database.engine.connect().close()
    start = time.monotonic()
    queue = Queue(client, ingestion.queue_url)
    done = Drained()
    deadline = start + _budget_s(queue.visibility_s(), ingestion.tick_budget_s, done.warnings)
    dead_letters = Queue(client, ingestion.dead_letter_url) if ingestion.dead_letter_url else None
    tick = _Tick(library, instance, queue, dead_letters, done)
    most = ingestion.max_messages_per_tick
    with ThreadPoolExecutor(1, thread_name_prefix="sqs-ahead") as ahead:
        patience_s = max(1, int(stay_s(instance)))
        coming = ahead.submit(queue.receive, min(_CHUNK, most), deadline, patience_s)
        taken = 0
        while True:
            with done.timed("receive"):  # what of it is not hidden behind the chunk before
                received = coming.result()
            taken += len(received.messages)
            goes_on = not received.is_last and taken < most and time.monotonic() < deadline
            if goes_on:
                coming = ahead.submit(queue.receive, min(_CHUNK, most - taken), deadline)
            if received.messages:
                with _database_errors():
                    tick.handle(received.messages)
            if not goes_on:
                break
    done.backlog = queue.backlog()
    done.wall_s = time.monotonic() - start
    if tick.dead_letter_error:
        raise tick.dead_letter_error
    return done


@contextmanager
def _database_errors() -> Iterator[None]:
    try:
        yield
    except sa.exc.OperationalError as error:
        raise DatabaseUnavailable(
            f"The database does not answer ({type(error.orig).__name__}); SQS delivers the messages again."
        ) from error


def _budget_s(visibility_s: int, wanted_s: float, warnings: list[str]) -> float:
    """Seconds of receiving after which what was received can still be dealt with before it is visible again."""
    if visibility_s >= 2 * wanted_s:
        return wanted_s
    if visibility_s < 1:
        raise QueueUnavailable(
            "The queue's visibility timeout is 0: its messages would be delivered without end.",
            f"Set its VisibilityTimeout to at least {2 * wanted_s:.0f} seconds.",
        )
    warnings.append(
        f"The queue's visibility timeout of {visibility_s} s is less than twice ingestion.tick_budget_s"
        f" ({wanted_s:g} s); ticks are shortened to {visibility_s / 2:g} s. Raise the timeout."
    )
    return visibility_s / 2


class _Tick:
    """Deals with the chunks of one tick."""

    def __init__(
        self,
        library: Library,
        instance: dg.DagsterInstance,
        queue: Queue,
        dead_letters: Queue | None,
        done: Drained,
    ) -> None:
        self._registry = library.registry
        self._versions = VersionedRegistry(library.database, library.registry)
        self._rejections = RejectedMessages(library.database)
        self._instance = instance
        self._settings = library.settings
        self._queue = queue
        self._dead_letters = dead_letters
        self._done = done
        self.dead_letter_error: MediaError | None = None

    def handle(self, messages: Sequence[Message]) -> None:
        """Register, reject and delete one chunk."""
        done = self._done
        events: list[Events] = []
        understood: list[Message] = []
        rejected: dict[str, _Rejection] = {}
        for message in messages:
            try:
                told = parse(message.body)
            except NotUnderstood as error:
                told = Events(rejected=(error.message,))
            events.append(told)
            if told.rejected:
                # A message can be delivered twice within a chunk.
                entry: _Rejection = (Rejected(message.id, told.reason, message.body), [])
                rejected.setdefault(message.id, entry)[1].append(message)
            else:
                understood.append(message)
        self._register(events)
        done.messages += len(messages)
        self._delete(understood)
        if rejected:
            self._reject(rejected)

    def _register(self, events: Sequence[Events]) -> None:
        done = self._done
        found = [upload for told in events for upload in told.uploads]
        gone = [removal for told in events for removal in told.removals]
        versions_gone = [removal for told in events for removal in told.version_removals]
        with done.timed("register"):
            registered = self._versions.register(found, gone, versions_gone)
        fault("s3_events.registered")
        with done.timed("partitions"):
            # Not only the new ones: a tick that died here before has registered them without a partition.
            states = self._registry.known(registered.media_ids)
            live = [media_id for media_id in registered.media_ids if states.get(media_id) == "live"]
            add_partitions(self._instance, self._settings, live)
        fault("s3_events.partitioned")
        done.events += len(found) + len(gone) + len(versions_gone)
        done.new += len(registered.new)
        done.duplicates += len(found) - len(registered.new)
        done.removed += len(registered.removed)
        done.ignored += sum(told.ignored for told in events)

    def _reject(self, rejected: dict[str, _Rejection]) -> None:
        """Keep a row of each, send it on, and only then delete it."""
        done = self._done
        with done.timed("reject"):
            self._rejections.keep(SOURCE, [message for message, _ in rejected.values()])
            done.rejected += len(rejected)
            settled = set(rejected) if self._dead_letters is None else self._send_on(rejected, self._dead_letters)
        fault("s3_events.rejected")
        left = [message for name, (_, messages) in rejected.items() if name not in settled for message in messages]
        self._count_left(left)
        self._delete([message for name in settled for message in rejected[name][1]])

    def _send_on(self, rejected: dict[str, _Rejection], dead_letters: Queue) -> set[str]:
        if self.dead_letter_error:
            return set()
        try:
            return dead_letters.send_rejected([message for message, _ in rejected.values()])
        except QueueUnavailable as error:
            # The good messages of the chunks to come are still dealt with; then the tick fails with this.
            self.dead_letter_error = error
            return set()

    def _delete(self, messages: Sequence[Message]) -> None:
        with self._done.timed("delete"):
            self._count_left(self._queue.delete(messages))

    def _count_left(self, messages: Sequence[Message]) -> None:
        self._done.left_to_redelivery += len(messages)


def build_s3_event_sensor(settings: Settings) -> dg.SensorDefinition:
    """The sensor of one installation; it runs by itself when `ingestion.queue_url` is set."""
    is_set = settings.ingestion.queue_url is not None

    @dg.sensor(
        name="s3_event_sensor",
        minimum_interval_seconds=every(_INTERVAL_S),
        default_status=dg.DefaultSensorStatus.RUNNING if is_set else dg.DefaultSensorStatus.STOPPED,
        required_resource_keys={"media"},
        description="Registers uploads and removals that S3 tells through SQS. Requests no runs.",
    )
    def s3_event_sensor(context: dg.SensorEvaluationContext) -> dg.SkipReason:
        library: Library = context.resources.media
        if library.settings.ingestion.queue_url is None:
            return dg.SkipReason("No queue to read: ingestion.queue_url is not set.")
        from sensors.sqs_resource import SQSResource

        client = SQSResource.of(library.settings).get_client()
        try:
            done = drain(library, client, context.instance)
        finally:
            client.close()
        _tell(context.log.warning, done)
        context.update_cursor(_counted(context.cursor, done))
        return dg.SkipReason(done.summary if done.messages else "The queue is empty.")

    return s3_event_sensor


def _tell(warn: Callable[[str], None], done: Drained) -> None:
    for text in done.warnings:
        warn(text)
    if done.rejected:
        warn(f"{done.rejected} messages were not understood; they are kept in rejected_messages with their reasons.")
    if done.left_to_redelivery:
        warn(f"{done.left_to_redelivery} messages could not be deleted or sent on; they are delivered again.")


def _counted(cursor: str | None, done: Drained) -> str:
    """The cursor: counters over all ticks, and nothing that a tick depends on."""
    before = json.loads(cursor) if cursor else {}
    return json.dumps({name: before.get(name, 0) + getattr(done, name) for name in _COUNTERS})
