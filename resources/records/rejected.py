"""Messages that could not be understood: kept with their reason, once each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy.dialects.postgresql import insert

from resources.errors import printable
from resources.records.database import Database
from resources.records.tables import rejected_messages

BODY_BYTES = 16 * 1024


@dataclass(frozen=True, slots=True)
class Rejected:
    """A message of a source, by the source's own ID, and why it was not understood."""

    message_id: str
    reason: str
    body: str


class RejectedMessages:
    """Writes the `rejected_messages` table."""

    def __init__(self, database: Database) -> None:
        self._engine = database.engine

    def keep(self, source: str, rejected: Sequence[Rejected]) -> None:
        """Keep these messages, the first 16 KiB of each body; one that is there already stays as it is."""
        if not rejected:
            return
        rows = [
            {
                "source": source,
                "message_id": message.message_id,
                "reason": printable(message.reason),
                "body": _storable(message.body),
            }
            for message in rejected
        ]
        with self._engine.begin() as connection:
            connection.execute(insert(rejected_messages).values(rows).on_conflict_do_nothing())


def _storable(body: str) -> str:
    """`body` as Postgres takes it: valid UTF-8 without NUL, cut at BODY_BYTES."""
    data = body.replace("\0", "\\u0000").encode("utf-8", "backslashreplace")
    return data[:BODY_BYTES].decode("utf-8", "ignore")
