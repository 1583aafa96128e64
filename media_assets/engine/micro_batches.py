"""Units that wait for a model, and the micro-batches made of them: of one stage each, across items."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from media_assets.engine.contract import Stage, Unit
from media_assets.engine.recorder import Task

Asked = Mapping[str, tuple[Task, Unit[Any]]]
"""The units of a micro-batch, by `media ID/unit ID`: IDs of units are unique within an item only."""


class MicroBatches:
    """The queues of the stages, of which a device's memory holds `scale` micro-batches."""

    def __init__(self, stages: Sequence[Stage[Any, Any]], scale: int) -> None:
        self._queued: dict[str, deque[tuple[Task, Unit[Any]]]] = {stage.name: deque() for stage in stages}
        self._downstream_first = [stage.name for stage in reversed(stages)]
        self._caps = {stage.name: stage.units_per_call(scale) for stage in stages}
        self.unanswered = 0

    @property
    def largest(self) -> int:
        """Units in the largest micro-batch."""
        return max(self._caps.values(), default=0)

    def add(self, task: Task, units: Sequence[Unit[Any]]) -> None:
        """Have the units of a task wait for their model."""
        self.unanswered += len(units)
        self._queued[task.stage.name].extend((task, unit) for unit in units)

    def fullest(self, is_idle: bool) -> str | None:
        """The most downstream stage with a full micro-batch; where nothing could fill one, that with the most units."""
        names: list[str] = [name for name in self._downstream_first if self._queued[name]]
        for name in names:
            if len(self._queued[name]) >= self._caps[name]:
                return name
        return max(names, key=lambda name: len(self._queued[name])) if names and is_idle else None

    def take(self, name: str) -> Asked:
        """The next micro-batch of a stage."""
        queue = self._queued[name]
        batch = [queue.popleft() for _ in range(min(len(queue), self._caps[name]))]
        return {f"{task.media_id}/{unit.id}": (task, unit) for task, unit in batch}

    def answered(self, units: Asked) -> None:
        """A micro-batch has its answers."""
        self.unanswered -= len(units)

    def shrink(self, name: str, fitting: int) -> None:
        """Make the stage's micro-batches no larger than what memory has room for."""
        self._caps[name] = max(1, min(self._caps[name], fitting))
