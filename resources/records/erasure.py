"""Erasing media items: the tombstone, their records, the lines of logs that name them, and the record of the purge.

Every function may be called again after a crash: what is gone already is no error.
"""

from __future__ import annotations

import getpass
import json
import os
import re
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import sqlalchemy as sa

from resources.files.local import replacing
from resources.records.database import LOCK_NAMESPACE, Database
from resources.records.outcomes import PURGED
from resources.records.tables import outcome_history, outcomes, purges, uploads

Step = Literal["begun", "erased", "incomplete"]
MEDIA = "media"


@dataclass(frozen=True, slots=True)
class Subject:
    """An upload to purge. `sha256` is known as long as its `media` outcome is there."""

    media_id: str
    uri: str
    state: str
    sha256: str | None = None


@dataclass(frozen=True, slots=True)
class Twin:
    """Another upload that holds the same bytes as `of`, or whose tables were copied from it or to it."""

    media_id: str
    uri: str
    state: str
    of: str


def mention(media_ids: Sequence[str]) -> re.Pattern[str]:
    """Matches any of these media IDs where it stands on its own."""
    return re.compile(rf"(?<![a-z0-9-])(?:{'|'.join(map(re.escape, media_ids))})(?![a-z0-9-])")


class Eraser:
    """The database's part of a purge."""

    def __init__(self, database: Database) -> None:
        self._engine = database.engine

    def subjects(self, media_ids: Sequence[str]) -> list[Subject]:
        """The uploads among `media_ids`, in their order, whatever their state."""
        content = sa.select(outcomes.c.content).where(
            outcomes.c.media_id == uploads.c.media_id, outcomes.c.asset == MEDIA, outcomes.c.content != ""
        )
        query = sa.select(uploads.c.media_id, uploads.c.uri, uploads.c.state, content.scalar_subquery()).where(
            uploads.c.media_id.in_(media_ids)
        )
        with self._engine.connect() as connection:
            rows = {row[0]: row for row in connection.execute(query)}
        return [
            Subject(key, rows[key][1], rows[key][2], rows[key][3] and rows[key][3].rsplit(":", 1)[-1])
            for key in dict.fromkeys(media_ids)
            if key in rows
        ]

    def twins(self, media_ids: Sequence[str]) -> list[Twin]:
        """Uploads not among `media_ids`, and not purged, that hold the same bytes as one of them."""
        query = sa.text(
            "select u.media_id, u.uri, u.state, min(o.of) from ("
            " select b.media_id, a.media_id as of from outcomes a join outcomes b"
            " on b.asset = 'media' and b.content = a.content"
            " where a.media_id = any(:ids) and a.asset = 'media' and a.content <> ''"
            " union select media_id, copied_from from outcomes where copied_from = any(:ids)"
            " union select copied_from, media_id from outcomes where media_id = any(:ids) and copied_from is not null"
            ") o join uploads u using (media_id)"
            " where u.state <> 'purged' and u.media_id <> all(:ids) group by 1, 2, 3 order by 1"
        )
        with self._engine.connect() as connection:
            return [Twin(*row) for row in connection.execute(query, {"ids": list(media_ids)})]

    def begin(self, media_ids: Sequence[str]) -> None:
        """Turn the uploads into tombstones and note who did it; from then on nothing works on them or serves them.

        Waits for claims that are being granted at this moment.
        """
        with self._engine.begin() as connection:
            connection.execute(sa.text("select pg_advisory_xact_lock(:space, 1)"), {"space": LOCK_NAMESPACE})
            values = {"plan": None, "due_at": None, "batch_id": None, "changed_at": sa.func.clock_timestamp()}
            connection.execute(
                sa.update(uploads)
                .where(uploads.c.media_id.in_(media_ids), uploads.c.state != PURGED)
                .values(state=PURGED, **values)
            )
            _note(connection, media_ids, "begun", {})

    def unfinished(self) -> list[str]:
        """Items whose purge was begun and not brought to its end."""
        query = sa.text(
            "select media_id from (select distinct on (media_id) media_id, step from purges"
            " order by media_id, id desc) last where step <> 'erased' order by media_id"
        )
        with self._engine.connect() as connection:
            return list(connection.execute(query).scalars())

    def records(self, media_ids: Sequence[str]) -> dict[str, int]:
        """Delete outcome records and their history; returns how many rows of each."""
        # In this order: a worker that commits at this moment holds its outcome, and its history row is there after it.
        # It locks several in the order of their keys, and so does this.
        key = (outcomes.c.media_id, outcomes.c.asset)
        held = sa.select(*key).where(outcomes.c.media_id.in_(media_ids)).order_by(*key).with_for_update()
        with self._engine.begin() as connection:
            connection.execute(held)
            return {
                table.name: connection.execute(sa.delete(table).where(table.c.media_id.in_(media_ids))).rowcount
                for table in (outcomes, outcome_history)
            }

    def finish(self, media_ids: Sequence[str], step: Step, counts: Mapping[str, int]) -> None:
        """Note how the purge ended, with counts alone."""
        with self._engine.begin() as connection:
            _note(connection, media_ids, step, counts)


def _note(connection: sa.Connection, media_ids: Sequence[str], step: Step, counts: Mapping[str, int]) -> None:
    who = {"os_user": _user(), "host": socket.gethostname(), "step": step, "counts": json.dumps(dict(counts))}
    connection.execute(sa.insert(purges), [{"media_id": media_id, **who} for media_id in media_ids])


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container may run as a number without a name
        return f"uid {os.getuid()}"


def erase_log_lines(folder: Path, media_ids: Sequence[str]) -> int:
    """Drop the lines that name an item from the text files below `folder`; returns how many."""
    named = re.compile(mention(media_ids).pattern.encode())
    return sum(_erase_lines(path, named) for path in text_files(folder))


def text_files(folder: Path) -> Iterator[Path]:
    """Regular files below `folder`, links not followed."""
    for parent, _, names in os.walk(folder):
        for name in names:
            path = Path(parent) / name
            if path.is_file() and not path.is_symlink():
                yield path


def erase_server_log(path: Path, media_ids: Sequence[str]) -> int:
    """`erase_log_lines` for the log of the embedded database server, which keeps its file open for appending."""
    if not path.is_file():
        return 0
    named = re.compile(mention(media_ids).pattern.encode())
    with path.open("r+b") as file:
        lines = file.readlines()
        kept = [line for line in lines if not named.search(line)]
        if len(kept) < len(lines):
            file.seek(0)
            file.writelines(kept)
            file.truncate()
    return len(lines) - len(kept)


def _erase_lines(path: Path, named: re.Pattern[bytes]) -> int:
    with path.open("rb") as source:
        dropped = sum(1 for line in source if named.search(line))
    if not dropped:
        return 0
    with replacing(path) as temporary, path.open("rb") as source, temporary.open("wb") as target:
        target.writelines(line for line in source if not named.search(line))
    return dropped
