"""Stages whose model is on a Ray cluster: `load` and `infer` go to a warm model server, all else stays here."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from media_assets.engine.contract import Stage, Unit
from media_assets.engine.versions import code_version
from resources.compute import devices
from resources.compute.model_server import Recipe
from resources.compute.serving import ServedModel, ServerDied
from resources.errors import Failure, MediaError, ModelTimeout, ModelUnavailable, ServingUnavailable
from resources.models.registry import ModelRegistry
from resources.settings import Alerts, Settings

if TYPE_CHECKING:
    from resources.models.towers import Vectors

log = logging.getLogger(__name__)
SERVER_FAULTS = (ServingUnavailable, ModelTimeout, ModelUnavailable, ServerDied)
"""Errors of the server rather than of the units: what the fallback is for."""


class StageModel:
    """The model half of a stage, as a model server holds it."""

    def __init__(self, kind: type[Stage[Any, Any]], settings: Settings, version: str) -> None:
        self._stage = kind(settings, ModelRegistry(settings))
        self.micro_batch = self._stage.units_per_call()
        self.device = f"ray:{devices.kind(settings.profile)}"
        if code_version(self._stage) != version:
            raise ModelUnavailable(
                f"The Ray worker has other code or other models for {self._stage.name} than the caller.",
                "Deploy the same version, and the same models.toml, to every Ray node.",
            )

    @property
    def loads(self) -> Mapping[str, int]:
        """How often each model was loaded, by identity."""
        return self._stage.models.loads

    def load(self) -> None:
        """Load the stage's models."""
        self._stage.load()

    def warm_up(self) -> None:
        """Let the models answer the stage's samples."""
        if units := self._stage.samples():
            self._stage.infer(units)

    def infer(self, units: Sequence[Unit[Any]]) -> Mapping[str, Any]:
        """The stage's answers."""
        return self._stage.infer(units)


class Served:
    """A stage with its model elsewhere. Falls back to a model in this process where `serving.fallback` says so."""

    def __init__(self, stage: Stage[Any, Any], settings: Settings) -> None:
        self._stage = stage
        self._falls_back = settings.serving.fallback == "local"
        self._model = ServedModel(recipe(stage, settings), settings)
        self._local_device = f"{devices.kind(settings.profile)} (fallback)"
        self._is_loaded = self._is_lost = False
        self._devices: dict[str, set[str]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stage, name)

    def load(self) -> None:
        """See to it that the model is up; the local one where it cannot be had."""
        try:
            self._model.load()
        except SERVER_FAULTS as error:
            self._fall_back(error)
            self._is_lost = True
            self._load_here()

    def infer(self, units: Sequence[Unit[Any]]) -> Mapping[str, Any | Failure]:
        """Answers of the server, or of the local model where the server fails."""
        if not self._is_lost:
            try:
                answers = self._model.infer(units)
            except SERVER_FAULTS as error:
                self._fall_back(error)
                self._is_lost = not isinstance(error, ModelTimeout | ServerDied)
            else:
                self._note(units, self._model.device)
                return answers
        self._load_here()
        self._note(units, self._local_device)
        return self._stage.infer(units)

    def answered_on(self, media_id: str) -> str | None:
        """Devices the item's units were answered on."""
        return ", ".join(sorted(self._devices.pop(media_id, ()))) or None

    def _fall_back(self, error: MediaError) -> None:
        if not self._falls_back:
            raise error
        log.warning("%s: the model in this process answers instead: %s", self._stage.name, error)

    def _load_here(self) -> None:
        if not self._is_loaded:
            self._stage.load()
            self._is_loaded = True

    def _note(self, units: Sequence[Unit[Any]], where: str) -> None:
        for unit in units:
            self._devices.setdefault(unit.id.partition("/")[0], set()).add(where)


def served(stages: Sequence[Stage[Any, Any]], settings: Settings) -> list[Stage[Any, Any]]:
    """The stages, those with models served from the cluster where the settings say so."""
    if settings.serving.backend == "local":
        return list(stages)
    return [cast("Stage[Any, Any]", Served(stage, settings)) if stage.specs() else stage for stage in stages]


def recipe(stage: Stage[Any, Any], settings: Settings) -> Recipe:
    """How a model server makes the stage's model. Passwords stay here: a model needs none."""
    bare = settings.model_copy(update={"database_url": None, "alerts": Alerts()})
    version = code_version(stage)
    make = partial(StageModel, type(stage), bare, version)
    return Recipe(stage.name, version, sum(spec.memory_bytes for spec in stage.held()), pickle.dumps(make))


def text_encoder(settings: Settings, models: ModelRegistry) -> Callable[[list[str]], Vectors]:
    """Encodes texts as joint vectors, float32 [n, d], unit length: with the model server of `embeddings` where models
    are served, else with the model in this process.
    """
    if settings.serving.backend == "local":
        from resources.models.openclip import OpenClip

        spec = models.spec("embedding")
        return models.loaded(spec, lambda: OpenClip(spec, models.cache)).encode_texts
    from media_assets.stages.embeddings import TEXT_COST, Embeddings

    (stage,) = served([Embeddings(settings, models)], settings)
    stage.load()

    def encode(texts: list[str]) -> Vectors:
        units = [Unit(str(number), text, TEXT_COST) for number, text in enumerate(texts)]
        answers: Mapping[str, Any] = stage.infer(units)
        return np.stack([answers[unit.id].joint for unit in units])

    return encode
