"""Whole runs: one step takes a batch through all groups, on one machine.

Three runs after another, and a fourth for the rebuild, each wait for a tick, a slot and a process. That is right where
groups run on machines of their own. It is wrong for the one upload somebody waits for: that has the express run, which
the planner launches on an idle system. And it is wrong for a process that does all of the work itself, as `media-assets
run`: there decoders work on the next items while the models have the last ones, and nothing waits for a group's end.
"""

from collections.abc import Iterator
from typing import Any

import dagster as dg
from pydantic import Field

from jobs.batch_sizes import express_s
from media_assets.checks.checker import checker
from media_assets.library.buckets import BucketBusy
from media_assets.orchestration.global_assets import SPANNING, rebuild, rebuild_seconds
from media_assets.orchestration.grouping import groups
from media_assets.orchestration.groups import materialize, media_items
from media_assets.orchestration.partitions import Batch
from media_assets.orchestration.processor import processor
from media_assets.orchestration.quality import EXPECTATIONS, ITEMS, Checks
from resources.compute.needs import Needs, op_tags, run_tags
from resources.library import Library
from resources.settings import Settings

EXPRESS = "express"
EXPRESS_JOB = f"process_{EXPRESS}"
WHOLE = "process"
WHOLE_JOB = f"{WHOLE}_all"


class WholeBatch(Batch):
    """What a whole run works on."""

    assets: list[str] = Field(default_factory=list, description="the assets to make; all of them where none is named")


def build_express_job(settings: Settings) -> dg.JobDefinition:
    """The job of express batches."""
    told = "A small batch through all groups in one run: what the planner launches on an idle system."
    return _job(settings, EXPRESS_JOB, EXPRESS, told, rebuilds=True)


def build_whole_job(settings: Settings) -> dg.JobDefinition:
    """The job of a process that does all of the work itself."""
    told = "A batch through several groups in one run: what `media-assets run` executes."
    return _job(settings, WHOLE_JOB, WHOLE, told, rebuilds=False)


def _job(settings: Settings, name: str, op: str, told: str, rebuilds: bool) -> dg.JobDefinition:
    needs = _needs(settings)
    tags = op_tags(op, needs, settings.compute)

    @dg.op(
        name=op,
        description=f"All stages over a batch of media items{', then the rebuild where that is quick' * rebuilds}.",
        tags=tags,
        pool=needs.pool_name,
        out=dg.Out(dg.Nothing),
        required_resource_keys={"media"},
    )
    def whole(context: dg.OpExecutionContext, config: WholeBatch) -> Iterator[Any]:
        library: Library = context.resources.media
        checker().warm()
        # While this run lives it may write of items that were there when it began: a purge asks for its lease.
        with library.outcomes.lease(context.run.run_id):
            batch = media_items(library, config.keys)
            stages = [
                stage
                for group in groups(library.settings)
                for stage in group.load(library.settings, library.models)
                if not config.assets or stage.name in config.assets
            ]
            checks = [(stage.name, check) for stage in stages for check in (ITEMS, EXPECTATIONS)]
            with Checks(library, checks, [item.media_id for item in batch]) as asked:
                with processor(needs, library, context.log.info) as device:
                    materialize(context, library, stages, batch, device, config.careful, [asked.listen])
                if rebuilds:
                    yield from _rebuild(context, library)
                yield from asked.results()
        yield dg.Output(None)

    @dg.job(name=name, description=told, tags=run_tags(tags, settings.compute.executor))
    def whole_job() -> None:
        whole()

    return whole_job


def _needs(settings: Settings) -> Needs:
    """The most that any group asks for."""
    every = [group.needs for group in groups(settings)]
    return Needs(
        cpus=max(needs.cpus for needs in every),
        gpus=max(needs.gpus for needs in every),
        memory_bytes=max(needs.memory_bytes for needs in every),
        gpu_memory_bytes=max(needs.gpu_memory_bytes for needs in every),
        gpu_required=any(needs.gpu_required for needs in every),
        pool=pools(settings)[0],
    )


def pools(settings: Settings) -> list[str]:
    """Pools of the groups, that of the hungriest first; the plain `cpu` only where there is no other.

    A step is in one pool alone. With several of them, an express run would get around the limits of all but one: the
    planner then launches none.
    """
    hungriest_first = sorted(groups(settings), key=lambda group: -group.needs.gpus)
    names = list(dict.fromkeys(group.needs.pool_name for group in hungriest_first))
    plain = Needs().pool_name
    return [name for name in names if name != plain] or [plain]


def _rebuild(context: dg.OpExecutionContext, library: Library) -> Iterator[Any]:
    """Make the batch searchable, unless that takes long or is under way: the planner sees to it then."""
    seconds = rebuild_seconds(library)
    if seconds is not None and seconds > express_s(library.settings):
        context.log.info(f"The last rebuild took {seconds:.0f} s: left to a run of its own.")
        return
    try:
        yield from rebuild(library, context.instance, SPANNING, range(library.settings.index.buckets))
    except BucketBusy as busy:
        context.log.info(f"{busy} The planner will see to the next one.")
