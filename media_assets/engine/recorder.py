"""Claims and endings of a batch, many in one statement: engines with small items would wait for little else.

What has ended is committed, and what that makes possible is claimed, as soon as a background thread could use more
work, at the latest `COMMIT_S` after the last time. Runs in the coordinator's thread.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from media_assets.engine.calls import Job
from media_assets.engine.contract import MediaItem, Memo, Product, Stage
from media_assets.engine.events import How
from resources.errors import Failure
from resources.faults import fault
from resources.files.derived import DerivedStore
from resources.records.leases import Liveness
from resources.records.outcome import Claim, Ending, LostClaim, Outcome, Withdrawn
from resources.records.outcomes import OutcomeStore

COMMIT_S = 0.05  # time between two commits while there is enough to do


class Flight:
    """One item in flight: the records it has so far, and the stages still to settle."""

    __slots__ = ("item", "memos", "open", "records")

    def __init__(self, item: MediaItem, stages: tuple[Stage[Any, Any], ...], records: dict[str, Outcome]) -> None:
        self.item = item
        self.records = records
        self.open = {stage.name: stage for stage in stages}
        self.memos = {stage.memo: Memo() for stage in stages}


class Task:
    """One stage of one item within a batch; `claim` and `job` are there once it may be worked on."""

    __slots__ = ("answers", "claim", "failure", "flight", "job", "seconds", "stage", "units", "version")

    def __init__(self, flight: Flight, stage: Stage[Any, Any], version: str) -> None:
        self.flight = flight
        self.stage = stage
        self.version = version
        self.claim: Claim | None = None
        self.job: Job | None = None
        self.units = 0
        self.answers: dict[str, Any] = {}
        self.failure: Failure | None = None
        self.seconds = 0.0

    @property
    def media_id(self) -> str:
        """ID of the item."""
        return self.flight.item.media_id

    @property
    def claimed(self) -> Claim:
        """The claim of a task that has one."""
        assert self.claim is not None
        return self.claim

    @property
    def work(self) -> Job:
        """The job of a task that has one."""
        assert self.job is not None
        return self.job


@dataclass(frozen=True, slots=True)
class Closing:
    """How a task ended, to be committed."""

    task: Task
    how: How
    ending: Ending
    product: Product | None = None


class Recorder:
    """Collects what is to be claimed and what has ended, and writes it down for one run.

    With `is_careful`, for items that may have killed their process, one task at a time holds a claim.
    """

    def __init__(self, outcomes: OutcomeStore, run_id: str, alive: Liveness, is_careful: bool) -> None:
        self._outcomes = outcomes
        self._run_id = run_id
        self._alive = alive
        self._is_careful = is_careful
        self._wanted: list[Task] = []
        self._closings: list[Closing] = []
        self._held: dict[tuple[str, str], Claim] = {}
        self._written_at = 0.0

    def want(self, task: Task) -> None:
        """Have the task claimed."""
        self._wanted.append(task)

    def close(self, closing: Closing) -> None:
        """Have the end of a task committed."""
        self._closings.append(closing)

    def has_news(self) -> bool:
        """Whether something has ended or may be claimed."""
        return bool(self._closings or self._may_claim())

    def _may_claim(self) -> bool:
        return bool(self._wanted) and not (self._is_careful and self._held)

    def is_due(self) -> bool:
        """Whether the last time is long enough ago."""
        return time.monotonic() - self._written_at >= COMMIT_S

    def committed(self) -> Iterator[tuple[Closing, Outcome | LostClaim]]:
        """Commit what has ended: each with its record, LostClaim or Withdrawn."""
        closings, self._closings = self._closings, []
        for _ in closings:
            fault("engine.before_commit")
        answers = self._outcomes.end([closing.ending for closing in closings]) if closings else []
        self._written_at = time.monotonic()
        for closing, answer in zip(closings, answers, strict=True):
            if not isinstance(answer, LostClaim):
                fault("engine.after_commit")
            yield closing, answer

    def claims(self) -> Iterator[tuple[Task, Claim | Outcome | LostClaim]]:
        """Claim what waits for it: each with its claim, or with what is there instead."""
        if not self._may_claim():
            return
        some = 1 if self._is_careful else len(self._wanted)
        tasks, self._wanted = self._wanted[:some], self._wanted[some:]
        wanted = [(task.media_id, task.stage.name, task.version) for task in tasks]
        answers = self._outcomes.claim_many(wanted, self._run_id, self._alive)
        self._written_at = time.monotonic()
        for task, answer in zip(tasks, answers, strict=True):
            if isinstance(answer, Claim):
                task.claim = self._held[task.media_id, task.stage.name] = answer
        yield from zip(tasks, answers, strict=True)

    def block(self, task: Task, cause: str, retryable: bool) -> Outcome:
        """Record that an input of the task failed. Raises LostClaim, Withdrawn."""
        return self._outcomes.block(task.media_id, task.stage.name, task.version, cause, retryable, self._run_id)

    def current(self, task: Task) -> Outcome | None:
        """The record as it is now; only a purge deletes it."""
        return self._outcomes.load([task.media_id], [task.stage.name]).get((task.media_id, task.stage.name))

    def settled(self, task: Task) -> None:
        """The task is through: it holds no claim any more."""
        self._held.pop((task.media_id, task.stage.name), None)

    def release(self, store: DerivedStore) -> None:
        """Give back all claims, and leave no file of an item that was purged meanwhile."""
        for claim in self._held.values():
            try:
                self._outcomes.release(claim)
            except Withdrawn:
                store.delete(claim.asset, claim.media_id)
