"""Model servers: Ray actors that hold one model each.

A server batches the units of all callers, loads its model once, bounds every call of the model, and leaves when
nobody asks for it. What it serves is opaque to it: an object with `load` and `infer`, made from a pickled recipe.
Everything here runs inside Ray's worker processes; callers use `resources.compute.serving`.
"""

from __future__ import annotations

import asyncio
import os
import pickle
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from resources.errors import (
    Failure,
    Internal,
    MediaError,
    ModelTimeout,
    ModelUnavailable,
    StorageFailed,
    is_out_of_memory,
    printable,
)

FAREWELL_S = 0.5  # answers on their way get out before the process ends
RETIRED_IDLE_S = 2.0  # a replaced version goes as soon as it has been quiet for this long


class Model(Protocol):
    """What a server serves. `infer` is called in one thread alone, after `load`."""

    device: str
    micro_batch: int

    @property
    def loads(self) -> Mapping[str, int]:
        """How often each model was loaded in this process, by identity."""

    def load(self) -> None:
        """Load the model."""

    def warm_up(self) -> None:
        """Let the model answer once, so that the first caller does not wait for it."""

    def infer(self, units: Sequence[Any]) -> Mapping[str, Any]:
        """Answers by the `id` of each unit."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """A model to serve: its slot (what it is for), the digest of its version, and how it is made, pickled."""

    slot: str
    digest: str
    memory_bytes: int
    pickled: bytes

    @property
    def name(self) -> str:
        """Name of the server's actor."""
        return f"{self.slot}:{self.digest[:16]}"


@dataclass(frozen=True, slots=True)
class Limits:
    """How a server runs; see `Serving` in the settings for the meaning and units."""

    cpus: float
    gpus: float
    max_wait_s: float
    timeout_s: float
    load_timeout_s: float
    idle_s: float
    memory_bytes: int | None


@dataclass(frozen=True, slots=True)
class Status:
    """What a server says of itself."""

    slot: str
    calls: int
    leaving: bool
    quiet_s: float
    memory_bytes: int
    batches: int
    units: int
    loads: Mapping[str, int]
    pid: int


@dataclass(frozen=True, slots=True)
class Answer:
    """Answers by unit ID, or the error of the call, and the device they come from."""

    answers: Mapping[str, Any]
    error: Exception | None
    device: str


class Leaving(Exception):
    """The server is on its way out; ask for another one."""


@dataclass(eq=False, slots=True)
class _Call:
    """One caller's units; settled when the last of them is answered, or with the first error."""

    open: int
    future: asyncio.Future[dict[str, Any]]
    answers: dict[str, Any] = field(default_factory=dict)

    def answer(self, unit_id: str, answer: Any) -> None:
        self.answers[unit_id] = answer
        self.settle_one()

    def settle_one(self) -> None:
        self.open -= 1
        if not self.open and not self.future.done():
            self.future.set_result(self.answers)

    def fail(self, error: Exception) -> None:
        if not self.future.done():
            self.future.set_exception(error)


class ModelServer:
    """One model behind a queue: the body of an async Ray actor. All state belongs to its event loop."""

    def __init__(self, recipe: Recipe, limits: Limits) -> None:
        self._recipe = recipe
        self._limits = limits
        self._idle_s = limits.idle_s
        self._queue: deque[tuple[_Call, Any]] = deque()
        self._calls: set[_Call] = set()
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, "model")
        self._loading: asyncio.Task[Model] | None = None
        self._main: asyncio.Task[None] | None = None
        self._model: Model | None = None
        self._cap = 1
        self._leaving = False
        self._quiet_since = time.monotonic()
        self._batches = self._units = 0

    # -- what callers ask ----------------------------------------------------------------------------------

    async def ready(self) -> Exception | None:
        """Wait until the model is loaded; the error when it cannot be."""
        try:
            await self._loaded()
        except Exception as error:  # noqa: BLE001 - classed, and told to every caller
            return portable(error)
        return None

    async def call(self, units: Sequence[Any]) -> Answer:
        """Answers for these units, which may share micro-batches with those of other callers."""
        if self._leaving:
            return Answer({}, Leaving(), "")
        call = _Call(len(units), asyncio.get_running_loop().create_future())
        self._calls.add(call)
        try:
            model = await self._loaded()
            self._queue.extend((call, unit) for unit in units)
            self._arrived.set()
            return Answer(await call.future if units else {}, None, model.device)
        except Exception as error:  # noqa: BLE001 - classed, and told to the caller
            return Answer({}, portable(error), "")
        finally:
            self._calls.discard(call)
            self._quiet_since = time.monotonic()

    async def status(self) -> Status:
        """A sign of life; answered while the model works."""
        return Status(
            self._recipe.slot,
            len(self._calls),
            self._leaving,
            time.monotonic() - self._quiet_since,
            self._recipe.memory_bytes,
            self._batches,
            self._units,
            dict(self._model.loads) if self._model else {},
            os.getpid(),
        )

    async def retire(self) -> None:
        """Go as soon as nobody asks any more: another version has taken the place."""
        self._idle_s = min(self._idle_s, RETIRED_IDLE_S)
        self._arrived.set()

    async def leave_if_quiet(self) -> bool:
        """Take no further call, unless one is under way."""
        if not self._calls:
            self._leaving = True
        return self._leaving

    # -- the model -----------------------------------------------------------------------------------------

    async def _loaded(self) -> Model:
        if self._loading is None:
            self._loading = asyncio.create_task(self._load())
        return await asyncio.shield(self._loading)

    async def _load(self) -> Model:
        try:
            model: Model = await self._bounded(self._make_and_load, self._limits.load_timeout_s)
        except TimeoutError:
            self._leave()
            limit = self._limits.load_timeout_s
            raise ModelTimeout(
                f"{self._recipe.slot} was not loaded within {limit:g} s.", "Raise serving.load_timeout_s."
            ) from None
        except BaseException:
            self._leave()
            raise
        self._model, self._cap = model, model.micro_batch
        self._quiet_since = time.monotonic()
        self._main = asyncio.create_task(self._serve())
        return model

    def _make_and_load(self) -> Model:
        """In the model's thread."""
        try:
            make: Callable[[], Model] = pickle.loads(self._recipe.pickled)  # noqa: S301 - of our own caller
        except (ImportError, AttributeError) as error:
            raise ModelUnavailable(
                f"The Ray worker cannot import {self._recipe.slot}: {error}.", "Deploy this project to every Ray node."
            ) from error
        model = make()
        model.load()
        model.warm_up()
        return model

    async def _serve(self) -> None:
        """Answer micro-batches until nobody has asked for `idle_s`."""
        while not self._leaving:
            if self._queue:
                await self._answer(await self._gathered())
            elif not self._calls and time.monotonic() - self._quiet_since >= self._idle_s:
                self._leave()
            else:
                self._arrived.clear()
                rest = self._quiet_since + self._idle_s - time.monotonic()
                await _either(self._arrived.wait(), max(rest, 0.05))

    async def _gathered(self) -> list[tuple[_Call, Any]]:
        """A micro-batch: full, or what came within `max_wait_s`. Units of calls that failed are dropped."""
        until = time.monotonic() + self._limits.max_wait_s
        while len(self._queue) < self._cap and (rest := until - time.monotonic()) > 0:
            self._arrived.clear()
            await _either(self._arrived.wait(), rest)
        batch: list[tuple[_Call, Any]] = []
        while self._queue and len(batch) < self._cap:
            call, unit = self._queue.popleft()
            if not call.future.done():
                batch.append((call, unit))
        return batch

    async def _answer(self, batch: list[tuple[_Call, Any]]) -> None:
        """Let the model answer. What fails in company is tried again alone: a caller suffers for its own units only."""
        model = self._model
        if not batch or model is None:
            return
        # IDs are unique within a call only.
        units = [replace(unit, id=f"{number}/{unit.id}") for number, (_, unit) in enumerate(batch)]
        self._batches += 1
        self._units += len(batch)
        try:
            answers = await self._bounded(lambda: model.infer(units), self._limits.timeout_s)
        except TimeoutError:
            self._leave()  # its thread cannot be stopped, its process can
            limit = self._limits.timeout_s
            self._fail(batch, ModelTimeout(f"{self._recipe.slot} did not answer within {limit:g} s."))
        except BaseException as error:  # noqa: BLE001 - whatever the model raises goes to its caller
            if is_out_of_memory(error):
                self._cap = max(1, min(self._cap, (len(batch) + 1) // 2))
            callers = dict.fromkeys(call for call, _ in batch)
            if len(callers) == 1:
                self._fail(batch, portable(error))
            else:
                for caller in callers:
                    await self._answer([(call, unit) for call, unit in batch if call is caller])
        else:
            for number, (call, unit) in enumerate(batch):
                key = f"{number}/{unit.id}"
                if key in answers:
                    call.answer(unit.id, answers[key])
                else:
                    call.settle_one()

    async def _bounded(self, work: Callable[[], Any], timeout_s: float) -> Any:
        running = asyncio.get_running_loop().run_in_executor(self._thread, work)
        done, _ = await asyncio.wait([running], timeout=timeout_s)
        if not done:
            raise TimeoutError
        return running.result()

    def _fail(self, batch: Sequence[tuple[_Call, Any]], error: Exception) -> None:
        for call in dict.fromkeys(call for call, _ in batch):
            call.fail(error)

    def _leave(self) -> None:
        """End this process, hung thread and all, once the answers are out; waiting callers ask another server."""
        self._leaving = True
        for call, _ in self._queue:
            call.fail(Leaving())
        asyncio.get_running_loop().call_later(FAREWELL_S, _end_this_actor)


async def _either(event: Any, timeout_s: float) -> None:
    try:
        await asyncio.wait_for(event, timeout_s)
    except TimeoutError:
        return


def _end_this_actor() -> None:
    import ray

    ray.kill(ray.get_runtime_context().current_actor)


def portable(error: BaseException) -> Exception:
    """`error` as one that every process can unpickle and that keeps its class in the outcome record."""
    if isinstance(error, MediaError | Leaving):
        return error
    if is_out_of_memory(error):
        return MemoryError(printable(str(error)))
    if isinstance(error, OSError):
        return StorageFailed(f"{type(error).__name__}: {printable(str(error))}.")
    return Internal(Failure.of(error).message)
