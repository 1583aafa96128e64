"""Planning: what a group of stages still has to do for an item, judged from its records alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from media_assets.engine.contract import MediaItem, Stage
from media_assets.engine.versions import item_version
from resources.errors import ModelTimeout, UpstreamFailed
from resources.records.outcome import Outcome, Status

Records = Mapping[tuple[str, str], Outcome]


class Need(StrEnum):
    """What one stage of one item needs."""

    NOTHING = "nothing"
    NEW = "new"
    STALE = "stale"
    RETRY = "retry"
    WAITING = "waiting"
    RUNNING = "running"

    @property
    def is_due(self) -> bool:
        """Whether a run would work on it now."""
        return self in (Need.NEW, Need.STALE, Need.RETRY)


@dataclass(frozen=True, slots=True)
class Judgement:
    """What a group still has to do for an item.

    `need` is the most urgent of its stages; `due_at` the first retry when all that is left must wait for
    one; `runs` are the runs that hold stages in flight; `hung` says that a call hung in one that is to be tried again.
    """

    need: Need
    due_at: datetime | None = None
    runs: frozenset[str] = frozenset()
    hung: bool = False


def pending(items: Iterable[MediaItem], stages: Sequence[Stage[Any, Any]], records: Records) -> list[str]:
    """IDs of items for which some stage has no settled outcome at its current version; retries count at once."""
    done = (Need.NOTHING,)
    return [item.media_id for item in items if any(need_of(item, stage, records)[0] not in done for stage in stages)]


def to_do(items: Iterable[MediaItem], stages: Sequence[Stage[Any, Any]], records: Records) -> Iterator[tuple[str, str]]:
    """(media ID, asset) of all that is to be made by `stages`, which are in their order, or follows from it."""
    for item in items:
        made: set[str] = set()
        for stage in stages:
            if made.intersection(stage.inputs) or need_of(item, stage, records)[0] is not Need.NOTHING:
                made.add(stage.name)
                yield item.media_id, stage.name


def suspects(records: Records, is_dead: Callable[[str], bool]) -> set[str]:
    """IDs of items that were in flight when their run died, or whose call hung: they go on one at a time."""
    return {
        media_id
        for (media_id, _), record in records.items()
        if (record.status is Status.RUNNING and is_dead(record.run_id or ""))
        or (record.status is Status.RETRYABLE and record.error_class == ModelTimeout.code)
    }


def judge(item: MediaItem, stages: Sequence[Stage[Any, Any]], records: Records, now: datetime) -> Judgement:
    """What the group of `stages` has to do for one item at `now`."""
    needs = [need_of(item, stage, records, now) for stage in stages]
    runs = frozenset(record.run_id or "" for need, record in needs if need is Need.RUNNING and record)
    if runs:
        return Judgement(Need.RUNNING, runs=runs)
    for need in (Need.RETRY, Need.STALE, Need.NEW):
        if any(found is need for found, _ in needs):
            tried = [record for found, record in needs if found is Need.RETRY and record]
            return Judgement(need, hung=any(record.error_class == ModelTimeout.code for record in tried))
    times = [record.retry_at for need, record in needs if need is Need.WAITING and record and record.retry_at]
    return Judgement(Need.WAITING, min(times)) if times else Judgement(Need.NOTHING)


def need_of(
    item: MediaItem, stage: Stage[Any, Any], records: Records, now: datetime | None = None
) -> tuple[Need, Outcome | None]:
    """What one stage needs, and its record. With `now`, a retry that is not due yet waits."""
    record = records.get((item.media_id, stage.name))
    if record is None:
        return Need.NEW, None
    if record.status is Status.RUNNING:
        return Need.RUNNING, record
    inputs = [records.get((item.media_id, name)) for name in stage.inputs]
    ready = all(source is not None and source.status.done for source in inputs)
    contents = [source.content if source and source.status.done else "" for source in inputs]
    if record.version != item_version(stage, item, contents):
        return Need.STALE, record
    if record.error_class == UpstreamFailed.code:
        return (Need.RETRY if ready else Need.NOTHING), record
    if record.status is Status.RETRYABLE:
        waits = now is not None and record.retry_at is not None and record.retry_at.astimezone(UTC) > now
        return (Need.WAITING if waits else Need.RETRY), record
    return Need.NOTHING, record
