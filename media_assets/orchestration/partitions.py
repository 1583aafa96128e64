"""Partitions: one per media ID, or one per bucket of them; and the one place that reads a run's choice of them."""

from __future__ import annotations

from collections.abc import Sequence

from dagster import (
    AssetExecutionContext,
    Config,
    DagsterInstance,
    DynamicPartitionsDefinition,
    PartitionsDefinition,
    StaticPartitionsDefinition,
)
from pydantic import Field

from media_assets.library.buckets import bucket_of, key
from resources.settings import Settings

MEDIA = "media"
media_partitions = DynamicPartitionsDefinition(name=MEDIA)
# Names of Dagster's own tags; it has no public constant for them.
ASSET_PARTITION_RANGE_START_TAG = "dagster/asset_partition_range_start"
ASSET_PARTITION_RANGE_END_TAG = "dagster/asset_partition_range_end"
HOST_TAG = "media/host"
"""Machine of a run that no launcher started."""
_CHUNK = 5000  # one huge insert fails in the instance's storage


class Batch(Config):  # type: ignore[misc]
    """What a run works on when its partitions do not say it."""

    keys: list[str] = Field(default_factory=list, description="media IDs; they win over the run's own partition")
    careful: bool = Field(default=False, description="one item at a time: a crash then counts against that one alone")


def partitions_of(settings: Settings) -> PartitionsDefinition[str]:
    """Partitions of the per-media assets."""
    if settings.partitions == "media":
        return media_partitions
    return StaticPartitionsDefinition([key(bucket) for bucket in range(settings.index.buckets)])


def partition_of(media_id: str, settings: Settings) -> str:
    """The partition an item's assets are in."""
    return media_id if settings.partitions == "media" else key(bucket_of(media_id, settings.index.buckets))


def batch_keys(context: AssetExecutionContext, config: Batch) -> list[str]:
    """Keys of the run: the media IDs in its config, else its partition range or its partition."""
    if config.keys:
        return list(dict.fromkeys(config.keys))
    # A run over a range has no partition key of its own.
    partitioned = context.has_partition_key or context.has_partition_key_range
    return list(context.partition_keys) if partitioned else []


def explicit_batch_tags(keys: Sequence[str], settings: Settings) -> dict[str, str]:
    """Tags of a run whose media IDs are in its config.

    Dagster looks up the versions of upstream partitions before every step and fails in a run without any
    partition, so the run names the partition of its first item as its range.
    """
    first = partition_of(keys[0], settings)
    return range_tags(first, first)


def range_tags(first: str, last: str) -> dict[str, str]:
    """Tags of a run over a range of partitions."""
    return {ASSET_PARTITION_RANGE_START_TAG: first, ASSET_PARTITION_RANGE_END_TAG: last}


def add_partitions(instance: DagsterInstance, settings: Settings, media_ids: Sequence[str]) -> None:
    """Make these items partitions, in chunks; those that are partitions already are left as they are.

    Where partitions are buckets there is nothing to add.
    """
    if settings.partitions != "media":
        return
    for start in range(0, len(media_ids), _CHUNK):
        instance.add_dynamic_partitions(MEDIA, list(media_ids[start : start + _CHUNK]))
