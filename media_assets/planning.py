"""Planning: which items a group of stages still has to work on, from records alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from media_assets.stage import MediaItem, Stage
from media_assets.versions import item_version
from resources.errors import UpstreamFailed
from resources.outcomes import Outcome, Status

Records = Mapping[tuple[str, str], Outcome]


def pending(
    items: Iterable[MediaItem], stages: Sequence[Stage[Any, Any]], records: Records, now: datetime | None = None
) -> list[str]:
    """IDs of items for which some stage has no settled outcome at its current version.

    With `now`, failures whose retry is not due yet are left out; without, every retryable one counts.
    """
    return [item.media_id for item in items if _is_pending(item, stages, records, now)]


def _is_pending(item: MediaItem, stages: Sequence[Stage[Any, Any]], records: Records, now: datetime | None) -> bool:
    return any(not _settled(item, stage, records, now) for stage in stages)


def _settled(item: MediaItem, stage: Stage[Any, Any], records: Records, now: datetime | None) -> bool:
    record = records.get((item.media_id, stage.name))
    if record is None:
        return False
    inputs = [records.get((item.media_id, name)) for name in stage.inputs]
    ready = all(source is not None and source.status.done for source in inputs)
    contents = [source.content if source and source.status.done else "" for source in inputs]
    if record.version != item_version(stage, item, contents):
        return False
    if record.error_class == UpstreamFailed.code:
        return not ready
    if record.status is Status.RETRYABLE:
        return now is not None and record.retry_at is not None and record.retry_at.astimezone(UTC) > now
    return record.status is not Status.RUNNING
