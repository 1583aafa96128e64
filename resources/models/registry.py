"""Model registry: models.toml names, per profile and task, the champion and its candidates."""

from __future__ import annotations

import hashlib
import json
import threading
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from resources.errors import ModelUnavailable
from resources.settings import Settings

T = TypeVar("T")
CATALOGUE = Path(__file__).with_name("models.toml")


class ModelSpec(BaseModel):
    """One model as models.toml declares it. Frozen; its digest enters the version of what it makes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    task: str = Field(description="what it does: asr, vad, ocr, ocr_detector, shots, embedding, nudity, nsfw, toxicity")
    name: str = Field(description="short name, unique within the task")
    adapter: str = Field(description="module of resources.models that loads it")
    source: str = Field(description="where weights come from: pypi:<package>, hf:<repo>@<revision>, file:<path>, s3://")
    sha256: Mapping[str, str] = Field(default={}, description="SHA-256 of each weight file, by name")
    parameters: Mapping[str, Any] = Field(default={}, description="what the adapter is given")
    precision: str = Field(default="fp32", description="fp32, fp16, bf16 or int8")
    licence: str = Field(description="licence of the weights")
    memory_bytes: int = Field(default=0, description="resident memory once loaded, bytes, as measured")

    @property
    def digest(self) -> str:
        """SHA-256 (hex) over everything that can change the model's answers."""
        identity = self.model_dump(mode="json", exclude={"licence", "memory_bytes"})
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    @property
    def identity(self) -> str:
        """`name@first 12 of the digest`: the `model` column of every row it makes."""
        return f"{self.name}@{self.digest[:12]}"


@dataclass(frozen=True, slots=True)
class _Key:
    task: str
    digest: str


class ModelRegistry:
    """Resolves specs and keeps loaded models: every model is loaded once per process, under a lock."""

    def __init__(self, settings: Settings, catalogue: Path | None = None) -> None:
        self.settings = settings
        self.profile = settings.profile
        override = settings.home / "models.toml"
        self.path = catalogue or (override if override.exists() else CATALOGUE)
        self._specs = _read(self.path, self.profile)
        self._loaded: dict[_Key, Any] = {}
        self._lock = threading.RLock()
        self.loads: dict[str, int] = {}

    @property
    def cache(self) -> Path:
        """Folder for weights that are joined or built from what the wheels hold."""
        return self.settings.home / "models"

    def spec(self, task: str, name: str | None = None) -> ModelSpec:
        """The champion of `task`, or the model called `name`. Raises ModelUnavailable."""
        models = self._specs.get(task, ())
        for spec in models:
            if name is None or spec.name == name:
                return spec
        raise ModelUnavailable(
            f"No model {name or ''} for task {task} in profile {self.profile}.", f"Declare it in {self.path.name}."
        )

    def tasks(self) -> tuple[str, ...]:
        """Tasks the profile has models for."""
        return tuple(self._specs)

    def candidates(self, task: str) -> tuple[ModelSpec, ...]:
        """Every model of `task`, champion first."""
        return tuple(self._specs.get(task, ()))

    def loaded(self, spec: ModelSpec, load: Callable[[], T]) -> T:
        """The loaded model of `spec`, made by `load` on first use in this process."""
        key = _Key(spec.task, spec.digest)
        with self._lock:
            if key not in self._loaded:
                self._loaded[key] = load()
                self.loads[spec.identity] = self.loads.get(spec.identity, 0) + 1
            return self._loaded[key]  # type: ignore[no-any-return]


def _read(path: Path, profile: str) -> dict[str, tuple[ModelSpec, ...]]:
    document = tomllib.loads(path.read_text())
    if profile not in document:
        raise ModelUnavailable(f"{path.name} has no profile {profile}.", f"It has: {', '.join(document)}.")
    return {
        task: tuple(ModelSpec(task=task, **entry) for entry in entries) for task, entries in document[profile].items()
    }
