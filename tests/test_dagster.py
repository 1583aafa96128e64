"""Dagster as users know it: `media-assets dev` driven through GraphQL as the UI does, and the groups in-process."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
import wave
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import dagster as dg
import numpy as np
import psutil  # type: ignore[import-untyped]
import pytest
from PIL import Image

from cli.instance import open_instance
from media_assets.engine.batch import BatchEngine
from media_assets.engine.versions import code_version
from media_assets.orchestration.partitions import add_partitions, partition_of, range_tags
from resources.compute import process
from resources.ingest.discovery import discover
from resources.ingest.uploads import Upload
from resources.library import Library
from resources.settings import Index, Settings
from tests.local import DECODE, DECODED, GROUPS, Local

T = TypeVar("T")
DEADLINE_S = 300.0
POLL_S = 0.5
REGISTER = """
import json, sys
from resources.compute import process
from resources.library import Library
from resources.ingest.discovery import discover
library = Library.open(sys.argv[1])
print(json.dumps(library.registry.add(list(discover(sys.argv[2:])))))
library.close()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two photos, a tone, and a photo whose upload broke off."""
    folder = tmp_path_factory.mktemp("media")
    rng = np.random.default_rng(7)
    for name in ("a_photo.jpg", "b_broken.jpg", "c_photo.jpg"):
        pixels = rng.integers(0, 255, (12, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((320, 240)).save(folder / name, quality=90)
    broken = folder / "b_broken.jpg"
    broken.write_bytes(broken.read_bytes()[:300])  # within its tables
    tone = (np.sin(np.arange(16_000) * 0.17) * 12_000).astype("<i2")
    with wave.open(str(folder / "d_tone.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes(tone.tobytes())
    return folder


@dataclass(frozen=True, slots=True)
class Dev:
    """A running `media-assets dev`, the folder it watches, and the media registered in its home, by file name.

    `user` is the home of who runs it, and its folder for temporary files.
    """

    process: subprocess.Popen[str]
    home: Path
    watched: Path
    user: Path
    port: int
    ids: dict[str, str]

    def graphql(self, query: str, **variables: Any) -> Any:
        """`data` of a GraphQL answer."""
        body = json.dumps({"query": query, "variables": variables}).encode()
        url = f"http://127.0.0.1:{self.port}/graphql"
        request = urllib.request.Request(url, body, {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as response:
            answer = json.load(response)
        assert "errors" not in answer, answer["errors"]
        return answer["data"]

    def asset(self, name: str, fields: str, **variables: str) -> Any:
        """Fields of one asset node."""
        declared = "".join(f", ${key}: String!" for key in variables)
        query = (
            f"query($key: AssetKeyInput!{declared}) {{assetNodeOrError(assetKey: $key) {{... on AssetNode {fields}}}}}"
        )
        return self.graphql(query, key={"path": [name]}, **variables)["assetNodeOrError"]


def until(read: Callable[[], T | None], what: str) -> T:
    """The first answer that is not None; fails at the deadline."""
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        if (answer := read()) is not None:
            return answer
        threading.Event().wait(POLL_S)
    raise AssertionError(f"{what}: not within {DEADLINE_S:.0f} s")


def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@pytest.fixture(scope="module")
def dev(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dev]:
    """`media-assets dev` with its embedded Postgres, on a home where the media are registered."""
    home, watched, user = (tmp_path_factory.mktemp(name) for name in ("dev", "watched", "u"))
    port = free_port()
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MEDIA_", "DAGSTER_"))}
    paths = sorted(str(path) for path in folder.iterdir())
    register = [sys.executable, "-c", REGISTER, str(home), *paths]
    ids = json.loads(subprocess.run(register, env=environment, check=True, capture_output=True, text=True).stdout)
    process = subprocess.Popen(
        [sys.executable, "-m", "cli.main", "dev", str(watched), "--home", str(home), "--port", str(port)],
        # Backfills are launched by hand here; the planner would be there first.
        env=environment
        | {"MEDIA_PLANNER__ENABLED": "false", "MEDIA_PLANNER__INTERVAL_S": "2", "HOME": str(user), "TMPDIR": str(user)},
        text=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    running = Dev(process, home, watched, user, port, dict(zip((Path(path).name for path in paths), ids, strict=True)))

    def answers() -> bool | None:
        assert process.poll() is None, "".join(said)
        try:
            return running.graphql("{version}") and True
        except OSError:
            return None

    # From the start: what nobody reads fills the pipe, and `dev` would wait for ever.
    said: deque[str] = deque(maxlen=100)
    threading.Thread(target=lambda: said.extend(process.stderr or ()), daemon=True).start()
    try:
        try:
            until(answers, "the UI answers")
        except AssertionError as error:
            raise AssertionError("".join(said)) from error
        yield running
        stop(running)
    finally:
        process.kill()
        process.wait(DEADLINE_S)


@pytest.fixture(scope="module")
def backfill(dev: Dev) -> dict[str, Any]:
    """A backfill of all media over the decode group, launched as the UI launches it and come to its end.

    With the checks of its assets, and what the UI shows of the frames of a photo.
    """
    selector = {"repositoryName": "__repository__", "repositoryLocationName": "media-assets"}
    for media_id in dev.ids.values():
        added = dev.graphql(
            "mutation($in: RepositorySelector!, $key: String!) {addDynamicPartition(repositorySelector: $in,"
            ' partitionsDefName: "media", partitionKey: $key) {__typename}}',
            **{"in": selector, "key": media_id},
        )
        assert added["addDynamicPartition"]["__typename"] == "AddDynamicPartitionSuccess"
    launched = dev.graphql(
        "mutation($what: LaunchBackfillParams!) {launchPartitionBackfill(backfillParams: $what)"
        " {__typename ... on LaunchBackfillSuccess {backfillId}}}",
        what={
            "assetSelection": [{"path": [name]} for name in DECODED],
            "partitionNames": list(dev.ids.values()),
            "fromFailure": False,
        },
    )["launchPartitionBackfill"]
    query = """query($id: String!) {partitionBackfillOrError(backfillId: $id) {... on PartitionBackfill {
        status isAssetBackfill runs(limit: 50) {runId status}
        assetBackfillData {assetBackfillStatuses {... on AssetPartitionsStatusCounts {
            assetKey {path} numPartitionsTargeted numPartitionsMaterialized numPartitionsFailed}}}}}}"""

    def ended() -> dict[str, Any] | None:
        found: dict[str, Any] = dev.graphql(query, id=launched["backfillId"])["partitionBackfillOrError"]
        return found if found["status"].startswith(("COMPLETED", "FAILED", "CANCELED")) else None

    fields = """{assetChecksOrError {... on AssetChecks {checks {name executionForLatestMaterialization {
        runId evaluation {success severity metadataEntries {
            label ... on TableMetadataEntry {table {records}}}}}}}}}"""
    figures = """{opVersion staleStatus(partition: $id) staleCauses(partition: $id) {reason}
        latestMaterializationByPartition(partitions: [$id]) {tags {key value} metadataEntries {
            label ... on IntMetadataEntry {intValue} ... on FloatMetadataEntry {floatValue}
            ... on TextMetadataEntry {text} ... on MarkdownMetadataEntry {mdStr}}}}"""
    found = until(ended, "the backfill ends")
    # At once: later runs materialize some of its items again.
    checks = {name: dev.asset(name, fields)["assetChecksOrError"]["checks"] for name in DECODED}
    return {**found, "checks": checks, "photo": dev.asset("frames", figures, id=dev.ids["a_photo.jpg"])}


def test_the_code_location_loads_with_what_people_look_for(dev: Dev) -> None:
    """Given `dev`, then the location has no error and every asset a group, kinds, owners and a description."""
    entries = dev.graphql("""{workspaceOrError {... on Workspace {locationEntries {name loadStatus
        locationOrLoadError {__typename}}}}}""")["workspaceOrError"]["locationEntries"]
    assert [(entry["name"], entry["locationOrLoadError"]["__typename"]) for entry in entries] == [
        ("media-assets", "RepositoryLocation")
    ]
    nodes = dev.graphql("{assetNodes {assetKey {path} groupName kinds description owners {__typename} pools}}")
    by_name = {node["assetKey"]["path"][-1]: node for node in nodes["assetNodes"]}
    for group in GROUPS:
        for path in group.stages:
            node = by_name[path.split(":")[0]]
            assert node["groupName"] == group.name
            assert node["kinds"]
            assert node["owners"]
            assert node["description"]
            assert node["pools"] == [group.needs.pool_name]


def test_a_poisoned_item_fails_alone_in_a_backfill(dev: Dev, backfill: dict[str, Any]) -> None:
    """Given a range with one broken upload, then its neighbours are materialized in one run and it is shown failed."""
    statuses = {entry["assetKey"]["path"][0]: entry for entry in backfill["assetBackfillData"]["assetBackfillStatuses"]}
    for name in DECODED:
        assert statuses[name]["numPartitionsMaterialized"] == len(dev.ids) - 1, name
        assert statuses[name]["numPartitionsFailed"] == 1, name
        found = dev.asset(
            name,
            "{assetPartitionStatuses {... on DefaultPartitionStatuses"
            " {materializedPartitions unmaterializedPartitions}}}",
        )["assetPartitionStatuses"]
        of_the_backfill = set(dev.ids.values())
        assert of_the_backfill & set(found["unmaterializedPartitions"]) == {dev.ids["b_broken.jpg"]}
        assert of_the_backfill & set(found["materializedPartitions"]) == of_the_backfill - {dev.ids["b_broken.jpg"]}
    assert [run["status"] for run in backfill["runs"]] == ["SUCCESS"]


def test_checks_tell_which_item_failed_and_why(dev: Dev, backfill: dict[str, Any]) -> None:
    """Given the backfill, then the items check warns and names the bad item; the others' rows meet expectations."""
    (run,) = backfill["runs"]
    for name in DECODED:
        checks = {check["name"]: check for check in backfill["checks"][name]}
        executions = {key: check["executionForLatestMaterialization"] for key, check in checks.items()}
        assert {execution["runId"] for execution in executions.values()} == {run["runId"]}
        assert executions["expectations"]["evaluation"]["success"]
        items = executions["items"]["evaluation"]
        assert (items["success"], items["severity"]) == (False, "WARN")
        entries = {entry["label"]: entry for entry in items["metadataEntries"]}
        (row,) = [json.loads(record) for record in entries["failed items"]["table"]["records"]]
        assert row["media_id"] == dev.ids["b_broken.jpg"]
        assert row["error_class"] in ({"truncated", "undecodable"} if name == "media" else {"upstream_failed"})
        assert "upload" in row["error"]


def test_materializations_carry_figures_pictures_and_versions(dev: Dev, backfill: dict[str, Any]) -> None:
    """Given a photo, then its frames tell rows, seconds, device and version, and hold a contact sheet."""
    node = backfill["photo"]
    (event,) = node["latestMaterializationByPartition"]
    entries = {entry["label"]: entry for entry in event["metadataEntries"]}
    assert entries["dagster/row_count"]["intValue"] == 1
    assert entries["seconds"]["floatValue"] > 0
    assert entries["device"]["text"] == "cpu"
    assert entries["picture: contact sheet"]["mdStr"].startswith("![contact sheet](data:image/")
    tags = {tag["key"]: tag["value"] for tag in event["tags"]}
    stages = {stage.name: stage for stage in DECODE.load(Settings.load(dev.home), Library.open(dev.home).models)}
    assert tags["dagster/code_version"] == node["opVersion"] == code_version(stages["frames"])
    assert tags["dagster/data_version"] == entries["version"]["text"]
    assert (node["staleStatus"], node["staleCauses"]) == ("FRESH", [])


def test_a_second_dev_is_refused(dev: Dev) -> None:
    """Given a running `dev`, when another starts on its port or on its home, then it says why not and exits 2."""
    for port, reason in ((dev.port, f"Port {dev.port} is in use"), (free_port(), "Another `media-assets dev`")):
        command = [sys.executable, "-m", "cli.main", "dev", "--home", str(dev.home), "--port", str(port)]
        environment = {key: value for key, value in os.environ.items() if not key.startswith("MEDIA_")}
        refused = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert refused.returncode == 2
        assert reason in refused.stderr


def test_a_file_dropped_into_a_watched_folder_becomes_a_partition(
    dev: Dev, backfill: dict[str, Any], folder: Path
) -> None:
    """Given `dev FOLDER`, when a file lands there, then its sensor registers it and adds its partition."""
    (dev.watched / "f photo.jpg").write_bytes((folder / "c_photo.jpg").read_bytes())

    def found() -> str | None:
        keys = dev.asset("media", "{partitionKeysByDimension {partitionKeys}}")["partitionKeysByDimension"]
        return next((key for key in keys[0]["partitionKeys"] if key.startswith("f-photo-jpg-")), None)

    media_id = until(found, "the dropped file is a partition")
    ask = [sys.executable, "-m", "cli.main", "status", media_id, "--home", str(dev.home), "--json"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MEDIA_")}
    told = subprocess.run(ask, env=environment, check=True, capture_output=True, text=True).stdout
    assert json.loads(told)["item"]["uri"] == str(dev.watched / "f photo.jpg")


def claimed_slots(dev: Dev, pool: str) -> list[str]:
    """IDs of the runs in progress that hold a slot of a pool, and of those with a step in it."""
    found = dev.graphql(
        """query($pool: String!) {instance {concurrencyLimit(concurrencyKey: $pool) {claimedSlots {runId}}}
        runsOrError(filter: {statuses: [STARTING, STARTED, CANCELING]}) {... on Runs {results {runId allPools}}}}""",
        pool=pool,
    )
    claimed = [slot["runId"] for slot in found["instance"]["concurrencyLimit"]["claimedSlots"]]
    return claimed + [run["runId"] for run in found["runsOrError"]["results"] if pool in (run["allPools"] or ())]


def run_state(dev: Dev, run_id: str) -> dict[str, Any]:
    """Status, tags and engine events of a run."""
    query = """query($id: ID!) {runOrError(runId: $id) {... on Run {runId status tags {key value}
        eventConnection {events {... on MessageEvent {message} ... on EngineEvent {
            metadataEntries {label ... on TextMetadataEntry {text}}}}}}}}"""
    found: dict[str, Any] = dev.graphql(query, id=run_id)["runOrError"]
    return found


def worker_of(dev: Dev, run_id: str) -> int | None:
    """Number of the process that works on a run, once it has said so."""
    for event in run_state(dev, run_id)["eventConnection"]["events"]:
        for entry in event.get("metadataEntries", ()):
            if entry["label"] == "pid":
                return int(entry["text"])
    return None


def failed(dev: Dev, run_id: str) -> dict[str, Any] | None:
    """The run once it is over; it must have failed."""
    state = run_state(dev, run_id)
    if state["status"] in ("QUEUED", "NOT_STARTED", "STARTING", "STARTED"):
        return None
    assert state["status"] == "FAILURE"
    return state


def test_a_killed_worker_fails_its_run_and_frees_its_slot(dev: Dev, backfill: dict[str, Any]) -> None:
    """Given a launched run, when its process gets kill -9, then it is FAILURE and its retry gets the slot and ends."""
    keys = [dev.ids["c_photo.jpg"], dev.ids["d_tone.wav"]]
    launched = dev.graphql(
        """mutation($params: ExecutionParams!) {launchRun(executionParams: $params) {__typename
        ... on LaunchRunSuccess {run {runId}} ... on PythonError {message}}}""",
        params={
            "selector": {
                "repositoryName": "__repository__",
                "repositoryLocationName": "media-assets",
                "jobName": "process_decode",
            },
            "runConfigData": {"ops": {"decode": {"config": {"keys": keys}}}},
            "executionMetadata": {"tags": [{"key": k, "value": v} for k, v in range_tags(keys[0], keys[0]).items()]},
        },
    )["launchRun"]
    assert launched["__typename"] == "LaunchRunSuccess", launched
    run_id = launched["run"]["runId"]
    os.kill(until(lambda: worker_of(dev, run_id), "the run has a process"), signal.SIGKILL)
    state = until(lambda: failed(dev, run_id), "the killed run fails")
    assert any("was terminated by signal 9" in event.get("message", "") for event in state["eventConnection"]["events"])

    def retried() -> str | None:
        runs = dev.graphql(
            """query($filter: RunsFilter!) {runsOrError(filter: $filter) {... on Runs {results {runId status}}}}""",
            filter={"tags": [{"key": "dagster/parent_run_id", "value": run_id}]},
        )["runsOrError"]["results"]
        return next((run["runId"] for run in runs if run["status"] == "SUCCESS"), None)

    # The pool has one slot: the retry could not begin while the dead run held it.
    assert until(retried, "the retry succeeds") != run_id
    assert claimed_slots(dev, "cpu") == []


def test_a_run_of_the_command_line_that_was_killed_is_found(
    dev: Dev, backfill: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    """Given `media-assets run` beside `dev`, when it dies with its code server, then monitoring fails its run."""
    photo = tmp_path / "e_photo.jpg"
    Image.open(folder / "a_photo.jpg").rotate(90).save(photo)
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MEDIA_", "DAGSTER_"))}
    command = [sys.executable, "-m", "cli.main", "run", str(photo), "--home", str(dev.home), "--select", "media"]
    query = """{runsOrError(filter: {tags: [{key: "media/host", value: "%s"}]})
        {... on Runs {results {runId jobName}}}}"""

    def of_this_machine() -> set[str]:
        runs = dev.graphql(query % socket.gethostname())["runsOrError"]["results"]
        return {run["runId"] for run in runs if run["jobName"] != "rebuild"}  # that one has a schedule

    before = of_this_machine()
    killed = subprocess.run(
        command, env={**environment, "MEDIA_FAULT": "engine.before_commit:kill"}, capture_output=True, text=True
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    (run_id,) = of_this_machine() - before
    state = until(lambda: failed(dev, run_id), "run monitoring finds the dead run")
    assert any("is gone" in event.get("message", "") for event in state["eventConnection"]["events"])
    assert claimed_slots(dev, "cpu") == []


def test_an_upload_is_processed_without_anyone_touching_anything(
    dev: Dev, backfill: dict[str, Any], folder: Path
) -> None:
    """Given the planner, when a file lands in the watched folder, then a batch of the planner materializes it."""
    selector = {
        "repositoryName": "__repository__",
        "repositoryLocationName": "media-assets",
        "sensorName": "planner_sensor",
    }
    started = dev.graphql(
        "mutation($in: SensorSelector!) {startSensor(sensorSelector: $in) {__typename"
        " ... on Sensor {sensorState {id}}}}",
        **{"in": selector},
    )["startSensor"]
    assert started["__typename"] == "Sensor"
    photo = dev.watched / "g photo.jpg"
    Image.open(folder / "a_photo.jpg").rotate(180).save(photo)

    def made() -> dict[str, Any] | None:
        statuses = "{assetPartitionStatuses {... on DefaultPartitionStatuses {materializedPartitions}}}"
        keys = dev.asset("frames", statuses)["assetPartitionStatuses"]["materializedPartitions"]
        key = next((key for key in keys if key.startswith("g-photo-jpg-")), None)
        if key is None:
            return None
        fields = "{latestMaterializationByPartition(partitions: [$id]) {runOrError {... on Run {tags {key}}}}}"
        (event,) = dev.asset("frames", fields, id=key)["latestMaterializationByPartition"]
        return dict(event)

    try:
        event = until(made, "the planner's batch materializes the file")
    finally:
        dev.graphql("mutation($id: String!) {stopSensor(id: $id) {__typename}}", id=started["sensorState"]["id"])
    assert {"media/batch", "media/lane"} <= {tag["key"] for tag in event["runOrError"]["tags"]}


def stop(dev: Dev) -> None:
    """Given `dev` that was used, when it gets Ctrl-C, then it ends well and leaves no process and no file."""
    process = psutil.Process(dev.process.pid)
    server = psutil.Process(int((dev.home / "postgres" / "postmaster.pid").read_text().splitlines()[0]))
    family = [server, *server.children(recursive=True), *process.children(recursive=True)]
    assert len(family) > 5
    dev.process.send_signal(signal.SIGINT)
    assert dev.process.wait(DEADLINE_S) == 0
    _, left = psutil.wait_procs(family, timeout=10)
    assert left == []
    # Torch's, of workers killed by -9: an empty folder where they were still importing it.
    killed = {path.parent for path in dev.user.rglob("_remote_module_non_scriptable.py")}
    killed |= {path for path in dev.user.glob("tmp????????") if path.is_dir() and not any(path.iterdir())}
    assert [path for path in dev.user.rglob("*") if not killed & {path, path.parent}] == []


@pytest.fixture
def local(library: Library, folder: Path) -> Iterator[Local]:
    """An empty library with the media registered, and an instance in memory."""
    uploads = [found for found in discover(sorted(str(path) for path in folder.iterdir())) if isinstance(found, Upload)]
    ids = library.registry.add(uploads)
    with dg.DagsterInstance.ephemeral() as instance:
        add_partitions(instance, library.settings, ids)
        yield Local(library, instance, ids)


def test_a_range_and_a_list_mean_the_same_items(local: Local) -> None:
    """Given a run over a list of two items, when a range names them all, then all are mirrored, those two again."""
    good = [local.ids[0], local.ids[2], local.ids[3]]
    by_list = local.run(*DECODED, keys=good[1:])
    for name in DECODED:
        assert sorted(local.made(by_list, name)) == sorted(good[1:])
    by_range = local.made(local.run(*DECODED), "frames")
    assert {key: event.metadata["how"].value for key, event in by_range.items()} == {
        good[0]: "computed",
        good[1]: "reused",
        good[2]: "reused",
    }


def test_a_hung_model_call_taints_the_process_and_not_the_run(local: Local, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given a batch in which a call hung, then its run succeeds, and the process says to use it no more."""
    run = BatchEngine.run

    def hangs(engine: BatchEngine, *given: Any) -> None:
        run(engine, *given)
        engine.hung = 1

    assert local.run("media").success
    monkeypatch.setattr(process, "_hung", 0)
    monkeypatch.setattr(BatchEngine, "run", hangs)
    assert local.run("frames").success
    assert process.is_tainted()


def test_provenance_names_the_version_and_event_of_the_input(local: Local) -> None:
    """Given `media` made in an earlier run, or in the same one, then `frames` points at that very materialization."""
    item = local.ids[0]
    pointers = []
    for runs in (("media",), ("frames",)), (("media", "frames"),):
        for assets in runs:
            result = local.run(*assets)
        tags = local.made(result, "frames")[item].tags or {}
        wanted = dg.AssetRecordsFilter(asset_key=dg.AssetKey("media"), asset_partitions=[item])
        (latest,) = local.instance.fetch_materializations(wanted, limit=1).records
        assert latest.asset_materialization is not None
        made = latest.asset_materialization.tags or {}
        assert tags["dagster/input_data_version/media"] == made["dagster/data_version"]
        assert int(tags["dagster/input_event_pointer/media"]) == latest.storage_id
        pointers.append(latest.storage_id)
    assert pointers[0] < pointers[1]


def test_buckets_can_be_the_partitions(library: Library, folder: Path) -> None:
    """Given partitions that are buckets, then a run over some of them makes their items, and each tells its sums."""
    # So many that the few items are hardly ever in one.
    library.settings = library.settings.model_copy(update={"partitions": "bucket", "index": Index(buckets=64)})
    library.registry.add([found for found in discover([folder]) if isinstance(found, Upload)])
    items = [row["media_id"] for row in library.registry.live()]
    buckets = {media_id: partition_of(media_id, library.settings) for media_id in items}
    with dg.DagsterInstance.ephemeral() as instance:
        add_partitions(instance, library.settings, items)
        first = next(bucket for key, bucket in buckets.items() if not key.startswith("b-broken"))
        local = Local(library, instance, [first])
        one = local.run("media")
        (told,) = local.made(one, "media").values()
        good = [bucket for key, bucket in buckets.items() if not key.startswith("b-broken")]
        assert told.partition == first
        assert told.metadata["items"].value == good.count(first) > 0
        records = library.outcomes.load(items, ["media"])
        assert {key for key, _ in records} == {key for key, bucket in buckets.items() if bucket == first}
        explicit = local.run("media", keys=[key for key, bucket in buckets.items() if bucket != first])
        assert explicit.success
        assert set(local.made(explicit, "media")) == set(good) - {first}


def test_a_run_in_this_process_prints_where_it_always_did(library: Library, capfd: pytest.CaptureFixture[str]) -> None:
    """Given a run as `media-assets run` makes it, then what it prints is there at once, through no other process."""
    me = psutil.Process()
    beside: list[int] = []

    @dg.op
    def prints() -> None:
        beside.extend(child.pid for child in me.children(recursive=True))
        os.write(1, b"this is out\n")

    @dg.job
    def printing() -> None:
        prints()

    with open_instance(library) as instance:
        before = {child.pid for child in me.children(recursive=True)}
        assert printing.execute_in_process(instance=instance).success
    assert set(beside) == before
    assert "this is out" in capfd.readouterr().out
