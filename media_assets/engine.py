"""The batch engine: streams media items through stages, with every item ending in exactly one outcome.

One coordinator (the caller's thread) owns all state and all record writes. Background threads run
`prepare` and `assemble`; one inference thread runs `infer` on micro-batches that span items. They answer
with events, so no lock guards the state machine. Per item and stage:

    inputs settled ─▶ reused | held | busy | blocked | withdrawn (nothing runs)
                   ─▶ claimed ─▶ copied from a twin with the same version
                              ─▶ prepare ─▶ infer* ─▶ assemble and write ─▶ outcome committed ─▶ yielded

What has ended is committed in one statement, and what that makes possible is claimed in one: as soon as a background
thread could use more work, at the latest `COMMIT_S` after the last time. Small items thus cost few round trips, and
none waits for others.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from enum import StrEnum
from queue import Empty, SimpleQueue
from typing import Any, Protocol, TypeAlias

from media_assets.stage import Inputs, MediaItem, Memo, Prepared, Product, Stage, Unit
from media_assets.versions import item_version
from resources import heartbeat
from resources.errors import (
    Failure,
    Internal,
    ModelTimeout,
    NotApplicable,
    UpstreamFailed,
    is_out_of_memory,
    not_loaded,
)
from resources.faults import fault
from resources.heartbeat import Pulse
from resources.model_loads import ModelLoads
from resources.models.registry import waited_s
from resources.outcomes import (
    Claim,
    Cost,
    Ending,
    LostClaim,
    Outcome,
    OutcomeStore,
    Status,
    Withdrawn,
    failed,
    succeeded,
)
from resources.settings import Settings
from resources.storage import DerivedStore

LANE_DEPTH = 2  # micro-batches handed to the inference thread: one running, one waiting
IN_FLIGHT = 24  # items in flight at least, where `engine.window` is not set
COMMIT_S = 0.05  # time between two commits while there is enough to do
REPORT_S = 1.0  # time between two reports while nothing happens
_WRITING = "The writing of its output"
MAX_HANGS = 3  # hung calls of one stage after which the rest of its items fail without being tried

Call: TypeAlias = tuple[Any, Callable[[], Any]]


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


@dataclass(slots=True)
class Progress:
    """The state of a running batch; the engine keeps it, a reporter draws it.

    `settled` grows by one record per stage of an item, and how it came about; `seconds` are those spent so far, by
    asset, on items in flight too; `facts` are the sums of what the stages counted.
    """

    items: int
    items_done: int = 0
    settled: list[tuple[How, Outcome]] = field(default_factory=list)
    units: Counter[str] = field(default_factory=Counter)
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    facts: dict[str, Counter[str]] = field(default_factory=dict)
    running: str = ""


@dataclass(frozen=True, slots=True)
class Event:
    """What a background call answers with: the call's key, its value or its error, and the seconds its work took."""

    key: Any
    value: Any
    error: BaseException | None
    seconds: float


class Executor(Protocol):
    """Where background calls run. Calls of the `inference` lane never overlap, but with one that hung.

    `hung` counts calls that gave no sign of life for too long and were answered with `Hung`; they may still run.
    """

    hung: int

    def submit(self, lane: str, key: Any, call: Callable[[], Any]) -> None:
        """Run `call` in a lane (`work` or `inference`)."""

    def finished(self, within_s: float) -> list[Event]:
        """Calls that have finished; waits for one, at most so many seconds."""

    def close(self) -> None:
        """Stop; calls not started are dropped."""


class Hung(Exception):
    """A call gave no sign of life in time."""


def _timed(key: Any, call: Callable[[], Any]) -> Event:
    # Models that are loaded on the way are no item's cost: the planner takes what an item cost for what the next will.
    start = time.perf_counter() - waited_s()
    try:
        value = call()
    except BaseException as error:  # noqa: BLE001 - recorded on the item; nothing may escape a lane
        return Event(key, None, error, time.perf_counter() - waited_s() - start)
    return Event(key, value, None, time.perf_counter() - waited_s() - start)


class Serial:
    """Runs every call in the caller's thread, in order: the protocol without concurrency and without timeouts."""

    hung = 0

    def __init__(self) -> None:
        self._calls: deque[Call] = deque()

    def submit(self, lane: str, key: Any, call: Callable[[], Any]) -> None:  # noqa: ARG002 - one lane serves all
        """Queue the call."""
        self._calls.append((key, call))

    def finished(self, within_s: float) -> list[Event]:  # noqa: ARG002 - it does not wait
        """Run the oldest queued call; an interrupt from the keyboard stops the batch."""
        event = _timed(*self._calls.popleft())
        if isinstance(event.error, KeyboardInterrupt):
            raise event.error
        return [event]

    def close(self) -> None:
        """Drop what is queued."""
        self._calls.clear()


class Lane:
    """Runs calls in `width` daemon threads, in the order they came.

    Nothing can end a thread that hangs inside a library. It is left behind instead, and another one takes its place:
    its late answer is dropped, and as a daemon it does not keep the process alive.
    """

    def __init__(self, name: str, width: int, limit_s: float, events: SimpleQueue[Event]) -> None:
        self._name = name
        self._limit_s = limit_s
        self._events = events
        self._calls: SimpleQueue[Call | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._running: dict[threading.Thread, tuple[Any, Pulse]] = {}
        self._threads: set[threading.Thread] = set()
        for _ in range(width):
            self._start()

    def submit(self, key: Any, call: Callable[[], Any]) -> None:
        """Queue a call."""
        self._calls.put((key, call))

    def left_s(self) -> float:
        """Seconds until the first of the running calls is overdue, unless it gives a sign of life."""
        with self._lock:
            heard = min((pulse.at for _, pulse in self._running.values()), default=time.monotonic())
        return max(0.0, self._limit_s - (time.monotonic() - heard))

    def abandon(self) -> Event | None:
        """Leave one overdue call behind, if there is one: the event that answers it."""
        with self._lock:
            for thread, (key, pulse) in self._running.items():
                if time.monotonic() - pulse.at >= self._limit_s:
                    del self._running[thread]
                    self._threads.discard(thread)
                    self._start()
                    return Event(key, None, Hung(), self._limit_s)
        return None

    def close(self) -> int:
        """Drop the calls not begun and wait for those running; how many of them hang."""
        with suppress(Empty):
            while True:
                self._calls.get_nowait()
        for _ in self._threads:
            self._calls.put(None)
        for thread in self._threads:
            while thread.is_alive() and self._is_in_time(thread):
                thread.join(min(1.0, self._limit_s))
        return sum(thread.is_alive() for thread in self._threads)

    def _is_in_time(self, thread: threading.Thread) -> bool:
        with self._lock:
            _, pulse = self._running.get(thread, (None, None))
        return pulse is None or time.monotonic() - pulse.at < self._limit_s

    def _start(self) -> None:
        thread = threading.Thread(target=self._serve, name=self._name, daemon=True)
        self._threads.add(thread)
        thread.start()

    def _serve(self) -> None:
        me = threading.current_thread()
        while (call := self._calls.get()) is not None:
            with self._lock:
                self._running[me] = (call[0], heartbeat.begin())
            event = _timed(*call)
            with self._lock:
                if self._running.pop(me, None) is None:
                    return
                self._events.put(event)


class Threads:
    """`work` calls in some threads, `inference` calls in one; a call silent for `limit_s` seconds is left behind."""

    def __init__(self, workers: int, limit_s: float) -> None:
        self.hung = 0
        self._events: SimpleQueue[Event] = SimpleQueue()
        self._lanes = {
            "work": Lane("work", workers, limit_s, self._events),
            "inference": Lane("inference", 1, limit_s, self._events),
        }

    def submit(self, lane: str, key: Any, call: Callable[[], Any]) -> None:
        """Run the call in its lane."""
        self._lanes[lane].submit(key, call)

    def finished(self, within_s: float) -> list[Event]:
        """Wait for calls to finish, or for one to be overdue."""
        end = time.monotonic() + within_s
        while True:
            wait_s = min(end - time.monotonic(), *(lane.left_s() for lane in self._lanes.values()))
            with suppress(Empty):
                return [self._events.get(timeout=max(0.0, wait_s)), *self._more()]
            for lane in self._lanes.values():
                if (overdue := lane.abandon()) is not None:
                    self.hung += 1
                    return [overdue]
            if time.monotonic() >= end:
                return []

    def _more(self) -> Iterator[Event]:
        with suppress(Empty):
            while True:
                yield self._events.get_nowait()

    def close(self) -> None:
        """Wait for running calls; drop the others."""
        self.hung += sum(lane.close() for lane in self._lanes.values())


class Task:
    """One stage of one item within a batch."""

    __slots__ = (
        "answers",
        "carry",
        "claim",
        "doing",
        "failure",
        "flight",
        "inputs",
        "is_left",
        "seconds",
        "stage",
        "units",
        "version",
    )

    def __init__(self, flight: Flight, stage: Stage[Any, Any]) -> None:
        self.flight = flight
        self.stage = stage
        self.version = ""
        self.claim: Claim | None = None
        self.doing = ""
        self.inputs: Inputs | None = None
        self.units = 0
        self.answers: dict[str, Any] = {}
        self.failure: Failure | None = None
        self.carry: Any = None
        self.seconds = 0.0
        self.is_left = False

    @property
    def media_id(self) -> str:
        """ID of the item."""
        return self.flight.item.media_id


class Flight:
    """One item in flight: the records it has so far, and the stages still to settle."""

    __slots__ = ("item", "memos", "open", "records")

    def __init__(self, item: MediaItem, stages: Sequence[Stage[Any, Any]], records: dict[str, Outcome]) -> None:
        self.item = item
        self.records = records
        self.open = {stage.name: stage for stage in stages}
        self.memos = {stage.memo: Memo() for stage in stages}


class BatchEngine:
    """Runs a group's stages over a batch of media items, on a `device` whose memory holds `scale` micro-batches.

    `hung` counts calls that did not answer in time. Their threads may still hold memory and locks of the library
    they hang in: a process in which there are any should end after its batch.
    """

    def __init__(
        self,
        stages: Sequence[Stage[Any, Any]],
        store: DerivedStore,
        outcomes: OutcomeStore,
        settings: Settings,
        executor: Callable[[], Executor] | None = None,
        device: str = "cpu",
        scale: int = 1,
    ) -> None:
        self._stages = tuple(stages)
        self._store = store
        self._outcomes = outcomes
        self._settings = settings.engine
        self._executor = executor or (lambda: Threads(self._settings.prepare_threads, self._settings.infer_timeout_s))
        self._device = device
        self._scale = scale
        self.hung = 0

    def run(
        self,
        items: Sequence[MediaItem],
        run_id: str,
        report: Callable[[Progress], None] | None = None,
    ) -> Iterator[Result]:
        """Settle every stage of every item; yields each result once its record is committed.

        Closing the iterator early finishes running calls and gives unfinished items back. An error of
        the record database or a defect of the engine itself propagates; an item's error never does.
        """
        loads = self._outcomes.model_loads(run_id)
        with self._outcomes.lease(run_id) as lease, ExitStack() as announced:
            for models in {id(stage.models): stage.models for stage in self._stages}.values():
                announced.enter_context(models.announcing(loads.under_way))
            batch = _Batch(self, items, run_id, lease.liveness, report or _ignore, loads)
            try:
                yield from batch.results()
            finally:
                batch.close()
                self.hung += batch.executor.hung


class _Batch:
    """State of one `BatchEngine.run`; touched by the coordinator's thread alone."""

    def __init__(
        self,
        engine: BatchEngine,
        items: Sequence[MediaItem],
        run_id: str,
        alive: Any,
        report: Callable[[Progress], None],
        loads: ModelLoads,
    ) -> None:
        self.stages = engine._stages
        self.store = engine._store
        self.outcomes = engine._outcomes
        self.settings = engine._settings
        self.device = engine._device
        self.executor = engine._executor()
        self.run_id = run_id
        self.alive = alive
        self.report = report
        self.loads = loads
        self.selected = frozenset(stage.name for stage in self.stages)
        self.order = {stage.name: index for index, stage in enumerate(self.stages)}
        self.waiting = deque(items)
        self.records = self._load(items)
        self.flights: dict[str, Flight] = {}
        self.ready: deque[Task] = deque()
        self.queued: dict[str, deque[tuple[Task, Unit[Any]]]] = {stage.name: deque() for stage in self.stages}
        self.caps = {stage.name: stage.units_per_call(engine._scale) for stage in self.stages}
        # Items of one unit each keep the inference thread busy when one more micro-batch is in preparation.
        filling = (LANE_DEPTH + 1) * max(self.caps.values(), default=0)
        self.window = self.settings.window or max(IN_FLIGHT, self.settings.prepare_threads, filling)
        # An item that is alone in flight, for it may have killed its process, has one stage in flight.
        self.is_careful = self.window == 1
        self.loaded: dict[str, Failure | None] = {}
        self.hangs = Counter[str]()
        self.given_up: dict[str, Failure] = {}
        self.leaders: dict[tuple[str, str], tuple[Task, list[Task]]] = {}
        self.claiming: list[Task] = []
        self.claimed: dict[tuple[str, str], Claim] = {}
        self.ending: list[tuple[Task, How, Ending, Product | None]] = []
        self.previews = Counter[str]()
        self.identities: dict[str, tuple[str, ...]] = {}
        self.recorded_at = 0.0
        self.working = self.inferring = self.unanswered = 0
        self.settled: deque[Result] = deque()
        self.progress = Progress(items=len(items))

    def _load(self, items: Sequence[MediaItem]) -> dict[tuple[str, str], Outcome]:
        needed = {name for stage in self.stages for name in (stage.name, *stage.inputs)}
        return self.outcomes.load([item.media_id for item in items], sorted(needed))

    def results(self) -> Iterator[Result]:
        """Drive the batch to its end."""
        while True:
            self._advance()
            while self.settled:
                result = self.settled.popleft()
                self.report(self.progress)
                yield result
            if not (self.flights or self.waiting):
                return
            if self.working + self.inferring == 0:
                if self.settled or self.ready or self._can_admit():
                    continue
                raise RuntimeError("the batch engine has items in flight but nothing to do")
            for event in self.executor.finished(COMMIT_S if self._has_news() else REPORT_S):
                self._handle(event)
            self._dispatch()
            self.report(self.progress)

    def close(self) -> None:
        """Stop background work and give claims back."""
        self.executor.close()
        for claim in self.claimed.values():
            try:
                self.outcomes.release(claim)
            except Withdrawn:
                self.store.delete(claim.asset, claim.media_id)

    # -- scheduling -----------------------------------------------------------------------------------

    def _can_admit(self) -> bool:
        return bool(self.waiting) and len(self.flights) < self.window

    def _advance(self) -> None:
        while self._can_admit() and self._has_room():
            self._admit(self.waiting.popleft())
        self._dispatch()
        while self._has_news() and self._is_due():
            self._record()
            self._dispatch()

    def _has_news(self) -> bool:
        """Whether something has ended or may be claimed."""
        return bool(self.ending or (self.claiming and not (self.is_careful and self.claimed)))

    def _is_due(self) -> bool:
        """Whether to write down what has ended: a thread may run out of work, or it has been a while."""
        is_hungry = not self.ready and self.working <= self.settings.prepare_threads
        return is_hungry or self.working + self.inferring == 0 or time.monotonic() - self.recorded_at >= COMMIT_S

    def _dispatch(self) -> None:
        """Keep the background threads busy."""
        while self.ready and self.working <= self.settings.prepare_threads and self._has_room():
            self._prepare(self.ready.popleft())
        while self.inferring < LANE_DEPTH and (name := self._fullest()) is not None:
            self._infer(name)

    def _has_room(self) -> bool:
        return self.unanswered < self.settings.max_units

    def _fullest(self) -> str | None:
        """The most downstream stage with a full micro-batch; a partial one only when nothing can fill it."""
        names: list[str] = [stage.name for stage in reversed(self.stages) if self.queued[stage.name]]
        for name in names:
            if len(self.queued[name]) >= self.caps[name]:
                return name
        if names and self.working == 0 and self.inferring == 0:
            return max(names, key=lambda name: len(self.queued[name]))
        return None

    def _admit(self, item: MediaItem) -> None:
        needed = {name for stage in self.stages for name in stage.inputs} - self.selected
        records = {n: r for n in needed if (r := self.records.get((item.media_id, n))) is not None}
        flight = Flight(item, self.stages, records)
        self.flights[item.media_id] = flight
        self._start_ready(flight)

    def _start_ready(self, flight: Flight) -> None:
        """Start every stage of the item whose inputs are settled."""
        for stage in list(flight.open.values()):
            settled = all(name in flight.records for name in stage.inputs if name in self.selected)
            if settled and stage.name in flight.open:
                del flight.open[stage.name]
                self._start(Task(flight, stage))

    def _start(self, task: Task) -> None:
        flight, stage = task.flight, task.stage
        inputs = [flight.records.get(name) for name in stage.inputs]
        contents = [record.content if record and record.status.done else "" for record in inputs]
        task.version = item_version(stage, flight.item, contents)
        for name, record in zip(stage.inputs, inputs, strict=True):
            if record is None or not record.status.done:
                self._block(task, name, record)
                return
        current = self.records.get((task.media_id, stage.name))
        if current and current.version == task.version and current.status.done:
            self._settle(task, How.REUSED, current)
            return
        # Items with the same bytes have the same version: one leads, the others copy what it makes.
        key = (stage.name, task.version)
        if key in self.leaders:
            self.leaders[key][1].append(task)
            return
        self.leaders[key] = (task, [])
        self.claiming.append(task)

    def _claim(self) -> None:
        """Claim what waits for it."""
        some = 1 if self.is_careful else len(self.claiming)
        tasks, self.claiming = self.claiming[:some], self.claiming[some:]
        wanted = [(task.media_id, task.stage.name, task.version) for task in tasks]
        for task, answer in zip(tasks, self.outcomes.claim_many(wanted, self.run_id, self.alive), strict=True):
            if isinstance(answer, Withdrawn):
                self._withdraw(task, answer)
            elif isinstance(answer, LostClaim):
                self._busy(task)
            elif isinstance(answer, Outcome):
                held = How.BUSY if answer.status is Status.RUNNING else How.HELD
                self._settle(task, How.REUSED if answer.status.done else held, answer)
            else:
                self._begin(task, answer)

    def _begin(self, task: Task, claim: Claim) -> None:
        task.claim = claim
        self.claimed[task.media_id, task.stage.name] = claim
        wants = self.previews[task.stage.name] < self.settings.previews_per_run
        self.previews[task.stage.name] += wants
        memo = task.flight.memos[task.stage.memo]
        task.inputs = Inputs(task.flight.item, self.store, task.version, self.selected, wants, memo)
        if claim.twin is not None and task.stage.inputs:
            self._copy(task, claim.twin)
        else:
            self.ready.append(task)

    def _busy(self, task: Task) -> None:
        record = self.outcomes.load([task.media_id], [task.stage.name]).get((task.media_id, task.stage.name))
        if record is None:  # only a purge deletes records
            self._withdraw(task, Withdrawn(f"{task.media_id} was purged"))
            return
        self._settle(task, How.BUSY, record)

    def _withdraw(self, task: Task, error: Withdrawn) -> None:
        """The upload is gone: settle the task without a record, and leave no file of a purged item behind."""
        if task.claim is not None:
            self.store.delete(task.stage.name, task.media_id)
        gone = Outcome(task.media_id, task.stage.name, task.version, "", Status.RETRYABLE, 0, 0, error=str(error))
        self._settle(task, How.WITHDRAWN, gone)

    def _block(self, task: Task, name: str, record: Outcome | None) -> None:
        if record is None:
            cause, retryable = f"{name} has not been made for this item. Materialize {name} first.", True
        elif record.status is Status.RUNNING:
            cause, retryable = f"{name} is in flight in run {record.run_id}.", True
        else:
            root = record.error or ""
            cause = (
                root if record.error_class == UpstreamFailed.code else f"{name} failed ({record.error_class}): {root}"
            )
            retryable = record.status is Status.RETRYABLE
        try:
            blocked = self.outcomes.block(task.media_id, task.stage.name, task.version, cause, retryable, self.run_id)
        except Withdrawn as error:
            self._withdraw(task, error)
            return
        except LostClaim:
            self._busy(task)
            return
        self._settle(task, How.BLOCKED, blocked)

    # -- background calls -------------------------------------------------------------------------------

    def _copy(self, task: Task, twin: str) -> None:
        self.working += 1
        self.executor.submit("work", (self._copied, task, twin), lambda: self._copy_tables(task, twin))

    def _copy_tables(self, task: Task, twin: str) -> tuple[int, int]:
        """Bytes and rows copied."""
        task.doing, name = "The copying from its twin", task.stage.name
        written = self.store.copy(name, twin, task.media_id, task.stage.sides)
        record = self.outcomes.load([twin], [name]).get((twin, name))
        return written, record.rows or 0 if record else 0

    def _prepare(self, task: Task) -> None:
        assert task.inputs is not None
        if (failure := self.given_up.get(task.stage.name)) is not None:
            self._fail(task, failure)
            return
        self.working += 1
        inputs = task.inputs
        self.executor.submit("work", (self._prepared, task), lambda: self._first(task, inputs))

    def _first(self, task: Task, inputs: Inputs) -> tuple[Prepared[Any], tuple[Product, int] | None]:
        """The stage's preparation; where there is nothing to infer, its product and the bytes written as well."""
        task.doing = "Its preparation"
        prepared = task.stage.prepare(inputs)
        if prepared.units:
            return prepared, None
        task.carry = prepared.carry
        return prepared, self._make(task)

    def _assemble(self, task: Task) -> None:
        self.working += 1
        self.executor.submit("work", (self._assembled, task), lambda: self._make(task))

    def _make(self, task: Task) -> tuple[Product, int]:
        assert task.inputs is not None
        task.doing = _WRITING
        product = task.stage.assemble(task.inputs, task.carry, task.answers)
        if task.is_left:  # its claim is gone; a file written now could outlive a purge
            raise Hung
        return product, self._write(task, product)

    def _write(self, task: Task, product: Product) -> int:
        written = 0
        for side in task.stage.sides:
            written += self.store.write(task.stage.name, task.media_id, product.sides[side], side)
        fault("engine.between_files")
        if not product.table.schema.equals(task.stage.schema):
            raise Internal(f"{task.stage.name} made a table that is not of its schema.")
        return written + self.store.write(task.stage.name, task.media_id, product.table)

    def _infer(self, name: str) -> None:
        queue = self.queued[name]
        batch = [queue.popleft() for _ in range(min(len(queue), self.caps[name]))]
        stage = batch[0][0].stage
        # IDs are unique within an item only; the micro-batch spans items.
        units = {f"{task.media_id}/{unit.id}": (task, unit) for task, unit in batch}
        payload = [replace(unit, id=key) for key, (_, unit) in units.items()]
        self.inferring += 1
        self.progress.running = name if name in self.loaded else f"loading the models of {name}"
        self.executor.submit("inference", (self._inferred, stage, units), lambda: self._answer(stage, payload))

    def _answer(self, stage: Stage[Any, Any], units: list[Unit[Any]]) -> Mapping[str, Any]:
        """In the inference thread: an answer for every unit, whatever the model does."""
        if stage.name not in self.loaded:
            with self.loads.under_way():
                self.loaded[stage.name] = _loading_failure(stage)
        broken = self.loaded[stage.name] or self.given_up.get(stage.name)
        if broken is not None:
            return {unit.id: broken for unit in units}
        try:
            answers = dict(stage.infer(units))
        except BaseException as error:  # noqa: BLE001 - isolated to the unit that causes it
            if len(units) == 1:
                return {units[0].id: Failure.of(error)}
            half = (len(units) + 1) // 2
            if is_out_of_memory(error):
                self.caps[stage.name] = max(1, min(self.caps[stage.name], half))
                _release_device_memory()
            return {**self._answer(stage, units[:half]), **self._answer(stage, units[half:])}
        for unit in units:
            if unit.id not in answers:
                answers[unit.id] = Failure.of(Internal(f"{stage.name} gave no answer for {unit.id}."))
        return answers

    # -- events ---------------------------------------------------------------------------------------

    def _handle(self, event: Event) -> None:
        handler, *rest = event.key
        handler(event, *rest)

    def _prepared(self, event: Event, task: Task) -> None:
        self.working -= 1
        self._spend(task, event.seconds)
        if isinstance(event.error, NotApplicable):
            self._not_applicable(task, str(event.error))
        elif event.error is not None:
            self._fail(task, self._failure_of(task, event.error))
        else:
            prepared, made = event.value
            if made is not None:
                self._made(task, *made)
                return
            task.carry = prepared.carry
            task.units = len(prepared.units)
            self.unanswered += task.units
            if len({unit.id for unit in prepared.units}) < task.units:
                self.unanswered -= task.units
                self._fail(task, Failure.of(Internal(f"{task.stage.name} prepared units that share an ID.")))
                return
            self.queued[task.stage.name].extend((task, unit) for unit in prepared.units)

    def _inferred(self, event: Event, stage: Stage[Any, Any], units: Mapping[str, tuple[Task, Unit[Any]]]) -> None:
        self.inferring -= 1
        self.unanswered -= len(units)
        self.progress.units[stage.name] += len(units)
        share = event.seconds / sum(unit.cost for _, unit in units.values())
        failure = None
        if isinstance(event.error, Hung):
            failure = self._hang(stage, _no_answer(stage, self.settings.infer_timeout_s))
        elif event.error is not None:
            failure = Failure.of(event.error)
        for key, (task, unit) in units.items():
            answer = failure or event.value[key]
            self._spend(task, share * unit.cost)
            task.answers[unit.id] = answer
            if isinstance(answer, Failure) and task.failure is None:
                task.failure = answer
            if len(task.answers) == task.units:
                if task.failure is None:
                    self._assemble(task)
                else:
                    self._fail(task, task.failure)

    def _spend(self, task: Task, seconds: float) -> None:
        task.seconds += seconds
        self.progress.seconds[task.stage.name] += seconds

    def _failure_of(self, task: Task, error: BaseException) -> Failure:
        """Failure of a `work` call."""
        if not isinstance(error, Hung):
            return Failure.of(error)
        task.is_left = True
        limit_s = self.settings.infer_timeout_s
        return self._hang(task.stage, f"{task.doing} for {task.stage.name} gave no sign of life for {limit_s:g} s.")

    def _hang(self, stage: Stage[Any, Any], message: str) -> Failure:
        """Failure of a call that hung; a stage whose calls hang again and again is not called any more."""
        failure = Failure.of(ModelTimeout(message))
        self.hangs[stage.name] += 1
        if self.hangs[stage.name] >= MAX_HANGS:
            self.given_up[stage.name] = failure
        return failure

    def _assembled(self, event: Event, task: Task) -> None:
        self.working -= 1
        self._spend(task, event.seconds)
        if event.error is not None:
            self._fail(task, self._failure_of(task, event.error))
            return
        self._made(task, *event.value)

    def _made(self, task: Task, product: Product, written: int) -> None:
        cost = self._cost(task, product.table.num_rows, written, product.models)
        self._succeed(task, How.COMPUTED, Status.OK, product.content or task.version, cost, product)

    def _copied(self, event: Event, task: Task, twin: str) -> None:
        self.working -= 1
        self._spend(task, event.seconds)
        if isinstance(event.error, Hung):
            self._fail(task, self._failure_of(task, event.error))
            return
        if event.error is not None:  # the twin's file may be gone; its own work remains possible
            self.ready.append(task)
            return
        written, rows = event.value
        cost = replace(self._cost(task, rows=rows, bytes_out=written), copied_from=twin)
        self._succeed(task, How.COPIED, Status.OK, task.version, cost, None)

    def _not_applicable(self, task: Task, reason: str) -> None:
        empty = Product(
            task.stage.schema.empty_table(),
            {side: schema.empty_table() for side, schema in task.stage.side_schemas.items()},
        )
        self.working += 1
        task.doing = _WRITING
        self.executor.submit("work", (self._emptied, task, empty, reason), lambda: self._write(task, empty))

    def _emptied(self, event: Event, task: Task, empty: Product, reason: str) -> None:
        self.working -= 1
        self._spend(task, event.seconds)
        if event.error is not None:
            self._fail(task, self._failure_of(task, event.error))
            return
        cost = self._cost(task, bytes_out=event.value)
        self._succeed(task, How.COMPUTED, Status.NOT_APPLICABLE, task.version, cost, empty, reason)

    # -- outcomes -------------------------------------------------------------------------------------

    def _cost(self, task: Task, rows: int = 0, bytes_out: int = 0, answered: Sequence[str] | None = None) -> Cost:
        name = task.stage.name
        if answered is None and name not in self.identities:
            self.identities[name] = tuple(spec.identity for spec in task.stage.specs())
        models = ", ".join(self.identities[name] if answered is None else answered) or None
        device = task.stage.answered_on(task.media_id) or (self.device if models else "cpu")
        return Cost(task.seconds, task.units, rows, bytes_out, device, models)

    def _succeed(
        self,
        task: Task,
        how: How,
        status: Status,
        content: str,
        cost: Cost,
        product: Product | None,
        note: str | None = None,
    ) -> None:
        assert task.claim is not None
        self.ending.append((task, how, succeeded(task.claim, status, content, cost, note), product))

    def _fail(self, task: Task, failure: Failure) -> None:
        assert task.claim is not None
        self.ending.append((task, How.COMPUTED, failed(task.claim, failure, self._cost(task), self.settings), None))

    def _record(self) -> None:
        """Write down what has ended and claim what is to begin, until nothing follows from it."""
        while self._has_news():
            if self.ending:
                self._end()
            else:
                self._claim()
        self.recorded_at = time.monotonic()

    def _end(self) -> None:
        """Commit what has ended."""
        ending, self.ending = self.ending, []
        for _ in ending:
            fault("engine.before_commit")
        answers = self.outcomes.end([entry for _, _, entry, _ in ending])
        for (task, how, _, product), answer in zip(ending, answers, strict=True):
            if isinstance(answer, Withdrawn):
                self._withdraw(task, answer)
            elif isinstance(answer, LostClaim):
                self._busy(task)
            else:
                fault("engine.after_commit")
                self._settle(task, how, answer, product)

    def _settle(self, task: Task, how: How, outcome: Outcome, product: Product | None = None) -> None:
        flight, name = task.flight, task.stage.name
        self.claimed.pop((task.media_id, name), None)
        task.answers.clear()
        flight.records[name] = outcome
        self.progress.settled.append((how, outcome))
        facts = product.facts if product else {}
        previews = product.previews if product else {}
        sums = self.progress.facts.setdefault(name, Counter())
        sums.update({fact: value for fact, value in facts.items() if isinstance(value, int)})
        self.settled.append(Result(task.media_id, name, how, outcome, facts, previews))
        for follower in self._followers(task):
            self._start(follower)
        self._start_ready(flight)
        if all(other.name in flight.records for other in self.stages if other.memo == task.stage.memo):
            flight.memos[task.stage.memo].clear()  # a decoded film does not wait for its transcript
        if not flight.open and all(stage.name in flight.records for stage in self.stages):
            self._land(flight)

    def _followers(self, task: Task) -> list[Task]:
        key = (task.stage.name, task.version)
        leader, followers = self.leaders.get(key, (None, []))
        if leader is not task:
            return []
        del self.leaders[key]
        return followers

    def _land(self, flight: Flight) -> None:
        if self.flights.pop(flight.item.media_id, None) is not None:
            self.progress.items_done += 1


def _ignore(_: Progress) -> None:
    """The reporter of a batch that nobody watches."""


def _no_answer(stage: Stage[Any, Any], limit_s: float) -> str:
    models = ", ".join(spec.identity for spec in stage.specs())
    return f"{stage.name}{f' ({models})' if models else ''} gave no answer within {limit_s:g} s."


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
