"""What is removed is neither worked on nor served, and a rebuild that has nothing to do costs nothing."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pyarrow.parquet as pq
import pytest
import sqlalchemy as sa

from cli.searching import open_views
from media_assets.engine.batch import BatchEngine
from media_assets.engine.contract import MediaItem
from media_assets.engine.events import How
from media_assets.engine.executors import Serial
from media_assets.library.buckets import bucket_of
from media_assets.library.index_shard import open_bucket
from media_assets.orchestration.global_assets import library_changed
from media_assets.orchestration.groups import media_items
from resources.errors import Failure
from resources.files.catalog_files import data_path
from resources.files.views import outcomes_table, query
from resources.ingest.uploads import Removal, Upload
from resources.library import Library
from resources.records.outcome import Claim, Cost, LostClaim, Status, Withdrawn
from resources.records.tables import outcomes, uploads
from search.engine import SearchEngine
from tests.settled import settled
from tests.shelf import Encoder, put, rebuild, register
from tests.toy_stages import CHAIN, SCHEMA


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral() as opened:
        yield opened


def set_state(library: Library, media_id: str, state: str) -> None:
    with library.database.engine.begin() as connection:
        connection.execute(sa.update(uploads).where(uploads.c.media_id == media_id).values(state=state))


def planner(library: Library, media_id: str) -> dict[str, object]:
    """The planner's columns of one upload."""
    names = ("plan", "due_at", "launches", "priority")
    with library.database.engine.connect() as connection:
        row = connection.execute(sa.select(*(uploads.c[n] for n in names)).where(uploads.c.media_id == media_id)).one()
    return dict(row._mapping)


def settle(library: Library, media_id: str) -> None:
    """What the planner writes when it finds nothing to do for an item."""
    values = {"plan": "digest", "due_at": sa.func.now(), "launches": 3, "priority": 0}
    with library.database.engine.begin() as connection:
        connection.execute(sa.update(uploads).where(uploads.c.media_id == media_id).values(**values))


def granted(library: Library, media_id: str, asset: str = "frames") -> Claim:
    with library.outcomes.lease("run") as lease:
        claim = library.outcomes.claim(media_id, asset, "v1", "run", lease.liveness)
    assert isinstance(claim, Claim)
    return claim


@pytest.mark.parametrize("state", ["removed", "superseded", "purged"])
def test_an_upload_that_is_not_live_is_not_claimed(library: Library, state: str) -> None:
    """Given an upload withdrawn after its run began, then it is neither claimed nor blocked, and has no record."""
    media_id = register(library, "a.mp3")
    set_state(library, media_id, state)
    with pytest.raises(Withdrawn):
        granted(library, media_id)
    with pytest.raises(Withdrawn):
        library.outcomes.block(media_id, "shots", "v1", "frames failed", retryable=False, run_id="run")
    assert library.outcomes.load([media_id]) == {}


def test_nothing_is_finished_for_a_purged_upload(library: Library) -> None:
    """Given a claim in flight, when its upload is purged, then finishing it is refused; when removed, it is not."""
    one, two = register(library, "a.mp3"), register(library, "b.mp3")
    purged, removed = granted(library, one), granted(library, two)
    set_state(library, one, "purged")
    set_state(library, two, "removed")
    failure = Failure("undecodable", "It does not decode.", retryable=False)
    for finish in (
        lambda: library.outcomes.succeed(purged, Status.OK, "", Cost()),
        lambda: library.outcomes.fail(purged, failure, Cost()),
        lambda: library.outcomes.release(purged),
    ):
        with pytest.raises(LostClaim):
            finish()
    assert library.outcomes.succeed(removed, Status.OK, "", Cost()).status is Status.OK


def test_any_claim_or_block_makes_the_planner_look_again(library: Library) -> None:
    """Given an item the planner holds for settled, when one of its assets is claimed or blocked, then it is not."""
    media_id = register(library, "a.mp3")
    settle(library, media_id)
    granted(library, media_id)
    assert planner(library, media_id)["plan"] is None
    settle(library, media_id)
    library.outcomes.block(media_id, "shots", "v1", "frames failed", retryable=False, run_id="run")
    assert planner(library, media_id)["plan"] is None
    assert planner(library, media_id)["launches"] == 3


def test_a_reset_sends_exactly_its_items_back_to_the_planner(library: Library) -> None:
    """Given two settled items, one of them quarantined, when failures are reset, then that one is due afresh."""
    bad, good = register(library, "a.mp3"), register(library, "b.mp3")
    library.outcomes.fail(granted(library, bad), Failure("empty", "Nothing in it.", retryable=False), Cost())
    library.outcomes.succeed(granted(library, good), Status.OK, "", Cost())
    settle(library, bad)
    settle(library, good)
    assert library.outcomes.reset() == 1
    assert planner(library, bad) == {"plan": None, "due_at": None, "launches": 0, "priority": 1}
    assert planner(library, good)["plan"] == "digest"


def test_claims_of_one_item_wait_for_each_other(library: Library) -> None:
    """Given a settled item, when many threads claim its assets at once, then each gets its own, without deadlock."""
    media_id = register(library, "a.mp3")
    settle(library, media_id)
    claims: list[Claim] = []
    names = [f"asset{number}" for number in range(8)]
    threads = [threading.Thread(target=lambda n=name: claims.append(granted(library, media_id, n))) for name in names]  # type: ignore[misc]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(claim.asset for claim in claims) == names


def test_an_item_purged_in_mid_batch_leaves_nothing_and_its_neighbours_finish(library: Library) -> None:
    """Given a batch under way, when an item is purged while it is assembled, then no file and no record of it stays."""
    ids = [register(library, name) for name in ("a.mp3", "b.mp3", "c.mp3")]
    doomed = ids[1]

    def purge(method: str, media_id: str) -> None:
        if method == "assemble" and media_id == doomed:
            set_state(library, doomed, "purged")
            with library.database.engine.begin() as connection:
                connection.execute(sa.delete(outcomes).where(outcomes.c.media_id == doomed))

    stages = [kind(library.settings, library.models, purge) for kind in CHAIN]
    engine = BatchEngine(stages, library.store, library.outcomes, library.settings, executor=Serial)
    results = settled(engine, [MediaItem(key, f"/{key}", "1") for key in ids], "run")
    assert {r.how for r in results if r.media_id == doomed} == {How.WITHDRAWN}
    assert {r.how for r in results if r.media_id != doomed} == {How.COMPUTED}
    assert not any(r.done for r in results if r.media_id == doomed)
    assert library.outcomes.load([doomed]) == {}
    left = [path.name for path in Path(str(library.store.root)).rglob("*.parquet") if doomed in path.name]
    assert left == []
    assert library.store.read("total", ids[0]).schema == SCHEMA


def test_a_run_that_carries_a_removed_item_leaves_it_out(library: Library) -> None:
    """Given a run with two IDs in its config, when one upload is removed before it starts, then the other is taken."""
    kept, gone = register(library, "a.mp3"), register(library, "b.mp3")
    library.registry.register([], [Removal("/shelf/b.mp3")])
    assert [item.media_id for item in media_items(library, [gone, kept])] == [kept]


def everywhere(library: Library, media_id: str) -> dict[str, bool]:
    """Where an item still shows."""
    bucket = bucket_of(media_id, library.settings.index.buckets)
    rows = pq.ParquetFile(str(data_path(library.store, "transcript", bucket))).read()["media_id"].to_pylist()
    shards = open_bucket(library.store, bucket)
    sidecars = [row for shard in shards.spaces.values() for row in shard.rows["media_id"].to_pylist()] if shards else []
    stored = library.store.read("near_duplicates", "all")["media_id"].to_pylist()
    engine = SearchEngine(library.store, Encoder(), lambda: outcomes_table(library.outcomes.rows()))
    views = open_views(library)
    return {
        "catalog": media_id in rows,
        "index": media_id in sidecars,
        "near_duplicates": media_id in stored,
        "search by vector": media_id in {hit.media_id for hit in engine.search("lighthouse").hits},
        "search by word": media_id in {hit.media_id for hit in engine.search("saw").hits},
        "outcomes": media_id in query(views, "select media_id from outcomes")["media_id"].to_pylist(),
        "media": media_id in query(views, "select media_id from media")["media_id"].to_pylist(),
        "evaluations": media_id in {item for item, _, _ in library.items()},
    }


def test_a_removed_item_leaves_everything_that_is_served(library: Library, instance: dg.DagsterInstance) -> None:
    """Given three processed items, when one is removed and the library rebuilt, then it is gone, the others are not."""
    gone = put(library, "lighthouse.mp3", "lighthouse", "a" * 64)
    copy = put(library, "copy.mp3", "lighthouse", "a" * 64)
    third = put(library, "third.mp3", "lighthouse", "a" * 64)
    assert rebuild(library, instance)
    assert set(everywhere(library, gone).values()) == {True}
    library.registry.register([], [Removal("/shelf/lighthouse.mp3")])
    before = everywhere(library, gone)
    assert {name for name, shows in before.items() if shows} == {"catalog", "index", "near_duplicates"}
    assert rebuild(library, instance)
    assert set(everywhere(library, gone).values()) == {False}
    for key in (copy, third):
        assert set(everywhere(library, key).values()) == {True}


def test_a_new_version_takes_the_place_of_the_old_one(library: Library, instance: dg.DagsterInstance) -> None:
    """Given a processed item, when its file changes, then the old version is no longer served."""
    old = put(library, "tram.mp3", "lighthouse")
    put(library, "other.mp3", "lighthouse")
    rebuild(library, instance)
    new = register(library, "tram.mp3", etag="2")
    assert new != old
    rebuild(library, instance)
    assert set(everywhere(library, old).values()) == {False}


def test_a_quiet_library_is_not_read_again(
    library: Library, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given a rebuilt library, when nothing happened, then two index lookups say so; what changes is noticed."""
    assert not library_changed(library)  # nothing was ever worked on
    put(library, "tram.mp3", "tram")
    assert library_changed(library)
    assert rebuild(library, instance)
    with monkeypatch.context() as patch:
        patch.setattr(library.outcomes, "finished", lambda: pytest.fail("the records were read"))
        assert not library_changed(library)
    assert not rebuild(library, instance)
    # A new upload changes the mark, but nothing that a rebuild would read.
    register(library, "new.mp3")
    assert not library_changed(library)
    with monkeypatch.context() as patch:
        patch.setattr(library.outcomes, "finished", lambda: pytest.fail("the records were read"))
        assert not library_changed(library)
    library.registry.register([], [Removal("/shelf/tram.mp3")])
    assert library_changed(library)


def test_only_a_complete_rebuild_counts(library: Library, instance: dg.DagsterInstance) -> None:
    """Given a changed library, when only the near-duplicates are made, then the rest is still to be rebuilt."""
    from media_assets.definitions import build

    put(library, "tram.mp3", "tram")
    job = build(library).resolve_job_def("rebuild")
    job.execute_in_process(instance=instance, asset_selection=[dg.AssetKey("near_duplicates")])
    assert library_changed(library)
    rebuild(library, instance)
    assert not library_changed(library)


def test_the_mark_tells_of_changes_that_were_under_way(library: Library) -> None:
    """Given a transaction that got its history row before the mark and commits after it, then the mark changes."""
    media_id = register(library, "tram.mp3")
    granted(library, media_id, "audio")
    quiet = library.outcomes.library_mark()
    assert library.outcomes.library_mark() == quiet
    with library.database.engine.connect() as slow:
        slow.execute(
            sa.text(
                "insert into outcome_history (media_id, asset, version, claim, status)"
                " values (:id, 'shots', 'v1', 1, 'running')"
            ),
            {"id": media_id},
        )
        granted(library, media_id, "frames")
        before = library.outcomes.library_mark()
        assert library.outcomes.library_mark() == before
        slow.commit()
    assert library.outcomes.library_mark() != before


def test_a_version_that_was_purged_is_not_registered_as_new(library: Library) -> None:
    """Given a purged upload, when the same version is found again, then it stays purged and nothing is new."""
    upload = Upload("/shelf/a.mp3", "1", 1, None)
    media_id = register(library, "a.mp3")
    set_state(library, media_id, "purged")
    assert library.registry.register([upload]).new == ()
    assert library.registry.known([media_id]) == {media_id: "purged"}
    assert json.dumps(library.registry.live()) == "[]"
