"""Provenance of materializations: which version of each input they were made from, in Dagster's own tags.

Dagster computes these tags for outputs only. Without them it takes every input of an explicit
materialization for a new dependency, and the UI shows the item as unsynced for ever.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dagster import AssetKey, AssetMaterialization, AssetObservation, DagsterEventType, DagsterInstance

from media_assets.engine.contract import Stage
from media_assets.engine.events import Result
from media_assets.engine.versions import code_version
from resources.records.outcomes import OutcomeStore

# Names and values of Dagster's own tags; it has no public constants for them.
DATA_VERSION_TAG = "dagster/data_version"
CODE_VERSION_TAG = "dagster/code_version"
INPUT_DATA_VERSION_TAG = "dagster/input_data_version"
INPUT_EVENT_TAG = "dagster/input_event_pointer"
_NO_EVENT = "NULL"
_INITIAL_VERSION = "INITIAL"  # what Dagster takes for the version of an external asset
_NO_CODE_VERSION = "none"  # without any, Dagster does not believe the other tags
SOURCE = "uploads"


class Provenance:
    """Tags for the materializations of one batch.

    Looks up the events of inputs in bulk: once per input made in an earlier run, and per call of `tags` for
    inputs made in this one, whose materializations must have been written by then.
    """

    def __init__(
        self,
        instance: DagsterInstance,
        outcomes: OutcomeStore,
        stages: Sequence[Stage[Any, Any]],
        media_ids: Sequence[str],
    ) -> None:
        self._instance = instance
        selected = {stage.name for stage in stages}
        inputs = {name for stage in stages for name in stage.inputs}
        self._versions = {
            key: record.version for key, record in outcomes.load(list(media_ids), sorted(inputs - selected)).items()
        }
        self._events: dict[str, dict[str, int]] = {name: self._latest(name, media_ids) for name in inputs - selected}
        self._made_here = inputs & selected
        self._stages = {stage.name: stage for stage in stages}

    def tags(self, results: Sequence[Result]) -> dict[str, dict[str, str]]:
        """Tags by media ID for the materializations of one asset's `results`, which the caller is about to write."""
        stage = self._stages[results[0].asset]
        media_ids = [result.media_id for result in results]
        for name in self._made_here.intersection(stage.inputs):
            self._events[name] = self._latest(name, media_ids)
        return {result.media_id: self._tags(result, stage) for result in results}

    def _tags(self, result: Result, stage: Stage[Any, Any]) -> dict[str, str]:
        media_id = result.media_id
        tags = {DATA_VERSION_TAG: result.outcome.version, CODE_VERSION_TAG: code_version(stage)}
        if not stage.inputs:
            tags |= _input(SOURCE, _INITIAL_VERSION, None)
        for name in stage.inputs:
            tags |= _input(name, self._versions.get((media_id, name), ""), self._events[name].get(media_id))
        self._versions[media_id, stage.name] = result.outcome.version
        return tags

    def _latest(self, name: str, media_ids: Sequence[str]) -> dict[str, int]:
        if not media_ids:
            return {}
        return dict(
            self._instance.get_latest_storage_id_by_partition(
                AssetKey(name), DagsterEventType.ASSET_MATERIALIZATION, set(media_ids)
            )
        )


def is_told(tags: Mapping[str, str], event: AssetMaterialization | AssetObservation) -> bool:
    """Whether an earlier event says the same of what was made and from what; which events told of inputs is no part."""
    known = event.tags or {}
    return all(known.get(name) == value for name, value in tags.items() if not name.startswith(INPUT_EVENT_TAG))


class LibraryProvenance:
    """Tags for materializations of assets made from many partitions of their inputs: what is told of those later, with
    another version, is new to them.

    Made right after the records were read, which are `digest`; what an item's run tells of it only then counts as new
    as well, until the next rebuild.
    """

    def __init__(self, instance: DagsterInstance, inputs: Iterable[str], digest: str) -> None:
        self._instance = instance
        self._digest = digest
        self._events = {name: self._latest(name) for name in inputs}

    def tags(self, version: str, inputs: Iterable[str]) -> dict[str, str]:
        """Tags of a materialization of `version`; an input that was not named at first was made just now."""
        tags = {DATA_VERSION_TAG: version, CODE_VERSION_TAG: _NO_CODE_VERSION}
        for name in inputs:
            event = self._events[name] if name in self._events else self._latest(name)
            tags |= _input(name, self._digest, event)
        return tags

    def _latest(self, name: str) -> int | None:
        records = self._instance.fetch_materializations(AssetKey(name), limit=1).records
        return records[0].storage_id if records else None


def _input(name: str, version: str, event: int | None) -> dict[str, str]:
    return {
        f"{INPUT_DATA_VERSION_TAG}/{name}": version,
        f"{INPUT_EVENT_TAG}/{name}": _NO_EVENT if event is None else str(event),
    }
