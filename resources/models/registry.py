"""Model registry: models.toml names, per profile and task, the champion and its candidates."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from resources import handwritten
from resources.errors import ModelUnavailable, not_loaded
from resources.faults import fault
from resources.models.screens import SCREENS, Screen, read_screens
from resources.settings import Settings

T = TypeVar("T")
Announcer = Callable[[], AbstractContextManager[object]]
CATALOGUE = Path(__file__).with_name("models.toml")
ROUTES = "routes"
"""The key of a profile that holds its routes; besides it and SCREENS, every one is a task."""

_MEND = "Mend the file, or remove it to use the shipped models."

Precision = Literal["fp32", "fp16", "bf16", "int8"]


class ModelSpec(BaseModel):
    """One model as models.toml declares it. Frozen; its digest enters the version of what it makes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    task: str = Field(description="what it does: asr, vad, ocr, ocr_detector, shots, embedding, nudity, nsfw, toxicity")
    name: str = Field(description="short name, unique within the task")
    adapter: str = Field(description="module of resources.models that loads it")
    source: str = Field(description="where weights come from: pypi:<package>, hf:<repo>@<revision>, file:<path>, s3://")
    sha256: Mapping[str, str] = Field(default={}, description="SHA-256 of each weight file, by name")
    parameters: Mapping[str, Any] = Field(default={}, description="what the adapter is given")
    precision: Precision = Field(default="fp32", description="fp32, fp16, bf16 or int8")
    compile: bool = Field(default=False, description="compile the network with torch.compile")
    batch_size: int | None = Field(
        default=None, ge=1, description="units per call; default: as tuned, else the stage's"
    )
    max_wait_ms: int = Field(default=20, ge=0, description="how long a served model waits for a batch to fill, ms")
    licence: str = Field(description="licence of the weights")
    memory_bytes: int = Field(default=0, description="resident memory once loaded, bytes, as measured")

    @property
    def digest(self) -> str:
        """SHA-256 (hex) over everything that can change the model's answers."""
        identity = self.model_dump(mode="json", exclude={"licence", "memory_bytes", "batch_size", "max_wait_ms"})
        if not self.compile:  # so that the default leaves the digest what it was before there was a choice
            del identity["compile"]
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    @property
    def network(self) -> str:
        """SHA-256 (hex) over what lies in memory: entries that differ only in how they ask have it in common."""
        held = self.model_dump(mode="json", include={"adapter", "source", "sha256", "precision", "compile"})
        held["device"] = self.parameters.get("device")
        return hashlib.sha256(json.dumps(held, sort_keys=True).encode()).hexdigest()

    def require(self, *precisions: str, compiles: bool = False) -> None:
        """Raises ModelUnavailable where the adapter, which does these, cannot do what the entry asks for."""
        if self.precision not in precisions:
            raise ModelUnavailable(
                f"Model {self.name} ({self.task}) cannot run in {self.precision}.", f"Use {' or '.join(precisions)}."
            )
        if self.compile and not compiles:
            raise ModelUnavailable(f"Model {self.name} ({self.task}) cannot be compiled.", "Remove compile = true.")

    @property
    def identity(self) -> str:
        """`name@first 12 of the digest`: the `model` column of every row it makes."""
        return f"{self.name}@{self.digest[:12]}"


class Route(BaseModel):
    """How the models of a task are asked: in order, the next only where the one before was not sure of its answer."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    task: str = Field(description="the task whose models these are")
    models: tuple[str, ...] = Field(min_length=1, description="names of the models, the cheapest first")
    min_confidence: tuple[float, ...] = Field(
        default=(), description="confidence (0-1) at which the answer of each model but the last is kept"
    )
    min_letters: tuple[int, ...] = Field(
        default=(), description="letters and digits below which the answer of each model but the last is kept too"
    )
    fallback: tuple[str, ...] = Field(
        default=(), description="models that answer, the first that works, in place of one that does not load or raises"
    )
    enabled: bool = Field(default=True, description="false: only the champion is asked, as if there were no route")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if len(self.min_confidence) != len(self.models) - 1:
            raise ValueError("min_confidence needs a value for every model but the last")
        if len(set(self.models)) < len(self.models):
            raise ValueError("a model is named twice")
        if self.min_letters and len(self.min_letters) != len(self.models) - 1:
            raise ValueError("min_letters needs a value for every model but the last, or none at all")
        return self

    def asks_on(self, position: int, confidence: float, letters: int) -> bool:
        """Whether the next model is asked about an answer of the model at `position`."""
        if position == len(self.models) - 1 or confidence >= self.min_confidence[position]:
            return False
        return not self.min_letters or letters >= self.min_letters[position]

    @property
    def digest(self) -> str:
        """SHA-256 (hex) over everything that can change which model answers."""
        unused = set() if self.min_letters else {"min_letters"}  # so that the default leaves the digest what it was
        return hashlib.sha256(self.model_dump_json(exclude={"enabled", *unused}).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class _Key:
    task: str
    digest: str


class _Waited(threading.local):
    """What a thread spent on models being loaded, seconds, and how deep in such a wait it is."""

    seconds = 0.0
    depth = 0


_waited = _Waited()


def waited_s() -> float:
    """Seconds that this thread has spent so far on loading models, or on waiting for another thread that did."""
    return _waited.seconds


@contextmanager
def _waiting() -> Iterator[None]:
    start = time.perf_counter()
    _waited.depth += 1
    try:
        yield
    finally:
        _waited.depth -= 1
        if not _waited.depth:  # a model that loads another one waits once
            _waited.seconds += time.perf_counter() - start


class ModelRegistry:
    """Resolves specs and keeps loaded models: every model is loaded once per process, under a lock of its own."""

    def __init__(self, settings: Settings, catalogue: Path | None = None) -> None:
        self.settings = settings
        self.profile = settings.profile
        override = settings.home / "models.toml"
        self.path = catalogue or (override if override.exists() else CATALOGUE)
        self._specs, self._routes, self._screens = _read(self.path, self.profile)
        self._loaded: dict[_Key, Any] = {}
        self._lock = threading.Lock()
        self._loading: dict[_Key, threading.RLock] = {}
        self.loads: dict[str, int] = {}
        self._announcers: list[Announcer] = []

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

    def route(self, task: str) -> Route:
        """The route of `task`; one without a declared route asks its champion. Raises ModelUnavailable."""
        return self._routes.get(task) or Route(task=task, models=(self.spec(task).name,))

    def routes(self, tasks: Sequence[str]) -> tuple[Route, ...]:
        """The declared routes among `tasks`."""
        return tuple(self._routes[task] for task in tasks if task in self._routes)

    def asked(self, task: str) -> tuple[ModelSpec, ...]:
        """Every model that may answer for `task`, in the order of its route, fallbacks last."""
        route = self.route(task)
        return tuple(self.spec(task, name) for name in dict.fromkeys((*route.models, *route.fallback)))

    def screen(self, task: str) -> tuple[Screen, ModelSpec] | None:
        """The screen of `task`, and the model that looks first; None where the champion is asked about everything."""
        return self._screens.get(task)

    def loaded(self, spec: ModelSpec, load: Callable[[], T]) -> T:
        """The loaded model of `spec`, made by `load` on first use in this process.

        A model that hangs while it loads holds up no other. Raises ModelUnavailable, whatever `load` raised.
        """
        return self._once(_Key(spec.task, spec.digest), spec, spec.identity, load)

    def shared(self, spec: ModelSpec, load: Callable[[], T]) -> T:
        """The network of `spec`, made by `load` on first use in this process, for all entries of its task that hold it.

        Counted in `loads` as `network@` and the first 12 digits of `spec.network`.
        """
        return self._once(_Key(spec.task, spec.network), spec, f"network@{spec.network[:12]}", load)

    @contextmanager
    def announcing(self, announce: Announcer) -> Iterator[None]:
        """Within this every model is loaded within `announce()`, in the thread that loads it."""
        self._announcers.append(announce)
        try:
            yield
        finally:
            self._announcers.remove(announce)

    def _once(self, key: _Key, spec: ModelSpec, counted_as: str, load: Callable[[], T]) -> T:
        with self._lock:
            turn = self._loading.setdefault(key, threading.RLock())
        if key in self._loaded:
            return self._loaded[key]  # type: ignore[no-any-return]
        with _waiting(), turn:
            if key not in self._loaded:
                try:
                    with ExitStack() as announced:
                        for announce in tuple(self._announcers):
                            announced.enter_context(announce())
                        fault("models.loading")
                        self._loaded[key] = load()
                except Exception as error:
                    told = not_loaded(f"Model {spec.name} ({spec.task})", error)
                    if told is error:
                        raise
                    raise told from error
                self.loads[counted_as] = self.loads.get(counted_as, 0) + 1
            return self._loaded[key]  # type: ignore[no-any-return]


def _read(
    path: Path, profile: str
) -> tuple[dict[str, tuple[ModelSpec, ...]], dict[str, Route], dict[str, tuple[Screen, ModelSpec]]]:
    try:
        document = handwritten.read_toml(path)
    except (OSError, ValueError) as error:
        raise ModelUnavailable(f"{path} cannot be used: {handwritten.reason(error)}.", _MEND) from error
    if profile not in document:
        raise ModelUnavailable(f"{path.name} has no profile {profile}.", f"It has: {', '.join(document)}.")
    tasks = dict(_tables(document, profile, path))
    declared, screens = tasks.pop(ROUTES, []), tasks.pop(SCREENS, [])
    specs = {task: tuple(_spec(task, entry, path) for entry in entries) for task, entries in tasks.items()}
    routes = [_route(entry, specs, path) for entry in declared]
    if len({route.task for route in routes}) < len(routes):
        raise ModelUnavailable(f"{path.name} has two routes for one task in profile {profile}.", "Keep one of them.")
    return specs, {route.task: route for route in routes if route.enabled}, read_screens(screens, specs, path)


def _tables(document: Mapping[str, Any], profile: str, path: Path) -> dict[str, list[dict[str, Any]]]:
    """The arrays of tables of a profile, by task."""
    tasks = document[profile]
    for task, entries in tasks.items() if isinstance(tasks, dict) else [("TASK", None)]:
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            what = f"[[{profile}.{task}]]"
            raise ModelUnavailable(f"{path} cannot be used: each entry is a table of its own, headed {what}.", _MEND)
    return dict(tasks)


def _spec(task: str, entry: Mapping[str, Any], path: Path) -> ModelSpec:
    try:
        if "task" in entry:
            raise ValueError("task: the name of its table says it")
        return ModelSpec.model_validate({"task": task, **entry})
    except ValueError as error:
        name = entry.get("name", "without a name")
        raise ModelUnavailable(
            f"{path} cannot be used: model {name} of task {task}: {handwritten.reason(error)}.", _MEND
        ) from error


def _route(entry: Mapping[str, Any], specs: Mapping[str, Sequence[ModelSpec]], path: Path) -> Route:
    try:
        route = Route.model_validate(entry)
    except ValidationError as error:
        raise ModelUnavailable(
            f"A route of {path.name} ({entry.get('task', 'without a task')}) is wrong: {handwritten.reason(error)}.",
            "Mend the route.",
        ) from error
    known = [spec.name for spec in specs.get(route.task, ())]
    if unknown := [name for name in (*route.models, *route.fallback) if name not in known]:
        raise ModelUnavailable(
            f"The route of task {route.task} in {path.name} names unknown models: {', '.join(unknown)}.",
            f"The task has: {', '.join(known) or 'no models'}.",
        )
    return route
