"""Index shards: built beside the old one, checked, swapped in; a crash anywhere leaves the old one serving."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from upath import UPath

from media_assets import schemas
from media_assets.library import index_shard
from media_assets.library.buckets import BucketBusy, exclusive
from media_assets.library.index_shard import (
    BuildReport,
    Rule,
    ShardRejected,
    ShardUnreadable,
    Vectors,
    build,
    open_bucket,
)
from resources.files.derived import DerivedStore

DIMENSION = 16
MODEL, OTHER = "clip@111111111111", "clip@222222222222"
RECALL = 0.95


def vectors(seed: int, count: int) -> Vectors:
    made = np.random.default_rng(seed).normal(size=(count, DIMENSION)).astype(np.float32)
    return np.asarray(made / np.linalg.norm(made, axis=1, keepdims=True))


def write(
    store: DerivedStore,
    media_id: str,
    seed: int,
    frames: int = 3,
    texts: int = 1,
    model: str = MODEL,
    version: str = "v1",
    space: str = "joint",
) -> None:
    units = ["frame"] * frames + ["transcript"] * texts
    rows: list[dict[str, object]] = [
        {
            "media_id": media_id,
            "unit": unit,
            "ordinal": number,
            "start_s": float(number),
            "end_s": number + 1.0,
            "space": space,
            "vector": vector.tolist(),
            "model": model,
            "version": version,
        }
        for number, (unit, vector) in enumerate(zip(units, vectors(seed, len(units)), strict=True))
    ]
    store.write("embeddings", media_id, schemas.table(schemas.EMBEDDINGS, rows))


def library(store: DerivedStore, count: int, **changes: str) -> dict[str, str]:
    for number in range(count):
        write(store, f"m-{number:03d}", number, **changes)  # type: ignore[arg-type]
    return {f"m-{number:03d}": changes.get("version", "v1") for number in range(count)}


@pytest.fixture
def store(tmp_path: Path) -> DerivedStore:
    return DerivedStore(tmp_path / "it's [a] *store")


def serving(store: DerivedStore) -> set[str]:
    """Media IDs that the open shard answers with."""
    shards = open_bucket(store, 0)
    assert shards is not None
    return {row for shard in shards.spaces.values() for row in shard.rows["media_id"].to_pylist()}


def builds(store: DerivedStore) -> set[str]:
    return {path.name for path in (store.root / "index" / "000").iterdir() if path.is_dir()}


def test_a_built_shard_finds_each_vector_and_says_where_it_is(store: DerivedStore) -> None:
    live = library(store, 20)
    report = build(store, 0, live, RECALL)
    shards = open_bucket(store, 0)
    assert shards is not None
    shard = shards.spaces["joint"]
    assert (report.spaces["joint"].vectors, report.spaces["joint"].pictures) == (80, 60)
    assert report.spaces["joint"].recall == 1.0
    wanted = vectors(7, 4)
    (frame, frame_scores), (text, _) = (
        shard.search(wanted[1:2], 5, "pictures")[0],
        shard.search(wanted[3:4], 5, "texts")[0],
    )
    assert frame_scores[0] == pytest.approx(1.0, abs=1e-5)
    assert shard.at(frame[:1])[0] | {"version": "v1"} == {
        "media_id": "m-007",
        "unit": "frame",
        "ordinal": 1,
        "start_s": 1.0,
        "end_s": 2.0,
        "version": "v1",
        "model": MODEL,
    }
    assert [row["unit"] for row in shard.at(text)] == ["transcript"] * 5
    assert shard.at(text[:1])[0]["media_id"] == "m-007"


def test_building_again_without_a_change_does_nothing(store: DerivedStore) -> None:
    live = library(store, 5)
    first = build(store, 0, live, RECALL)
    before = (store.root / "index" / "000" / "CURRENT").stat().st_mtime_ns
    second = build(store, 0, dict(reversed(live.items())), RECALL)
    assert (first.swapped, second.swapped) == (True, False)
    assert second.build == first.build
    assert second.spaces == first.spaces
    assert (store.root / "index" / "000" / "CURRENT").stat().st_mtime_ns == before


def test_an_item_that_is_gone_leaves_and_a_reader_of_the_old_shard_keeps_working(store: DerivedStore) -> None:
    live = library(store, 10)
    build(store, 0, live, RECALL)
    old = open_bucket(store, 0)
    assert old is not None
    names = [build(store, 0, {key: "v1" for key in live if key >= start}, RECALL).build for start in ("m-003", "m-006")]
    assert serving(store) == {key for key in live if key >= "m-006"}
    assert builds(store) == set(names)
    numbers, _ = old.spaces["joint"].search(vectors(0, 4)[:1], 1)[0]
    assert old.spaces["joint"].at(numbers)[0]["media_id"] == "m-000"


def test_a_bucket_that_became_empty_serves_nothing(store: DerivedStore) -> None:
    build(store, 0, library(store, 2), RECALL)
    report = build(store, 0, {}, RECALL)
    assert report.swapped
    assert report.spaces == {}
    assert serving(store) == set()


def test_items_without_rows_and_unknown_buckets(store: DerivedStore) -> None:
    store.write("embeddings", "silent", schemas.EMBEDDINGS.empty_table())
    assert build(store, 0, {"silent": "v1"}, RECALL).skipped == ()
    assert open_bucket(store, 1) is None


@pytest.mark.parametrize(
    "point",
    ["index.after_space", "index.before_manifest", "storage.before_rename", "index.before_swap"],
)
@pytest.mark.parametrize("action", ["raise", "disk_full"])
def test_a_failure_before_the_swap_leaves_the_old_shard_serving(
    store: DerivedStore, monkeypatch: pytest.MonkeyPatch, point: str, action: str
) -> None:
    live = library(store, 4)
    build(store, 0, live, RECALL)
    write(store, "new", 99)
    monkeypatch.setenv("MEDIA_FAULT", f"{point}:{action}")
    monkeypatch.setattr("resources.faults._hits", {})
    with pytest.raises((RuntimeError, OSError), match="injected"):
        build(store, 0, live | {"new": "v1"}, RECALL)
    assert serving(store) == set(live)
    monkeypatch.delenv("MEDIA_FAULT")
    assert build(store, 0, live | {"new": "v1"}, RECALL).swapped
    assert serving(store) == set(live) | {"new"}
    assert len(builds(store)) == 2


CHILD = """
import json, sys
from media_assets.library.index_shard import build
from resources.files.derived import DerivedStore
build(DerivedStore(sys.argv[1]), 0, json.loads(sys.argv[2]), 0.95)
"""


@pytest.mark.parametrize(("point", "swapped"), [("index.before_swap", False), ("index.after_swap", True)])
def test_a_killed_builder_leaves_a_whole_shard_and_no_lock(store: DerivedStore, point: str, swapped: bool) -> None:
    live = library(store, 4)
    build(store, 0, live, RECALL)
    write(store, "new", 99)
    wanted = live | {"new": "v1"}
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(store.root), json.dumps(wanted)],
        env={**os.environ, "MEDIA_FAULT": f"{point}:kill"},
        check=False,
    )
    assert child.returncode == -signal.SIGKILL
    assert serving(store) == (set(wanted) if swapped else set(live))
    assert build(store, 0, wanted, RECALL).swapped is not swapped
    assert serving(store) == set(wanted)


def test_models_do_not_mix_the_majority_serves_and_the_rest_is_stale(store: DerivedStore) -> None:
    live = library(store, 5)
    for media_id in ("m-000", "m-001"):
        write(store, media_id, 50, model=OTHER, version="v2")
        live[media_id] = "v2"
    report = build(store, 0, live, RECALL, champion=OTHER).spaces["joint"]
    assert (report.model, report.stale_items, report.items) == (MODEL, ("m-000", "m-001"), 3)
    assert serving(store) == {"m-002", "m-003", "m-004"}
    write(store, "m-002", 50, model=OTHER, version="v2")
    report = build(store, 0, live | {"m-002": "v2"}, RECALL, champion=OTHER).spaces["joint"]
    assert (report.model, report.stale_items) == (OTHER, ("m-003", "m-004"))


def test_the_champion_wins_a_tie(store: DerivedStore) -> None:
    live = library(store, 2)
    write(store, "m-000", 50, model=OTHER)
    for champion in (MODEL, OTHER):
        assert build(store, 0, live, RECALL, champion=champion).spaces["joint"].model == champion


def test_each_space_is_a_shard_of_its_own(store: DerivedStore) -> None:
    library(store, 3)
    write(store, "seen", 9, space="visual", texts=0)
    report = build(store, 0, {"m-000": "v1", "m-001": "v1", "m-002": "v1", "seen": "v1"}, RECALL)
    assert {space: entry.items for space, entry in report.spaces.items()} == {"joint": 3, "visual": 1}


@pytest.mark.parametrize(
    ("rule", "factory"),
    [(Rule(), "Flat"), (Rule(flat_max=100), "HNSW32"), (Rule(flat_max=100, hnsw_max=100), "IVF126,Flat")],
)
def test_every_kind_of_index_reaches_the_recall_and_answers_by_unit(
    store: DerivedStore, rule: Rule, factory: str
) -> None:
    write(store, "long", 1, frames=900, texts=100)
    report = build(store, 0, {"long": "v1"}, RECALL, rule=rule).spaces["joint"]
    assert report.factory == factory
    assert report.recall >= RECALL
    shards = open_bucket(store, 0)
    assert shards is not None
    numbers, scores = shards.spaces["joint"].search(vectors(1, 1000)[950:951], 3, "texts")[0]
    assert shards.spaces["joint"].at(numbers[:1])[0]["ordinal"] == 950
    assert scores == sorted(scores, reverse=True)
    assert min(numbers) >= report.pictures


def test_a_shard_below_the_recall_wanted_is_rejected(store: DerivedStore, monkeypatch: pytest.MonkeyPatch) -> None:
    live = library(store, 2)
    build(store, 0, live, RECALL)
    write(store, "long", 1, frames=900)
    monkeypatch.setattr(index_shard, "_efforts", lambda *_: (1,))
    with pytest.raises(ShardRejected, match=r"recall@10 0\.\d+, below 0.99"):
        build(store, 0, live | {"long": "v1"}, 0.99, rule=Rule(flat_max=10, hnsw_max=10))
    assert serving(store) == set(live)


def broken(store: DerivedStore, vector: list[float]) -> None:
    row: dict[str, object] = {
        "media_id": "bad",
        "unit": "frame",
        "ordinal": 0,
        "start_s": 0.0,
        "end_s": 0.0,
        "space": "joint",
        "vector": vector,
        "model": MODEL,
        "version": "v1",
    }
    store.write("embeddings", "bad", schemas.table(schemas.EMBEDDINGS, [row]))


@pytest.mark.parametrize(
    ("vector", "reason"),
    [
        ([0.5] * DIMENSION, "unit length"),
        ([float("nan")] * DIMENSION, "unit length"),
        ([1.0, 0.0], "2 dimensions"),
        ([], "one length"),
    ],
)
def test_an_item_with_bad_vectors_is_left_out_and_named(store: DerivedStore, vector: list[float], reason: str) -> None:
    live = library(store, 3) | {"bad": "v1", "lost": "v1", "torn": "v1"}
    broken(store, vector)
    store.path("embeddings", "torn").write_bytes(b"PAR1 not really")
    report = build(store, 0, live, RECALL)
    reasons = {item.media_id: item.reason for item in report.skipped}
    assert reasons.keys() == {"bad", "lost", "torn"}
    assert reason in reasons["bad"]
    assert "missing" in reasons["lost"]
    assert serving(store) == {"m-000", "m-001", "m-002"}
    assert not build(store, 0, live, RECALL).swapped
    write(store, "lost", 77)
    assert build(store, 0, live, RECALL).swapped
    assert "lost" in serving(store)


def test_a_damaged_build_is_told_and_mended_by_building_again(store: DerivedStore) -> None:
    live = library(store, 3)
    name = build(store, 0, live, RECALL).build
    (store.root / "index" / "000" / name / "joint.faiss").write_bytes(b"\0" * 10)
    with pytest.raises(ShardUnreadable, match="Materialize index_shard"):
        open_bucket(store, 0)
    assert build(store, 0, live, RECALL).build == name
    assert serving(store) == set(live)


def test_two_builders_of_one_bucket_do_not_meet(store: DerivedStore) -> None:
    live = library(store, 1)
    with exclusive(store, "index-000"), pytest.raises(BucketBusy):
        build(store, 0, live, RECALL)
    assert build(store, 0, live, RECALL).swapped


def test_an_object_store_serves_the_same(tmp_path: Path) -> None:
    store = DerivedStore(UPath(f"memory://shards-{tmp_path.name}"))
    live = library(store, 4)
    report: BuildReport = build(store, 0, live, RECALL)
    assert report.skipped == ()
    for start in (1, 2):
        build(store, 0, dict(list(live.items())[start:]), RECALL)
    assert serving(store) == {"m-002", "m-003"}
    assert len(builds(store)) == 2
