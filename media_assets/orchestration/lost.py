"""What a run recorded of its items and did not live to tell Dagster, told by whoever finds it dead."""

from __future__ import annotations

from collections.abc import Sequence

import dagster as dg

from media_assets.engine.events import How, Result
from media_assets.orchestration.events import Shown, carried, last, materialization, observation
from media_assets.orchestration.grouping import groups
from media_assets.orchestration.provenance import Provenance
from resources.library import Library
from resources.records.outcome import Status

_NOTE = "finished by a run that died before it could report"
_MADE, _SEEN = dg.DagsterEventType.ASSET_MATERIALIZATION, dg.DagsterEventType.ASSET_OBSERVATION
_PAGE = 1000


def report_lost(library: Library, instance: dg.DagsterInstance, run_id: str, media_ids: Sequence[str]) -> None:
    """Tell Dagster how these items ended in a run that is over, as far as the run did not; inputs first."""
    records = library.outcomes.load(media_ids)
    ended = [record for record in records.values() if record.run_id == run_id and record.status is not Status.RUNNING]
    told = _told_in(instance, run_id) if ended else set()
    untold = [record for record in ended if (record.asset, record.media_id) not in told]
    if not untold:
        return
    for stage in [
        stage for group in groups(library.settings) for stage in group.load(library.settings, library.models)
    ]:
        results = [
            Result(record.media_id, stage.name, How.COPIED if record.copied_from else How.COMPUTED, record)
            for record in untold
            if record.asset == stage.name
        ]
        done = [result for result in results if result.done]
        if done:
            tags = Provenance(instance, library.outcomes, [stage], [r.media_id for r in done]).tags(done)
            twins = {result.outcome.copied_from for result in done if result.outcome.copied_from}
            before = last(instance, stage.name, _MADE, twins)
            for result in done:
                extra: Shown = {"note": _NOTE, **carried(result, {}, before)}
                path = str(library.store.path(result.asset, result.media_id))
                made = materialization(result, stage, path, tags[result.media_id], extra)
                instance.report_runless_asset_event(made)
        for result in results:
            if not result.done:
                instance.report_runless_asset_event(observation(result))


def _told_in(instance: dg.DagsterInstance, run_id: str) -> set[tuple[str, str]]:
    """(asset, partition) of every materialization and observation of a run."""
    found: set[tuple[str, str]] = set()
    for kind in (_MADE, _SEEN):
        cursor: str | None = None
        while True:
            page = instance.get_records_for_run(run_id, cursor, kind, limit=_PAGE)
            for record in page.records:
                event = record.event_log_entry.get_dagster_event()
                if event.asset_key is not None and event.partition is not None:
                    found.add((event.asset_key.to_user_string(), event.partition))
            if not page.has_more:
                break
            cursor = page.cursor
    return found
