"""The calls of the work lane: an item is prepared, its rows are assembled and written, or copied from its twin's.

They run in background threads. A call touches its job, its stage and the store; of the batch it knows nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from media_assets.engine.contract import Inputs, Prepared, Product, Stage
from media_assets.engine.executors import Hung
from resources.errors import Internal
from resources.faults import fault
from resources.files.derived import DerivedStore
from resources.records.outcomes import OutcomeStore

WRITING = "The writing of its output"


class Job:
    """One stage of one item at work.

    Its calls follow one another, so what they hand on needs no lock. Two values are seen by two threads: `doing`,
    written by the one that works, is read by the coordinator once that hangs; `is_left`, written by the coordinator
    when it has given the call up, is read by the one that works before it writes a file.
    """

    __slots__ = ("carry", "doing", "inputs", "is_left", "stage")

    def __init__(self, stage: Stage[Any, Any], inputs: Inputs) -> None:
        self.stage = stage
        self.inputs = inputs
        self.carry: Any = None
        self.doing = ""
        self.is_left = False


@dataclass(frozen=True, slots=True)
class Made:
    """What was made and written. A copy has no product, for it was made elsewhere."""

    product: Product | None
    rows: int
    bytes_out: int


class Calls:
    """The calls of one batch."""

    def __init__(self, store: DerivedStore, outcomes: OutcomeStore) -> None:
        self._store = store
        self._outcomes = outcomes

    def prepare(self, job: Job) -> tuple[Prepared[Any], Made | None]:
        """The stage's preparation; where there is nothing to infer, what is made of it as well."""
        job.doing = "Its preparation"
        prepared = job.stage.prepare(job.inputs)
        job.carry = prepared.carry
        return prepared, None if prepared.units else self.make(job, {})

    def make(self, job: Job, answers: Mapping[str, Any]) -> Made:
        """The item's rows, from the answers to its units. Raises Hung where nobody waits for them any more."""
        job.doing = WRITING
        product = job.stage.assemble(job.inputs, job.carry, answers)
        if job.is_left:  # its claim is gone; a file written now could outlive a purge
            raise Hung
        return self._written(job, product)

    def make_empty(self, job: Job) -> Made:
        """No rows, for an item that the asset has no meaning for."""
        job.doing = WRITING
        sides = {side: schema.empty_table() for side, schema in job.stage.side_schemas.items()}
        return self._written(job, Product(job.stage.schema.empty_table(), sides))

    def copy(self, job: Job, twin: str) -> Made:
        """The tables of an item that has the very same version."""
        job.doing, name = "The copying from its twin", job.stage.name
        written = self._store.copy(name, twin, job.inputs.media_id, job.stage.sides)
        record = self._outcomes.load([twin], [name]).get((twin, name))
        return Made(None, record.rows or 0 if record else 0, written)

    def _written(self, job: Job, product: Product) -> Made:
        name, media_id, written = job.stage.name, job.inputs.media_id, 0
        for side in job.stage.sides:
            written += self._store.write(name, media_id, product.sides[side], side)
        fault("engine.between_files")
        if not product.table.schema.equals(job.stage.schema):
            raise Internal(f"{name} made a table that is not of its schema.")
        written += self._store.write(name, media_id, product.table)
        return Made(product, product.table.num_rows, written)
