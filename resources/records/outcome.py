"""What the outcome record says, in types: states, claims, costs and endings."""

from __future__ import annotations

import random
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from resources.errors import Failure
from resources.settings import Engine


class Status(StrEnum):
    """State of one asset of one media item."""

    RUNNING = "running"
    OK = "ok"
    NOT_APPLICABLE = "not_applicable"
    RETRYABLE = "retryable"
    QUARANTINED = "quarantined"

    @property
    def done(self) -> bool:
        """Whether there is a table to read."""
        return self in (Status.OK, Status.NOT_APPLICABLE)


class LostClaim(Exception):
    """The item was claimed by another run meanwhile; what this worker made is discarded."""


class Withdrawn(LostClaim):
    """The upload was removed, superseded or purged meanwhile; nothing is made from it any more."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """One row of the `outcomes` table. `content` identifies the output; it feeds its dependants' versions."""

    media_id: str
    asset: str
    version: str
    content: str
    status: Status
    attempts: int
    claim: int
    error_class: str | None = None
    error: str | None = None
    run_id: str | None = None
    seconds: float | None = None
    units: int | None = None
    rows: int | None = None
    device: str | None = None
    model: str | None = None
    bytes_out: int | None = None
    copied_from: str | None = None
    retry_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class Claim:
    """The right to finish one asset of one item. `twin` is an item that has the very same already."""

    media_id: str
    asset: str
    version: str
    number: int
    attempts: int
    twin: str | None = None


@dataclass(frozen=True, slots=True)
class Cost:
    """What an item's asset took: seconds of work, model units, rows and bytes written, and on what."""

    seconds: float = 0.0
    units: int = 0
    rows: int = 0
    bytes_out: int = 0
    device: str | None = None
    model: str | None = None
    copied_from: str | None = None


@dataclass(frozen=True, slots=True)
class Ending:
    """How a claimed asset of an item ended; made by `succeeded` and `failed`.

    `content` and `attempts` stay as they are where None; `retry_s` are seconds until a retry is due.
    """

    claim: Claim
    status: Status
    cost: Cost | None = None
    content: str | None = None
    attempts: int | None = None
    error_class: str | None = None
    error: str | None = None
    retry_s: float | None = None


def succeeded(claim: Claim, status: Status, content: str, cost: Cost, note: str | None = None) -> Ending:
    """`ok` or `not_applicable`. Raises ValueError for any other status."""
    if not status.done:
        raise ValueError(f"{status} is not a success")
    return Ending(claim, status, cost, content, error=note)


def failed(claim: Claim, failure: Failure, cost: Cost, settings: Engine) -> Ending:
    """`retryable`, due after a growing delay, as long as there are attempts left; else `quarantined`."""
    retry = failure.retryable and claim.attempts < settings.max_attempts
    delay_s = settings.retry_base_s * 2 ** (claim.attempts - 1) * random.uniform(0.5, 1.5)  # noqa: S311
    return Ending(
        claim,
        Status.RETRYABLE if retry else Status.QUARANTINED,
        cost,
        error_class=failure.error_class,
        error=failure.message,
        retry_s=delay_s if retry else None,
    )
