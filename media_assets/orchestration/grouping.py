"""Which stages run together: decode (CPU), analyse (GPU) and label (CPU), and what settings split off from them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

from media_assets.engine.contract import Stage
from resources.compute.needs import BadNeeds, Needs, stated
from resources.models.registry import ModelRegistry
from resources.settings import Settings


@dataclass(frozen=True, slots=True)
class Group:
    """Stages that share a step, a process and a kind of machine."""

    name: str
    stages: tuple[str, ...]
    needs: Needs
    backfill_items: int

    @property
    def assets(self) -> tuple[str, ...]:
        """Names of the assets it makes, in topological order."""
        return tuple(path.partition(":")[0] for path in self.stages)

    def load(self, settings: Settings, models: ModelRegistry) -> list[Stage[Any, Any]]:
        """The group's stages, ready for use, in topological order."""
        return [_stage_class(path)(settings, models) for path in self.stages]


# Different backfill sizes make Dagster run the groups as separate runs, each on its own machines.
_GROUPS = (
    Group("decode", ("media:Media", "frames:Frames", "audio:Audio"), Needs(cpus=2), 100),
    Group(
        "analyse",
        (
            "shots:Shots",
            "transcript:Transcript",
            "ocr_text:OcrText",
            "embeddings:Embeddings",
            "moderation_scores:ModerationScores",
        ),
        Needs(cpus=2, gpus=1),
        200,
    ),
    Group("label", ("moderation_labels:ModerationLabels",), Needs(cpus=1), 1000),
)
# A step on Ray is a new process, so a backfill's runs are larger there: of photos, the starts of all three groups then
# take a twentieth of the work.
_BACKFILL_ITEMS_ON_RAY = {"decode": 1000, "analyse": 500, "label": 2000}
LIBRARY = "library"
"""The group of what spans items; it has needs, but no stages."""
_RESERVED = (LIBRARY, "sources", "evals")  # asset groups of Dagster that hold no stages


def groups(settings: Settings) -> tuple[Group, ...]:
    """The groups of an installation, in topological order, with their needs. Raises BadNeeds.

    What `compute.groups` splits off becomes a group of its own, with the needs of the one it came from where it
    states none. The stages that remain form as few groups as their order allows; the second is called `<name>_2`.
    """
    apart = _apart(settings)
    found = tuple(
        _for_profile(piece, group.name, settings)
        for group in _GROUPS
        for piece in _pieces(
            replace(
                group,
                needs=stated(settings.compute, group.name, group.needs),
                backfill_items=_backfill_items(group, settings),
            ),
            {name: assets for name, assets in apart.items() if assets[0] in group.assets},
            settings,
        )
    )
    if clash := _first_twice(group.name for group in found):
        raise BadNeeds(f"compute.groups.{clash}: that name is taken by what remains of a split group.")
    if settings.serving.backend == "ray":
        # The models are in servers of their own, which ask for the GPUs; a step would hold one idle.
        return tuple(replace(group, needs=_without_gpu(group.needs)) for group in found)
    return found


def _backfill_items(group: Group, settings: Settings) -> int:
    return _BACKFILL_ITEMS_ON_RAY[group.name] if settings.compute.executor == "ray" else group.backfill_items


def _for_profile(piece: Group, origin: str, settings: Settings) -> Group:
    """`piece` of the group `origin`, without a GPU that its models would leave idle, unless the settings name one."""
    said = [settings.compute.groups.get(name) for name in (piece.name, origin)]
    is_stated = any(entry is not None and entry.gpus is not None for entry in said)
    if settings.profile != "offline" or is_stated or not piece.needs.gpus:
        return piece
    return replace(piece, needs=_without_gpu(piece.needs))


def _without_gpu(needs: Needs) -> Needs:
    return replace(needs, gpus=0, gpu_memory_bytes=0, gpu_required=False, pool=needs.pool_name)


def _apart(settings: Settings) -> dict[str, tuple[str, ...]]:
    """Assets split off, by the name of their new group; raises BadNeeds for what cannot be meant."""
    known = [group.name for group in _GROUPS]
    owner = {asset: group.name for group in _GROUPS for asset in group.assets}
    apart: dict[str, tuple[str, ...]] = {}
    for name, said in settings.compute.groups.items():
        where = f"compute.groups.{name}"
        if not said.stages:
            if name not in known and name != LIBRARY:
                there = ", ".join([*known, LIBRARY])
                raise BadNeeds(f"{where}: no such group. There are {there}; a new one names its stages.")
            continue
        if name in known or name in _RESERVED:
            raise BadNeeds(f"{where}: stages are split off into a new group, and {name} exists.")
        if unknown := [asset for asset in said.stages if asset not in owner]:
            raise BadNeeds(f"{where}: no stage {unknown[0]}. There are {', '.join(owner)}.")
        if len({owner[asset] for asset in said.stages}) > 1:
            raise BadNeeds(f"{where}: its stages are of several groups; split off those of each by themselves.")
        apart[name] = said.stages
    if twice := _first_twice(asset for assets in apart.values() for asset in assets):
        raise BadNeeds(f"compute.groups: {twice} is split off more than once.")
    return apart


def _pieces(group: Group, apart: Mapping[str, tuple[str, ...]], settings: Settings) -> Iterator[Group]:
    """What remains of `group`, and the groups split off from it, in topological order.

    Those split off come as soon as they can, so that what remains can wait for them and stay in one piece.
    """
    paths = dict(zip(group.assets, group.stages, strict=True))
    inputs = {asset: {name for name in _stage_class(path).inputs if name in paths} for asset, path in paths.items()}
    waiting = dict(apart)
    split = {asset for assets in apart.values() for asset in assets}
    rest = [asset for asset in group.assets if asset not in split]
    done: set[str] = set()
    size = group.backfill_items  # equal sizes would share a run
    remnants = 0

    def piece(name: str, assets: list[str], needs: Needs) -> Group:
        nonlocal size
        done.update(assets)
        size += 1
        return Group(name, tuple(paths[asset] for asset in assets), needs, size - 1)

    while waiting or rest:
        before = len(done)
        for name, assets in list(waiting.items()):
            if all(inputs[asset] <= done | {*assets} for asset in assets):
                del waiting[name]
                needs = stated(settings.compute, name, group.needs)
                yield piece(name, [asset for asset in group.assets if asset in assets], needs)
        ready: list[str] = []
        for asset in rest:
            if inputs[asset] <= done | {*ready}:
                ready.append(asset)
        if ready and (ready == rest or len(done) == before):
            remnants += 1
            yield piece(group.name if remnants == 1 else f"{group.name}_{remnants}", ready, group.needs)
            rest = [asset for asset in rest if asset not in ready]
        if len(done) == before:
            name, assets = next(iter(waiting.items()))
            between = sorted({need for asset in assets for need in inputs[asset]} - done - {*assets})
            raise BadNeeds(
                f"compute.groups.{name}: it cannot run before {', '.join(between)}, nor that before it."
                f" Put {', '.join(between)} into it too, or split off less."
            )


def _first_twice(names: Iterator[str]) -> str | None:
    return next((name for name, times in Counter(names).items() if times > 1), None)


def _stage_class(path: str) -> type[Stage[Any, Any]]:
    module, name = path.split(":")
    found: type[Stage[Any, Any]] = getattr(import_module(f"media_assets.stages.{module}"), name)
    return found
