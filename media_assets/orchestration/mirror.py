"""Events of items written to Dagster many at a time: the outcome records are the truth, Dagster mirrors them.

A step that yields an event per item pays several round trips and commits for each. Dagster's
event storage can store many of one asset at once, but offers no way to yield them so; hence events are built
here and handed to the storage itself. What is not mirrored when a process dies is mirrored by the run that
finds the item finished, or by the planner when it closes the batch.
"""

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import dagster as dg
from dagster import DagsterEvent, DagsterEventType, EventLogEntry
from dagster._core.events import AssetObservationData, StepMaterializationData  # Dagster names them nowhere else

from media_assets.engine.events import Event, How, OutcomeCommitted, Result
from media_assets.orchestration.events import Last, Shown, carried, last, observation, observation_of_many, shown
from media_assets.orchestration.partitions import partition_of
from media_assets.orchestration.provenance import CODE_VERSION_TAG, Provenance, is_told
from resources.settings import Settings

MOST = 1000
"""Results kept before they are written."""
LONGEST_S = 2.0
"""Time after which what there is is written, seconds."""

Build = Callable[[Result, Mapping[str, str], Shown], dg.AssetMaterialization]
FAILED = frozenset({How.COMPUTED, How.HELD, How.BLOCKED})
"""How an item's asset comes to a failure that is told; one that is merely in another run's hands is not."""
_Kept = Sequence[tuple[float, Result]]


class Mirror:
    """Collects the results of one step and writes them, inputs before what was made from them.

    What was made is a materialization, what failed an observation. A finished item that was met again shows the
    pictures and figures that its last materialization showed, a copied one those of its twin. Where nothing about an
    item is new, nothing is written, unless its partition was asked for (`anew`): a backfill counts what it was told.

    A thread of its own writes, one lot at a time: the caller has the step's work to hand out meanwhile.
    """

    def __init__(
        self,
        context: dg.OpExecutionContext,
        order: Sequence[str],
        provenance: Provenance,
        build: Build,
        anew: bool = False,
    ) -> None:
        self._instance = context.instance
        self._run_id = context.run.run_id
        self._job = context.job_name
        self._step = context.op_handle.name
        self._order = tuple(order)
        self._provenance = provenance
        self._build = build
        self._anew = anew
        self._kept: list[tuple[float, Result]] = []
        self._since = time.monotonic()
        self._writer = ThreadPoolExecutor(1, "mirror")
        self._writing: Future[None] | None = None

    def listen(self, event: Event) -> None:
        """Add what is settled; a listener of the engine."""
        if isinstance(event, OutcomeCommitted):
            self.add(event.result)

    def add(self, result: Result) -> None:
        """Keep a result; has them written when there are many or it has been a while.

        Raises what the lot before ended with.
        """
        if result.done or result.how in FAILED:
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

    def _write(self, kept: _Kept) -> None:
        for asset in self._order:
            chosen = [(at, result) for at, result in kept if result.asset == asset]
            self._store([self._made(at, made) for at, made in self._materializations(asset, chosen)])
            self._store([self._observed(at, seen) for at, seen in self._observations(asset, chosen)])

    def _store(self, entries: Sequence[EventLogEntry]) -> None:
        if entries:
            self._instance.event_log_storage.store_event_batch(entries)

    def _materializations(self, asset: str, kept: _Kept) -> Iterator[tuple[float, dg.AssetMaterialization]]:
        """Of the finished results among `kept`, which are in the order in which they were made."""
        done = [(at, result) for at, result in kept if result.done]
        if not done:
            return
        tags = self._provenance.tags([result for _, result in done])
        before = self._before(asset, DagsterEventType.ASSET_MATERIALIZATION, [result for _, result in done])
        told: dict[str, Shown] = {}
        for at, result in done:
            mine = tags[result.media_id]
            _, event = before.get(result.media_id, (0, None))
            if not self._anew and result.how in (How.REUSED, How.BUSY) and event is not None and is_told(mine, event):
                continue
            extra = shown(result) if result.how is How.COMPUTED else carried(result, told, before)
            told[result.media_id] = extra
            yield at, self._build(result, mine, extra)

    def _observations(self, asset: str, kept: _Kept) -> Iterator[tuple[float, dg.AssetObservation]]:
        """Of the failed results among `kept`."""
        failed = [(at, result) for at, result in kept if not result.done]
        again = [] if self._anew else [result for _, result in failed]
        before = self._before(asset, DagsterEventType.ASSET_OBSERVATION, again)
        made = self._before(asset, DagsterEventType.ASSET_MATERIALIZATION, [r for r in again if r.media_id in before])
        for at, result in failed:
            seen = observation(result)
            number, event = before.get(result.media_id, (0, None))
            is_last = number > made.get(result.media_id, (0, None))[0]
            if result.how is How.COMPUTED or not is_last or event is None or event.metadata != seen.metadata:
                yield at, seen

    def _before(self, asset: str, kind: DagsterEventType, results: Sequence[Result]) -> Last:
        """The last events of what was not computed just now, and of its twins."""
        others = [result for result in results if result.how is not How.COMPUTED]
        twins = {result.outcome.copied_from for result in others if result.outcome.copied_from}
        return last(self._instance, asset, kind, twins | {result.media_id for result in others})

    def _made(self, at: float, made: dg.AssetMaterialization) -> EventLogEntry:
        told = f"Materialized {made.asset_key.to_user_string()} of {made.partition}."
        return self._entry(at, DagsterEventType.ASSET_MATERIALIZATION, StepMaterializationData(made), told)

    def _observed(self, at: float, seen: dg.AssetObservation) -> EventLogEntry:
        told = f"{seen.asset_key.to_user_string()} of {seen.partition}: {seen.description}"
        return self._entry(at, DagsterEventType.ASSET_OBSERVATION, AssetObservationData(seen), told)

    def _entry(self, at: float, kind: DagsterEventType, data: Any, message: str) -> EventLogEntry:
        event = DagsterEvent(
            event_type_value=kind.value,
            job_name=self._job,
            step_key=self._step,
            event_specific_data=data,
            message=message,
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
    """Counts the results of one step and writes, at its end, one materialization per asset and bucket, and one
    observation where items failed just now or their bucket was asked for (`anew`)."""

    def __init__(
        self,
        context: dg.OpExecutionContext,
        settings: Settings,
        code_versions: Mapping[str, str],
        anew: bool = False,
    ) -> None:
        self._context = context
        self._settings = settings
        self._code_versions = code_versions
        self._anew = anew
        self._sums: dict[tuple[str, str], Counter[str]] = {}
        self._failed: dict[tuple[str, str], list[Result]] = {}

    def listen(self, event: Event) -> None:
        """Add what is settled; a listener of the engine."""
        if isinstance(event, OutcomeCommitted):
            self.add(event.result)

    def add(self, result: Result) -> None:
        """Count a finished result, or keep a failed one."""
        key = result.asset, partition_of(result.media_id, self._settings)
        if not result.done:
            if result.how is How.COMPUTED or (self._anew and result.how in FAILED):
                self._failed.setdefault(key, []).append(result)
            return
        sums = self._sums.setdefault(key, Counter())
        sums.update({"items": 1, str(result.how): 1, "dagster/row_count": result.outcome.rows or 0})
        sums["milliseconds"] += round(1000 * (result.outcome.seconds or 0))

    def close(self) -> None:
        """Write the sums and the failures."""
        for (asset, partition), sums in sorted(self._sums.items()):
            self._context.log_event(
                dg.AssetMaterialization(
                    asset,
                    partition=partition,
                    metadata=dict(sums),
                    tags={CODE_VERSION_TAG: self._code_versions[asset]},
                )
            )
        for (asset, partition), failed in sorted(self._failed.items()):
            self._context.log_event(observation_of_many(asset, partition, failed))
