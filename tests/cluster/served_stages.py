"""Stages for tests of model servers: what the model does to a unit is told by the unit."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from media_assets.engine.contract import Unit
from resources.errors import Failure, Undecodable
from tests.toy_stages import Numbers, Toy


@dataclass(frozen=True, slots=True)
class Order:
    """What the model does: `hang`, `die`, `die once` (told by a file), `fail`, `look` at the array,
    or say `where` it is or its `pid`."""

    act: str
    file: Path | None = None
    array: npt.NDArray[Any] | None = None


class Obedient(Toy):
    """Does what its units say and doubles numbers; out of memory with more than `ROOM` units at once."""

    name = "obedient"
    tasks = ("nsfw",)
    ROOM = 4

    def load(self) -> None:
        self.models.loaded(self.models.spec("nsfw"), object)

    def infer(self, units: Sequence[Unit[Any]]) -> Mapping[str, Any | Failure]:
        if len(units) > self.ROOM:
            raise MemoryError("the device is full")
        return {unit.id: _obeyed(unit.payload) for unit in units}


class Newer(Obedient):
    """The next version of the same stage."""

    code_version = "2"


class Other(Obedient):
    """Another model."""

    name = "other"


class Greedy(Obedient):
    """Asks for more units at once than the device holds."""

    name = "greedy"
    micro_batch = 8


class ServedNumbers(Numbers):
    """Numbers whose model holds one unit at a time."""

    tasks = ("nsfw",)

    def infer(self, units: Sequence[Unit[int]]) -> Mapping[str, int | Failure]:
        if len(units) > 1:
            raise MemoryError("the device is full")
        return super().infer(units)


def _obeyed(order: Any) -> Any:
    if not isinstance(order, Order):
        return order * 2
    if order.act == "hang":
        time.sleep(3600)
    if order.act == "die" or (order.file is not None and _first(order.file)):
        os._exit(1)
    if order.act == "fail":
        raise Undecodable("No stream can be decoded.")
    if order.array is not None:
        return order.array.flags.writeable, order.array.flags.owndata, float(np.sum(order.array))
    if order.act == "where":
        import ray

        return ray.get_runtime_context().get_node_id()
    return os.getpid()


def _first(file: Path) -> bool:
    try:
        file.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True
