"""Where background calls run: which thread makes a call, which one hears of its end, and what is done about a hang.

A call runs in one of two lanes: `work`, some threads, or `inference`, one. `then` never runs there: the coordinator
takes ends by `finished` and calls `then` in its own thread. So a call may touch what it was handed alone, and no lock
guards the coordinator's state.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any, Generic, Literal, Protocol, TypeAlias, TypeVar

from resources.compute import heartbeat
from resources.compute.heartbeat import Pulse
from resources.models.registry import waited_s

T = TypeVar("T")
LaneName = Literal["work", "inference"]


@dataclass(frozen=True, slots=True)
class Ended(Generic[T]):
    """The end of a call: its value or its error, and the seconds its work took."""

    then: Then[T]
    value: T | None
    error: BaseException | None
    seconds: float


Then: TypeAlias = Callable[[Ended[T]], None]
Call: TypeAlias = tuple[Callable[[], Any], Then[Any]]


class Executor(Protocol):
    """Where background calls run. Calls of the `inference` lane never overlap, except with one that hung.

    `hung` counts calls that gave no sign of life for too long and were answered with `Hung`; they may still run.
    """

    hung: int

    def submit(self, lane: LaneName, call: Callable[[], T], then: Then[T]) -> None:
        """Run `call` in a lane. Whoever takes its end from `finished` calls `then` with it."""

    def finished(self, within_s: float) -> list[Ended[Any]]:
        """Calls that have ended; waits for one, at most so many seconds."""

    def close(self) -> None:
        """Stop; calls not started are dropped."""


class Hung(Exception):
    """A call gave no sign of life in time."""


def timed(call: Callable[[], T], then: Then[T]) -> Ended[T]:
    """The end of a call, made here and now."""
    # Models that are loaded on the way are no item's cost: the planner takes what an item cost for what the next will.
    start = time.perf_counter() - waited_s()
    try:
        value = call()
    except BaseException as error:  # noqa: BLE001 - recorded on the item; nothing may escape a lane
        return Ended(then, None, error, time.perf_counter() - waited_s() - start)
    return Ended(then, value, None, time.perf_counter() - waited_s() - start)


class Serial:
    """Runs every call in the caller's thread, in order: the protocol without concurrency and without timeouts."""

    hung = 0

    def __init__(self) -> None:
        self._calls: deque[Call] = deque()

    def submit(self, lane: LaneName, call: Callable[[], T], then: Then[T]) -> None:  # noqa: ARG002 - one serves all
        """Queue the call."""
        self._calls.append((call, then))

    def finished(self, within_s: float) -> list[Ended[Any]]:  # noqa: ARG002 - it does not wait
        """Make the oldest queued call; an interrupt from the keyboard stops the batch."""
        ended = timed(*self._calls.popleft())
        if isinstance(ended.error, KeyboardInterrupt):
            raise ended.error
        return [ended]

    def close(self) -> None:
        """Drop what is queued."""
        self._calls.clear()


class Lane:
    """Runs calls in `width` daemon threads, in the order they came.

    Nothing can end a thread that hangs inside a library. It is left behind instead, and another one takes its place:
    its late answer is dropped, and as a daemon it does not keep the process alive.
    """

    def __init__(self, name: str, width: int, limit_s: float, ended: SimpleQueue[Ended[Any]]) -> None:
        self._name = name
        self._limit_s = limit_s
        self._ended = ended
        self._calls: SimpleQueue[Call | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._running: dict[threading.Thread, tuple[Then[Any], Pulse]] = {}
        self._threads: set[threading.Thread] = set()
        for _ in range(width):
            self._start()

    def submit(self, call: Callable[[], T], then: Then[T]) -> None:
        """Queue a call."""
        self._calls.put((call, then))

    def left_s(self) -> float:
        """Seconds until the first of the running calls is overdue, unless it gives a sign of life."""
        with self._lock:
            heard = min((pulse.at for _, pulse in self._running.values()), default=time.monotonic())
        return max(0.0, self._limit_s - (time.monotonic() - heard))

    def abandon(self) -> Ended[Any] | None:
        """Leave one overdue call behind, if there is one: the end it is given."""
        with self._lock:
            for thread, (then, pulse) in self._running.items():
                if time.monotonic() - pulse.at >= self._limit_s:
                    del self._running[thread]
                    self._threads.discard(thread)
                    self._start()
                    return Ended(then, None, Hung(), self._limit_s)
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
                self._running[me] = (call[1], heartbeat.begin())
            ended = timed(*call)
            with self._lock:
                if self._running.pop(me, None) is None:
                    return
                self._ended.put(ended)


class Threads:
    """`work` calls in some threads, `inference` calls in one; a call silent for `limit_s` seconds is left behind."""

    def __init__(self, workers: int, limit_s: float) -> None:
        self.hung = 0
        self._ended: SimpleQueue[Ended[Any]] = SimpleQueue()
        self._lanes: dict[LaneName, Lane] = {
            "work": Lane("work", workers, limit_s, self._ended),
            "inference": Lane("inference", 1, limit_s, self._ended),
        }

    def submit(self, lane: LaneName, call: Callable[[], T], then: Then[T]) -> None:
        """Run the call in its lane."""
        self._lanes[lane].submit(call, then)

    def finished(self, within_s: float) -> list[Ended[Any]]:
        """Wait for calls to end, or for one to be overdue."""
        end = time.monotonic() + within_s
        while True:
            wait_s = min(end - time.monotonic(), *(lane.left_s() for lane in self._lanes.values()))
            with suppress(Empty):
                return [self._ended.get(timeout=max(0.0, wait_s)), *self._more()]
            for lane in self._lanes.values():
                if (overdue := lane.abandon()) is not None:
                    self.hung += 1
                    return [overdue]
            if time.monotonic() >= end:
                return []

    def _more(self) -> Iterator[Ended[Any]]:
        with suppress(Empty):
            while True:
                yield self._ended.get_nowait()

    def close(self) -> None:
        """Wait for running calls; drop the others."""
        self.hung += sum(lane.close() for lane in self._lanes.values())
