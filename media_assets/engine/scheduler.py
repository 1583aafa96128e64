"""One batch: what is in flight, what may run next, and what follows from each end.

Everything here runs in the caller's thread, the coordinator's. A claimed task goes this way:

    copied from a twin with the same version, or: prepare ─▶ infer* ─▶ assemble and write ─▶ ended
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from media_assets.engine.calls import Calls, Job, Made
from media_assets.engine.contract import Inputs, MediaItem, Prepared, Stage, Unit
from media_assets.engine.events import (
    BatchFinished,
    BatchInferred,
    BatchStarted,
    Event,
    How,
    InferenceBegun,
    ItemClaimed,
    StillWorking,
    WorkDone,
)
from media_assets.engine.executors import Ended, Executor, Hung
from media_assets.engine.flights import Flights
from media_assets.engine.inference import Answers, Inference
from media_assets.engine.micro_batches import Asked, MicroBatches
from media_assets.engine.recorder import COMMIT_S, Closing, Recorder, Task
from media_assets.engine.verdicts import cost_of, hang_of, no_answer
from resources.errors import Failure, Internal, ModelTimeout, NotApplicable
from resources.files.derived import DerivedStore
from resources.records.outcome import Claim, Outcome, Status, failed, succeeded
from resources.settings import Engine

LANE_DEPTH = 2  # micro-batches handed to the inference lane: one running, one waiting
IN_FLIGHT = 24  # items in flight at least, where `engine.window` is not set
REPORT_S = 1.0  # time between two signs of life while nothing ends
MAX_HANGS = 3  # hung calls of one stage after which the rest of its items fail without being tried


class Scheduler:
    """Settles every stage of every item of a batch."""

    def __init__(
        self,
        stages: tuple[Stage[Any, Any], ...],
        items: Sequence[MediaItem],
        records: Mapping[tuple[str, str], Outcome],
        store: DerivedStore,
        recorder: Recorder,
        calls: Calls,
        inference: Inference,
        executor: Executor,
        settings: Engine,
        device: str,
        scale: int,
        emit: Callable[[Event], None],
    ) -> None:
        self._store = store
        self._recorder = recorder
        self._calls = calls
        self._inference = inference
        self._executor = executor
        self._settings = settings
        self._device = device
        self._emit = emit
        self._waiting = deque(items)
        self._flights = Flights(stages, records, store, recorder)
        self._ready: deque[Task] = deque()
        self._units = MicroBatches(stages, scale)
        # Items of one unit each keep the inference lane busy when one more micro-batch is in preparation.
        filling = (LANE_DEPTH + 1) * self._units.largest
        self._window = settings.window or max(IN_FLIGHT, settings.prepare_threads, filling)
        self._asked: set[str] = set()
        self._hangs = Counter[str]()
        self._given_up: dict[str, Failure] = {}
        self._previews = Counter[str]()
        self._working = self._inferring = 0

    def run(self) -> None:
        """Drive the batch to its end."""
        self._emit(BatchStarted(len(self._waiting)))
        while True:
            self._advance()
            self._flights.report(self._emit)
            if not (self._flights or self._waiting):
                break
            if self._is_idle():
                if self._ready or self._can_admit() or self._recorder.has_news():
                    continue
                raise RuntimeError("the batch engine has items in flight but nothing to do")
            ends = self._executor.finished(COMMIT_S if self._recorder.has_news() else REPORT_S)
            for end in ends:
                end.then(end)
            if not ends:
                self._emit(StillWorking())
            self._dispatch()
        self._emit(BatchFinished())

    # -- what may run next --------------------------------------------------------------------------------

    def _can_admit(self) -> bool:
        return bool(self._waiting) and len(self._flights) < self._window

    def _has_room(self) -> bool:
        return self._units.unanswered < self._settings.max_units

    def _advance(self) -> None:
        while self._can_admit() and self._has_room():
            self._flights.admit(self._waiting.popleft())
        self._dispatch()
        while self._recorder.has_news() and self._is_due():
            self._record()
            self._dispatch()

    def _is_due(self) -> bool:
        """Whether to write down what has ended: a thread may run out of work, or it has been a while."""
        is_hungry = not self._ready and self._working <= self._settings.prepare_threads
        return is_hungry or self._is_idle() or self._recorder.is_due()

    def _dispatch(self) -> None:
        """Keep the background threads busy."""
        while self._ready and self._working <= self._settings.prepare_threads and self._has_room():
            self._prepare(self._ready.popleft())
        while self._inferring < LANE_DEPTH and (name := self._units.fullest(self._is_idle())) is not None:
            self._infer(name)

    def _is_idle(self) -> bool:
        return self._working + self._inferring == 0

    def _begin(self, task: Task, claim: Claim) -> None:
        self._emit(ItemClaimed(task.media_id, task.stage.name, claim.attempts))
        wants = self._previews[task.stage.name] < self._settings.previews_per_run
        self._previews[task.stage.name] += wants
        memo = task.flight.memos[task.stage.memo]
        inputs = Inputs(task.flight.item, self._store, task.version, self._flights.selected, wants, memo)
        twin = claim.twin if task.stage.inputs else None
        task.job = Job(task.stage, inputs)
        if twin is not None:
            self._submit(task, partial(self._calls.copy, task.job, twin), partial(self._copied, twin))
        else:
            self._ready.append(task)

    # -- calls and their ends -----------------------------------------------------------------------------

    def _submit(self, task: Task, call: Callable[[], Any], then: Callable[[Task, Ended[Any]], None]) -> None:
        """Have a call of the work lane made for the task, and then what follows."""
        self._working += 1

        def ended(end: Ended[Any]) -> None:
            self._working -= 1
            self._spend(task, end.seconds)
            then(task, end)

        self._executor.submit("work", call, ended)

    def _copied(self, twin: str, task: Task, end: Ended[Made]) -> None:
        if end.value is not None:
            self._made(task, end.value, twin)
        elif isinstance(end.error, Hung):
            self._fail(task, self._failure_of(task, end.error))
        else:  # the twin's file may be gone; its own work remains possible
            self._ready.append(task)

    def _prepare(self, task: Task) -> None:
        if (failure := self._given_up.get(task.stage.name)) is not None:
            self._fail(task, failure)
        else:
            self._submit(task, partial(self._calls.prepare, task.work), self._prepared)

    def _prepared(self, task: Task, end: Ended[tuple[Prepared[Any], Made | None]]) -> None:
        if isinstance(end.error, NotApplicable):
            self._submit(task, partial(self._calls.make_empty, task.work), partial(self._emptied, str(end.error)))
        elif end.value is None:
            self._fail(task, self._failure_of(task, end.error))
        elif (made := end.value[1]) is not None:
            self._made(task, made)
        else:
            self._queue(task, end.value[0].units)

    def _emptied(self, reason: str, task: Task, end: Ended[Made]) -> None:
        if end.value is None:
            self._fail(task, self._failure_of(task, end.error))
            return
        cost = cost_of(task, self._device, bytes_out=end.value.bytes_out)
        ending = succeeded(task.claimed, Status.NOT_APPLICABLE, task.version, cost, reason)
        self._recorder.close(Closing(task, How.COMPUTED, ending, end.value.product))

    def _queue(self, task: Task, units: Sequence[Unit[Any]]) -> None:
        if len({unit.id for unit in units}) < len(units):
            self._fail(task, Failure.of(Internal(f"{task.stage.name} prepared units that share an ID.")))
            return
        task.units = len(units)
        self._units.add(task, units)

    def _infer(self, name: str) -> None:
        units = self._units.take(name)
        if (failure := self._given_up.get(name)) is not None:
            self._answered(units, dict.fromkeys(units, failure))
            return
        stage = next(iter(units.values()))[0].stage
        payload = [replace(unit, id=key) for key, (_, unit) in units.items()]
        self._emit(InferenceBegun(name, len(units), name not in self._asked))
        self._asked.add(name)
        self._inferring += 1
        call = partial(self._inference.answer, stage, payload)
        self._executor.submit("inference", call, partial(self._inferred, stage, units))

    def _inferred(self, stage: Stage[Any, Any], units: Asked, end: Ended[Answers]) -> None:
        self._inferring -= 1
        share = end.seconds / sum(unit.cost for _, unit in units.values())
        for task, unit in units.values():
            task.seconds += share * unit.cost
        self._emit(WorkDone(stage.name, end.seconds))
        self._emit(BatchInferred(stage.name, len(units)))
        if end.value is not None:
            if end.value.fitting is not None:
                self._units.shrink(stage.name, end.value.fitting)
            self._answered(units, end.value.by_unit)
        elif isinstance(end.error, Hung):
            failure = self._hang(stage, no_answer(stage, self._settings.infer_timeout_s))
            self._answered(units, dict.fromkeys(units, failure))
        elif end.error is not None:
            self._answered(units, dict.fromkeys(units, Failure.of(end.error)))

    def _answered(self, units: Asked, answers: Mapping[str, Any]) -> None:
        self._units.answered(units)
        for key, (task, unit) in units.items():
            answer = task.answers[unit.id] = answers[key]
            if isinstance(answer, Failure) and task.failure is None:
                task.failure = answer
            if len(task.answers) < task.units:
                continue
            if task.failure is None:
                self._submit(task, partial(self._calls.make, task.work, task.answers), self._assembled)
            else:
                self._fail(task, task.failure)

    def _assembled(self, task: Task, end: Ended[Made]) -> None:
        if end.value is None:
            self._fail(task, self._failure_of(task, end.error))
        else:
            self._made(task, end.value)

    def _failure_of(self, task: Task, error: BaseException | None) -> Failure:
        """Failure of a call of the work lane."""
        if not isinstance(error, Hung):
            return Failure.of(error or Internal("A call ended with nothing."))
        task.work.is_left = True
        return self._hang(task.stage, hang_of(task, self._settings.infer_timeout_s))

    def _hang(self, stage: Stage[Any, Any], message: str) -> Failure:
        """Failure of a call that hung; a stage whose calls hang again and again is not called any more."""
        failure = Failure.of(ModelTimeout(message))
        self._hangs[stage.name] += 1
        if self._hangs[stage.name] >= MAX_HANGS:
            self._given_up[stage.name] = failure
        return failure

    def _spend(self, task: Task, seconds: float) -> None:
        task.seconds += seconds
        self._emit(WorkDone(task.stage.name, seconds))

    # -- outcomes -----------------------------------------------------------------------------------------

    def _made(self, task: Task, made: Made, twin: str | None = None) -> None:
        product = made.product
        cost = cost_of(task, self._device, made.rows, made.bytes_out, product.models if product else None, twin)
        content = product.content if product and product.content else task.version
        ending = succeeded(task.claimed, Status.OK, content, cost)
        self._recorder.close(Closing(task, How.COPIED if twin else How.COMPUTED, ending, product))

    def _fail(self, task: Task, failure: Failure) -> None:
        ending = failed(task.claimed, failure, cost_of(task, self._device), self._settings)
        self._recorder.close(Closing(task, How.COMPUTED, ending))

    def _record(self) -> None:
        """Write down what has ended and claim what is to begin, until nothing follows from it."""
        while self._recorder.has_news():
            for closing, answer in self._recorder.committed():
                self._flights.closed(closing, answer)
            for task, found in self._recorder.claims():
                if (claim := self._flights.claimed(task, found)) is not None:
                    self._begin(task, claim)
