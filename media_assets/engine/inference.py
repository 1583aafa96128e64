"""The models of a batch: loaded before their first units, asked in micro-batches, halved around what breaks them.

Runs in the inference lane, one call at a time, and what is kept here is touched there alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from media_assets.engine.contract import Stage, Unit
from resources.errors import Failure, Internal, is_out_of_memory, not_loaded
from resources.records.model_loads import ModelLoads


@dataclass(frozen=True, slots=True)
class Answers:
    """An output or a Failure for every unit, by its ID; `fitting` is the largest micro-batch that memory has room for,
    where a larger one turned out to have none."""

    by_unit: Mapping[str, Any]
    fitting: int | None = None


class Inference:
    """Loads the models of stages and has them answer."""

    def __init__(self, loads: ModelLoads) -> None:
        self._loads = loads
        self._loaded: dict[str, Failure | None] = {}

    def answer(self, stage: Stage[Any, Any], units: Sequence[Unit[Any]]) -> Answers:
        """An answer for every unit, whatever the model does."""
        if stage.name not in self._loaded:
            with self._loads.under_way():
                self._loaded[stage.name] = _loading_failure(stage)
        broken = self._loaded[stage.name]
        return Answers({unit.id: broken for unit in units}) if broken is not None else _isolated(stage, units)


def _isolated(stage: Stage[Any, Any], units: Sequence[Unit[Any]]) -> Answers:
    try:
        answers = dict(stage.infer(units))
    except BaseException as error:  # noqa: BLE001 - isolated to the unit that causes it
        if len(units) == 1:
            return Answers({units[0].id: Failure.of(error)})
        half = (len(units) + 1) // 2
        has_no_room = is_out_of_memory(error)
        if has_no_room:
            _release_device_memory()
        parts = [_isolated(stage, units[:half]), _isolated(stage, units[half:])]
        fitting = [part.fitting for part in parts if part.fitting is not None] + [half] * has_no_room
        return Answers({**parts[0].by_unit, **parts[1].by_unit}, min(fitting, default=None))
    for unit in units:
        if unit.id not in answers:
            answers[unit.id] = Failure.of(Internal(f"{stage.name} gave no answer for {unit.id}."))
    return Answers(answers)


def _loading_failure(stage: Stage[Any, Any]) -> Failure | None:
    try:
        stage.load()
    except BaseException as error:  # noqa: BLE001 - every unit of the stage carries it
        return Failure.of(not_loaded(f"The models of {stage.name}", error))
    return None


def _release_device_memory() -> None:
    """Return cached blocks to the device after an out-of-memory error, where torch is in use."""
    import sys

    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        with suppress(RuntimeError):
            torch.cuda.empty_cache()
