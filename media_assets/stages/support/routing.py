"""Routes at work: a cheap model first, the next one where it was not sure, a declared fallback where one fails."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

from resources.errors import ModelUnavailable, is_out_of_memory, printable
from resources.models.registry import ModelRegistry, ModelSpec

K = TypeVar("K", bound=Hashable)
M = TypeVar("M")
U = TypeVar("U")
A = TypeVar("A")
R = TypeVar("R")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Answered(Generic[A]):
    """An answer, and the model that gave it."""

    by: ModelSpec
    answer: A


class Routed(Generic[M]):
    """The models of one task, loaded when they are first needed and asked as the task's route says.

    Belongs to one stage of one run: a model that could not be loaded is not tried again within it. The models
    themselves are shared by the process.
    """

    def __init__(self, models: ModelRegistry, task: str, load: Callable[[ModelSpec], M]) -> None:
        self._models = models
        self._task = task
        self._load = load
        self._missing: dict[str, ModelUnavailable] = {}

    def load(self) -> None:
        """Load the model that is asked first, or its fallback. Raises ModelUnavailable."""
        first = self._models.route(self._task).models[0]
        self._first_working(self._models.spec(self._task, first), self._model, isolated=True)

    def ask(
        self,
        inputs: Mapping[K, U],
        call: Callable[[ModelSpec, M, Mapping[K, U]], Mapping[K, A]],
        confidence: Callable[[A], float],
        letters: Callable[[A], int],
    ) -> dict[K, Answered[A]]:
        """An answer for each input: of the first model of the route that is sure enough, else of the last.

        An answer with fewer `letters` than the route wants stands too. `call` asks one model about some of the inputs,
        by key. What a fallback answers stands. An error of a model without a fallback propagates; so does an error on
        several inputs at once, for only one of them may be to blame, and whoever calls can ask about fewer.
        """
        route = self._models.route(self._task)
        answers: dict[K, Answered[A]] = {}
        waiting = dict(inputs)
        for position, name in enumerate(route.models):
            if not waiting:
                break
            spec = self._models.spec(self._task, name)
            by, found = self._first_working(spec, partial(self._call, call, waiting), isolated=len(waiting) == 1)
            answers.update((key, Answered(by, answer)) for key, answer in found.items())
            waiting = {
                key: asked
                for key, asked in waiting.items()
                if by is spec and route.asks_on(position, confidence(found[key]), letters(found[key]))
            }
        return answers

    def _call(
        self, call: Callable[[ModelSpec, M, Mapping[K, U]], Mapping[K, A]], inputs: Mapping[K, U], spec: ModelSpec
    ) -> Mapping[K, A]:
        return call(spec, self._model(spec), inputs)

    def _first_working(self, spec: ModelSpec, call: Callable[[ModelSpec], R], isolated: bool) -> tuple[ModelSpec, R]:
        """What `call` gives for `spec`, or for the first fallback that works in its place, and which it was."""
        names = [name for name in self._models.route(self._task).fallback if name != spec.name]
        candidates = [spec, *(self._models.spec(self._task, name) for name in names)]
        for at, candidate in enumerate(candidates):
            try:
                return candidate, call(candidate)
            except Exception as error:
                declared = at + 1 < len(candidates) and (isolated or isinstance(error, ModelUnavailable))
                if not declared or is_out_of_memory(error):
                    raise
                instead = candidates[at + 1].name
                _log.warning("%s failed, %s answers instead: %s", candidate.name, instead, printable(str(error)))
        raise AssertionError("the last candidate returns or raises")

    def _model(self, spec: ModelSpec) -> M:
        if spec.name in self._missing:
            raise self._missing[spec.name]
        try:
            return self._models.loaded(spec, lambda: self._load(spec))
        except ModelUnavailable as error:
            self._missing[spec.name] = error
            raise
