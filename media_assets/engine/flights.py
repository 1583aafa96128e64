"""The items in flight: which of their stages may begin, and how each is settled.

    inputs settled ─▶ reused | held | busy | blocked | withdrawn (nothing runs)
                   ─▶ claimed ─▶ work ─▶ outcome committed

Runs in the coordinator's thread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from media_assets.engine.contract import MediaItem, Product, Stage
from media_assets.engine.events import Event, How, ItemFinished, OutcomeCommitted, Result
from media_assets.engine.recorder import Closing, Flight, Recorder, Task
from media_assets.engine.verdicts import why_blocked
from media_assets.engine.versions import item_version
from resources.files.derived import DerivedStore
from resources.records.outcome import Claim, LostClaim, Outcome, Status, Withdrawn


class Flights:
    """The items of one batch that are begun and not through."""

    def __init__(
        self,
        stages: tuple[Stage[Any, Any], ...],
        records: Mapping[tuple[str, str], Outcome],
        store: DerivedStore,
        recorder: Recorder,
    ) -> None:
        self._stages = stages
        self.selected = frozenset(stage.name for stage in stages)
        self._records = records
        self._store = store
        self._recorder = recorder
        self._flights: dict[str, Flight] = {}
        self._leaders: dict[tuple[str, str], tuple[Task, list[Task]]] = {}
        self._said: deque[Event] = deque()

    def __len__(self) -> int:
        return len(self._flights)

    def report(self, emit: Callable[[Event], None]) -> None:
        """Say what was settled."""
        while self._said:
            emit(self._said.popleft())

    def admit(self, item: MediaItem) -> None:
        """Begin with an item."""
        needed = {name for stage in self._stages for name in stage.inputs} - self.selected
        records = {name: found for name in needed if (found := self._records.get((item.media_id, name))) is not None}
        flight = self._flights[item.media_id] = Flight(item, self._stages, records)
        self._start_ready(flight)

    def _start_ready(self, flight: Flight) -> None:
        """Start every stage of the item whose inputs are settled."""
        for stage in list(flight.open.values()):
            is_ready = all(name in flight.records for name in stage.inputs if name in self.selected)
            if is_ready and stage.name in flight.open:
                del flight.open[stage.name]
                inputs = [flight.records.get(name) for name in stage.inputs]
                contents = [record.content if record and record.status.done else "" for record in inputs]
                self._start(Task(flight, stage, item_version(stage, flight.item, contents)))

    def _start(self, task: Task) -> None:
        for name in task.stage.inputs:
            record = task.flight.records.get(name)
            if record is None or not record.status.done:
                self._block(task, name, record)
                return
        current = self._records.get((task.media_id, task.stage.name))
        if current and current.version == task.version and current.status.done:
            self._settle(task, How.REUSED, current)
            return
        # Items with the same bytes have the same version: one leads, the others copy what it makes.
        key = (task.stage.name, task.version)
        if key in self._leaders:
            self._leaders[key][1].append(task)
            return
        self._leaders[key] = (task, [])
        self._recorder.want(task)

    def closed(self, closing: Closing, answer: Outcome | LostClaim) -> None:
        """A task has ended, and this is what the records say of it."""
        if isinstance(answer, Withdrawn):
            self._withdraw(closing.task, answer)
        elif isinstance(answer, LostClaim):
            self._busy(closing.task)
        else:
            self._settle(closing.task, closing.how, answer, closing.product)

    def claimed(self, task: Task, found: Claim | Outcome | LostClaim) -> Claim | None:
        """What a task has that was to be claimed: a claim, or else it is settled by what is there instead."""
        if isinstance(found, Withdrawn):
            self._withdraw(task, found)
        elif isinstance(found, LostClaim):
            self._busy(task)
        elif isinstance(found, Outcome):
            held = How.BUSY if found.status is Status.RUNNING else How.HELD
            self._settle(task, How.REUSED if found.status.done else held, found)
        else:
            return found
        return None

    def _busy(self, task: Task) -> None:
        record = self._recorder.current(task)
        if record is None:
            self._withdraw(task, Withdrawn(f"{task.media_id} was purged"))
        else:
            self._settle(task, How.BUSY, record)

    def _withdraw(self, task: Task, error: Withdrawn) -> None:
        """The upload is gone: settle the task without a record, and leave no file of a purged item behind."""
        if task.claim is not None:
            self._store.delete(task.stage.name, task.media_id)
        gone = Outcome(task.media_id, task.stage.name, task.version, "", Status.RETRYABLE, 0, 0, error=str(error))
        self._settle(task, How.WITHDRAWN, gone)

    def _block(self, task: Task, name: str, record: Outcome | None) -> None:
        try:
            blocked = self._recorder.block(task, *why_blocked(name, record))
        except Withdrawn as error:
            self._withdraw(task, error)
        except LostClaim:
            self._busy(task)
        else:
            self._settle(task, How.BLOCKED, blocked)

    def _settle(self, task: Task, how: How, outcome: Outcome, product: Product | None = None) -> None:
        flight, name = task.flight, task.stage.name
        self._recorder.settled(task)
        task.answers = {}
        flight.records[name] = outcome
        facts, previews = (product.facts, product.previews) if product else ({}, {})
        self._said.append(OutcomeCommitted(Result(task.media_id, name, how, outcome, facts, previews)))
        leader, followers = self._leaders.get((name, task.version), (None, []))
        if leader is task:
            del self._leaders[name, task.version]
            for follower in followers:
                self._start(follower)
        self._start_ready(flight)
        if all(other.name in flight.records for other in self._stages if other.memo == task.stage.memo):
            flight.memos[task.stage.memo].clear()  # a decoded film does not wait for its transcript
        if not flight.open and all(stage.name in flight.records for stage in self._stages):
            self._land(flight)

    def _land(self, flight: Flight) -> None:
        if self._flights.pop(flight.item.media_id, None) is not None:
            self._said.append(ItemFinished(flight.item.media_id))
