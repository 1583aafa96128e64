"""Partitions: one per media ID; and the one place that reads a run's choice of them."""

from __future__ import annotations

from dagster import AssetExecutionContext, Config, DagsterInstance, DynamicPartitionsDefinition
from pydantic import Field

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


def batch_keys(context: AssetExecutionContext, config: Batch) -> list[str]:
    """Keys of the run: the list in its config, else its partition range or its partition."""
    if config.keys:
        return list(dict.fromkeys(config.keys))
    # A run over a range has no partition key of its own.
    partitioned = context.has_partition_key or context.has_partition_key_range
    return list(context.partition_keys) if partitioned else []


def explicit_batch_tags(keys: list[str]) -> dict[str, str]:
    """Tags of a run whose keys are in its config.

    Dagster looks up the versions of upstream partitions before every step and fails in a run without any
    partition, so the run names its first key as its range.
    """
    return range_tags(keys[0], keys[0])


def range_tags(first: str, last: str) -> dict[str, str]:
    """Tags of a run over a range of partitions."""
    return {ASSET_PARTITION_RANGE_START_TAG: first, ASSET_PARTITION_RANGE_END_TAG: last}


def add_partitions(instance: DagsterInstance, name: str, keys: list[str]) -> None:
    """Add dynamic partitions in chunks; those already there are left as they are."""
    for start in range(0, len(keys), _CHUNK):
        instance.add_dynamic_partitions(name, keys[start : start + _CHUNK])
