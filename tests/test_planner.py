"""The planner on records in a real Postgres: what it packs, what it lets wait, and what it says about it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dagster as dg
import pytest
import sqlalchemy as sa
from dagster._core.events import StepMaterializationData

from jobs.batch_sizes import express_s, most_items
from jobs.costs import Costs
from jobs.express import EXPRESS, build_express_job, pools
from jobs.planner import CAREFUL, LONG, MIXED, Planner, Tick
from media_assets.engine.versions import item_version
from media_assets.orchestration.groups import media_items
from resources.errors import Failure, ModelTimeout
from resources.ingest.uploads import Upload
from resources.library import Library
from resources.records.outcome import Claim, Cost, Status
from resources.settings import Compute, Engine, GroupNeeds, Settings
from resources.settings import Planner as PlannerSettings
from sensors.intervals import stay_s
from sensors.planner import _decide, build_planner_sensor, follow, request
from tests.conftest import SILENT

PASSING = Failure("model_failed", "The model did not answer.", retryable=True)
PERMANENT = Failure("undecodable", "It does not decode.", retryable=False)


def register(library: Library, *names: str) -> list[str]:
    """Register uploads of these names."""
    now = datetime.now(UTC)
    return library.registry.add([Upload(f"s3://bucket/{name}", "e", 1_000_000, now, "s3") for name in names])


def configure(
    library: Library, planner: PlannerSettings | None = None, batch_items: int = 200, express_s: float = 0.0
) -> Planner:
    """A planner over the library with these settings; by default every group has batches of its own."""
    engine = Engine(batch_items=batch_items, retry_base_s=30)
    update = {"planner": (planner or PlannerSettings()).model_copy(update={"express_s": express_s}), "engine": engine}
    library.settings = library.settings.model_copy(update=update)
    return Planner(library)


def make(
    library: Library,
    planner: Planner,
    group: str,
    keys: Sequence[str],
    fail: Callable[[str, str], Failure | None] = lambda _media_id, _asset: None,
    seconds: float = 1.0,
    run: str = "run",
) -> None:
    """Settle a group's outcomes for `keys` as the engine would, without a model."""
    with library.outcomes.lease(run) as lease:
        for item in media_items(library, keys):
            for stage in planner.stages[group]:
                records = library.outcomes.load([item.media_id])
                inputs = [records.get((item.media_id, name)) for name in stage.inputs]
                contents = [found.content if found and found.status.done else "" for found in inputs]
                version = item_version(stage, item, contents)
                claim = library.outcomes.claim(item.media_id, stage.name, version, run, lease.liveness)
                if not isinstance(claim, Claim):
                    continue
                failure = fail(item.media_id, stage.name)
                if failure is not None:
                    library.outcomes.fail(claim, failure, Cost())
                else:
                    library.outcomes.succeed(claim, Status.OK, f"{stage.name}-content", Cost(seconds=seconds))


def end(library: Library, tick: Tick, state: str = "finished") -> None:
    """The runs of a tick's batches ended."""
    for batch in tick.batches:
        assert batch.id is not None
        library.backlog.ended(batch.id, state, 30.0)


def through(library: Library, planner: Planner, keys: Sequence[str]) -> None:
    """Take uploads through every group."""
    for group in planner.stages:
        make(library, planner, group, keys)
    planner.tick()


def test_an_upload_goes_through_the_groups_and_is_settled(library: Library) -> None:
    """Given one upload, then it rides in one batch per group, in order, and is then never looked at again."""
    planner = configure(library)
    (key,) = register(library, "a.mp4")
    for group in ("decode", "analyse", "label"):
        tick = planner.tick()
        assert [(batch.group, batch.keys) for batch in tick.batches] == [(group, (key,))]
        assert planner.tick().batches == []  # it is in flight
        make(library, planner, group, [key])
        end(library, tick)
    assert planner.tick().batches == []
    assert planner.tick().looked_at == 0


def test_little_work_on_an_idle_system_takes_all_groups_at_once(library: Library) -> None:
    """Given two photos and nothing in flight, then one batch takes both to the end, and what comes meanwhile waits."""
    planner = configure(library, express_s=60)
    keys = register(library, "a.jpg", "b.jpg")
    tick = planner.tick()
    assert [(batch.group, set(batch.keys)) for batch in tick.batches] == [(EXPRESS, set(keys))]
    assert tick.batches[0].seconds == pytest.approx(6)  # of three groups
    wanted = request(tick.batches[0], library.settings)
    assert wanted.job_name == "process_express"
    assert set(wanted.run_config["ops"][EXPRESS]["config"]["keys"]) == set(keys)
    register(library, "c.jpg")
    later = planner.tick()
    assert later.batches == []
    assert "1 image uploads wait" in " ".join(later.explanations)
    for group in planner.stages:
        make(library, planner, group, keys)
    end(library, tick)
    assert [(batch.group, len(batch.keys)) for batch in planner.tick().batches] == [(EXPRESS, 1)]


def test_groups_with_pools_of_their_own_are_not_run_together(library: Library) -> None:
    """Given one more pool besides the GPU's, whose limit an express run would get around, then it is not taken."""
    compute = Compute(groups={"decode": GroupNeeds(pool="disk")})
    library.settings = library.settings.model_copy(update={"compute": compute})
    (key,) = register(library, "a.jpg")
    tick = configure(library, express_s=60).tick()
    assert [(batch.group, batch.keys) for batch in tick.batches] == [("decode", (key,))]
    assert "several pools: disk, gpu" in " ".join(tick.explanations)


@pytest.mark.parametrize(
    ("needs", "expected"),
    [
        ({}, ["gpu"]),
        ({"analyse": GroupNeeds(pool="cards")}, ["cards"]),
        ({"analyse": GroupNeeds(gpus=0)}, ["cpu"]),
        ({"asr": GroupNeeds(stages=("transcript",), pool="asr")}, ["asr", "gpu"]),
    ],
    ids=["usual", "renamed", "no gpu", "split off"],
)
def test_an_express_run_is_in_the_pool_of_its_groups(needs: dict[str, GroupNeeds], expected: list[str]) -> None:
    """Given pools in the settings, then the express step is in the one of the group that needs most."""
    settings = Settings(home=Path("nowhere"), compute=Compute(groups=needs))
    assert pools(settings) == expected
    (step,) = build_express_job(settings).nodes_in_topological_order
    assert step.definition.pool == expected[0]


@pytest.mark.parametrize("names", [["film.mp4", "film2.mp4"], [f"{n}.jpg" for n in range(21)]], ids=["long", "many"])
def test_more_work_goes_by_groups(library: Library, names: list[str]) -> None:
    """Given more expected work than express_s, then the groups run apart, each on its own machines."""
    planner = configure(library, express_s=60)
    register(library, *names)
    assert [batch.group for batch in planner.tick().batches] == ["decode"]


def on_ray(library: Library) -> Planner:
    """A planner of a library on a Ray cluster, where a step is a new process."""
    compute = Compute(executor="ray")
    library.settings = library.settings.model_copy(update={"compute": compute})
    return Planner(library)


def test_on_ray_seconds_of_work_fill_a_batch_and_not_items(library: Library) -> None:
    """Given 1,000 photos of a second each, then a batch on Ray has as many as `batch_seconds` allow, here 200."""
    register(library, *(f"{n:04d}.jpg" for n in range(1000)))
    here = configure(library, express_s=0).dry_run(1000)
    assert [len(batch.keys) for batch in here.batches] == [200] * 5
    library.settings = Settings(home=library.settings.home)
    on_cluster = on_ray(library).dry_run(1000)
    assert [len(batch.keys) for batch in on_cluster.batches] == [900, 100]


def test_on_ray_more_work_goes_through_all_groups_in_one_step(library: Library) -> None:
    """Given 50 photos on an idle system, which are three minutes of work, then on Ray one step takes them to the end;
    settings that say otherwise are obeyed."""
    register(library, *(f"{n}.jpg" for n in range(50)))
    assert [batch.group for batch in on_ray(library).tick().batches] == [EXPRESS]
    assert express_s(library.settings) == pytest.approx(300)
    said = library.settings.model_copy(
        update={"planner": PlannerSettings(express_s=60), "engine": Engine(batch_items=200)}
    )
    assert express_s(said) == pytest.approx(60)
    assert most_items(said) == 200


def test_scattered_retries_are_packed_full(library: Library) -> None:
    """Given 130 of 400 settled uploads to retry, then batches of 50 make three runs, and nothing else is read."""
    planner = configure(library, PlannerSettings(max_in_flight=10, batch_seconds=1e6), batch_items=50)
    keys = register(library, *(f"{n:04d}.jpg" for n in range(400)))
    through(library, planner, keys)
    chosen = sorted(keys)[::3][:130]
    with library.database.engine.begin() as connection:
        statement = "update outcomes set status = 'quarantined' where asset = 'shots' and media_id = any(:ids)"
        connection.execute(sa.text(statement), {"ids": chosen})
    assert library.outcomes.reset(chosen) == 130
    tick = planner.tick()
    assert tick.looked_at == 130
    assert sorted(len(batch.keys) for batch in tick.batches) == [30, 50, 50]
    assert sorted(key for batch in tick.batches for key in batch.keys) == sorted(chosen)
    assert all("50 to retry" in batch.reason or "30 to retry" in batch.reason for batch in tick.batches)


def test_no_more_batches_than_the_limit_are_in_flight(library: Library) -> None:
    """Given more work than the limit lets fly, then the rest waits in the registry and the tick says so."""
    planner = configure(library, PlannerSettings(max_in_flight=2), batch_items=10)
    register(library, *(f"{n:03d}.jpg" for n in range(55)))
    tick = planner.tick()
    assert [len(batch.keys) for batch in tick.batches] == [10, 10]
    assert "decode: 35 uploads wait; 2 batches are in flight, the limit" in tick.explanations
    assert planner.tick().batches == []
    library.backlog.ended(tick.batches[0].id or 0, "finished", 0.0)
    assert len(planner.tick().batches) == 1


def test_small_batches_when_idle_full_ones_under_load(library: Library) -> None:
    """Given an idle group, then one upload flies at once; with a batch in flight the next waits to fill up."""
    planner = configure(library, PlannerSettings(max_in_flight=3, max_wait_s=60), batch_items=4)
    register(library, "a.jpg")
    assert [len(batch.keys) for batch in planner.tick().batches] == [1]
    register(library, "b.jpg", "c.jpg")
    tick = planner.tick()
    assert tick.batches == []
    assert any("2 image uploads wait at most 60 s for their batch to fill" in line for line in tick.explanations)
    overdue = planner.tick(datetime.now(UTC) + timedelta(seconds=61))
    assert [len(batch.keys) for batch in overdue.batches] == [2]
    register(library, "d.jpg", "e.jpg", "f.jpg", "g.jpg")
    assert [len(batch.keys) for batch in planner.tick().batches] == [4]


def test_long_videos_do_not_ride_with_photos(library: Library) -> None:
    """Given past videos of many seconds per megabyte, then big ones go among themselves and the short ones mix."""
    planner = configure(library, PlannerSettings(max_in_flight=9, long_s=100))
    through(library, planner, register(library, "old.jpg"))
    old = register(library, "old.mp4")
    for group in planner.stages:
        make(library, planner, group, old, seconds=40.0)
    planner = configure(library, PlannerSettings(max_in_flight=9, long_s=100))
    big, small = register(library, "big.mp4", "small.jpg")
    (tone,) = register(library, "tone.wav")
    lanes = {batch.lane: batch.keys for batch in planner.tick().batches}
    assert lanes == {LONG: (big,), MIXED: (small, tone)}


def test_fresh_uploads_go_before_a_backfill(library: Library) -> None:
    """Given a model change that makes all stale and two fresh uploads, then the fresh ones go first."""
    planner = configure(library, PlannerSettings(max_in_flight=1), batch_items=2)
    through(library, planner, register(library, "a.jpg", "b.jpg", "c.jpg"))
    with library.database.engine.begin() as connection:
        connection.execute(sa.text("update uploads set plan = 'of another model'"))
        connection.execute(sa.text("update outcomes set version = 'older' where asset = 'moderation_labels'"))
    fresh = register(library, "x.jpg", "y.jpg")
    tick = planner.tick()
    by_group = {batch.group: batch for batch in tick.batches}
    assert by_group["decode"].keys == tuple(fresh)
    assert "2 stale" in by_group["label"].reason


def test_a_retry_waits_for_its_time(library: Library) -> None:
    """Given a failure that may pass, then its upload is put aside until it is due and then retried."""
    planner = configure(library)
    (key,) = register(library, "a.mp4")
    tick = planner.tick()
    make(library, planner, "decode", [key], lambda _, asset: PASSING if asset == "audio" else None)
    end(library, tick)
    waiting = planner.tick()
    assert waiting.batches == []
    assert any("1 waiting for a retry" in line for line in waiting.explanations)
    with library.database.engine.begin() as connection:
        connection.execute(sa.text("update outcomes set retry_at = now() - interval '1 s' where retry_at is not null"))
        connection.execute(sa.text("update uploads set due_at = now() - interval '1 s' where due_at is not null"))
    (batch,) = planner.tick().batches
    assert (batch.group, batch.keys) == ("decode", (key,))
    assert "1 to retry" in batch.reason


def test_a_quarantined_item_is_not_run_again(library: Library) -> None:
    """Given an upload that failed for good, then the later groups note it once and it is settled."""
    planner = configure(library)
    (key,) = register(library, "a.mp4")
    tick = planner.tick()
    make(library, planner, "decode", [key], lambda _, asset: PERMANENT if asset == "media" else None)
    end(library, tick)
    (analyse,) = planner.tick().batches
    assert analyse.group == "analyse"


def test_suspects_of_a_crash_go_one_at_a_time(library: Library) -> None:
    """Given items in flight when their run died, then they come back in a careful batch and the others do not."""
    planner = configure(library)
    first, second, other = register(library, "a.jpg", "b.jpg", "c.jpg")
    tick = planner.tick()
    stage = planner.stages["decode"][0]
    with library.outcomes.lease("dying") as lease:
        for item in media_items(library, [first, second]):
            library.outcomes.claim(item.media_id, stage.name, item_version(stage, item, []), "dying", lease.liveness)
        end(library, tick, "failed")
        with library.database.engine.begin() as connection:
            connection.execute(sa.text("update uploads set due_at = null"))
        alive = planner.tick()
        assert [batch.keys for batch in alive.batches] == [(other,)]  # the others are held by a live run
    with library.database.engine.begin() as connection:
        connection.execute(sa.text("update uploads set due_at = null"))
    (careful,) = planner.tick(datetime.now(UTC) + timedelta(seconds=61)).batches
    assert (careful.lane, set(careful.keys)) == (CAREFUL, {first, second})
    config = request(careful, library.settings).run_config
    assert isinstance(config, dict)
    assert config["ops"]["decode"]["config"]["careful"] is True


def test_what_shared_a_hung_call_goes_one_at_a_time(library: Library) -> None:
    """Given two items in whose call a model hung and one it failed for, then the two are retried one at a time."""
    planner = configure(library)
    keys = register(library, "a.jpg", "b.jpg", "c.jpg")
    first, second, other = keys
    hung = Failure.of(ModelTimeout("It gave no answer."))
    make(library, planner, "decode", keys, lambda key, _: PASSING if key == other else hung)
    batches = planner.tick(datetime.now(UTC) + timedelta(hours=1)).batches
    assert {batch.lane: set(batch.keys) for batch in batches} == {CAREFUL: {first, second}, "image": {other}}
    assert "2 to retry after a hung call" in next(batch.reason for batch in batches if batch.is_careful)


def test_a_failed_batch_backs_off(library: Library) -> None:
    """Given a batch whose run fails before any item is claimed, then its uploads wait longer each time."""
    planner = configure(library)
    (key,) = register(library, "a.jpg")
    delays = []
    for _ in range(6):
        with library.database.engine.begin() as connection:
            connection.execute(sa.text("update uploads set due_at = null"))
        end(library, planner.tick(), "failed")
        with library.database.engine.connect() as connection:
            query = sa.text("select extract(epoch from due_at - now()) from uploads where media_id = :key")
            delays.append(round(float(connection.execute(query, {"key": key}).scalar_one()), -1))
    assert delays == [30, 30, 30, 60, 120, 240]


def test_a_dry_run_changes_nothing(library: Library) -> None:
    """Given a backlog, when it is planned dry, then the batches are told and nothing is recorded."""
    planner = configure(library, PlannerSettings(max_in_flight=1), batch_items=10)
    register(library, *(f"{n:03d}.jpg" for n in range(25)))
    assert [len(batch.keys) for batch in planner.dry_run(1000).batches] == [10, 10, 5]
    assert library.backlog.open_batches() == []
    assert library.backlog.notes() is None
    assert [len(batch.keys) for batch in planner.tick().batches] == [10]


def test_what_claims_an_outcome_unsettles_its_upload(library: Library) -> None:
    """Given a settled upload, when someone makes one of its assets anew, then the planner looks at it again."""
    planner = configure(library)
    (key,) = register(library, "a.jpg")
    through(library, planner, [key])
    assert planner.tick().looked_at == 0
    assert library.outcomes.reset([key], ["media"], finished=True) == 1
    (batch,) = planner.tick().batches
    assert (batch.group, batch.keys) == ("decode", (key,))


def test_the_batches_follow_their_runs(library: Library) -> None:
    """Given runs that are going, done, failed and missing, then their batches say so and name them, be it that a run
    was over before the first look, and one is asked again."""
    planner = configure(library, PlannerSettings(max_in_flight=9, lost_after_s=300), batch_items=1)
    register(library, "a.jpg", "b.jpg", "c.jpg", "d.jpg", "e.jpg")
    ids = [batch.id or 0 for batch in planner.tick().batches]

    @dg.job
    def nothing() -> None:
        """A job to have runs of."""

    states = [dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.FAILURE]
    with dg.DagsterInstance.ephemeral() as instance:
        runs = [
            instance.create_run_for_job(nothing, status=status, tags={"media/batch": str(batch_id)}).run_id
            for batch_id, status in zip(ids, states, strict=False)
        ]
        with library.database.engine.begin() as connection:
            aged = "update batches set created_at = now() - make_interval(secs => :age) where id = :id"
            connection.execute(sa.text(aged), [{"id": ids[3], "age": 60}, {"id": ids[4], "age": 600}])
        (again,) = follow(library, instance)
    assert (again.id, len(again.keys)) == (ids[3], 1)
    recorded = {batch.id: batch for batch in library.backlog.recent_batches()}
    assert [recorded[i].state for i in ids] == ["running", "finished", "failed", "requested", "lost"]
    assert [recorded[i].run_id for i in ids] == [*runs, None, None]


def test_a_batch_keeps_its_run_to_the_end(library: Library) -> None:
    """Given a batch whose run was seen to start, when it is closed without naming the run, then it names it still."""
    planner = configure(library)
    register(library, "a.jpg")
    (batch,) = planner.tick().batches
    assert batch.id is not None
    library.backlog.started(batch.id, "run")
    library.backlog.ended(batch.id, "lost", 0.0)
    assert [found.run_id for found in library.backlog.recent_batches()] == ["run"]


@pytest.mark.parametrize(
    ("uri", "size", "expected"),
    [("a.mp4", 2_000_000, 20.0), ("b.mp4", 500_000, 5.0), ("c.jpg", 9_000_000, 3.0), ("d.xyz", 10, 2.0)],
)
def test_costs_follow_past_work(uri: str, size: int, expected: float) -> None:
    """Given past work, then video is expected by its size, a photo by the mean, and the unknown is guessed."""
    past = [("frames", "x.mp4", 10.0, 1_000_000), ("frames", "y.jpg", 2.0, 5), ("frames", "z.jpg", 4.0, 5)]
    seconds, guessed = Costs(past).seconds(["frames"], uri, size)
    assert seconds == pytest.approx(expected)
    assert guessed is (uri == "d.xyz")


def test_what_a_dead_run_ended_is_mirrored(library: Library) -> None:
    """Given a run that died with three items ended, two well and one not, and one of them reported, then closing it
    reports the others: the good one with what it was made from, the other with why it failed."""
    planner = configure(library)
    keys = register(library, "a.jpg", "b.jpg", "c.jpg")
    (batch,) = planner.tick().batches

    @dg.job
    def nothing() -> None:
        """A job to have a run of."""

    with dg.DagsterInstance.ephemeral() as instance:
        tags = {"media/batch": str(batch.id)}
        run = instance.create_run_for_job(nothing, status=dg.DagsterRunStatus.FAILURE, tags=tags)
        broken = {keys[2]: PERMANENT}
        make(library, planner, "decode", keys, fail=lambda media_id, _: broken.get(media_id), run=run.run_id)
        told = dg.AssetMaterialization("media", partition=keys[0])
        entry = dg.EventLogEntry(  # type: ignore[no-untyped-call]
            None,
            10,
            "",
            run.run_id,
            0.0,
            None,
            "nothing",
            dg.DagsterEvent("ASSET_MATERIALIZATION", "nothing", event_specific_data=StepMaterializationData(told)),
        )
        instance.event_log_storage.store_event(entry)
        follow(library, instance)
        made = instance.fetch_materializations(dg.AssetKey("media"), limit=10).records
        assert [record.partition_key for record in made] == [keys[1], keys[0]]
        frames = instance.fetch_materializations(dg.AssetKey("frames"), limit=10).records
        assert {record.partition_key for record in frames} == set(keys[:2])
        pointers = {
            record.partition_key: int((record.asset_materialization.tags or {})["dagster/input_event_pointer/media"])
            for record in frames
            if record.asset_materialization
        }
        assert pointers == {record.partition_key: record.storage_id for record in made}
        (seen,) = instance.fetch_observations(dg.AssetKey("media"), limit=10).records
        observed = seen.event_log_entry.asset_observation
        assert observed is not None
        assert (observed.partition, observed.metadata["error class"].value) == (keys[2], "undecodable")


def test_a_claim_during_the_planners_look_is_not_hidden(library: Library) -> None:
    """Given outcomes claimed or reset after the planner read them, then their uploads are not settled."""
    planner = configure(library)
    claimed, reset, _ = keys = register(library, "a.jpg", "b.jpg", "c.jpg")
    for group in planner.stages:
        make(library, planner, group, keys)
    read_at = library.backlog.now()
    with library.outcomes.lease("other") as lease:
        library.outcomes.claim(claimed, "media", "newer", "other", lease.liveness)
    assert library.outcomes.reset([reset], ["audio"], finished=True) == 1
    library.backlog.settle(keys, planner.plan, read_at)
    assert {upload.media_id for upload in library.backlog.waiting(planner.plan, 10)} == {claimed, reset}


def test_a_tick_that_launches_nothing_writes_no_log(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given nothing to do, then the reason to skip says so and the tick has no log, which would be a file; a tick that
    launches something says why in its log."""
    planner = configure(library)
    lines: list[str] = []
    monkeypatch.setattr("sensors.planner.rebuild_request", lambda _: None)
    with dg.DagsterInstance.ephemeral() as instance:
        context: Any = SimpleNamespace(instance=instance, log=SimpleNamespace(info=lines.append))
        skipped, _ = _decide(context, library, planner)
        assert isinstance(skipped, dg.SkipReason)
        assert "backlog: 0 uploads ready" in (skipped.skip_message or "")
        assert lines == []
        register(library, "a.jpg")
        asked, _ = _decide(context, library, planner)
        assert isinstance(asked, dg.SensorResult)
        assert any(line.startswith("decode: batch ") for line in lines)


@pytest.mark.parametrize("finished", [[], ["a.jpg"]], ids=["an empty library", "an item just finished"])
def test_an_idle_tick_is_there_when_an_upload_comes(
    library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: list[str]
) -> None:
    """Given a thread for each sensor and nothing left to do, when an upload is registered, then the same tick plans
    it."""
    monkeypatch.setattr("sensors.intervals._STAY_S", 60.0)
    monkeypatch.setattr("sensors.planner.rebuild_request", lambda _: None)  # as after a run that rebuilt
    library.settings = library.settings.model_copy(update={"partitions": "media"})
    planner = Planner(library)
    if finished:
        keys = register(library, *finished)
        for group in planner.stages:
            make(library, planner, group, keys)
        assert library.backlog.waiting(planner.plan, 10), "the tick is the one that settles them"
    sensor = build_planner_sensor(library.settings, [build_express_job(library.settings)])
    threads = {"sensors": {"use_threads": True}}
    with dg.DagsterInstance.local_temp(str(tmp_path), overrides=threads | SILENT) as instance:
        threading.Timer(1.0, lambda: register(library, "b.jpg")).start()
        with dg.build_sensor_context(instance=instance, resources={"media": library}) as context:
            (asked,) = sensor.evaluate_tick(context).run_requests or ()
    assert asked.job_name == f"process_{EXPRESS}"
    with dg.DagsterInstance.local_temp(str(tmp_path), overrides=SILENT) as instance:
        assert stay_s(instance) == 0
