"""Screens at work: a light model looks at every unit, the champion of a task only at what is not clearly safe."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, Literal, TypeVar

from resources.models.registry import ModelRegistry, ModelSpec
from resources.models.screens import Screen

U = TypeVar("U")
Labels = Mapping[str, float]
"""Label -> score 0-1."""
Verdict = Literal["asked", "second_look", "skipped"]


@dataclass(frozen=True, slots=True)
class Screening:
    """What the model that looked first (`by`, an identity) made of a unit, and what followed for the champion.

    `score` is the strongest of its labels; None where it cannot read the unit, and the champion is asked.
    """

    by: str
    score: float | None
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class Answers:
    """Of one unit: the labels of each model that answered, by its identity, and the screening of each screened task."""

    labels: dict[str, Labels] = field(default_factory=dict)
    screenings: dict[str, Screening] = field(default_factory=dict)


class Screened(Generic[U]):
    """The champions of several tasks, asked about the same units as the screens of models.toml say.

    `score` asks one model about units, in order; `content` are the bytes of a unit by which second looks are
    drawn, the same ones every time; `reads` says whether a model's answer about a unit means anything.
    """

    def __init__(
        self,
        models: ModelRegistry,
        score: Callable[[ModelSpec, Sequence[U]], Sequence[Labels]],
        content: Callable[[U], bytes],
        reads: Callable[[ModelSpec, U], bool] = lambda _spec, _unit: True,
    ) -> None:
        self._models = models
        self._score = score
        self._content = content
        self._reads = reads

    def ask(self, tasks: Sequence[str], units: Mapping[str, U]) -> dict[str, Answers]:
        """Answers for each unit, by key. A model that looks first for one task and answers for another runs once."""
        seen: dict[str, dict[str, Labels]] = {}

        def answers_of(spec: ModelSpec, keys: Sequence[str]) -> Mapping[str, Labels]:
            known = seen.setdefault(spec.identity, {})
            if fresh := [key for key in keys if key not in known]:
                known.update(zip(fresh, self._score(spec, [units[key] for key in fresh]), strict=True))
            return known

        found = {key: Answers() for key in units}
        for task in tasks:
            champion, waiting = self._models.spec(task), list(units)
            if screen := self._models.screen(task):
                policy, light = screen
                looked = answers_of(light, [key for key, unit in units.items() if self._reads(light, unit)])
                for key, unit in units.items():
                    score = max(looked[key].values()) if self._reads(light, unit) else None
                    verdict = verdict_of(policy, score, self._content(unit))
                    found[key].screenings[task] = Screening(light.identity, score, verdict)
                waiting = [key for key in units if found[key].screenings[task].verdict != "skipped"]
                if light.task == task:
                    for key in units.keys() - waiting:
                        found[key].labels[light.identity] = looked[key]
            labels = answers_of(champion, waiting)
            for key in waiting:
                found[key].labels[champion.identity] = labels[key]
        return found


def verdict_of(screen: Screen, score: float | None, content: bytes) -> Verdict:
    """Whether the champion is asked about a unit to which the first model gave `score` (None: it cannot tell)."""
    if score is None or score > screen.ask_above:
        return "asked"
    return "second_look" if _draw(content) < screen.second_look else "skipped"


def strongest(screenings: Sequence[Screening]) -> Screening:
    """The screening of several units as one: the champion was asked if it was asked about any of them."""
    order: tuple[Verdict, ...] = ("asked", "second_look", "skipped")
    scores = [one.score for one in screenings if one.score is not None]
    verdict = min((one.verdict for one in screenings), key=order.index)
    return Screening(screenings[0].by, max(scores, default=None), verdict)


def _draw(content: bytes) -> float:
    """A number from 0 up to 1 that is fixed by the content and evenly spread."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest()) / 2**64
