"""The Dagster assets of the groups of stages: each group is one multi-asset.

A group's step writes an `AssetMaterialization` per finished item and then succeeds: bad items are not materialized
but observed, with their error, so a backfill shows exactly those as failed, and its neighbours are not lost.
"""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import dagster as dg

from media_assets.checks.checker import checker
from media_assets.engine.batch import BatchEngine
from media_assets.engine.contract import MediaItem, Stage
from media_assets.engine.events import (
    BatchStarted,
    Event,
    How,
    InferenceBegun,
    ItemFinished,
    Listener,
    OutcomeCommitted,
    Result,
)
from media_assets.engine.remote import served
from media_assets.engine.versions import code_version
from media_assets.orchestration.events import materialization
from media_assets.orchestration.grouping import Group
from media_assets.orchestration.mirror import BucketMirror, Mirror
from media_assets.orchestration.partitions import Batch, batch_keys, partition_of, partitions_of
from media_assets.orchestration.processor import Processor, processor
from media_assets.orchestration.provenance import SOURCE, Provenance
from media_assets.orchestration.quality import EXPECTATIONS, ITEMS, Checks, as_output
from resources.compute.needs import op_tags
from resources.compute.process import note_hung
from resources.library import Library
from resources.models.registry import ModelRegistry
from resources.settings import Settings

OWNERS = ["team:ml-platform", "team:trust-and-safety"]
LOADED_TAG = "media/models_loaded"
_LOG_EVERY_S = 10.0


KINDS = {
    "media": {"ffmpeg", "parquet"},
    "frames": {"ffmpeg", "parquet"},
    "audio": {"ffmpeg", "parquet"},
    "shots": {"pytorch", "parquet"},
    "transcript": {"whisperx", "parquet"},
    "ocr_text": {"easyocr", "parquet"},
    "embeddings": {"pytorch", "parquet"},
    "moderation_scores": {"pytorch", "parquet"},
    "moderation_labels": {"python", "parquet"},
}


def one_at_a_time(settings: Settings) -> Settings:
    """Settings of a batch whose items are suspected of killing or hanging the process."""
    engine = settings.engine.model_copy(update={"window": 1, "prepare_threads": 1})
    return settings.model_copy(update={"engine": engine})


def _media_ids(library: Library, keys: Sequence[str], explicit: bool) -> Sequence[str]:
    """Media IDs of a run's keys: themselves, or the live items of the buckets that its partitions are."""
    if explicit or library.settings.partitions == "media":
        return keys
    wanted = set(keys)
    return [
        row["media_id"] for row in library.registry.live() if partition_of(row["media_id"], library.settings) in wanted
    ]


def media_items(library: Library, keys: Sequence[str]) -> list[MediaItem]:
    """The live items among `keys`, in their order."""
    rows = {row["media_id"]: row for row in library.registry.live(keys)}
    return [MediaItem(key, rows[key]["uri"], rows[key]["etag"]) for key in keys if key in rows]


def build_group(group: Group, settings: Settings, models: ModelRegistry) -> dg.AssetsDefinition:
    """The Dagster assets of one group."""
    stages = group.load(settings, models)
    keys = {dg.AssetKey(stage.name): stage.name for stage in stages}

    @dg.multi_asset(
        name=group.name,
        specs=[_spec(group, stage) for stage in stages],
        check_specs=[spec for stage in stages for spec in _check_specs(stage.name)],
        can_subset=True,
        partitions_def=partitions_of(settings),
        backfill_policy=dg.BackfillPolicy.multi_run(group.backfill_items),
        op_tags=op_tags(group.name, group.needs, settings.compute),
        pool=group.needs.pool_name,
        required_resource_keys={"media"},
    )
    def run_group(context: dg.AssetExecutionContext, config: Batch) -> Iterator[Any]:
        library: Library = context.resources.media
        wanted = {keys[key] for key in context.selected_asset_keys}
        if any(check.name == EXPECTATIONS for check in context.selected_asset_check_keys):
            checker().warm()
        # While this run lives, its checks may still quote items of its batch: a purge asks for its lease.
        with library.outcomes.lease(context.run.run_id):
            chosen = _media_ids(library, batch_keys(context, config), bool(config.keys))
            batch = media_items(library, chosen)
            # Without any partition a check is about the library; of a batch that is gone it is about nothing.
            checked = [item.media_id for item in batch] if chosen else None
            selected = [stage for stage in group.load(library.settings, library.models) if stage.name in wanted]
            checks = [(keys[check.asset_key], check.name) for check in context.selected_asset_check_keys]
            with Checks(library, checks, checked) as asked:
                if selected:
                    with processor(group.needs, library, context.log.info) as device:
                        op = context.op_execution_context
                        # Partitions that were asked for are told of: a backfill counts what its runs say.
                        materialize(
                            op, library, selected, batch, device, config.careful, [asked.listen], not config.keys
                        )
                yield from map(as_output, asked.results())

    return run_group


def materialize(
    context: dg.OpExecutionContext,
    library: Library,
    stages: list[Stage[Any, Any]],
    batch: list[MediaItem],
    device: Processor,
    careful: bool = False,
    also: Sequence[Listener] = (),
    anew: bool = False,
) -> None:
    """Settle `stages` of every item of the batch, in the step of `context`, and mirror how they ended.

    `also` listens to the engine too. With `anew` Dagster is told of every item, also of one about which nothing is
    new.
    """
    settings = one_at_a_time(library.settings) if careful else library.settings
    engine = BatchEngine(
        served(stages, settings), library.store, library.outcomes, settings, device=device.name, scale=device.scale
    )
    by_name = {stage.name: stage for stage in stages}
    mirror: Mirror | BucketMirror
    if settings.partitions == "media":
        media_ids = [item.media_id for item in batch]
        mirror = Mirror(
            context,
            list(by_name),
            Provenance(context.instance, library.outcomes, stages, media_ids),
            lambda result, tags, extra: materialization(
                result, by_name[result.asset], str(library.store.path(result.asset, result.media_id)), tags, extra
            ),
            anew,
        )
    else:
        mirror = BucketMirror(context, settings, {stage.name: code_version(stage) for stage in stages}, anew)
    known = Counter(library.models.loads)
    try:
        listeners = [mirror.listen, _log_of(context), *library.listeners, *also]
        engine.run(batch, context.run.run_id, *listeners)
    finally:
        if engine.hung:
            note_hung(engine.hung)
            context.log.error(
                f"{engine.hung} call(s) gave no sign of life within engine.infer_timeout_s"
                f" ({settings.engine.infer_timeout_s:g} s) and still hang: this process should not be used again."
            )
        mirror.close()
        _tell_loaded(context, Counter(library.models.loads) - known)


def _tell_loaded(context: dg.OpExecutionContext, loaded: Counter[str]) -> None:
    """Say in the run's log and in its tag which models this process had to load: none, where it was warm."""
    names = ", ".join(f"{name} ({times} times)" if times > 1 else name for name, times in loaded.items())
    context.log.info(f"models loaded for {context.op_handle.name}: {names or 'none'}")
    run = context.instance.get_run_by_id(context.run.run_id)
    before = int(run.tags.get(LOADED_TAG, 0)) if run is not None else 0
    context.instance.add_run_tags(context.run.run_id, {LOADED_TAG: str(before + loaded.total())})


def _log_of(context: dg.OpExecutionContext) -> Listener:
    """Writes failures, and how far the batch is, into the run's log."""
    group = context.op_handle.name
    last = time.monotonic()
    items, running = Counter[str](), ""

    def log(event: Event) -> None:
        nonlocal last, running
        if isinstance(event, BatchStarted):
            items["all"] = event.items
        elif isinstance(event, InferenceBegun):
            running = event.asset
        elif isinstance(event, ItemFinished):
            items["finished"] += 1
        elif isinstance(event, OutcomeCommitted) and event.result.how in (How.COMPUTED, How.HELD):
            _warn(context, event.result)
        if time.monotonic() - last >= _LOG_EVERY_S:
            last = time.monotonic()
            context.log.info(f"{group}: {items['finished']} of {items['all']} items, now {running}")

    return log


def _warn(context: dg.OpExecutionContext, result: Result) -> None:
    record = result.outcome
    if not result.done:
        context.log.warning(
            f"{result.asset} of {result.media_id}: {record.status} after {record.attempts} attempt(s),"
            f" {record.error_class}: {record.error}"
        )


def _spec(group: Group, stage: Stage[Any, Any]) -> dg.AssetSpec:
    return dg.AssetSpec(
        stage.name,
        deps=list(stage.inputs) or [SOURCE],
        skippable=True,
        group_name=group.name,
        kinds=KINDS[stage.name],
        owners=OWNERS,
        description=stage.description or type(stage).__doc__,
        code_version=code_version(stage),
        metadata={
            "dagster/column_schema": _columns(stage),
            "model": ", ".join(spec.identity for spec in stage.specs()) or "none",
            "model digest": ", ".join(spec.digest for spec in stage.specs()) or "none",
        },
    )


def _columns(stage: Stage[Any, Any]) -> dg.TableSchema:
    return dg.TableSchema(
        columns=[
            dg.TableColumn(field.name, str(field.type), (field.metadata or {}).get(b"doc", b"").decode())
            for field in stage.schema
        ]
    )


def _check_specs(asset: str) -> list[dg.AssetCheckSpec]:
    return [
        dg.AssetCheckSpec(ITEMS, asset=asset, description="Every item of the batch ended in a success."),
        dg.AssetCheckSpec(EXPECTATIONS, asset=asset, description="Great Expectations over the batch's rows."),
    ]
