"""What the engine says while it works. Progress, Dagster's mirror, checks, logs and whatever comes later listen.

Listeners are called in the caller's thread, in order; what one of them raises ends the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from resources.records.outcome import Outcome


class How(StrEnum):
    """How an item's asset came to its state in this batch."""

    COMPUTED = "computed"
    COPIED = "copied"
    REUSED = "reused"
    HELD = "held"
    BLOCKED = "blocked"
    BUSY = "busy"
    WITHDRAWN = "withdrawn"


@dataclass(frozen=True, slots=True)
class Result:
    """One asset of one item, settled: its record, how it got there, and what is worth showing."""

    media_id: str
    asset: str
    how: How
    outcome: Outcome
    facts: Mapping[str, int | float | str] = field(default_factory=dict)
    previews: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def done(self) -> bool:
        """Whether the asset is there to read."""
        return self.outcome.status.done


@dataclass(frozen=True, slots=True)
class BatchStarted:
    """A batch of so many items begins."""

    items: int


@dataclass(frozen=True, slots=True)
class ItemClaimed:
    """The batch may work on an asset of an item, for the `attempt`-th time."""

    media_id: str
    asset: str
    attempt: int


@dataclass(frozen=True, slots=True)
class InferenceBegun:
    """A micro-batch goes to the models of an asset, which are loaded before the first one."""

    asset: str
    units: int
    loads: bool


@dataclass(frozen=True, slots=True)
class BatchInferred:
    """The models of an asset answered a micro-batch."""

    asset: str
    units: int


@dataclass(frozen=True, slots=True)
class WorkDone:
    """A background call for an asset took so many seconds, loading of models left out."""

    asset: str
    seconds: float


@dataclass(frozen=True, slots=True)
class OutcomeCommitted:
    """An asset of an item is settled; its record is committed, just now or before."""

    result: Result


@dataclass(frozen=True, slots=True)
class ItemFinished:
    """Every asset of an item is settled."""

    media_id: str


@dataclass(frozen=True, slots=True)
class StillWorking:
    """Nothing ended for a second; comes again every second."""


@dataclass(frozen=True, slots=True)
class BatchFinished:
    """Every asset of every item is settled."""


Event = (
    BatchStarted
    | ItemClaimed
    | InferenceBegun
    | BatchInferred
    | WorkDone
    | OutcomeCommitted
    | ItemFinished
    | StillWorking
    | BatchFinished
)
Listener = Callable[[Event], None]
