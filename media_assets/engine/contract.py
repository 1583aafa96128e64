"""The Stage interface: prepare -> infer -> assemble. An asset module holds its stage and nothing else."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, TypeVar

import pyarrow as pa

from media_assets import schemas
from resources.compute import heartbeat
from resources.errors import Failure, ModelUnavailable
from resources.files.derived import DerivedStore
from resources.models.registry import ModelRegistry, ModelSpec, Route
from resources.models.screens import Screen
from resources.models.tuning import tuned
from resources.settings import Settings

P = TypeVar("P")
O = TypeVar("O")  # noqa: E741 - the field's usual letter for an output
T = TypeVar("T")
_LISTEN_S = 0.1


@dataclass(frozen=True, slots=True)
class MediaItem:
    """A registered media item: what is known before its bytes are read."""

    media_id: str
    uri: str
    etag: str


@dataclass(frozen=True, slots=True)
class Unit(Generic[P]):
    """One input of the model, such as a frame or a stretch of speech. `id` is unique within its item."""

    id: str
    payload: P
    cost: float = 1.0


@dataclass(frozen=True, slots=True)
class Prepared(Generic[P]):
    """What `prepare` hands on: the units for `infer`, and anything `assemble` will want again."""

    units: Sequence[Unit[P]] = ()
    carry: Any = None


@dataclass(frozen=True, slots=True)
class Product:
    """What `assemble` returns.

    `table` follows the stage's schema, without rows where there is nothing; `sides` its side tables.
    `facts` are figures worth showing (counts, seconds, spared frames), `previews` PNG or JPEG bytes by
    name for the Dagster UI, made only when `Inputs.wants_preview`. `content` identifies the output for
    its dependants where that differs from the version (`media`: the bytes, whatever their location).
    `models` are the identities of the models that answered, where the stage's specs are only those that may.
    """

    table: pa.Table
    sides: Mapping[str, pa.Table] = field(default_factory=dict)
    facts: Mapping[str, int | float | str] = field(default_factory=dict)
    previews: Mapping[str, bytes] = field(default_factory=dict)
    content: str | None = None
    models: tuple[str, ...] | None = None


class Inputs:
    """What a stage may read about one item: its upstream tables, and a memo shared within the batch.

    The memo lives as long as the item is in flight, and with it stages that share the memo. Thread-safe.
    """

    def __init__(
        self,
        item: MediaItem,
        store: DerivedStore,
        version: str,
        selected: frozenset[str] = frozenset(),
        wants_preview: bool = False,
        memo: Memo | None = None,
    ) -> None:
        self.item = item
        self.store = store
        self.version = version
        self.selected = selected
        self.wants_preview = wants_preview
        self._memo = memo or Memo()

    @property
    def media_id(self) -> str:
        """ID of the item."""
        return self.item.media_id

    def table(self, asset: str, side: str = "", columns: list[str] | None = None) -> pa.Table:
        """The item's table of an upstream asset; read once per batch and column set."""
        key = ("table", asset, side, tuple(columns or ()))
        return self.once(key, lambda: self.store.read(asset, self.media_id, side, columns))

    def media(self) -> dict[str, Any]:
        """The item's row of the `media` table."""
        row: dict[str, Any] = self.table("media").to_pylist()[0]
        return row

    def once(self, key: object, make: Callable[[], T]) -> T:
        """`make()`, computed once for the item within the batch, whichever stage that shares the memo asks first."""
        return self._memo.once(key, make)


class Memo:
    """Values computed once per item and batch; an exception is remembered and raised again."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._cells: dict[object, _Cell] = {}

    def once(self, key: object, make: Callable[[], T]) -> T:
        """The value of `key`, made by the first caller; others wait for it."""
        with self._lock:
            cell = self._cells.setdefault(key, _Cell())
        while not cell.lock.acquire(timeout=_LISTEN_S):
            heartbeat.follow(cell.pulse)
        try:
            if not cell.done:
                cell.pulse = heartbeat.pulse()
                try:
                    cell.value = make()
                except Exception as error:  # noqa: BLE001 - raised again to every caller
                    cell.error = error
                cell.done = True
        finally:
            cell.lock.release()
        if cell.error is not None:
            raise cell.error
        return cell.value  # type: ignore[no-any-return]

    def clear(self) -> None:
        """Drop every value."""
        with self._lock:
            self._cells.clear()


class _Cell:
    __slots__ = ("done", "error", "lock", "pulse", "value")

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.done = False
        self.value: Any = None
        self.error: Exception | None = None
        self.pulse: heartbeat.Pulse | None = None


class Stage(ABC, Generic[P, O]):
    """One derived artifact of a media item.

    | method     | runs in                    | called                     | may touch                     |
    |------------|----------------------------|----------------------------|-------------------------------|
    | `load`     | the inference thread       | once, before first `infer` | the model                     |
    | `prepare`  | background threads         | once per item and attempt  | inputs, storage (reading)     |
    | `infer`    | the inference thread alone | on micro-batches of units of many items | the model only   |
    | `assemble` | background threads         | once per item and attempt  | inputs, CPU                   |

    `prepare` may raise `NotApplicable` or any exception; `infer` answers per unit, keyed by the IDs it
    was given, with an output or a `Failure`, or raises, upon which the engine halves the micro-batch to
    isolate what failed. A stage keeps no state between calls besides its loaded model.
    """

    name: ClassVar[str]
    inputs: ClassVar[tuple[str, ...]] = ()
    code_version: ClassVar[str]
    tasks: ClassVar[tuple[str, ...]] = ()
    routed: ClassVar[tuple[str, ...]] = ()  # tasks among them whose routes the stage follows
    screened: ClassVar[tuple[tuple[str, ...], ...]] = ()  # tasks among them whose models may screen one another
    micro_batch: ClassVar[int] = 8
    memo: ClassVar[str] = ""  # stages of one name share `Inputs.once`, until the last of them is settled
    description: ClassVar[str] = ""

    def __init__(self, settings: Settings, models: ModelRegistry) -> None:
        self.settings = settings
        self.models = models
        if ignored := [route.task for route in self.routes() if route.task not in self.routed]:
            raise ModelUnavailable(
                f"{self.name} asks one model of task {', '.join(ignored)} and follows no route.",
                f"Remove the route from {models.path.name}.",
            )
        for task in self.tasks:
            if (found := models.screen(task)) and not any({task, found[1].task} <= {*group} for group in self.screened):
                raise ModelUnavailable(
                    f"{self.name} cannot let {found[1].name} ({found[1].task}) look first at what task {task} is for.",
                    f"Remove the screen from {models.path.name}.",
                )

    @property
    def schema(self) -> pa.Schema:
        """Schema of the stage's table."""
        return schemas.PER_MEDIA[self.name]

    @property
    def sides(self) -> tuple[str, ...]:
        """Names of the stage's side tables."""
        return tuple(self.side_schemas)

    @property
    def side_schemas(self) -> Mapping[str, pa.Schema]:
        """Schemas of the stage's side tables, by name."""
        return schemas.SIDES.get(self.name, {})

    def specs(self) -> tuple[ModelSpec, ...]:
        """Specs of the models that may answer; their identity enters the version, as those of routes and screens do."""
        asked = [spec for task in self.tasks for spec in self.models.asked(task)]
        first = [found[1] for task in self.tasks if (found := self.models.screen(task))]
        return tuple({(spec.task, spec.digest): spec for spec in (*asked, *first)}.values())

    def held(self) -> tuple[ModelSpec, ...]:
        """Specs of the models that `load` and `infer` keep in memory; default: all."""
        return self.specs()

    def routes(self) -> tuple[Route, ...]:
        """Declared routes between models of the stage's tasks."""
        return self.models.routes(self.tasks)

    def screens(self) -> tuple[Screen, ...]:
        """Declared screens of the stage's tasks."""
        return tuple(found[0] for task in self.tasks if (found := self.models.screen(task)))

    def units_per_call(self, scale: int = 1) -> int:
        """Size of a micro-batch: what models.toml says of its models, else what was tuned, else `micro_batch`.

        The last grows by `scale`, which is how many such micro-batches the device's memory holds.
        """
        specs = self.specs()
        if declared := [spec.batch_size for spec in specs if spec.batch_size is not None]:
            return min(declared)
        found = tuned(self.settings, specs) if specs else None
        return found.batch_size if found else self.micro_batch * scale

    def parameters(self) -> Mapping[str, object]:
        """Settings that change the output and therefore enter the version."""
        return {}

    def load(self) -> None:
        """Load the models. Raises ModelUnavailable with what to install."""

    def samples(self) -> Sequence[Unit[P]]:
        """A few made-up units that take every path through the models: what a model server warms up with."""
        return ()

    def answered_on(self, media_id: str) -> str | None:  # noqa: ARG002 - for stages whose model is elsewhere
        """Devices the item's units were answered on, where the engine cannot know; asked once per item."""
        return None

    @abstractmethod
    def prepare(self, inputs: Inputs) -> Prepared[P]:
        """Units for the model. Raises NotApplicable, MediaError."""

    def infer(self, units: Sequence[Unit[P]]) -> Mapping[str, O | Failure]:
        """Answers keyed by unit ID; IDs are unique within the micro-batch."""
        raise NotImplementedError(f"{self.name} prepares no units")

    @abstractmethod
    def assemble(self, inputs: Inputs, carry: Any, outputs: Mapping[str, O]) -> Product:
        """The item's rows. `outputs` holds an answer for every unit of the item."""
