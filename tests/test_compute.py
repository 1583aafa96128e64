"""What groups need, how settings split them, which GPUs a run gets, and what launchers read of it."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import dagster as dg
import pytest
from pydantic import ValidationError
from typer.testing import CliRunner

from cli.instance import open_instance
from cli.main import app
from jobs import executors
from jobs.executors import ExecutorUnavailable, executor, instance_file, pool_limits
from media_assets.definitions import build
from media_assets.orchestration.grouping import groups
from media_assets.orchestration.groups import build_group
from media_assets.orchestration.partitions import add_partitions, explicit_batch_tags
from media_assets.orchestration.processor import Processor, processor
from resources.compute import devices
from resources.compute.devices import Device, DeviceUnavailable, assigned, candidates, visible
from resources.compute.needs import BadNeeds, Needs, micro_batch_scale, op_tags, run_tags
from resources.ingest.discovery import discover
from resources.library import Library
from resources.records.database import Database
from resources.records.event_log import EventLog
from resources.settings import Compute, GroupNeeds, Settings

PHOTO = Path(__file__).parents[1] / "samples" / "media" / "photos" / "cat.jpg"
GIB = 2**30
CARDS = tuple(Device(index, f"GPU-{index:04d}", 16 * GIB) for index in range(3))
ANALYSED = ("shots", "transcript", "ocr_text", "embeddings", "moderation_scores")


def settings(profile: str = "offline", **entries: GroupNeeds) -> Settings:
    """Settings with these entries in [compute.groups]."""
    return Settings(home=Path("nowhere"), profile=profile, compute=Compute(groups=entries))


def apart(*stages: str, **needs: object) -> GroupNeeds:
    """An entry that splits stages off."""
    return GroupNeeds(stages=stages, **needs)


# -- groups ----------------------------------------------------------------------------------------------------


def test_without_settings_the_groups_are_the_usual_three() -> None:
    """Given no settings, then decode and label want a CPU, and analyse a GPU if its models would use one."""
    for profile, wanted in (("gpu", Needs(cpus=2, gpus=1)), ("offline", Needs(cpus=2, pool="gpu"))):
        told = {group.name: (group.assets, group.needs, group.backfill_items) for group in groups(settings(profile))}
        assert told == {
            "decode": (("media", "frames", "audio"), Needs(cpus=2), 100),
            "analyse": (ANALYSED, wanted, 200),
            "label": (("moderation_labels",), Needs(), 1000),
        }


def test_backfills_on_ray_have_larger_runs() -> None:
    """Given executor ray, where each run starts a process, then its runs take more items, by group another number."""
    found = groups(Settings(home=Path("nowhere"), compute=Compute(executor="ray")))
    usual = {group.name: group.backfill_items for group in groups(settings())}
    assert all(group.backfill_items > usual[group.name] for group in found)
    assert len({group.backfill_items for group in found}) == len(found)


def test_a_gpu_that_is_stated_is_asked_for_whatever_the_profile() -> None:
    """Given settings that name a GPU for models of a CPU, then they are taken at their word."""
    found = {
        group.name: group.needs for group in groups(settings(analyse=GroupNeeds(gpus=0.5), asr=apart("transcript")))
    }
    assert found["analyse"] == found["asr"] == Needs(cpus=2, gpus=0.5)
    found = {group.name: group.needs for group in groups(settings(asr=apart("transcript", gpus=1)))}
    assert (found["analyse"].gpus, found["asr"].gpus) == (0, 1)


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        (
            {"asr": apart("transcript")},
            [("asr", ["transcript"]), ("analyse", ["shots", "ocr_text", "embeddings", "moderation_scores"])],
        ),
        (
            {"vectors": apart("embeddings")},
            [
                ("analyse", ["shots", "transcript", "ocr_text"]),
                ("vectors", ["embeddings"]),
                ("analyse_2", ["moderation_scores"]),
            ],
        ),
        (
            {"vectors": apart("embeddings"), "asr": apart("transcript")},
            [
                ("asr", ["transcript"]),
                ("analyse", ["shots", "ocr_text"]),
                ("vectors", ["embeddings"]),
                ("analyse_2", ["moderation_scores"]),
            ],
        ),
        ({"all_of_it": apart(*reversed(ANALYSED))}, [("all_of_it", list(ANALYSED))]),
    ],
    ids=["one at the head", "one in the middle", "two", "the whole group"],
)
def test_stages_can_be_split_off(entries: dict[str, GroupNeeds], expected: list[tuple[str, list[str]]]) -> None:
    """Given stages split off, then all groups are in topological order and no two share a backfill's run."""
    found = groups(settings(**entries))
    between = [(group.name, list(group.assets)) for group in found if group.name not in ("decode", "label")]
    assert between == expected
    assert [group.name for group in found] == ["decode", *(name for name, _ in expected), "label"]
    assert len({group.backfill_items for group in found}) == len(found)
    made: set[str] = set()
    for group in found:
        for stage in group.load(settings(), Library(settings()).models):
            made.add(stage.name)
            assert made.issuperset(stage.inputs), stage.name


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"x": apart("ocr_text", "moderation_scores")}, "cannot run before embeddings"),
        ({"x": apart("ocr_text", "moderation_scores"), "y": apart("embeddings")}, "cannot run before embeddings"),
        ({"x": apart("shots", "frames")}, "several groups"),
        ({"x": apart("shot")}, "no stage shot"),
        ({"x": GroupNeeds(gpus=1)}, "no such group"),
        ({"label": apart("shots")}, "label exists"),
        ({"library": apart("shots")}, "library exists"),
        ({"x": apart("shots"), "y": apart("shots")}, "shots is split off more than once"),
        ({"analyse_2": apart("embeddings")}, "what remains of a split group"),
        ({"analyse": GroupNeeds(gpus=0, gpu_required=True)}, "contradicts gpus = 0"),
    ],
)
def test_what_cannot_be_meant_is_refused(entries: dict[str, GroupNeeds], said: str) -> None:
    """Given a split that would make a cycle, a misspelt stage or a contradiction, then a sentence says which."""
    with pytest.raises(BadNeeds, match=said):
        groups(settings("gpu", **entries))


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ({"groups": {"analyse": {"gpus": 1.5}}}, "fraction of one GPU or a whole number"),
        ({"groups": {"Analyse GPU": {}}}, "a-z, 0-9 and _"),
        ({"groups": {"analyse": {"gpu": 1}}}, "Extra inputs"),
        ({"executor": "slurm"}, "'local', 'ray', 'ecs' or 'k8s'"),
        ({"groups": {"analyse": {"gpu_required": True}}}, "whose models run on the CPU"),
    ],
)
def test_wrong_needs_are_refused_by_the_settings(document: dict[str, object], said: str) -> None:
    """Given needs that no machine has, or a GPU required of models that use none, then the settings do not load."""
    with pytest.raises(ValidationError, match=said):
        Settings(home=Path("nowhere"), compute=Compute.model_validate(document))


def test_needs_are_stated_once_and_overridden_one_by_one() -> None:
    """Given settings, then they change what they name; what is split off inherits the rest."""
    entries = {
        "analyse": GroupNeeds(memory_bytes=32 * GIB, gpu_memory_bytes=24 * GIB),
        "asr": apart("transcript", gpus=0.5, pool="asr"),
        "library": GroupNeeds(cpus=8),
    }
    found = {group.name: group.needs for group in groups(settings("gpu", **entries))}
    assert found["analyse"] == Needs(cpus=2, gpus=1, memory_bytes=32 * GIB, gpu_memory_bytes=24 * GIB)
    assert found["asr"] == replace(found["analyse"], gpus=0.5, pool="asr")
    assert (found["analyse"].pool_name, found["asr"].pool_name, found["label"].pool_name) == ("gpu", "asr", "cpu")


def test_split_groups_reach_the_definitions(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given a split by environment, then there is a job and a pool for it, and the runs of ECS say what they need."""
    chosen = {"asr": {"stages": ["transcript"], "pool": "asr"}, "library": {"cpus": 4, "memory_bytes": 9 * GIB}}
    monkeypatch.setenv("MEDIA_COMPUTE__GROUPS", json.dumps(chosen))
    monkeypatch.setenv("MEDIA_COMPUTE__EXECUTOR", "ecs")
    monkeypatch.setenv("MEDIA_PROFILE", "gpu")
    definitions = build(Library(Settings.load(library.settings.home)))
    job = definitions.resolve_job_def("process_asr")
    assert json.loads(job.tags["ecs/run_task_kwargs"])["taskDefinition"] == "media-assets-gpu"
    assert job.nodes_in_topological_order[0].definition.pool == "asr"
    assert [key.to_user_string() for key in job.asset_layer.selected_asset_keys] == ["transcript"]
    rebuild = definitions.resolve_job_def("rebuild").tags
    assert (rebuild["ecs/cpu"], rebuild["ecs/memory"]) == ("4096", "9216")
    assert "ecs/run_task_kwargs" not in rebuild


# -- tags ------------------------------------------------------------------------------------------------------


def test_a_cpu_group_asks_for_nothing_special() -> None:
    """Given needs without a GPU, then no tag mentions one."""
    tags = op_tags("decode", Needs(cpus=2, memory_bytes=6 * GIB), Compute(executor="ecs"))
    assert tags == {
        "media/compute": "cpu",
        "media/group": "decode",
        "dagster-ray/config": {"num_cpus": 2, "memory": 6 * GIB},
        "dagster-k8s/config": {
            "container_config": {
                "resources": {"requests": {"cpu": "2", "memory": "6144Mi"}, "limits": {"memory": "6144Mi"}}
            }
        },
        "ecs/cpu": "2048",
        "ecs/memory": "6144",
    }


def test_a_gpu_group_says_so_to_every_launcher() -> None:
    """Given half a GPU of 24 GiB, then Ray gets the half, Kubernetes a whole one of that size, ECS its task."""
    compute = Compute(executor="ecs", ecs_gpu_task_definition="heavy", ecs_gpu_capacity_provider="cards")
    tags = op_tags("analyse", Needs(cpus=3, gpus=0.5, gpu_memory_bytes=24 * GIB), compute)
    assert tags["media/compute"] == "gpu"
    assert tags["dagster-ray/config"]["num_gpus"] == 0.5
    assert tags["dagster-k8s/config"]["container_config"]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    pod = tags["dagster-k8s/config"]["pod_spec_config"]
    assert pod["node_selector"] == {"nvidia.com/gpu.present": "true"}
    assert pod["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    assert '"nvidia.com/gpu.memory", "operator": "Gt", "values": ["22118"]' in json.dumps(pod["affinity"])
    assert json.loads(tags["ecs/run_task_kwargs"]) == {
        "taskDefinition": "heavy",
        "capacityProviderStrategy": [{"capacityProvider": "cards", "weight": 1}],
    }
    assert (tags["ecs/cpu"], tags["ecs/memory"]) == ("3072", "4096")


@pytest.mark.parametrize(
    ("name", "kept"),
    [("local", set()), ("ray", set()), ("ecs", {"ecs/cpu", "ecs/memory"}), ("k8s", {"dagster-k8s/config"})],
)
def test_runs_carry_what_their_launcher_reads(name: str, kept: set[str]) -> None:
    """Given an executor, then its runs have the tags that limit the queue and its launcher's own, not the others'."""
    compute = Compute(executor=name)
    assert set(run_tags(op_tags("decode", Needs(), compute), name)) == {"media/compute", "media/group"} | kept


@pytest.mark.parametrize(
    ("cpus", "gibibytes", "sold"),
    [
        (0.25, 0.5, (256, 512)),
        (0.3, 1, (512, 1024)),
        (1, 1, (1024, 2048)),
        (1, 4, (1024, 4096)),
        (1, 9, (2048, 9216)),
        (2, 4.5, (2048, 5120)),
        (4, 40, (8192, 40960)),
        (8, 17, (8192, 20480)),
        (16, 120, (16384, 122880)),
    ],
)
def test_ecs_tasks_have_a_size_that_fargate_sells(cpus: float, gibibytes: float, sold: tuple[int, int]) -> None:
    """Given needs, then the task's size is the smallest valid pair that holds them."""
    tags = op_tags("decode", Needs(cpus=cpus, memory_bytes=int(gibibytes * GIB)), Compute(executor="ecs"))
    assert (int(tags["ecs/cpu"]), int(tags["ecs/memory"])) == sold


def test_more_than_fargate_sells_is_refused() -> None:
    """Given a CPU group larger than any Fargate task, then a sentence says so, on ECS alone."""
    large = Needs(cpus=32)
    assert op_tags("decode", large, Compute())
    with pytest.raises(BadNeeds, match="32 CPUs"):
        op_tags("decode", large, Compute(executor="ecs"))


@pytest.mark.parametrize(
    ("needs", "device_gib", "scale"),
    [
        (Needs(gpus=1), 0, 1),
        (Needs(gpus=1), 6, 1),
        (Needs(gpus=1), 24, 2),
        (Needs(gpus=0.5), 24, 1),
        (Needs(gpus=1, gpu_memory_bytes=16 * GIB), 80, 2),
        (Needs(gpus=1), 80, 8),
        (Needs(gpus=2), 80, 8),
    ],
)
def test_micro_batches_follow_the_memory(needs: Needs, device_gib: int, scale: int) -> None:
    """Given a share of a GPU's memory, then micro-batches grow by powers of two, eight times at most."""
    assert micro_batch_scale(needs, device_gib * GIB) == scale


# -- devices ---------------------------------------------------------------------------------------------------


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int], None]:
    """Puts an `nvidia-smi` on the path that says this and exits so."""
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv(devices.VISIBLE, raising=False)

    def install(said: str, code: int) -> None:
        (tmp_path / "said").write_text(said)
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\ncat {tmp_path / 'said'}\nexit {code}\n")
        program.chmod(0o755)
        devices.present.cache_clear()

    yield install
    devices.present.cache_clear()


def test_devices_are_those_the_driver_lists(driver: Callable[[str, int], None]) -> None:
    """Given a driver's listing, then each line is a device; shared memory counts as unknown."""
    driver("0, GPU-aaaa, 15360\n1, GPU-bbbb, [N/A]\n", 0)
    assert devices.present() == (Device(0, "GPU-aaaa", 15 * GIB), Device(1, "GPU-bbbb", 0))


def test_a_driver_that_does_not_work_is_an_error_with_its_words(driver: Callable[[str, int], None]) -> None:
    """Given a driver of another version than its library, then the run is refused, though no GPU was required."""
    driver("Failed to initialize NVML: Driver/library version mismatch\n", 18)
    with pytest.raises(DeviceUnavailable, match="Driver/library version mismatch"):
        candidates(Needs(gpus=1), "gpu")


@pytest.mark.parametrize(
    ("variable", "indexes"),
    [(None, [0, 1, 2]), ("", []), ("-1", []), ("2,0", [2, 0]), ("GPU-0001", [1]), ("1,7,2", [1])],
)
def test_what_is_hidden_from_cuda_is_not_there(variable: str | None, indexes: list[int]) -> None:
    """Given CUDA_VISIBLE_DEVICES, then it means what it means to CUDA."""
    environment = {} if variable is None else {devices.VISIBLE: variable}
    assert [device.index for device in visible(CARDS, environment)] == indexes


@pytest.mark.parametrize(
    ("needs", "profile", "count"),
    [
        (Needs(gpus=1), "gpu", 3),
        (Needs(gpus=0.5, gpu_required=True), "gpu", 3),
        (Needs(gpus=1, gpu_memory_bytes=16 * GIB), "gpu", 3),
        (Needs(gpus=1, gpu_memory_bytes=40 * GIB), "gpu", 0),
        (Needs(gpus=4), "gpu", 0),
        (Needs(), "gpu", 0),
        (Needs(gpus=1), "offline", 0),
    ],
)
def test_a_step_works_on_a_gpu_that_suits_it_or_on_the_cpu(
    needs: Needs, profile: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given needs, then there are so many devices to choose from; none means the CPU."""
    monkeypatch.setattr(devices, "present", lambda: CARDS)
    assert len(candidates(needs, profile)) == count


@pytest.mark.parametrize(
    ("needs", "cards", "said"),
    [
        (Needs(gpus=1), (), "this machine has none"),
        (Needs(gpus=4), CARDS, r"4 GPU\(s\) needed, 3 of 3"),
        (Needs(gpus=1, gpu_memory_bytes=40 * GIB), CARDS, "with 40 GiB needed, 0 of 3"),
    ],
)
def test_without_the_gpu_that_is_required_a_run_is_refused(
    needs: Needs, cards: tuple[Device, ...], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given a required GPU that is not there, or too small, then a sentence says so."""
    monkeypatch.setattr(devices, "present", lambda: cards)
    with pytest.raises(DeviceUnavailable, match=said):
        candidates(replace(needs, gpu_required=True), "gpu")


def test_a_listed_gpu_that_torch_cannot_use_is_an_error(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given a driver that lists a GPU where torch finds none, as here, then the step is refused, not run slowly."""
    monkeypatch.setattr(devices, "candidates", lambda needs, profile: CARDS[:1])
    monkeypatch.setattr(devices, "_mine", ())
    monkeypatch.setenv(devices.VISIBLE, "all")
    with pytest.raises(DeviceUnavailable, match="cannot use it"), processor(Needs(gpus=1), library, print):
        pass


def test_a_cpu_group_touches_no_driver(library: Library, driver: Callable[[str, int], None]) -> None:
    """Given a broken driver, then groups without a GPU still work."""
    driver("broken", 1)
    with processor(Needs(), library, print) as found:
        assert found == Processor("cpu", 1)


def test_two_processes_get_different_devices(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given two devices and three takers, then two get one each, and the third the one that is given back first."""
    monkeypatch.setenv(devices.VISIBLE, "all")
    cards = CARDS[:2]
    waits: list[str] = []
    third: list[Device] = []

    def as_new_process() -> None:
        monkeypatch.setattr(devices, "_mine", ())

    def take() -> None:
        with assigned(database.engine, Needs(gpus=1), cards, waits.append) as got:
            third.extend(got)

    monkeypatch.setattr(devices, "_AGAIN_S", 0.02)
    as_new_process()
    with assigned(database.engine, Needs(gpus=1), cards, waits.append) as first:
        assert os.environ[devices.VISIBLE] == first[0].uuid
        as_new_process()
        with assigned(database.engine, Needs(gpus=0.5), cards, waits.append) as second:
            assert (first, second) == (cards[:1], cards[1:])
            assert not waits
            as_new_process()
            thread = threading.Thread(target=take)
            thread.start()
            while not waits:
                assert thread.is_alive()
        thread.join()
    assert third == list(second)
    assert waits == ["waits for 1 of the GPUs 0, 1"]


def test_a_process_stays_with_its_device(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given a process that worked on one GPU, then its next batch has the same: CUDA would not see another."""
    monkeypatch.setenv(devices.VISIBLE, "all")
    monkeypatch.setattr(devices, "_mine", ())
    with assigned(database.engine, Needs(gpus=1), CARDS[2:], print) as first:
        pass
    with assigned(database.engine, Needs(gpus=1), CARDS, print) as again:
        assert again == first == CARDS[2:]


def test_a_part_is_not_held_while_waiting_for_the_rest(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given one of two devices taken, then a step that needs both holds neither: others can have the free one."""
    monkeypatch.setenv(devices.VISIBLE, "all")
    monkeypatch.setattr(devices, "_AGAIN_S", 0.02)
    monkeypatch.setattr(devices, "_mine", ())
    waits, got = threading.Event(), threading.Event()

    def take_both() -> None:
        with assigned(database.engine, Needs(gpus=2), CARDS[:2], lambda _: waits.set()) as both:
            assert both == CARDS[:2]
            got.set()

    with assigned(database.engine, Needs(gpus=1), CARDS[:1], print):
        monkeypatch.setattr(devices, "_mine", ())
        thread = threading.Thread(target=take_both)
        thread.start()
        assert waits.wait(30)
        with database.engine.connect() as connection:
            assert devices._lock(connection, CARDS[1:2], 1) == CARDS[1:2]
            devices._unlock(connection, CARDS[1:2])
    thread.join()
    assert got.is_set()


def test_a_run_without_its_gpu_fails_with_the_sentence(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given a group that requires a GPU, on a machine without one, then its run fails at once, no item is tried, and
    the item's status says why."""
    monkeypatch.setattr(devices, "present", lambda: ())
    monkeypatch.setenv("MEDIA_PROFILE", "gpu")
    library = Library(Settings.load(library.settings.home))
    ids = library.registry.add(list(discover([str(PHOTO)])))
    group = replace(groups(library.settings)[0], needs=Needs(gpus=1, gpu_required=True))
    definitions = dg.Definitions(
        assets=[build_group(group, library.settings, library.models)],
        jobs=[dg.define_asset_job("job", dg.AssetSelection.assets("media").without_checks())],
        resources={"media": dg.ResourceDefinition(lambda _: library)},
    )
    with open_instance(library) as instance:
        add_partitions(instance, library.settings, ids)
        done = definitions.resolve_job_def("job").execute_in_process(
            instance=instance,
            run_config={"ops": {group.name: {"config": {"keys": ids}}}},
            tags=explicit_batch_tags(ids, library.settings),
            raise_on_error=False,
        )
    (failure,) = done.get_step_failure_events()
    said = "1 GPU(s) needed, this machine has none."
    assert said in str(failure.event_specific_data)
    assert not library.outcomes.load(ids)
    found = EventLog(library.database).failed_run(ids[0])
    assert found is not None
    assert (found.run_id, found.job) == (done.run_id, "job")
    assert found.error.startswith(f"resources.compute.devices.DeviceUnavailable: {said} Run it on a machine with a GPU")
    status = CliRunner().invoke(app, ["status", ids[0]], env={"COLUMNS": "1000"})
    assert f"Its last run failed (job {done.run_id}" in status.stdout
    assert said in " ".join(status.stdout.split())
    library.close()


# -- executors -------------------------------------------------------------------------------------------------


def test_pools_let_in_as_many_runs_as_there_are_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Given three GPUs, then three runs at once in a pool of GPU work, one where a run takes two."""
    monkeypatch.setattr(devices, "present", lambda: CARDS)
    entries = {"asr": apart("transcript", gpus=2, pool="asr")}
    assert pool_limits(settings("gpu", **entries)) == {"gpu": 3, "asr": 1}
    assert pool_limits(settings("offline", **entries)) == {}
    cluster = settings("gpu").model_copy(update={"compute": Compute(executor="k8s")})
    assert pool_limits(cluster) == {}


@pytest.mark.parametrize("name", ["local", "ecs", "k8s"])
def test_every_executor_has_its_dagster_yaml(name: str) -> None:
    """Given an executor, then its file is there, and a run works on its one step within its own process."""
    chosen = Settings(home=Path("nowhere"), compute=Compute(executor=name))
    assert instance_file(chosen).is_file()
    assert executor(chosen) is dg.in_process_executor


@pytest.mark.parametrize(("name", "extra"), [("ray", "ray"), ("k8s", "k8s")])
def test_an_executor_that_is_not_installed_names_its_extra(
    name: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given an executor whose package is absent, then the definitions do not load and a sentence names the extra."""
    monkeypatch.setattr(executors, "find_spec", lambda package: None)
    chosen = Settings(home=Path("nowhere"), compute=Compute(executor=name))
    for call in (executor, instance_file):
        with pytest.raises(ExecutorUnavailable, match=rf"media-assets\[{extra}\]"):
            call(chosen)
