"""`BatchEngine`: runs a group's stages over a batch of media items."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

from media_assets.engine.calls import Calls
from media_assets.engine.contract import MediaItem, Stage
from media_assets.engine.events import Event, Listener
from media_assets.engine.executors import Executor, Threads
from media_assets.engine.inference import Inference
from media_assets.engine.recorder import Recorder
from media_assets.engine.scheduler import Scheduler
from resources.files.derived import DerivedStore
from resources.records.model_loads import ModelLoads
from resources.records.outcomes import OutcomeStore
from resources.settings import Settings


class BatchEngine:
    """Runs stages over batches of media items, on a `device` whose memory holds `scale` micro-batches.

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

    def run(self, items: Sequence[MediaItem], run_id: str, *listeners: Listener) -> None:
        """Settle every stage of every item; listeners hear of each once its record is committed.

        What a listener raises, an interrupt among it, finishes running calls and gives unfinished items back. So does
        an error of the record database or a defect of the engine itself; an item's error never does.
        """
        loads = self._outcomes.model_loads(run_id)
        with self._outcomes.lease(run_id) as lease, ExitStack() as announced:
            for models in {id(stage.models): stage.models for stage in self._stages}.values():
                announced.enter_context(models.announcing(loads.under_way))
            executor = self._executor()
            recorder = Recorder(self._outcomes, run_id, lease.liveness, self._settings.window == 1)
            try:
                self._scheduler(items, recorder, executor, loads, listeners).run()
            finally:
                executor.close()
                recorder.release(self._store)
                self.hung += executor.hung

    def _scheduler(
        self,
        items: Sequence[MediaItem],
        recorder: Recorder,
        executor: Executor,
        loads: ModelLoads,
        listeners: Sequence[Listener],
    ) -> Scheduler:
        needed = {name for stage in self._stages for name in (stage.name, *stage.inputs)}

        def emit(event: Event) -> None:
            for listener in listeners:
                listener(event)

        return Scheduler(
            self._stages,
            items,
            self._outcomes.load([item.media_id for item in items], sorted(needed)),
            self._store,
            recorder,
            Calls(self._store, self._outcomes),
            Inference(loads),
            executor,
            self._settings,
            self._device,
            self._scale,
            emit,
        )
