"""Warm models on a real Ray cluster of several raylets: batches across callers, hangs, deaths, swaps and a budget."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from media_assets.engine.batch import BatchEngine
from media_assets.engine.contract import MediaItem, Stage, Unit
from media_assets.engine.remote import Served, recipe, text_encoder
from resources.compute import serving
from resources.compute.keeper import Keeper
from resources.compute.model_server import Status
from resources.compute.ray_cluster import ClusterUnavailable, namespace
from resources.compute.serving import ServedModel, ServerDied
from resources.errors import ModelTimeout, ServingUnavailable, Undecodable
from resources.files.derived import DerivedStore
from resources.library import Library
from resources.models.openclip import OpenClip
from resources.models.registry import ModelRegistry
from resources.records.database import Database
from resources.records.outcomes import OutcomeStore
from resources.settings import Alerts, Engine, Ray, Serving, Settings
from tests.cluster.ray_cluster import Cluster
from tests.cluster.served_stages import Greedy, Newer, Obedient, Order, Other, ServedNumbers
from tests.settled import settled

DEADLINE_S = 60.0


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The home of the one library of this module, whose keeper all tests share."""
    return tmp_path_factory.mktemp("home")


class Bench:
    """A library whose models are served, and callers of them."""

    def __init__(self, home: Path, address: str) -> None:
        self.home, self.address = home, address

    def settings(self, **options: Any) -> Settings:
        """Settings of the library with these options of `serving`."""
        section = Serving.model_validate({"backend": "ray", "cpus": 0.1, **options})
        ray = Ray(address=self.address, connect_timeout_s=2)
        return Settings(home=self.home, ray=ray, serving=section, engine=Engine(retry_base_s=0))

    def model(self, kind: type[Stage[Any, Any]] = Obedient, size: int = 1, **options: Any) -> ServedModel:
        """A caller of its own of the stage's model."""
        settings = self.settings(**options)
        stage = kind(settings, ModelRegistry(settings))
        made = recipe(stage, settings)
        return ServedModel(type(made)(made.slot, made.digest, size, made.pickled), settings)

    def servers(self) -> dict[str, Status]:
        """What is up, by slot."""
        found = serving.servers(self.settings())
        return {status.slot: status for status in found.values() if status is not None and not status.leaving}

    def until(self, condition: Callable[[dict[str, Status]], bool]) -> dict[str, Status]:
        """The servers, once they are as wanted."""
        deadline = time.monotonic() + DEADLINE_S
        while not condition(found := self.servers()):
            assert time.monotonic() < deadline, found
            time.sleep(0.1)
        return found


@pytest.fixture
def bench(cluster: Cluster, home: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """The library, with the servers that earlier tests left up, whose limits stay: opening one takes seconds."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return Bench(home, cluster.address)


@pytest.fixture
def empty(bench: Bench) -> Bench:
    """The library without a server."""
    import ray

    for name in serving.servers(bench.settings()):
        ray.kill(ray.get_actor(name, namespace(bench.settings())))
    bench.until(lambda servers: not servers)
    return bench


def units(*payloads: Any) -> list[Unit[Any]]:
    """Units called 0, 1, …"""
    return [Unit(str(number), payload) for number, payload in enumerate(payloads)]


def both(bench: Bench, first: list[Unit[Any]], second: list[Unit[Any]]) -> tuple[list[Any], int, int]:
    """Two callers at once on a model that waits for a full micro-batch: their answers or errors, batches and units."""
    models = [bench.model(Other, max_wait_ms=2000) for _ in range(2)]
    for model in models:
        model.load()
    before = bench.servers()["other"]
    with ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(model.infer, asked) for model, asked in zip(models, (first, second), strict=True)]
        answers = [call.exception() or call.result() for call in calls]
    after = bench.servers()["other"]
    assert after.loads == before.loads
    assert list(after.loads.values()) == [1]
    return answers, after.batches - before.batches, after.units - before.units


def test_callers_share_a_model_that_loads_once_and_its_micro_batches(empty: Bench) -> None:
    """Given two callers with two units each, then one micro-batch of four answers both, each with its own."""
    answers, batches, answered = both(empty, units(1, 2), units(10, 20))
    assert answers == [{"0": 2, "1": 4}, {"0": 20, "1": 40}]
    assert (batches, answered) == (1, 4)


def test_a_bad_unit_harms_its_caller_alone(empty: Bench) -> None:
    """Given two callers in one micro-batch, one of them with a poisonous unit, then the other has its answers."""
    (bad, good), batches, _ = both(empty, units(1, Order("fail")), units(10, 20))
    assert isinstance(bad, Undecodable)
    assert good == {"0": 20, "1": 40}
    assert batches == 3  # together, and each alone


def test_arrays_come_through_shared_memory(bench: Bench) -> None:
    """Given eight megabytes, then the model sees a read-only view of the object store, not a copy of its own."""
    array = np.ones(2**20)
    writeable, owned, total = bench.model().infer(units(Order("look", array=array)))["0"]
    assert (writeable, owned, total) == (False, False, 2**20)


def test_a_hung_call_ends_and_its_server_is_replaced(empty: Bench) -> None:
    """Given a model that hangs, then its caller has a retryable error in time and the next call a fresh server."""
    model = empty.model(Greedy, timeout_s=1)
    with pytest.raises(ModelTimeout, match="greedy did not answer within 1 s") as caught:
        model.infer(units(1, Order("hang")))
    assert caught.value.retryable
    assert model.infer(units(2)) == {"0": 4}


def test_a_server_that_dies_is_replaced_and_the_call_made_again(bench: Bench, tmp_path: Path) -> None:
    """Given a process that dies once, then the caller notices nothing; given one that always dies, it is told."""
    model = bench.model()
    assert model.infer(units(1, Order("die once", file=tmp_path / "died")))["0"] == 2
    assert (tmp_path / "died").exists()
    with pytest.raises(ServerDied, match="died in two calls"):
        model.infer(units(Order("die")))


def test_a_server_without_a_sign_of_life_is_replaced(bench: Bench) -> None:
    """Given a server whose process is stopped, then it is killed and another one answers."""
    model = bench.model(health_s=1)
    pid = model.infer(units(Order("pid")))["0"]
    os.kill(pid, signal.SIGSTOP)
    assert model.infer(units(Order("pid")))["0"] != pid


def test_an_idle_model_goes_and_comes_back(empty: Bench) -> None:
    """Given a model nobody asks for, then it is unloaded, and loaded again by the next call."""
    model = empty.model(idle_s=0.5)
    model.infer(units(1))
    empty.until(lambda servers: not servers)
    assert model.infer(units(2)) == {"0": 4}


def test_a_new_version_takes_over_and_the_old_one_goes(empty: Bench) -> None:
    """Given a caller of the old version, then it is served until it is quiet, beside those of the new one."""
    old, new = empty.model(), empty.model(Newer)
    old.load()
    new.load()
    assert (old.infer(units(1)), new.infer(units(1))) == ({"0": 2}, {"0": 2})
    deadline = time.monotonic() + DEADLINE_S
    while len(serving.servers(empty.settings())) > 1:
        assert time.monotonic() < deadline
        new.infer(units(1))
    assert new.infer(units(2)) == {"0": 4}


class Deaf(Keeper):
    """A keeper that gets no status in time, as on a machine whose cores are all taken."""

    def _servers(self) -> dict[str, tuple[Any, Status | None]]:
        return {name: (handle, None) for name, (handle, _) in super()._servers().items()}


def test_an_old_version_goes_whose_status_is_not_known(empty: Bench) -> None:
    """Given a server that does not say in time what it is, when a newer version comes, then it goes all the same."""
    old, new = empty.model(), empty.model(Newer)
    old.load()
    assert Deaf(namespace(empty.settings())).open(new._recipe, new._limits)
    deadline = time.monotonic() + DEADLINE_S
    while set(serving.servers(empty.settings())) != {new._recipe.name}:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_the_least_recently_used_model_makes_room(empty: Bench) -> None:
    """Given a budget for two models, then a third one pushes out the one that was quiet for longest."""
    budget = {"memory_bytes": 20}
    first, second, third = (empty.model(kind, 10, **budget) for kind in (Obedient, Other, Greedy))
    first.load()
    second.infer(units(1))
    first.infer(units(1))
    third.infer(units(1))
    assert set(empty.until(lambda servers: "other" not in servers)) == {"obedient", "greedy"}
    with pytest.raises(ServingUnavailable, match=r"more than serving\.memory_bytes"):
        empty.model(Other, 30, **budget).load()


def test_gpus_are_asked_for_in_fractions(empty: Bench, cluster: Cluster) -> None:
    """Given a share of a GPU, then the server is on the node that has one; given two, no node has, and it is said."""
    model = empty.model(gpus=0.5)
    assert model.infer(units(Order("where")))["0"] in [node.node_id for node in cluster.nodes[1:]]
    with pytest.raises(ClusterUnavailable, match=r"No node .* has 0\.1 CPU and 2 GPU"):
        empty.model(gpus=2).load()


def test_the_engine_halves_batches_over_the_wire_and_says_who_answered(
    bench: Bench, database: Database, tmp_path: Path
) -> None:
    """Given a remote device that holds one unit, then all items succeed and their records name the cluster."""
    results = run(bench.settings(), database, tmp_path)
    assert all(result.done for result in results)
    assert {result.outcome.device for result in results} == {"ray:cpu"}
    assert {result.outcome.rows for result in results} == {3}


@pytest.mark.parametrize("fallback", ["none", "local"])
def test_the_fallback_is_as_declared(bench: Bench, database: Database, tmp_path: Path, fallback: str) -> None:
    """Given a model that no node can take, then the items wait for a retry, or the local model answers for it."""
    results = run(bench.settings(fallback=fallback, gpus=8), database, tmp_path)
    if fallback == "local":
        assert {(result.outcome.device, result.done) for result in results} == {("cpu (fallback)", True)}
    else:
        assert {(result.outcome.error_class, result.done) for result in results} == {("serving_unavailable", False)}
        assert "No node of the Ray cluster has" in (results[0].outcome.error or "")


def run(settings: Settings, database: Database, root: Path) -> list[Any]:
    """Three items through a served stage."""
    stage: Any = Served(ServedNumbers(settings, ModelRegistry(settings)), settings)
    engine = BatchEngine([stage], DerivedStore(root / "derived"), OutcomeStore(database, settings.engine), settings)
    return settled(engine, [MediaItem(name, f"/media/{name}", "1") for name in ("a", "b", "c")], "run")


def test_passwords_stay_with_the_caller(tmp_path: Path) -> None:
    """Given a database and a webhook with secrets in their URLs, then what goes to the cluster holds neither."""
    alerts = Alerts.model_validate({"webhook_url": "https://hooks.example/secret-of-hook"})
    settings = Settings(home=tmp_path, database_url="postgresql+psycopg2://u:secret-of-database@h/d", alerts=alerts)
    assert b"secret-of" not in recipe(Obedient(settings, ModelRegistry(settings)), settings).pickled


def test_profile_gpu_needs_a_share_of_a_gpu(tmp_path: Path) -> None:
    """Given models for CUDA and servers without a GPU, then the settings are refused: Ray would hide the devices."""
    with pytest.raises(ValueError, match=r"serving\.gpus must be above 0"):
        Settings(home=tmp_path, profile="gpu", serving=Serving(backend="ray"))


def test_a_search_asks_the_warm_model(bench: Bench, models: ModelRegistry, model_home: Path) -> None:
    """Given the embedding model on the cluster, then queries have the vectors that the model gives here."""
    (bench.home / "models").symlink_to(model_home / "models")
    library = Library(bench.settings())
    encode = text_encoder(library.settings, library.models)
    spec = models.spec("embedding")
    here = models.loaded(spec, lambda: OpenClip(spec, models.cache)).encode_texts(["a red car", "rain"])
    np.testing.assert_allclose(encode(["a red car", "rain"]), here, atol=1e-5)
    text_encoder(library.settings, library.models)(["a tram"])
    assert list(bench.servers()["embeddings"].loads.values()) == [1]
    assert library.models.loads == {}
