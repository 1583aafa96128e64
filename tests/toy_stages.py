"""Small stages without a model, for tests of the engine: a chain numbers -> doubled -> total, with planned faults."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import pyarrow as pa

from media_assets.engine.contract import Inputs, Prepared, Product, Stage, Unit
from resources.errors import Failure, NotApplicable
from resources.models.registry import ModelRegistry
from resources.settings import Settings

SCHEMA = pa.schema(
    [
        pa.field("media_id", pa.string(), nullable=False),
        pa.field("value", pa.int64(), nullable=False),
        pa.field("version", pa.string(), nullable=False),
    ]
)

Fault = Callable[[str, str], object]
"""Called with (method, media_id); may raise, or for `infer` return a Failure or the word `silent`."""


class Toy(Stage[int, int]):
    """Common parts: three units per item, and a hook for faults."""

    code_version = "1"
    micro_batch: ClassVar[int] = 4

    def __init__(self, settings: Settings, models: ModelRegistry, fault: Fault = lambda method, media_id: None) -> None:
        super().__init__(settings, models)
        self.fault = fault
        self.batches: list[list[str]] = []
        self.prepared: list[str] = []

    @property
    def schema(self) -> pa.Schema:
        return SCHEMA

    def prepare(self, inputs: Inputs) -> Prepared[int]:
        self.prepared.append(inputs.media_id)
        self.fault("prepare", inputs.media_id)
        return Prepared([Unit(str(n), value) for n, value in enumerate(self.values(inputs))], carry=inputs.media_id)

    def values(self, inputs: Inputs) -> list[int]:
        raise NotImplementedError

    def infer(self, units: Sequence[Unit[int]]) -> Mapping[str, int | Failure]:
        self.batches.append([unit.id for unit in units])
        answers: dict[str, int | Failure] = {}
        for unit in units:
            said = self.fault("infer", unit.id.split("/")[0])
            if said != "silent":
                answers[unit.id] = said if isinstance(said, Failure) else unit.payload * 2
        return answers

    def assemble(self, inputs: Inputs, carry: Any, outputs: Mapping[str, int]) -> Product:
        assert carry == inputs.media_id
        self.fault("assemble", inputs.media_id)
        rows = [
            {"media_id": inputs.media_id, "value": outputs[key], "version": inputs.version} for key in sorted(outputs)
        ]
        return Product(pa.Table.from_pylist(rows, schema=SCHEMA), facts={"rows": len(rows)})


class Numbers(Toy):
    """Three numbers made from the item's name; an item called `empty…` has none, `photo…` is not applicable."""

    name = "numbers"

    def values(self, inputs: Inputs) -> list[int]:
        if inputs.media_id.startswith("photo"):
            raise NotApplicable("a photo has no numbers")
        if inputs.media_id.startswith("empty"):
            return []
        seed = sum(inputs.media_id.encode())
        return [seed, seed + 1, seed + 2]


class Doubled(Toy):
    """The doubles of `numbers`."""

    name = "doubled"
    inputs = ("numbers",)

    def values(self, inputs: Inputs) -> list[int]:
        return list(inputs.table("numbers").column("value").to_pylist())


class Total(Toy):
    """The doubles of `doubled` and of `numbers`."""

    name = "total"
    inputs = ("numbers", "doubled")

    def values(self, inputs: Inputs) -> list[int]:
        return [value for name in self.inputs for value in inputs.table(name).column("value").to_pylist()]


CHAIN: tuple[type[Toy], ...] = (Numbers, Doubled, Total)
