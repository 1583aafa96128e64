"""The auto-tuner: finds the micro-batch with which a stage answers most units per second within memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from typing import Any

from media_assets.engine.contract import Inputs, MediaItem, Stage, Unit
from resources.errors import Failure, MediaError, NotApplicable, is_out_of_memory
from resources.library import Library
from resources.models.tuning import Tuned

SAMPLE_UNITS = 64
"""Distinct units that are looked for; larger micro-batches repeat them."""
LARGEST = 512
WORTH = 1.05
"""How much faster a doubled micro-batch must be to be worth its memory."""
OUT_OF_TIME = "out of time"
PATIENCE = 2
"""Doublings in a row without that gain, after which growing ends."""


class NothingToTune(MediaError):
    """There are no model inputs to measure with."""

    code, http_status = "nothing_to_tune", 409
    remedy = "Process some representative media first: media-assets run FOLDER"


@dataclass(frozen=True, slots=True)
class Trial:
    """One size that was tried: units per call, units per second, or what stopped it."""

    batch_size: int
    units_per_s: float
    stopped: str = ""


def sample(library: Library, stage: Stage[Any, Any], count: int = SAMPLE_UNITS) -> list[Unit[Any]]:
    """Up to `count` units of the library's own media, from as many items as it takes. Raises NothingToTune."""
    units: list[Unit[Any]] = []
    for row in library.registry.live():
        inputs = Inputs(MediaItem(row["media_id"], row["uri"], row["etag"]), library.store, "tune")
        try:
            prepared = stage.prepare(inputs)
        except (NotApplicable, MediaError, FileNotFoundError):  # what has no input here is no measure of anything
            continue
        units += [replace(unit, id=f"{inputs.media_id}/{unit.id}") for unit in prepared.units]
        if len(units) >= count:
            break
    if not units:
        raise NothingToTune(f"No media in this library give {stage.name} anything to do.")
    return units[:count]


def trials(
    stage: Stage[Any, Any],
    units: Sequence[Unit[Any]],
    budget_s: float,
    clock: Callable[[], float] = time.perf_counter,
) -> Iterator[Trial]:
    """Doubled micro-batches, one trial each, until growing stops paying, memory ends or `budget_s` seconds are over.

    The first call of each size is not counted: it allocates, and compiles where models are compiled.
    """
    started, best, idle, size = clock(), 0.0, 0, 1
    while size <= LARGEST and idle < PATIENCE:
        batch = [replace(unit, id=f"{at}/{unit.id}") for at, unit in enumerate(islice(cycle(units), size))]
        try:
            _answer(stage, batch)
            before = clock()
            _answer(stage, batch)
            speed = size / max(clock() - before, 1e-9)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            yield Trial(size, 0.0, "out of memory")
            return
        idle = 0 if speed > best * WORTH else idle + 1
        best = max(best, speed)
        yield Trial(size, speed)
        # The next size takes about twice as long as this one, and twice over.
        if clock() - started + 4 * size / speed > budget_s:
            yield Trial(2 * size, 0.0, OUT_OF_TIME)
            return
        size *= 2


def best_of(tried: Sequence[Trial]) -> Tuned:
    """The smallest micro-batch that is about as fast as the fastest.

    Raises NothingToTune where none fits memory, and where time was up while larger ones were still faster.
    """
    worked = [trial for trial in tried if not trial.stopped]
    if not worked:
        raise NothingToTune("Not even one unit fits into memory.", "Choose smaller models in models.toml.")
    fastest = max(trial.units_per_s for trial in worked)
    if tried[-1].stopped == OUT_OF_TIME and worked[-1].units_per_s == fastest:
        raise NothingToTune("The time was up before the fastest size was found.", "Give it more --seconds.")
    chosen = next(trial for trial in worked if trial.units_per_s * WORTH >= fastest)
    return Tuned(chosen.batch_size, round(chosen.units_per_s, 3))


def _answer(stage: Stage[Any, Any], batch: Sequence[Unit[Any]]) -> None:
    for answer in stage.infer(batch).values():
        if isinstance(answer, Failure):
            raise NothingToTune(f"{stage.name} fails on its own inputs: {answer.message}")
