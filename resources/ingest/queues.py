"""An SQS queue: taken from by several receivers at once, and emptied of exactly what was dealt with."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from resources.errors import MediaError, printable
from resources.records.rejected import Rejected

RECEIVERS = 8
_PER_CALL = 10  # SQS' own limit for receiving, deleting and sending
_POLL_S = 1
_DELETE_ROUNDS = 3
_CHUNK_BYTES = 64 * 2**20
_SEND_BYTES = 240 * 1024  # of one call and of one body; SQS' limit was 256 KiB, attributes included, for long
T = TypeVar("T")


class QueueUnavailable(MediaError):
    """A queue does not exist, refuses access, cannot be reached or is set up so that it cannot be used."""

    code, retryable, http_status = "queue_unavailable", True, 503
    remedy = "Check ingestion.queue_url, s3.region, the credentials and the network; nothing was lost."


@dataclass(frozen=True, slots=True)
class Message:
    """A received message. `receipt` deletes this very delivery of it."""

    id: str
    body: str
    receipt: str


@dataclass(frozen=True, slots=True)
class Received:
    """Messages taken together, and whether the queue had no more."""

    messages: list[Message]
    is_last: bool


class Queue:
    """One queue at `url` over a boto3 SQS client, whose calls are safe in several threads.

    Every method raises QueueUnavailable with what to do when the queue does not answer as it should.
    """

    def __init__(self, client: Any, url: str) -> None:
        self._client = client
        self.url = url

    def visibility_s(self) -> int:
        """How long a received message stays hidden from other receivers, seconds."""
        return int(self._attribute("VisibilityTimeout"))

    def backlog(self) -> int:
        """About how many messages wait to be received."""
        return int(self._attribute("ApproximateNumberOfMessages"))

    def receive(self, limit: int, deadline: float, patience_s: int = _POLL_S) -> Received:
        """Up to `limit` messages, until the queue is empty or `deadline` (of `time.monotonic`).

        An empty queue costs two calls: a short poll, which may miss messages, and one long poll: of `patience_s`
        (whole seconds, 20 at most) while there are no messages at all, of a second after some.
        """
        intake = _Intake(limit, deadline, patience_s)
        self._pull(intake, alone=True)
        if intake.is_open():
            self._each([intake] * RECEIVERS, self._pull)
        return Received(intake.messages, intake.found_nothing)

    def delete(self, messages: Sequence[Message]) -> list[Message]:
        """Delete these deliveries; returns those that SQS refused three times and will deliver again."""
        left = list(messages)
        for _ in range(_DELETE_ROUNDS):
            if not left:
                break
            batches = [left[start : start + _PER_CALL] for start in range(0, len(left), _PER_CALL)]
            left = [message for refused in self._each(batches, self._delete) for message in refused]
        return left

    def send_rejected(self, rejected: Sequence[Rejected]) -> set[str]:
        """Send messages on with their reason and original ID as attributes; returns the IDs SQS has taken.

        A body above 240 KiB is cut, and has an attribute `cut` then.
        """
        batches: list[list[dict[str, Any]]] = []
        size = 0
        for message in rejected:
            entry, weight = _entry(message)
            if not batches or len(batches[-1]) == _PER_CALL or size + weight > _SEND_BYTES:
                batches.append([])
                size = 0
            batches[-1].append(entry)
            size += weight
        return {name for ids in self._each(batches, self._send) for name in ids}

    def _attribute(self, name: str) -> str:
        with self._reported():
            answer = self._client.get_queue_attributes(QueueUrl=self.url, AttributeNames=[name])
            value: str = answer["Attributes"][name]
            return value

    def _pull(self, intake: _Intake, alone: bool = False) -> None:
        """Receive until the intake is closed; the receiver that finds nothing polls once more, then closes it.

        One that is `alone` ends with the first full answer: there is enough for more receivers.
        """
        while asked := intake.reserve():
            try:
                found = self._receive(asked, 0)
                if not found:
                    if not intake.last_look.acquire(blocking=False):
                        intake.give_back(asked, found)
                        return  # another receiver is looking
                    try:
                        found = self._receive(asked, _POLL_S if intake.messages else intake.patience_s)
                    finally:
                        intake.last_look.release()
                    if not found:
                        intake.found_nothing = True
                        intake.close()
            except BaseException:
                intake.close()
                raise
            intake.give_back(asked, found)
            if alone and len(found) == asked:
                return

    def _receive(self, limit: int, wait_s: int) -> list[Message]:
        with self._reported():
            answer = self._client.receive_message(QueueUrl=self.url, MaxNumberOfMessages=limit, WaitTimeSeconds=wait_s)
        return [Message(m["MessageId"], m["Body"], m["ReceiptHandle"]) for m in answer.get("Messages", ())]

    def _delete(self, messages: Sequence[Message]) -> list[Message]:
        entries = [{"Id": str(place), "ReceiptHandle": m.receipt} for place, m in enumerate(messages)]
        with self._reported():
            answer = self._client.delete_message_batch(QueueUrl=self.url, Entries=entries)
        return [messages[int(refused["Id"])] for refused in answer.get("Failed", ())]

    def _send(self, entries: Sequence[dict[str, Any]]) -> list[str]:
        numbered = [{"Id": str(place), **entry} for place, entry in enumerate(entries)]
        with self._reported():
            answer = self._client.send_message_batch(QueueUrl=self.url, Entries=numbered)
        taken = [entries[int(done["Id"])] for done in answer.get("Successful", ())]
        return [entry["MessageAttributes"]["source_message_id"]["StringValue"] for entry in taken]

    @staticmethod
    def _each(inputs: Sequence[Any], call: Callable[[Any], T]) -> list[T]:
        """`call` on every input, in as many threads as there are receivers; the first error is raised."""
        if len(inputs) < 2:
            return [call(value) for value in inputs]
        with ThreadPoolExecutor(RECEIVERS, thread_name_prefix="sqs") as threads:
            return list(threads.map(call, inputs))

    @contextmanager
    def _reported(self) -> Iterator[None]:
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            yield
        except ClientError as error:
            raise _refused(self.url, str(error.response.get("Error", {}).get("Code", "unknown"))) from error
        except BotoCoreError as error:
            raise unreachable(self.url, error) from error


class _Intake:
    """What the receivers of one call have taken together, and whether they go on."""

    def __init__(self, limit: int, deadline: float, patience_s: int) -> None:
        self.messages: list[Message] = []
        self.patience_s = patience_s
        self.found_nothing = False
        self.last_look = threading.Lock()
        self._lock = threading.Lock()
        self._free = limit
        self._bytes = _CHUNK_BYTES
        self._deadline = deadline
        self._closed = False

    def reserve(self) -> int:
        """How many messages to ask for now; 0 means stop."""
        with self._lock:
            asked = min(_PER_CALL, self._free) if self.is_open() else 0
            self._free -= asked
            return asked

    def give_back(self, asked: int, found: Sequence[Message]) -> None:
        """Hand in what was received; what was asked for in vain is free again."""
        with self._lock:
            self._free += asked - len(found)
            self._bytes -= sum(len(message.body) for message in found)
            self.messages.extend(found)

    def is_open(self) -> bool:
        """Whether more is wanted: there is room, time and, as far as known, something to receive."""
        in_time = time.monotonic() < self._deadline
        return in_time and not self._closed and self._free > 0 and self._bytes > 0

    def close(self) -> None:
        """Nobody asks any more."""
        self._closed = True


def unreachable(url: str, error: Exception) -> QueueUnavailable:
    """What boto3 itself raised before SQS could answer, as an error with a remedy."""
    kind = type(error).__name__
    if kind in ("NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "TokenRetrievalError"):
        return QueueUnavailable(
            f"There are no AWS credentials for {printable(url)} ({kind}).",
            "Give this process a role, a profile or AWS' variables; nothing was lost.",
        )
    if kind == "NoRegionError":
        return QueueUnavailable(f"The AWS region of {printable(url)} is not known.", "Set s3.region.")
    return QueueUnavailable(f"The queue {printable(url)} cannot be reached ({kind}).")


def _refused(url: str, code: str) -> QueueUnavailable:
    shown = printable(code, 80)
    if code.endswith(("NonExistentQueue", "QueueDoesNotExist")):
        return QueueUnavailable(
            f"The queue {printable(url)} does not exist ({shown}).",
            "Create it, or correct its URL, region and endpoint in the settings.",
        )
    if any(
        word in code for word in ("AccessDenied", "Token", "Signature", "Forbidden", "AuthFailure", "OptInRequired")
    ):
        return QueueUnavailable(
            f"The queue {printable(url)} refuses access ({shown}).",
            "Check the credentials, and give them the permissions of the runbook's section on S3 events.",
        )
    return QueueUnavailable(f"The queue {printable(url)} answered with the error {shown}.")


def _entry(message: Rejected) -> tuple[dict[str, Any], int]:
    """One entry of a send call, and about how many bytes it counts for."""
    reason = printable(message.reason)
    data = message.body.encode("utf-8", "backslashreplace")
    told = {"reason": reason, "source_message_id": message.message_id}
    if len(data) > _SEND_BYTES:
        told["cut"] = "true"
    body = data[:_SEND_BYTES].decode("utf-8", "ignore")
    attributes = {name: {"DataType": "String", "StringValue": value} for name, value in told.items()}
    return {"MessageBody": body, "MessageAttributes": attributes}, len(body.encode()) + 4 * len(reason) + 200
