"""Materializations written to Dagster many at a time: the outcome records are the truth, Dagster mirrors them.

A step that yields an `AssetMaterialization` per item pays several round trips and commits for each. Dagster's
event storage can store many of one asset at once, but offers no way to yield them so; hence events are built
here and handed to the storage itself. What is not mirrored when a process dies is mirrored by the run that
finds the item finished, or by the planner when it closes the batch.
"""

import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import dagster as dg
from dagster import DagsterEvent, DagsterEventType, EventLogEntry
from dagster._core.events import StepMaterializationData  # Dagster names it nowhere else

from media_assets.engine import Result
from media_assets.partitions import partition_of
from media_assets.provenance import CODE_VERSION_TAG, Provenance
from resources.settings import Settings

MOST = 1000
"""Results kept before they are written."""
LONGEST_S = 2.0
"""Time after which what there is is written, seconds."""

Build = Callable[[Result, Mapping[str, str]], dg.AssetMaterialization]


class Mirror:
    """Collects the finished results of one step and writes them, inputs before what was made from them.

    A thread of its own writes, one lot at a time: the caller has the step's work to hand out meanwhile.
    """

    def __init__(
        self, context: dg.OpExecutionContext, order: Sequence[str], provenance: Provenance, build: Build
    ) -> None:
        self._instance = context.instance
        self._run_id = context.run.run_id
        self._job = context.job_name
        self._step = context.op_handle.name
        self._order = tuple(order)
        self._provenance = provenance
        self._build = build
        self._kept: list[tuple[float, Result]] = []
        self._since = time.monotonic()
        self._writer = ThreadPoolExecutor(1, "mirror")
        self._writing: Future[None] | None = None

    def add(self, result: Result) -> None:
        """Keep a finished result; has them written when there are many or it has been a while.

        Raises what the lot before ended with.
        """
        self._kept.append((time.time(), result))
        if len(self._kept) >= MOST or time.monotonic() - self._since >= LONGEST_S:
            self._flush()

    def close(self) -> None:
        """Write what is left, and wait for it."""
        with self._writer:
            self._flush()
            self._written()

    def _flush(self) -> None:
        self._written()
        kept, self._kept = self._kept, []
        self._writing = self._writer.submit(self._write, kept)
        self._since = time.monotonic()

    def _written(self) -> None:
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _write(self, kept: Sequence[tuple[float, Result]]) -> None:
        for asset in self._order:
            chosen = [(at, result) for at, result in kept if result.asset == asset]
            if chosen:
                tags = self._provenance.tags([result for _, result in chosen])
                made = [(at, self._build(result, tags[result.media_id])) for at, result in chosen]
                self._instance.event_log_storage.store_event_batch([self._entry(at, m) for at, m in made])

    def _entry(self, at: float, materialization: dg.AssetMaterialization) -> EventLogEntry:
        event = DagsterEvent(
            event_type_value=DagsterEventType.ASSET_MATERIALIZATION.value,
            job_name=self._job,
            step_key=self._step,
            event_specific_data=StepMaterializationData(materialization),
            message=f"Materialized {materialization.asset_key.to_user_string()} of {materialization.partition}.",
            pid=os.getpid(),
        )
        return EventLogEntry(  # type: ignore[no-untyped-call]
            error_info=None,
            user_message="",
            level=10,
            run_id=self._run_id,
            timestamp=at,
            step_key=self._step,
            job_name=self._job,
            dagster_event=event,
        )


class BucketMirror:
    """Counts the finished results of one step and writes one materialization per asset and bucket at its end."""

    def __init__(self, context: dg.OpExecutionContext, settings: Settings, code_versions: Mapping[str, str]) -> None:
        self._context = context
        self._settings = settings
        self._code_versions = code_versions
        self._sums: dict[tuple[str, str], Counter[str]] = {}

    def add(self, result: Result) -> None:
        """Count a finished result."""
        partition = partition_of(result.media_id, self._settings)
        sums = self._sums.setdefault((result.asset, partition), Counter())
        sums.update({"items": 1, str(result.how): 1, "dagster/row_count": result.outcome.rows or 0})
        sums["milliseconds"] += round(1000 * (result.outcome.seconds or 0))

    def close(self) -> None:
        """Write the sums."""
        for (asset, partition), sums in sorted(self._sums.items()):
            self._context.log_event(
                dg.AssetMaterialization(
                    asset,
                    partition=partition,
                    metadata=dict(sums),
                    tags={CODE_VERSION_TAG: self._code_versions[asset]},
                )
            )


def materialized_in(instance: dg.DagsterInstance, run_id: str) -> set[tuple[str, str]]:
    """(asset, partition) of every materialization of a run."""
    found: set[tuple[str, str]] = set()
    cursor: str | None = None
    while True:
        page = instance.get_records_for_run(run_id, cursor, DagsterEventType.ASSET_MATERIALIZATION, limit=1000)
        for record in page.records:
            event = record.event_log_entry.get_dagster_event()
            if event.asset_key is not None and event.partition is not None:
                found.add((event.asset_key.to_user_string(), event.partition))
        if not page.has_more:
            return found
        cursor = page.cursor


def report(instance: dg.DagsterInstance, missing: Iterable[tuple[str, str, Mapping[str, str]]]) -> None:
    """Report materializations (asset, media ID, tags) whose own run died before it could."""
    for asset, media_id, tags in missing:
        metadata = {"note": "finished by a run that died before it could report"}
        instance.report_runless_asset_event(
            dg.AssetMaterialization(asset, partition=media_id, metadata=metadata, tags=dict(tags))
        )
