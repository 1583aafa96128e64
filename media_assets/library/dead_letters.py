"""Dead letters: quarantined outcomes by root cause, what waits for them, and a fresh start for them.

An asset that could not be made because its input failed is no failure of its own: it is counted under the root cause,
and follows by itself once that is mended.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import groupby
from operator import itemgetter
from typing import Any

import sqlalchemy as sa

from media_assets.engine.contract import MediaItem, Stage
from media_assets.engine.versions import item_version
from resources.errors import UpstreamFailed, printable
from resources.library import Library
from resources.records.outcome import Outcome

_CHUNK = 1000  # items whose inputs are looked up at once
_BODY_CHARS = 200

Inputs = Mapping[str, Sequence[str]]
"""What each asset is made from."""


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """One quarantined outcome; `waiting` are the assets of its item that cannot be made before it."""

    media_id: str
    uri: str
    etag: str
    asset: str
    version: str
    error_class: str
    error: str
    at: datetime
    waiting: tuple[str, ...] = ()


@dataclass(slots=True)
class Group:
    """Dead letters of one error class and asset; `since` and `latest` are when they were quarantined."""

    error_class: str
    asset: str
    since: datetime
    latest: datetime
    items: int = 0
    waiting: Counter[str] = field(default_factory=Counter)
    examples: list[DeadLetter] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Rejected:
    """Messages of one source that could not be understood for the same reason; examples are (ID, start of body)."""

    source: str
    reason: str
    messages: int
    since: datetime
    latest: datetime
    examples: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Chosen:
    """Which dead letters are meant; empty means all. `changed`: whose code or model is another one by now."""

    media_ids: Collection[str] = ()
    assets: Collection[str] = ()
    error_classes: Collection[str] = ()
    changed: bool = False

    def __contains__(self, letter: DeadLetter) -> bool:
        return (
            (not self.media_ids or letter.media_id in self.media_ids)
            and (not self.assets or letter.asset in self.assets)
            and (not self.error_classes or letter.error_class in self.error_classes)
        )


def dead_letters(library: Library, stages: Sequence[Stage[Any, Any]], chosen: Chosen) -> Iterator[DeadLetter]:
    """Quarantined outcomes of live items, by media ID; those that merely wait for a failed input are not."""
    found = (letter for letter in roots(library.outcomes.failed(), _inputs(stages)) if letter in chosen)
    return _changed(library, stages, found) if chosen.changed else found


def roots(failed: Iterable[Mapping[str, Any]], inputs: Inputs) -> Iterator[DeadLetter]:
    """The root causes among failed records, which come in the order of their media IDs."""
    for _, records in groupby(failed, key=itemgetter("media_id")):
        by_asset = {row["asset"]: row for row in records}
        waiting: dict[str, list[str]] = {}
        for asset in by_asset:
            if (root := _root(asset, by_asset, inputs)) is not None:
                waiting.setdefault(root, []).append(asset)
        for asset, row in by_asset.items():
            if asset in waiting:
                followers = tuple(name for name in waiting[asset] if name != asset)
                yield DeadLetter(
                    row["media_id"],
                    row["uri"],
                    row["etag"],
                    asset,
                    row["version"],
                    row["error_class"] or "",
                    row["error"] or "",
                    row["updated_at"],
                    followers,
                )


def _root(asset: str, failed: Mapping[str, Mapping[str, Any]], inputs: Inputs) -> str | None:
    """The quarantined asset that `asset` fails for (itself, or the first of its inputs that leads to one)."""
    row = failed.get(asset)
    if row is None:
        return None
    if row["error_class"] != UpstreamFailed.code:
        return asset
    found = (_root(name, failed, inputs) for name in inputs.get(asset, ()))
    return next((root for root in found if root is not None), None)


def _changed(
    library: Library, stages: Sequence[Stage[Any, Any]], letters: Iterable[DeadLetter]
) -> Iterator[DeadLetter]:
    """Dead letters whose version would be another one if they were made now."""
    by_name = {stage.name: stage for stage in stages}
    chunk: list[DeadLetter] = []
    for letter in letters:
        chunk.append(letter)
        if len(chunk) == _CHUNK:
            yield from _outdated(library, by_name, chunk)
            chunk = []
    yield from _outdated(library, by_name, chunk)


def _outdated(
    library: Library, stages: Mapping[str, Stage[Any, Any]], letters: Sequence[DeadLetter]
) -> Iterator[DeadLetter]:
    records = library.outcomes.load(list({letter.media_id for letter in letters})) if letters else {}
    for letter in letters:
        stage = stages.get(letter.asset)
        if stage is not None and _version_now(stage, letter, records) not in (None, letter.version):
            yield letter


def _version_now(stage: Stage[Any, Any], letter: DeadLetter, records: Mapping[tuple[str, str], Outcome]) -> str | None:
    """The version the outcome would have now; None while an input is not there, so that nobody can say."""
    contents: list[str] = []
    for name in stage.inputs:
        record = records.get((letter.media_id, name))
        if record is None or not record.status.done:
            return None
        contents.append(record.content)
    return item_version(stage, MediaItem(letter.media_id, letter.uri, letter.etag), contents)


def grouped(letters: Iterable[DeadLetter], examples: int) -> list[Group]:
    """By error class and asset, the largest group first; of each the latest `examples`."""
    groups: dict[tuple[str, str], Group] = {}
    for letter in letters:
        key = (letter.error_class, letter.asset)
        group = groups.setdefault(key, Group(*key, since=letter.at, latest=letter.at))
        group.items += 1
        group.since, group.latest = min(group.since, letter.at), max(group.latest, letter.at)
        group.waiting.update(letter.waiting)
        group.examples = sorted([*group.examples, letter], key=lambda one: (one.at, one.media_id), reverse=True)
        del group.examples[examples:]
    return sorted(groups.values(), key=lambda group: (-group.items, group.error_class, group.asset))


def replay(library: Library, letters: Iterable[DeadLetter]) -> int:
    """A fresh start for these dead letters; returns how many. What waits for them follows by itself."""
    return library.outcomes.replay([(letter.media_id, letter.asset) for letter in letters])


_REJECTED = sa.text(
    """
    with ranked as (
        select source, reason, message_id, left(body, :chars) as body, id,
            count(*) over same as messages, min(at) over same as since, max(at) over same as latest,
            row_number() over (partition by source, reason order by id desc) as place
        from rejected_messages window same as (partition by source, reason)
    )
    select source, reason, message_id, body, messages, since, latest from ranked
    where place <= :examples order by messages desc, source, reason, id desc
    """
)


def rejected(library: Library, examples: int) -> list[Rejected]:
    """Messages of ingestion that nobody understood, by source and reason, the most frequent first."""
    with library.database.engine.connect() as connection:
        rows = connection.execute(_REJECTED, {"chars": _BODY_CHARS, "examples": examples}).all()
    return [
        Rejected(*key, tuple((row.message_id, printable(row.body, _BODY_CHARS)) for row in same))
        for key, same in groupby(rows, key=lambda row: (row.source, row.reason, row.messages, row.since, row.latest))
    ]


def _inputs(stages: Sequence[Stage[Any, Any]]) -> Inputs:
    return {stage.name: stage.inputs for stage in stages}
