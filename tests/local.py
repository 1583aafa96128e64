"""The decode group run in the tests' own process, on an instance of Dagster."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import dagster as dg

from media_assets.orchestration.grouping import groups
from media_assets.orchestration.groups import build_group
from media_assets.orchestration.partitions import explicit_batch_tags, range_tags
from resources.library import Library
from resources.settings import Settings

GROUPS = groups(Settings(home=Path("nowhere")))
DECODE = GROUPS[0]
DECODED = ("media", "frames", "audio")


@dataclass(frozen=True, slots=True)
class Local:
    """The decode group on a library, run in this process."""

    library: Library
    instance: dg.DagsterInstance
    ids: list[str]

    def run(
        self, *assets: str, keys: list[str] | None = None, checks: Sequence[dg.AssetCheckKey] = ()
    ) -> dg.ExecuteInProcessResult:
        """Materialize over all items as a range, or over `keys` by config; with these checks alone."""
        group = build_group(DECODE, self.library.settings, self.library.models)
        chosen = dg.AssetSelection.assets(*assets).without_checks()
        job = dg.Definitions(
            assets=[group],
            jobs=[dg.define_asset_job("decode_job", chosen | dg.AssetSelection.checks(*checks) if checks else chosen)],
            resources={"media": dg.ResourceDefinition(lambda _: self.library)},
        ).resolve_job_def("decode_job")
        config = {"ops": {DECODE.name: {"config": {"keys": keys}}}} if keys else None
        tags = explicit_batch_tags(keys, self.library.settings) if keys else range_tags(self.ids[0], self.ids[-1])
        return job.execute_in_process(instance=self.instance, run_config=config, tags=tags)

    def made(self, result: dg.ExecuteInProcessResult, asset: str) -> dict[str, dg.AssetMaterialization]:
        """Materializations of an asset in a run, by media ID."""
        page = self.instance.get_records_for_run(result.run_id, of_type=dg.DagsterEventType.ASSET_MATERIALIZATION)
        events = [record.event_log_entry.asset_materialization for record in page.records]
        return {str(m.partition): m for m in events if m is not None and m.asset_key == dg.AssetKey(asset)}

    def seen(self, media_id: str, asset: str) -> list[dg.AssetObservation]:
        """Observations of an asset of an item, the last one first."""
        wanted = dg.AssetRecordsFilter(dg.AssetKey(asset), asset_partitions=[media_id])
        records = self.instance.fetch_observations(wanted, limit=100).records
        events = [record.event_log_entry.asset_observation for record in records]
        return [event for event in events if event is not None]
