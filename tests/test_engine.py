"""The batch engine alone, on toy stages: whatever raises and in whatever order, every item ends in one outcome."""

from __future__ import annotations

import subprocess
import sys
import threading
import uuid
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from media_assets.engine.batch import BatchEngine
from media_assets.engine.contract import Inputs, MediaItem
from media_assets.engine.events import (
    BatchFinished,
    BatchInferred,
    BatchStarted,
    Event,
    How,
    InferenceBegun,
    ItemClaimed,
    ItemFinished,
    OutcomeCommitted,
    Result,
    WorkDone,
)
from media_assets.engine.executors import Serial, Threads, timed
from media_assets.engine.scheduler import MAX_HANGS
from resources.compute.heartbeat import beat
from resources.errors import Failure, ModelUnavailable, Undecodable
from resources.files.derived import DerivedStore
from resources.library import Library
from resources.models.registry import ModelRegistry
from resources.records.database import Database
from resources.records.outcome import Status
from resources.records.outcomes import OutcomeStore
from resources.settings import Engine, Settings
from tests.settled import settled
from tests.toy_stages import CHAIN, Doubled, Fault, Numbers, Total, Toy

EXECUTORS = {"serial": Serial, "threads": lambda: Threads(2, 60.0)}


class Bench:
    """An engine on toy stages with everything a test wants to look at."""

    def __init__(self, database: Database, root: Path, executor: str = "threads", **engine: object) -> None:
        self.settings = Settings(home=root, engine=Engine.model_validate({"retry_base_s": 0, **engine}))
        self.store = DerivedStore(root / "derived")
        self.outcomes = OutcomeStore(database, self.settings.engine)
        self.models = Library(self.settings).models
        self.executor = EXECUTORS[executor]

    def stages(self, fault: Fault = lambda method, media_id: None, kinds: Sequence[type[Toy]] = CHAIN) -> list[Toy]:
        return [kind(self.settings, self.models, fault) for kind in kinds]

    def run(self, items: Sequence[MediaItem], stages: Sequence[Toy], run_id: str = "run") -> list[Result]:
        engine = BatchEngine(stages, self.store, self.outcomes, self.settings, self.executor)
        return settled(engine, items, run_id)

    def values(self, asset: str, item: MediaItem) -> list[int]:
        return list(self.store.read(asset, item.media_id).column("value").to_pylist())


def items(*names: str) -> list[MediaItem]:
    """Items with distinct content, called by these names."""
    return [MediaItem(name, f"/media/{name}", "1") for name in names]


@pytest.fixture(params=["serial", "threads"])
def bench(request: pytest.FixtureRequest, database: Database, tmp_path: Path) -> Bench:
    """The engine under each executor."""
    return Bench(database, tmp_path, request.param)


def by_key(results: Sequence[Result]) -> dict[tuple[str, str], Result]:
    """Results by (media_id, asset); each key must come once."""
    found = {(result.media_id, result.asset): result for result in results}
    assert len(found) == len(results)
    return found


def test_a_chain_of_stages_runs_over_every_item(bench: Bench) -> None:
    """Given six items, when three stages run, then each table holds the values of its own item."""
    batch = items("a", "b", "c", "empty-1", "photo-1", "d")
    results = by_key(bench.run(batch, bench.stages()))
    assert len(results) == 18
    assert all(result.done for result in results.values())
    assert results["photo-1", "numbers"].outcome.status is Status.NOT_APPLICABLE
    assert results["empty-1", "total"].outcome.rows == 0
    for item in batch[:3]:
        seed = sum(item.media_id.encode())
        assert bench.values("numbers", item) == [2 * seed, 2 * seed + 2, 2 * seed + 4]
        assert bench.values("doubled", item) == [4 * seed, 4 * seed + 4, 4 * seed + 8]


def test_micro_batches_span_items_and_are_keyed(bench: Bench) -> None:
    """Given items with three units each and micro-batches of four, then batches mix items and are full but the last."""
    stages = bench.stages(kinds=[Numbers])
    bench.run(items("a", "b", "empty-0", "c", "d"), stages)
    sizes = [len(batch) for batch in stages[0].batches]
    assert sum(sizes) == 12
    assert sizes.count(4) == 3
    assert any(len({unit.split("/")[0] for unit in batch}) > 1 for batch in stages[0].batches)


def test_items_of_one_unit_fill_large_micro_batches(bench: Bench) -> None:
    """Given a micro-batch larger than items are usually in flight, then those of one unit each fill it all the same."""

    class Photos(Numbers):
        micro_batch = 32

        def values(self, inputs: Inputs) -> list[int]:
            return super().values(inputs)[:1]

    stages = bench.stages(kinds=[Photos])
    bench.run(items(*(f"item-{number:03}" for number in range(128))), stages)
    assert [len(batch) for batch in stages[0].batches] == [32] * 4


def test_a_unit_that_breaks_the_model_is_isolated(bench: Bench) -> None:
    """Given a model that raises whenever one item is in the micro-batch, then only that item fails."""

    def fault(method: str, media_id: str) -> object:
        if method == "infer" and media_id == "b":
            raise RuntimeError("device-side assert")
        return None

    results = by_key(bench.run(items("a", "b", "c", "d"), bench.stages(fault)))
    assert {key[0] for key, result in results.items() if not result.done} == {"b"}
    assert results["b", "numbers"].outcome.error_class == "internal"
    assert results["b", "total"].outcome.error_class == "upstream_failed"
    assert "device-side assert" in (results["b", "total"].outcome.error or "")


def test_out_of_memory_halves_the_micro_batch_for_good(bench: Bench) -> None:
    """Given a device that holds one unit, then every item succeeds, one unit at a time."""
    stages = bench.stages(kinds=[Numbers])
    infer = stages[0].infer

    def small_device(units: Sequence[object]) -> object:
        if len(units) > 1:
            raise MemoryError
        return infer(units)  # type: ignore[arg-type]

    stages[0].infer = small_device  # type: ignore[method-assign,assignment]
    results = bench.run(items("a", "b", "c", "d"), stages)
    assert all(result.done for result in results)
    assert {len(batch) for batch in stages[0].batches} == {1}


def test_failures_keep_their_class_and_wait_or_are_set_aside(bench: Bench) -> None:
    """Given a permanent and a retryable failure, then one is quarantined at once and the other after three attempts."""

    def fault(method: str, media_id: str) -> object:
        if method == "prepare" and media_id == "bad":
            raise Undecodable("No stream can be decoded.")
        if method == "infer" and media_id == "flaky":
            return Failure("model_failed", "the server answered 503", retryable=True)
        return None

    batch = items("bad", "flaky", "good")
    seen = []
    for attempt in range(4):
        results = by_key(bench.run(batch, bench.stages(fault, [Numbers]), f"run-{attempt}"))
        seen.append((results["bad", "numbers"].outcome.status, results["flaky", "numbers"].outcome.status))
        assert results["good", "numbers"].done
    assert seen[0] == (Status.QUARANTINED, Status.RETRYABLE)
    assert seen[1] == (Status.QUARANTINED, Status.RETRYABLE)
    assert seen[2:] == [(Status.QUARANTINED, Status.QUARANTINED)] * 2
    assert results["bad", "numbers"].how is How.HELD
    assert results["bad", "numbers"].outcome.attempts == 1
    assert results["flaky", "numbers"].outcome.attempts == 3


def test_finished_items_are_not_computed_again(bench: Bench) -> None:
    """Given a finished batch, when it runs again, then nothing is prepared and every result is reused."""
    batch = items("a", "b", "photo-1")
    bench.run(batch, bench.stages(), "first")
    stages = bench.stages()
    results = bench.run(batch, stages, "second")
    assert {result.how for result in results} == {How.REUSED}
    assert [stage.prepared for stage in stages] == [[], [], []]
    assert all(result.outcome.run_id == "first" for result in results)


def test_a_changed_stage_makes_exactly_its_dependants_stale(bench: Bench) -> None:
    """Given a finished chain, when `doubled` changes, then `doubled` and `total` run again and `numbers` does not."""
    batch = items("a", "b")
    bench.run(batch, bench.stages())
    changed = bench.stages()
    changed[1].code_version = "2"  # type: ignore[misc]
    results = by_key(bench.run(batch, changed, "second"))
    assert {key[1]: result.how for key, result in results.items()} == {
        "numbers": How.REUSED,
        "doubled": How.COMPUTED,
        "total": How.COMPUTED,
    }


def test_items_with_the_same_input_are_computed_once(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given three items whose `numbers` have the same content, then `doubled` runs once and is copied twice."""
    batch = items("a", "twin-1", "twin-2")
    make = Numbers.assemble

    def same_content(stage: Numbers, inputs: object, carry: object, outputs: object) -> object:
        product = make(stage, inputs, carry, outputs)  # type: ignore[arg-type]
        table = product.table.set_column(1, product.table.schema.field(1), pa.array([1, 2, 3], pa.int64()))
        return type(product)(table, content="the same bytes")

    monkeypatch.setattr(Numbers, "assemble", same_content)
    stages = bench.stages()
    results = by_key(bench.run(batch, stages))
    assert Counter(results[item.media_id, "doubled"].how for item in batch) == {How.COMPUTED: 1, How.COPIED: 2}
    assert len(stages[1].prepared) == 1
    assert {tuple(bench.values("total", item)) for item in batch} == {tuple(bench.values("total", batch[0]))}
    assert bench.store.read("doubled", "twin-2").column("media_id").unique().to_pylist() == ["twin-2"]


def test_a_model_that_does_not_load_fails_its_stage_with_its_remedy(bench: Bench) -> None:
    """Given weights that are missing, then each item of that stage ends with the message, and `infer` is not tried."""
    stages = bench.stages(kinds=[Numbers, Doubled])

    def missing() -> None:
        raise ModelUnavailable("No weights for toy.", "Install media-assets[offline].")

    stages[1].load = missing  # type: ignore[method-assign]
    results = by_key(bench.run(items("a", "b"), stages))
    assert results["a", "numbers"].done
    assert results["a", "doubled"].outcome.error_class == "model_unavailable"
    assert "media-assets[offline]" in (results["b", "doubled"].outcome.error or "")
    assert stages[1].batches == []


def test_a_full_disk_ends_the_item_and_not_the_batch(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given a disk that is full for one write, then that item is retryable, nothing half-written is left behind."""
    monkeypatch.setenv("MEDIA_FAULT", "storage.before_rename:disk_full:2")
    monkeypatch.setattr("resources.faults._hits", {})
    results = bench.run(items("a", "b", "c"), bench.stages(kinds=[Numbers]))
    failed = [result for result in results if not result.done]
    assert len(failed) == 1
    assert failed[0].outcome.error_class == "storage_failed"
    assert failed[0].outcome.status is Status.RETRYABLE
    assert len(list((bench.store.root / "numbers").iterdir())) == 2


def test_a_disk_that_is_really_full_is_named(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given a device without space, when tables are written, an empty one too, then the items say which file; once
    there is space, they are made."""
    monkeypatch.setattr("resources.files.derived.secrets.token_hex", lambda _: "full")
    folder = bench.store.root / "numbers"
    folder.mkdir(parents=True)
    for name in ("b", "photo-b"):
        Path(folder / f".{name}.parquet.full").symlink_to("/dev/full")
    batch = items("a", "b", "photo-b", "c")
    results = by_key(bench.run(batch, bench.stages(kinds=[Numbers])))
    assert {media_id for (media_id, _), result in results.items() if not result.done} == {"b", "photo-b"}
    for name in ("b", "photo-b"):
        outcome = results[name, "numbers"].outcome
        assert (outcome.status, outcome.error_class) == (Status.RETRYABLE, "storage_failed")
        assert f"No space left on device: '{folder / name}.parquet'" in (outcome.error or "")
    assert sorted(path.name for path in folder.iterdir()) == ["a.parquet", "c.parquet"]
    assert all(result.done for result in bench.run(batch, bench.stages(kinds=[Numbers]), "later"))


def test_a_missing_input_blocks_and_follows_when_it_is_made(bench: Bench) -> None:
    """Given `doubled` without its input, then it is blocked at no attempt; once the input is there, it runs."""
    batch = items("a")
    blocked = bench.run(batch, bench.stages(kinds=[Doubled]))
    assert blocked[0].how is How.BLOCKED
    assert blocked[0].outcome.attempts == 0
    assert "Materialize numbers first" in (blocked[0].outcome.error or "")
    bench.run(batch, bench.stages(kinds=[Numbers]))
    assert bench.run(batch, bench.stages(kinds=[Doubled]))[0].how is How.COMPUTED


def stops(event: Event) -> None:
    """A listener that ends the batch at its first result."""
    if isinstance(event, OutcomeCommitted):
        raise KeyboardInterrupt


def test_stopping_early_gives_items_back(bench: Bench) -> None:
    """Given a batch that a listener stops after one result, then no record stays in flight and no attempt is lost."""
    batch = items(*"abcdefgh")
    engine = BatchEngine(bench.stages(), bench.store, bench.outcomes, bench.settings, bench.executor)
    with pytest.raises(KeyboardInterrupt):
        engine.run(batch, "stopped", stops)
    records = bench.outcomes.load([item.media_id for item in batch])
    assert Status.RUNNING not in {record.status for record in records.values()}
    assert {record.attempts for record in records.values() if not record.status.done} <= {0}
    assert all(result.done for result in bench.run(batch, bench.stages(), "again"))


def test_an_item_in_flight_elsewhere_is_left_alone(bench: Bench) -> None:
    """Given an item claimed by a live run, then a second run leaves it; when that run is gone, it takes it."""
    batch = items("a", "b")
    numbers = bench.stages(kinds=[Numbers])
    with bench.outcomes.lease("other") as lease:
        from media_assets.engine.versions import item_version

        version = item_version(numbers[0], batch[0], [])
        bench.outcomes.claim("a", "numbers", version, "other", lease.liveness)
        results = by_key(bench.run(batch, numbers))
        assert results["a", "numbers"].how is How.BUSY
        assert results["b", "numbers"].how is How.COMPUTED
    results = by_key(bench.run(batch, bench.stages(kinds=[Numbers]), "later"))
    assert results["a", "numbers"].how is How.COMPUTED
    assert results["a", "numbers"].outcome.attempts == 2


METHODS = ("prepare", "infer", "assemble")
WAYS = ("raise", "base", "memory", "failure", "silent", "unprintable")


class Unprintable(Exception):
    """An exception whose text cannot be made."""

    def __str__(self) -> str:
        raise ValueError("no")


def planned(plan: dict[tuple[str, str], str]) -> Fault:
    """A fault hook that does what `plan` says for (method, media_id)."""

    def fault(method: str, media_id: str) -> object:
        way = plan.get((method, media_id))
        if way == "raise":
            raise RuntimeError("planned")
        if way == "base":
            raise SystemExit(3)
        if way == "memory":
            raise MemoryError
        if way == "unprintable":
            raise Unprintable
        if way == "failure" and method == "infer":
            return Failure("model_failed", "planned", retryable=False)
        return "silent" if way == "silent" and method == "infer" else None

    return fault


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    names=st.lists(st.sampled_from(["a", "b", "c", "photo-x", "empty-y", "d", "e"]), unique=True, max_size=7),
    plans=st.dictionaries(
        st.tuples(st.sampled_from([stage.name for stage in CHAIN]), st.sampled_from(METHODS), st.sampled_from("abcde")),
        st.sampled_from(WAYS),
        max_size=6,
    ),
    window=st.integers(2, 5),
    max_units=st.integers(1, 9),
    executor=st.sampled_from(sorted(EXECUTORS)),
)
def test_every_item_ends_in_exactly_one_outcome(
    database: Database,
    tmp_path: Path,
    names: list[str],
    plans: dict[tuple[str, str, str], str],
    window: int,
    max_units: int,
    executor: str,
) -> None:
    """Whatever raises, wherever, under any window: one result and one settled record per item and stage."""
    prefix = uuid.uuid4().hex[:6]
    bench = Bench(database, tmp_path / prefix, executor, window=window, max_units=max_units)
    batch = [MediaItem(name, f"/{prefix}/{name}", "1") for name in names]
    stages = []
    for kind in CHAIN:
        plan = {(method, name): way for (stage, method, name), way in plans.items() if stage == kind.name}
        stages.append(kind(bench.settings, bench.models, planned(plan)))
    results = by_key(bench.run(batch, stages, prefix))
    assert set(results) == {(item.media_id, stage.name) for item in batch for stage in stages}
    records = bench.outcomes.load(names)
    for (media_id, asset), result in results.items():
        record = records[media_id, asset]
        assert record.status is not Status.RUNNING
        assert record.status == result.outcome.status
        hurt = any(plans.get((asset, method, media_id)) for method in METHODS)
        if result.done:
            assert bench.store.exists(asset, media_id)
        else:
            upstream = [results[media_id, name] for name in next(s for s in stages if s.name == asset).inputs]
            assert hurt or any(not source.done for source in upstream)
            assert record.error_class
            assert record.error


def test_the_engine_says_what_it_does(bench: Bench) -> None:
    """Given two items, one of which fails, then listeners hear of claims, inference, work, outcomes and both ends."""
    heard: list[Event] = []
    bench_stages = bench.stages(lambda method, media_id: 1 / 0 if (method, media_id) == ("assemble", "b") else None)
    engine = BatchEngine(bench_stages[:1], bench.store, bench.outcomes, bench.settings, bench.executor)
    engine.run(items("a", "b"), "run", heard.append)
    assert heard[0] == BatchStarted(2)
    assert heard[-1] == BatchFinished()
    assert [event for event in heard if isinstance(event, ItemClaimed)] == [
        ItemClaimed("a", "numbers", 1),
        ItemClaimed("b", "numbers", 1),
    ]
    begun = [event for event in heard if isinstance(event, InferenceBegun)]
    assert [event.loads for event in begun] == [True] + [False] * (len(begun) - 1)
    assert sum(event.units for event in heard if isinstance(event, BatchInferred)) == 6
    ended = {event.result.media_id: event.result for event in heard if isinstance(event, OutcomeCommitted)}
    assert {media_id: result.done for media_id, result in ended.items()} == {"a": True, "b": False}
    spent = sum(event.seconds for event in heard if isinstance(event, WorkDone))
    assert spent == pytest.approx(sum(result.outcome.seconds or 0 for result in ended.values()))
    assert {event.media_id for event in heard if isinstance(event, ItemFinished)} == {"a", "b"}


class Film:
    """Something large."""


def test_a_memo_ends_with_the_last_stage_that_shares_it(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given two stages that share what is made once per item and a third that does not, then the two get the same, the
    third one of its own, and the first is gone before the third begins."""
    made: dict[str, list[weakref.ref[Film]]] = {}
    left: list[bool] = []

    def asks(values: Callable[[Toy, Inputs], list[int]]) -> Callable[[Toy, Inputs], list[int]]:
        def asking(stage: Toy, inputs: Inputs) -> list[int]:
            if stage.name == "total":
                left.append(any(film() is not None for film in made[inputs.media_id]))
            made.setdefault(inputs.media_id, []).append(weakref.ref(inputs.once("film", Film)))
            return values(stage, inputs)

        return asking

    for kind in CHAIN:
        monkeypatch.setattr(kind, "values", asks(kind.values))
    for kind in (Numbers, Doubled):
        monkeypatch.setattr(kind, "memo", "shared")
    batch = items("a", "b", "c")
    assert all(result.done for result in bench.run(batch, bench.stages()))
    assert left == [False] * len(batch)
    assert all(first is second and second is not third for first, second, third in made.values())


def test_total_reads_both_of_its_inputs(bench: Bench) -> None:
    """Given a diamond, then `total` holds six values: three of `numbers` and three of `doubled`, doubled."""
    batch = items("a")
    bench.run(batch, bench.stages())
    values = [*bench.values("numbers", batch[0]), *bench.values("doubled", batch[0])]
    assert sorted(bench.values(Total.name, batch[0])) == sorted(2 * value for value in values)


def test_a_hung_model_call_fails_its_items_and_the_rest_goes_on(database: Database, tmp_path: Path) -> None:
    """Given a model that never answers for one item, then its micro-batch waits for a retry and the rest is done.

    The next run of the same items, in which the model answers, finishes them.
    """
    bench = Bench(database, tmp_path, infer_timeout_s=0.3, window=2)
    answer = threading.Event()

    def hangs(method: str, media_id: str) -> object:
        if method == "infer" and media_id == "b":
            answer.wait()
        return None

    batch = items("a", "b", "c", "d", "e", "f", "g", "h")
    stages = bench.stages(hangs, [Numbers])
    engine = BatchEngine(stages, bench.store, bench.outcomes, bench.settings)
    try:
        results = by_key(settled(engine, batch, "first"))
    finally:
        answer.set()
    failed = {media_id for (media_id, _), result in results.items() if not result.done}
    assert "b" in failed
    assert failed < {item.media_id for item in batch[:4]}, "only what shared its micro-batches"
    outcome = results["b", "numbers"].outcome
    assert (outcome.status, outcome.error_class) == (Status.RETRYABLE, "model_timeout")
    assert "numbers gave no answer within 0.3 s" in (outcome.error or "")
    assert engine.hung >= 1
    assert Status.RUNNING not in {record.status for record in bench.outcomes.load(["b"]).values()}
    again = by_key(bench.run(batch, bench.stages(kinds=[Numbers]), "second"))
    assert all(result.done for result in again.values())
    assert {media_id for (media_id, _), result in again.items() if result.how is How.COMPUTED} == failed


def test_a_stage_that_hangs_again_and_again_is_not_called_any_more(database: Database, tmp_path: Path) -> None:
    """Given a wedged model and many items, then a few calls are waited for, every item fails, other stages work."""
    bench = Bench(database, tmp_path, infer_timeout_s=0.2)
    answer = threading.Event()

    def hangs(method: str, media_id: str) -> object:
        if method == "infer":
            answer.wait()
        return None

    numbers, doubled = bench.stages(kinds=[Numbers, Doubled])
    bench.run(items("done"), [numbers])
    doubled.fault = hangs
    engine = BatchEngine([numbers, doubled], bench.store, bench.outcomes, bench.settings)
    batch = items(*"abcdefghij")
    try:
        results = by_key(settled(engine, batch, "wedged"))
    finally:
        answer.set()
    assert len(doubled.batches) == engine.hung
    assert MAX_HANGS <= engine.hung <= MAX_HANGS + 1, "one more was in the lane already"
    assert all(results[item.media_id, "numbers"].done for item in batch)
    assert {results[item.media_id, "doubled"].outcome.error_class for item in batch} == {"model_timeout"}


@pytest.mark.parametrize(
    ("method", "hung", "what"),
    [
        ("prepare", "b", "Its preparation"),
        ("assemble", "b", "The writing of its output"),
        ("prepare", "empty", "Its preparation"),
        ("assemble", "empty", "The writing of its output"),
    ],
)
def test_a_hung_preparation_fails_its_item_alone(
    database: Database, tmp_path: Path, method: str, hung: str, what: str
) -> None:
    """Given one item whose preparation or writing never ends, then it waits for a retry and all others are done.

    What the call left behind makes later is not written: by then the item may have been purged.
    """
    bench = Bench(database, tmp_path, infer_timeout_s=0.3, prepare_threads=1)
    answer = threading.Event()

    def hangs(called: str, media_id: str) -> object:
        if called == method and media_id == hung:
            answer.wait()
        return None

    batch = items("a", hung, *"cdefgh")
    engine = BatchEngine(bench.stages(hangs, [Numbers]), bench.store, bench.outcomes, bench.settings)
    before = set(threading.enumerate())
    results = by_key(settled(engine, batch, "first"))
    (left,) = set(threading.enumerate()) - before
    answer.set()
    left.join(30)
    assert {media_id for (media_id, _), result in results.items() if not result.done} == {hung}
    outcome = results[hung, "numbers"].outcome
    assert (outcome.status, outcome.error_class) == (Status.RETRYABLE, "model_timeout")
    assert f"{what} for numbers gave no sign of life for 0.3 s" in (outcome.error or "")
    assert engine.hung == 1
    assert not bench.store.exists("numbers", hung)
    assert all(result.done for result in bench.run(batch, bench.stages(kinds=[Numbers]), "second"))


def test_a_stage_whose_preparation_hangs_again_and_again_is_given_up(database: Database, tmp_path: Path) -> None:
    """Given a preparation that hangs for every item, then a few are waited for and no thread is left to the rest."""
    bench = Bench(database, tmp_path, infer_timeout_s=0.2, prepare_threads=1)
    answer = threading.Event()
    stages = bench.stages(lambda method, _: answer.wait() if method == "prepare" else None, [Numbers])
    engine = BatchEngine(stages, bench.store, bench.outcomes, bench.settings)
    try:
        results = settled(engine, items(*"abcdefghij"), "wedged")
    finally:
        answer.set()
    assert {result.outcome.error_class for result in results} == {"model_timeout"}
    assert len(results) == 10
    assert len(stages[0].prepared) == engine.hung <= MAX_HANGS + 1, "one more was in the lane already"


def test_a_long_call_with_signs_of_life_does_not_hang(database: Database, tmp_path: Path) -> None:
    """Given a preparation of several times the limit that is getting on, then it is waited for, and so is another
    stage of the item that waits for the same value."""
    bench = Bench(database, tmp_path, infer_timeout_s=0.4)

    class Slow(Numbers):
        def values(self, inputs: Inputs) -> list[int]:
            return inputs.once("slow", self._slowly)

        def _slowly(self) -> list[int]:
            never = threading.Event()
            for _ in range(20):
                beat()
                never.wait(0.06)
            return [1]

    class Waiting(Slow):
        name = "waiting"

    engine = BatchEngine(bench.stages(kinds=[Slow, Waiting]), bench.store, bench.outcomes, bench.settings)
    assert all(result.done for result in settled(engine, items("a"), "slow"))
    assert engine.hung == 0


HANGING = """
import sys, threading
from media_assets.engine.executors import Threads
threads = Threads(1, 0.2)
threads.submit("inference", threading.Event().wait, "hung")
threads.submit("inference", lambda: 42, "next")
ends = [*threads.finished(60), *threads.finished(60)]
threads.close()
print([(end.then, type(end.error).__name__, end.value) for end in ends], threads.hung)
"""


def test_a_process_with_a_hung_call_ends() -> None:
    """Given a call that never returns, then the one behind it is answered by a new thread and the interpreter exits."""
    done = subprocess.run([sys.executable, "-c", HANGING], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[('hung', 'Hung', None), ('next', 'NoneType', 42)] 1"


def test_a_model_too_large_for_the_device_is_no_fault_of_the_items(bench: Bench) -> None:
    """Given a model that runs out of memory while it loads, then its items wait for a retry."""
    stages = bench.stages(kinds=[Numbers])

    def too_large() -> None:
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    stages[0].load = too_large  # type: ignore[method-assign]
    results = bench.run(items("a", "b"), stages)
    assert {(result.outcome.status, result.outcome.error_class) for result in results} == {
        (Status.RETRYABLE, "model_unavailable")
    }


def test_the_record_names_the_models_that_answered(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given a stage that says who answered, then its outcomes say so, and not who might have."""
    make = Numbers.assemble
    monkeypatch.setattr(Numbers, "assemble", lambda *given: replace(make(*given), models=("small@1", "vad@2")))
    (result,) = bench.run(items("a"), bench.stages(kinds=[Numbers]))
    assert result.outcome.model == "small@1, vad@2"


def test_an_input_too_large_alone_is_set_aside(bench: Bench) -> None:
    """Given a GPU out of memory on one item even alone, then that item is set aside and its neighbours are done."""

    def fault(method: str, media_id: str) -> object:
        if method == "infer" and media_id == "b":
            raise RuntimeError("CUDA failed with error out of memory")
        return None

    results = by_key(bench.run(items("a", "b", "c"), bench.stages(fault, [Numbers])))
    assert {key[0] for key, result in results.items() if not result.done} == {"b"}
    outcome = results["b", "numbers"].outcome
    assert (outcome.status, outcome.error_class) == (Status.QUARANTINED, "out_of_memory")


def test_loading_a_model_is_no_items_cost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given a call that loads a model, which loads another, then its seconds are those of its work alone."""
    now = 0.0

    def take(seconds: float, answer: object = None) -> object:
        nonlocal now
        now += seconds
        return answer

    monkeypatch.setattr("time.perf_counter", lambda: now)
    models = ModelRegistry(Settings(home=tmp_path))
    outer, inner = models.spec("asr"), models.spec("vad")

    def load() -> object:
        models.loaded(inner, lambda: take(20, "inner"))
        return take(30, "outer")

    def work() -> object:
        take(1)
        models.loaded(outer, load)
        return take(2)

    assert timed(work, print).seconds == 3
    assert timed(work, print).seconds == 3
    assert now == 56
