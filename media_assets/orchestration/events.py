"""What Dagster's event log is told of an item's asset: a materialization when it is made, an observation when not."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import dagster as dg

from media_assets.engine.contract import Stage
from media_assets.engine.events import Result
from media_assets.orchestration.provenance import DATA_VERSION_TAG
from resources.errors import printable, remedy_of

_PICTURE = "picture: "
_OF_THE_RECORD = frozenset(
    {
        "status",
        "how",
        "dagster/row_count",
        "seconds",
        "device",
        "bytes",
        "version",
        "path",
        "model",
        "model digest",
        "copied from",
        "note",
    }
)
_WORST = 20
_PAGE = 200  # events read at once; one may hold pictures of some 100 kB

Shown = Mapping[str, Any]
"""Metadata of a materialization that the record does not hold: pictures and the stage's figures."""
Last = dict[str, tuple[int, dg.AssetMaterialization | dg.AssetObservation]]
"""The last event of each partition, with its number in the event log."""


def shown(result: Result) -> Shown:
    """The pictures and figures that came with a result: none, unless it was computed just now."""
    pictures = {
        f"{_PICTURE}{_label(name)}": dg.MetadataValue.md(_data_uri(_label(name), picture))
        for name, picture in result.previews.items()
    }
    return pictures | {_label(name): value for name, value in result.facts.items()}


def carried(result: Result, told: Mapping[str, Shown], before: Last) -> Shown:
    """What a finished result that was not computed just now shows: what earlier materializations of its version, the
    item's own or else its twin's, did. `told` are those about to be written, `before` those that are."""
    for media_id in (result.media_id, result.outcome.copied_from or ""):
        if told.get(media_id):
            return told[media_id]
        _, event = before.get(media_id, (0, None))
        if event is not None and (event.tags or {}).get(DATA_VERSION_TAG) == result.outcome.version:
            extra = {name: value for name, value in event.metadata.items() if name not in _OF_THE_RECORD}
            if extra:
                return extra
    return {}


def materialization(
    result: Result, stage: Stage[Any, Any], path: str, tags: Mapping[str, str], extra: Shown
) -> dg.AssetMaterialization:
    """The materialization of a finished result, with `extra` shown beside its record."""
    record = result.outcome
    # Pictures first: they are what people look for in the list.
    metadata: dict[str, Any] = {name: value for name, value in extra.items() if name.startswith(_PICTURE)}
    metadata |= {
        "status": str(record.status),
        "how": str(result.how),
        "dagster/row_count": record.rows or 0,
        "seconds": round(record.seconds or 0.0, 3),
        "device": record.device or "cpu",
        "bytes": record.bytes_out or 0,
        "version": record.version,
        "path": dg.MetadataValue.path(path),
        **extra,
    }
    if record.model:
        metadata["model"] = record.model
        metadata["model digest"] = ", ".join(spec.digest for spec in stage.specs())
    if record.copied_from:
        metadata["copied from"] = record.copied_from
    if record.error:
        metadata["note"] = record.error
    return dg.AssetMaterialization(
        asset_key=result.asset, partition=result.media_id, metadata=metadata, tags=dict(tags)
    )


def observation(result: Result) -> dg.AssetObservation:
    """Why the asset of an item was not made, and what to do about it: what its partition's page shows."""
    record = result.outcome
    error_class = record.error_class or "internal"
    metadata: dict[str, Any] = {
        "status": str(record.status),
        "error class": error_class,
        "error": record.error or "",
        "what to do": remedy_of(error_class),
        "attempts": record.attempts,
        "version": record.version,
    }
    if record.retry_at is not None:
        metadata["retry at"] = dg.MetadataValue.timestamp(record.retry_at)
    return dg.AssetObservation(
        asset_key=result.asset,
        partition=result.media_id,
        description=f"Not made: {record.status}, {error_class}.",
        metadata=metadata,
    )


def observation_of_many(asset: str, partition: str, failed: Sequence[Result]) -> dg.AssetObservation:
    """Why items of a partition that is a bucket have no such asset: how many by class, and some of them."""
    classes = Counter(result.outcome.error_class or "internal" for result in failed)
    rows = [
        dg.TableRecord(
            {
                "media_id": result.media_id,
                "status": str(result.outcome.status),
                "error_class": result.outcome.error_class or "internal",
                "error": printable(result.outcome.error or "", 200),
                "what_to_do": remedy_of(result.outcome.error_class or "internal"),
            }
        )
        for result in failed[:_WORST]
    ]
    return dg.AssetObservation(
        asset_key=asset,
        partition=partition,
        description=f"Not made for {len(failed)} items.",
        metadata={"failed": len(failed), "error classes": dict(classes), "failed items": dg.MetadataValue.table(rows)},
    )


def last(instance: dg.DagsterInstance, asset: str, kind: dg.DagsterEventType, partitions: Collection[str]) -> Last:
    """The last materialization or observation of these partitions, where there is one."""
    if not partitions:
        return {}
    key = dg.AssetKey(asset)
    numbers = sorted(instance.get_latest_storage_id_by_partition(key, kind, set(partitions)).values())
    is_made = kind is dg.DagsterEventType.ASSET_MATERIALIZATION
    fetch = instance.fetch_materializations if is_made else instance.fetch_observations
    found: Last = {}
    for start in range(0, len(numbers), _PAGE):
        wanted = dg.AssetRecordsFilter(key, storage_ids=numbers[start : start + _PAGE])
        for record in fetch(wanted, limit=_PAGE).records:
            entry = record.event_log_entry
            event = entry.asset_materialization if is_made else entry.asset_observation
            if event is not None and event.partition is not None:
                found[event.partition] = record.storage_id, event
    return found


def _label(name: str) -> str:
    return name.removesuffix(".png").replace("_", " ")


def _data_uri(name: str, picture: bytes) -> str:
    kind = "png" if picture.startswith(b"\x89PNG") else "jpeg"
    return f"![{name}](data:image/{kind};base64,{base64.b64encode(picture).decode()})"
