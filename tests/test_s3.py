"""Given a real S3 server, when derived files, media and listings go through it, then all is as on a local folder."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import dagster as dg
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from typer.testing import CliRunner

from cli.main import app
from media_assets.engine.contract import Inputs, MediaItem
from media_assets.library.index_shard import build
from media_assets.stages.audio import Audio
from media_assets.stages.frames import Frames
from media_assets.stages.media import Media
from resources.decoding.client import decoder
from resources.decoding.sources import RemoteFile, localize
from resources.errors import Failure, SourceChanged, StorageFailed, TooLarge, Unreadable
from resources.files.derived import DerivedStore
from resources.files.local import version_of
from resources.files.object_store import location
from resources.ingest.discovery import Problem, discover
from resources.ingest.inventory import Cursor, Inventory, Report
from resources.ingest.registry import Registry
from resources.ingest.uploads import Removal, Upload
from resources.library import Library
from resources.models.registry import ModelRegistry
from resources.records.database import Database
from resources.records.outcome import Status
from resources.settings import S3, Ingestion, Limits, Settings
from sensors.s3_inventory import build_s3_inventory_sensor, sentence
from tests import s3_server
from tests.s3_server import Proxy
from tests.test_engine import Bench, by_key, items
from tests.test_index_shard import RECALL, serving
from tests.test_index_shard import library as embed
from tests.toy_stages import Numbers

SAMPLES = Path(__file__).parents[1] / "samples" / "media"
MIB = 2**20


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    """A running server, and the credentials where AWS' own chain looks for them."""
    with pytest.MonkeyPatch.context() as patch, s3_server.s3_server() as url:
        for name, value in s3_server.ENVIRONMENT.items():
            patch.setenv(name, value)
        yield url


@pytest.fixture(scope="module")
def proxy(endpoint: str) -> Iterator[Proxy]:
    with s3_server.s3_proxy(endpoint) as running:
        yield running


@pytest.fixture
def watched(proxy: Proxy) -> Iterator[Proxy]:
    """The proxy with nothing seen yet, and harmless afterwards."""
    proxy.seen.clear()
    yield proxy
    proxy.meddle = None


@pytest.fixture
def s3(proxy: Proxy) -> S3:
    """Small blocks and parts, so that small objects need several."""
    return S3(endpoint_url=proxy.url, region=s3_server.REGION, block_bytes=2**16, part_bytes=5 * MIB, max_attempts=2)


@pytest.fixture
def bucket(endpoint: str, request: pytest.FixtureRequest) -> str:
    """An empty bucket of its own."""
    name = "b" + hashlib.blake2b(request.node.nodeid.encode(), digest_size=8).hexdigest()
    s3_server.client(endpoint).create_bucket(Bucket=name)
    return name


@pytest.fixture
def put(endpoint: str, bucket: str) -> Callable[[str, bytes], None]:
    """`put(key, body)`: store an object behind the project's back."""
    client = s3_server.client(endpoint)
    return lambda key, body: client.put_object(Bucket=bucket, Key=key, Body=body) and None


# -- derived files ------------------------------------------------------------------------------------


def test_derived_tables_are_kept_on_s3_as_in_a_folder(s3: S3, bucket: str) -> None:
    """Given a store on S3, when tables are written, copied and deleted, then reading tells the same as a folder."""
    store = DerivedStore(location(f"s3://{bucket}/derived", s3), s3.part_bytes)
    rows = pa.table({"media_id": ["a-1", "a-1"], "x": [1, 2]})
    written = store.write("shots", "a-1", rows)
    store.write("shots", "a-1", rows, "side")
    store.write("shots", "a-10", rows)
    assert store.read("shots", "a-1").equals(rows)
    assert store.path("shots", "a-1").stat().st_size == written
    assert list(store.sides("shots", "a-1")) == ["side"]
    store.copy("shots", "a-1", "b-2", ("side",))
    assert store.read("shots", "b-2", "side").column("media_id").to_pylist() == ["b-2", "b-2"]
    store.delete("shots", "a-1")
    assert not store.exists("shots", "a-1")
    assert not list(store.sides("shots", "a-1"))
    assert store.exists("shots", "a-10")
    with pytest.raises(FileNotFoundError):
        store.read("shots", "a-1")


def test_large_files_are_sent_in_parts(s3: S3, bucket: str, watched: Proxy) -> None:
    """Given a file of more than two parts, when it is written, then it goes in parts and comes back whole."""
    store = DerivedStore(location(f"s3://{bucket}/d", s3), s3.part_bytes)
    data = np.random.default_rng(1).bytes(11 * MIB)
    assert store.write_bytes(store.root / "index" / "shard.faiss", data) == len(data)
    assert len(watched.requests("PUT", "partNumber=")) == 3
    assert (store.root / "index" / "shard.faiss").read_bytes() == data


def test_a_damaged_upload_is_refused(s3: S3, bucket: str, watched: Proxy) -> None:
    """Given a line that flips bits or cuts the end off, when a file is written, then it fails and nothing is there."""
    store = DerivedStore(location(f"s3://{bucket}/d", s3), s3.part_bytes)
    watched.meddle = lambda method, path, body: body.replace(b"good", b"evil") if method == "PUT" else body
    with pytest.raises(OSError, match=r"(?i)digest|checksum|match|md5|sha"):
        store.write_bytes(store.root / "file", b"all good things")
    watched.meddle = None
    assert not (store.root / "file").exists()


def test_a_full_store_sets_back_the_item_and_not_the_batch(
    s3: S3, bucket: str, watched: Proxy, database: Database, tmp_path: Path
) -> None:
    """Given a store without space for one item, of which nothing is to be made for another, then both wait for a retry
    with the store's answer, the rest is done, and a later run makes them."""
    bench = Bench(database, tmp_path)
    bench.store = DerivedStore(location(f"s3://{bucket}/d", s3), s3.part_bytes)
    batch = items("a", "b", "photo-b", "c")
    watched.meddle = lambda method, path, body: 507 if method == "PUT" and "b.parquet" in path else body
    results = by_key(bench.run(batch, bench.stages(kinds=[Numbers])))
    watched.meddle = None
    assert {media_id for (media_id, _), result in results.items() if not result.done} == {"b", "photo-b"}
    for name in ("b", "photo-b"):
        outcome = results[name, "numbers"].outcome
        assert (outcome.status, outcome.error_class) == (Status.RETRYABLE, "storage_failed")
        assert "507" in (outcome.error or "")
        assert f"{bucket}/d/numbers/{name}.parquet" in (outcome.error or "")
    assert all(result.done for result in bench.run(batch, bench.stages(kinds=[Numbers]), "later"))


def test_a_store_that_keeps_something_else_is_found_out(s3: S3, bucket: str, watched: Proxy, put: Any) -> None:
    """Given a store that acknowledges a write it did not do, when a file is written, then it raises StorageFailed."""
    store = DerivedStore(location(f"s3://{bucket}/d", s3), s3.part_bytes)
    put("d/file", b"old")
    watched.meddle = lambda method, path, body: 200 if method == "PUT" else body
    with pytest.raises(StorageFailed, match="keeps 3 bytes"):
        store.write_bytes(store.root / "file", b"something longer")


def test_a_busy_store_is_asked_again(s3: S3, bucket: str, watched: Proxy) -> None:
    """Given a store that answers 503 once, when a file is written, then the second attempt succeeds."""
    store = DerivedStore(location(f"s3://{bucket}/d", s3), s3.part_bytes)
    answers = iter([503])
    watched.meddle = lambda method, path, body: next(answers, body) if method == "PUT" else body
    store.write_bytes(store.root / "file", b"data")
    assert [seen.status for seen in watched.requests("PUT", "file")] == [503, 200]
    assert (store.root / "file").read_bytes() == b"data"


def test_a_store_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Given a wrong endpoint, when something is written, read or listed, then a sentence names the endpoint."""
    for name, value in s3_server.ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    nowhere = S3(endpoint_url="http://127.0.0.1:9", region="us-east-1", max_attempts=1, connect_timeout_s=1)
    store = DerivedStore(location("s3://bucket/d", nowhere))
    with pytest.raises(OSError, match=r"127\.0\.0\.1:9") as caught:
        store.write_bytes(store.root / "file", b"data")
    assert isinstance(caught.value, StorageFailed)
    failure = Failure.of(caught.value)
    assert (failure.error_class, failure.retryable) == ("storage_failed", True)
    with pytest.raises(Unreadable, match=r"No store answers at http://127\.0\.0\.1:9"):
        localize("s3://bucket/photo.jpg", MIB, nowhere)
    (problem,) = list(discover(["s3://bucket/photos"], nowhere))
    assert isinstance(problem, Problem)
    assert "s3.endpoint_url" in problem.reason


# -- discovery ----------------------------------------------------------------------------------------


def test_objects_are_discovered_by_folder_and_by_name(s3: S3, bucket: str, put: Any) -> None:
    """Given keys of every kind, when a folder and one object are discovered, then each file has its URI and etag."""
    keys = ["in/a b+c.jpg", "in/dé::p?versionId=1/x#.txt", "in/sub/", "in.txt", "in2/z.txt", "in/100%25.txt"]
    for key in keys:
        put(key, key.encode())
    found = {each.uri: each for each in discover([f"s3://{bucket}/in"], s3) if isinstance(each, Upload)}
    wanted = {f"s3://{bucket}/{key}" for key in keys if key.startswith("in/") and not key.endswith("/")}
    assert set(found) == wanted
    first = found[f"s3://{bucket}/in/a b+c.jpg"]
    assert (first.etag, first.bytes, first.source) == (hashlib.md5(b"in/a b+c.jpg").hexdigest(), 12, "s3")
    (alone,) = discover([f"s3://{bucket}/in.txt"], s3)
    assert isinstance(alone, Upload)
    for uri in wanted:
        copy = localize(uri, MIB, s3)
        assert Path(copy.path).read_bytes() == uri.removeprefix(f"s3://{bucket}/").encode()


# -- media by ranges ----------------------------------------------------------------------------------


def film(seconds: int) -> bytes:
    """An MP4 of noise with a tone, about 700 kB per second, its index at the end."""
    sink = io.BytesIO()
    noise = np.random.default_rng(3)
    with av.open(sink, "w", format="mp4") as container:
        video = container.add_stream("mpeg4", rate=10, options={"qscale": "2"})
        video.width, video.height, video.pix_fmt = 640, 480, "yuv420p"
        audio = container.add_stream("aac", rate=16_000, layout="mono")
        for number in range(10 * seconds):
            picture = noise.integers(0, 255, (480, 640, 3), np.uint8)
            container.mux(video.encode(av.VideoFrame.from_ndarray(picture)))
            tone = np.sin(np.arange(1600) * 0.1)[None].astype(np.float32)
            frame = av.AudioFrame.from_ndarray(tone, "fltp", "mono")
            frame.sample_rate, frame.pts = 16_000, 1600 * number
            container.mux(audio.encode(frame))
        container.mux(video.encode(None))
        container.mux(audio.encode(None))
    return sink.getvalue()


@pytest.fixture(scope="module")
def clip() -> bytes:
    data = film(8)
    assert data.rfind(b"moov") > len(data) * 0.9
    assert len(data) > 4 * MIB
    return data


def settings_for(s3: S3, tmp_path: Path, **limits: Any) -> Settings:
    return Settings(home=tmp_path / "home", s3=s3, limits=Limits(**limits))


def test_limits_are_judged_by_ranges_before_anything_is_fetched(
    s3: S3, bucket: str, put: Any, watched: Proxy, clip: bytes, tmp_path: Path
) -> None:
    """Given large objects over a limit, when they are probed, then they are refused after a few blocks of each."""
    canvas = io.BytesIO()
    Image.fromarray(np.random.default_rng(4).integers(0, 255, (900, 1200, 3), np.uint8)).save(canvas, "PNG")
    put("clip.mp4", clip)
    put("huge.png", canvas.getvalue())
    put("long.txt", b"words and words\n" * 100_000)
    limits = Limits(max_duration_s=2.0, max_pixels=1_000_000, max_text_bytes=MIB)
    judge = decoder(Settings(home=tmp_path, limits=limits))
    for key, limit, size in (
        ("clip.mp4", "max_duration_s", len(clip)),
        ("huge.png", "max_pixels", len(canvas.getvalue())),
        ("long.txt", "max_text_bytes", 1_600_000),
    ):
        with pytest.raises(TooLarge, match=limit):
            judge.probe(localize(f"s3://{bucket}/{key}", 10**9, s3))
        assert 0 < watched.served(key) < size / 4
    watched.seen.clear()
    with pytest.raises(TooLarge, match="max_bytes"):
        localize(f"s3://{bucket}/clip.mp4", MIB, s3)
    assert watched.served("clip.mp4") == 0


def stage_inputs(uri: str, etag: str, store: DerivedStore) -> Inputs:
    return Inputs(MediaItem("clip-1", uri, etag), store, "v1", frozenset({"media", "frames", "audio"}))


@pytest.mark.parametrize("copy_bytes", [0, 512 * MIB], ids=["streamed", "copied"])
def test_an_object_is_decoded_as_the_same_file_would_be(
    s3: S3, bucket: str, put: Any, watched: Proxy, clip: bytes, tmp_path: Path, copy_bytes: int
) -> None:
    """Given a film on S3, when the decode group works on it, then its tables equal those of the local file,
    and a copied one is fetched once for the whole group, a streamed one once for its hash and once for decoding."""
    put("clip.mp4", clip)
    (tmp_path / "clip.mp4").write_bytes(clip)
    settings = settings_for(s3.model_copy(update={"copy_bytes": copy_bytes}), tmp_path)
    models = ModelRegistry(settings)
    tables: dict[str, list[pa.Table]] = {}
    for name, uri, etag in (
        ("local", str(tmp_path / "clip.mp4"), version_of((tmp_path / "clip.mp4").stat())),
        ("s3", f"s3://{bucket}/clip.mp4", hashlib.md5(clip).hexdigest()),
    ):
        store = DerivedStore(tmp_path / name)
        inputs = stage_inputs(uri, etag, store)
        for stage in (Media(settings, models), Frames(settings, models), Audio(settings, models)):
            product = stage.assemble(inputs, stage.prepare(inputs).carry, {})
            store.write(stage.name, inputs.media_id, product.table)
            table = product.table.drop_columns(["uri"]) if stage.name == "media" else product.table
            tables.setdefault(stage.name, []).append(table)
            for side, rows in product.sides.items():
                tables.setdefault(f"{stage.name} {side}", []).append(rows)
    for name in ("media", "frames", "frames track", "audio"):
        local, remote = tables[name]
        assert local.equals(remote), name
    whole = 1 if copy_bytes else 2
    assert len(clip) * whole <= watched.served("clip.mp4") <= len(clip) * whole + len(clip) / 4


def test_a_replaced_object_is_another_version(s3: S3, bucket: str, put: Any, clip: bytes, tmp_path: Path) -> None:
    """Given an object that is replaced after registration, or between probe and decode, then SourceChanged."""
    put("clip.mp4", clip)
    uri, etag = f"s3://{bucket}/clip.mp4", hashlib.md5(clip).hexdigest()
    with pytest.raises(SourceChanged):
        localize(uri, 10**9, s3, "another")
    file = localize(uri, 10**9, s3.model_copy(update={"copy_bytes": 0}), etag)
    assert isinstance(file, RemoteFile)
    machine = decoder(settings_for(s3, tmp_path))
    facts = machine.probe(file).facts
    put("clip.mp4", clip[:-1] + b"!")
    with pytest.raises(SourceChanged):
        machine.decode(file, facts.kind, facts.bytes, facts.duration_s, frozenset({"frames"}))
    with pytest.raises(Unreadable, match="gone"):
        localize(f"s3://{bucket}/none.mp4", 10**9, s3)


def test_an_answer_that_breaks_off_is_asked_for_again(
    s3: S3, bucket: str, put: Any, watched: Proxy, clip: bytes
) -> None:
    """Given a store that answers 500 to a range, when the object is read, then it comes whole by another attempt."""
    put("clip.mp4", clip)
    answers = iter([500])
    watched.meddle = lambda method, path, body: next(answers, body) if method == "GET" else body
    file = localize(f"s3://{bucket}/clip.mp4", 10**9, s3)
    assert isinstance(file, RemoteFile)
    assert file.sha256() == hashlib.sha256(clip).hexdigest()
    assert 500 in {seen.status for seen in watched.requests("GET", "clip.mp4")}


# -- inventory ----------------------------------------------------------------------------------------


class Watch:
    """An inventory whose clock lets a tick do so many pages."""

    def __init__(self, registry: Registry, s3: S3, prefixes: tuple[str, ...], page: int, every_s: float = 0.0) -> None:
        self.partitions: list[str] = []
        self.cursor = Cursor()
        self.budget_pages = 10**6
        self._calls = 0
        ingestion = Ingestion(prefixes=prefixes, inventory_page=page, inventory_every_s=every_s, tick_budget_s=20)
        self.inventory = Inventory(registry, s3, ingestion, self.partitions.extend, self._clock)

    def _clock(self) -> float:
        self._calls += 1
        return 0.0 if self._calls <= self.budget_pages + 2 else 1e9

    def tick(self, pages: int = 10**6) -> list[Report]:
        self._calls, self.budget_pages = 0, pages
        self.cursor, reports = self.inventory.tick(Cursor.parse(self.cursor.model_dump_json()))
        return reports


def live(registry: Registry) -> set[str]:
    return {row["uri"] for row in registry.live()}


@pytest.fixture
def library(library: Library, s3: S3) -> Library:
    """The shared fixture's library, reading from the test server."""
    library.settings = library.settings.model_copy(update={"s3": s3})
    return library


def fill(endpoint: str, bucket: str, keys: list[str]) -> None:
    from concurrent.futures import ThreadPoolExecutor

    client = s3_server.client(endpoint)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda key: client.put_object(Bucket=bucket, Key=key, Body=key.encode()), keys))


def test_an_inventory_is_resumed_over_ticks_while_the_bucket_changes(
    library: Library, s3: S3, endpoint: str, bucket: str, put: Any
) -> None:
    """Given 1,000 keys in small pages and a few pages per tick, when keys come and go in between, then after the last
    tick exactly what is there is live, each registered once, and one page per tick is what a quiet bucket costs."""
    keys = [f"in/{number % 7}/file {number:04d}.txt" for number in range(1_000)]
    fill(endpoint, bucket, [*keys, "out/other.txt"])
    registry, client = library.registry, s3_server.client(endpoint)
    watch = Watch(registry, s3, (f"s3://{bucket}/in/",), page=80, every_s=3600)
    (first,) = watch.tick(pages=5)
    assert not first.finished
    assert first.new == len(live(registry)) == first.pages * 80 > 0
    early, resume = sorted(keys)[10], watch.cursor.prefixes[f"s3://{bucket}/in/"].after
    client.delete_object(Bucket=bucket, Key=resume)  # the key to go on from
    put("in/6/zzz.txt", b"late")
    reports = [watch.tick(pages=4)[0] for _ in range(6)]
    assert [report.finished for report in reports].count(True) == 1
    assert {row["priority"] for row in registry.live()} == {5}
    here = {f"s3://{bucket}/{key}" for key in [*keys, "in/6/zzz.txt"]} - {f"s3://{bucket}/{resume}"}
    deleted_in_passing = live(registry) == here
    assert live(registry) in (here, here | {f"s3://{bucket}/{resume}"})
    assert len(watch.partitions) == len(set(watch.partitions)) == 1_001

    quiet = watch.tick()
    assert [(report.pages, report.looks) for report in quiet] == [(1, 0)]

    # The next pass: a removal and an upload whose events were lost.
    client.delete_object(Bucket=bucket, Key=early)
    put("in/3/lost event.txt", b"lost")
    watch.inventory.settings = watch.inventory.settings.model_copy(update={"inventory_every_s": 0.0})
    (report,) = watch.tick()
    assert (report.finished, report.missed, report.keys) == (True, 1, 1_000)
    assert report.removed == 2 - deleted_in_passing
    assert live(registry) == here - {f"s3://{bucket}/{early}"} | {f"s3://{bucket}/in/3/lost event.txt"}
    lost = next(row for row in registry.live() if row["uri"].endswith("lost event.txt"))
    assert (lost["source"], lost["priority"]) == ("s3_inventory", 0)


def test_a_listing_out_of_order_removes_nothing_that_is_there(
    library: Library, s3: S3, endpoint: str, bucket: str, put: Any
) -> None:
    """Given a store that does not list in the order of the bytes, when pages cover a stretch, then objects that stand
    on other pages stay live, and what is gone is found all the same."""
    keys = ["a/1.txt", "a/2.txt", "a-b.txt", "a.txt", "a b.txt", "z.txt"]
    fill(endpoint, bucket, keys)
    watch = Watch(library.registry, s3, (f"s3://{bucket}/",), page=2)
    watch.tick()
    (report,) = watch.tick()
    assert (report.finished, report.removed) == (True, 0)
    assert live(library.registry) == {f"s3://{bucket}/{key}" for key in keys}
    gone = f"s3://{bucket}/a-b.txt"
    s3_server.client(endpoint).delete_object(Bucket=bucket, Key="a-b.txt")
    # The store's clock has whole seconds: a removal in the second of the upload is believed in the next one.
    (report,) = next(reports for reports in iter(watch.tick, []) if reports[0].removed)
    assert (report.finished, report.removed) == (True, 1)
    assert live(library.registry) == {f"s3://{bucket}/{key}" for key in keys} - {gone}


def test_a_prefix_that_cannot_be_listed_does_not_stop_the_others(
    library: Library, s3: S3, bucket: str, put: Any
) -> None:
    """Given a bucket that is gone beside one that is there, when the sensor ticks, then it says so, registers the other
    one's uploads and adds their partitions, requests no run, and keeps its cursor."""
    put("one.txt", b"1")
    put("folder/", b"")
    ingestion = Ingestion(prefixes=("s3://no-such-bucket/x", f"s3://{bucket}/"))
    library.settings = library.settings.model_copy(update={"ingestion": ingestion})
    sensor = build_s3_inventory_sensor(library.settings)
    assert sensor.default_status is dg.DefaultSensorStatus.RUNNING
    with dg.DagsterInstance.ephemeral() as instance:
        context = dg.build_sensor_context(instance, resources={"media": library})
        result = sensor(context)
        assert isinstance(result, dg.SensorResult)
        text = str(result.skip_reason)
        assert "s3://no-such-bucket/x: The bucket of" in text
        assert "complete, 1 pages, 1 keys, 1 new" in text
        assert not result.run_requests
        (row,) = library.registry.live()
        assert instance.get_dynamic_partitions("media") == [row["media_id"]]
        again = sensor(dg.build_sensor_context(instance, cursor=result.cursor, resources={"media": library}))
        assert "between passes, 1 pages, 1 keys, 0 new" in str(again.skip_reason)
    assert json.loads(result.cursor)["prefixes"][f"s3://{bucket}/"]["passes"] == 1
    off = build_s3_inventory_sensor(Settings(home=library.settings.home))
    assert off.default_status is dg.DefaultSensorStatus.STOPPED


def test_a_later_event_wins_over_the_listing(library: Library, s3: S3, bucket: str, put: Any) -> None:
    """Given an upload whose removal was told by a later event, when a listing still holds it, then it stays removed."""
    from datetime import UTC, datetime, timedelta

    put("one.txt", b"1")
    uri = f"s3://{bucket}/one.txt"
    library.registry.register((), [Removal(uri, datetime.now(UTC) + timedelta(minutes=1))])
    Watch(library.registry, s3, (f"s3://{bucket}/",), page=10).tick()
    assert live(library.registry) == set()


# -- end to end ---------------------------------------------------------------------------------------


def test_the_whole_library_lives_on_s3(
    endpoint: str, bucket: str, database_url: str, model_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given media and storage on S3, when they go through all models, then search, SQL and status answer from there."""
    client = s3_server.client(endpoint)
    photo, words = SAMPLES / "photos" / "cat.jpg", b"The quick brown fox jumps over the lazy dog.\n"
    client.put_object(Bucket=bucket, Key="in/cat.jpg", Body=photo.read_bytes())
    client.put_object(Bucket=bucket, Key="in/words.txt", Body=words)
    for name, value in {
        "MEDIA_DATABASE_URL": database_url,
        "MEDIA_STORAGE_URL": f"s3://{bucket}/derived",
        "MEDIA_S3__ENDPOINT_URL": endpoint,
        "MEDIA_S3__BLOCK_BYTES": str(2**16),
    }.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "models").symlink_to(model_home / "models")
    home = ["--home", str(tmp_path / "home")]
    result = CliRunner().invoke(app, ["run", f"s3://{bucket}/in", *home, "--json"])
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    assert summary["failures"] == []
    assert summary["outcomes"]["media"] == {"ok": 2}
    assert summary["outcomes"]["frames"] == {"ok": 1, "not_applicable": 1}
    names = {each["Key"] for each in client.list_objects_v2(Bucket=bucket, Prefix="derived/")["Contents"]}
    assert any(name.startswith("derived/catalog/media/bucket=") for name in names)
    assert not (tmp_path / "home" / "derived").exists()
    for query, wanted in (("a cat", "cat.jpg"), ("quick brown fox", "words.txt")):
        result = CliRunner().invoke(app, ["search", query, *home, "--json"])
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["hits"][0]["uri"] == f"s3://{bucket}/in/{wanted}"
    query = "select parse_filename(uri) as file, sha256 from media order by 1"
    result = CliRunner().invoke(app, ["sql", query, *home, "--json"])
    assert result.exit_code == 0, result.output
    digests = [hashlib.sha256(data).hexdigest() for data in (photo.read_bytes(), words)]
    assert digests[0] in result.stdout
    assert digests[1] in result.stdout
    result = CliRunner().invoke(app, ["status", *home, "--json"])
    assert result.exit_code == 0, result.output


def test_shards_are_swapped_on_s3(s3: S3, bucket: str, endpoint: str) -> None:
    """Given embeddings on S3, when a bucket's shards are built and swapped twice, then the newest serves, one before
    is kept, and a reader finds exactly the live items."""
    store = DerivedStore(location(f"s3://{bucket}/derived", s3), s3.part_bytes)
    live_items = embed(store, 4)
    assert build(store, 0, live_items, RECALL).skipped == ()
    for start in (1, 2):
        build(store, 0, dict(list(live_items.items())[start:]), RECALL)
    assert serving(store) == {"m-002", "m-003"}
    listed = s3_server.client(endpoint).list_objects_v2(Bucket=bucket, Prefix="derived/index/000/")["Contents"]
    assert len({entry["Key"].split("/")[3] for entry in listed} - {"CURRENT"}) == 2


def test_an_inventory_between_passes_writes_no_log(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given ticks between passes, then one that found nothing has no log, which would be a file; one that found
    something, or ended a pass, has."""
    prefix = "s3://bucket/"
    library.settings = library.settings.model_copy(update={"ingestion": Ingestion(prefixes=(prefix,))})
    sensor = build_s3_inventory_sensor(library.settings)
    logged: list[str] = []
    monkeypatch.setattr(dg.SensorEvaluationContext, "log", SimpleNamespace(info=logged.append, error=logged.append))
    for report, lines in (
        (Report(prefix, pages=1, between=True), 0),
        (Report(prefix, pages=1, new=1, between=True), 1),
        (Report(prefix, pages=2, finished=True), 1),
        (Report(prefix, error="No such bucket.", between=True), 1),
    ):
        logged.clear()
        monkeypatch.setattr(Inventory, "tick", lambda *_, one=report: (Cursor(), [one]))
        with dg.DagsterInstance.ephemeral() as instance:
            result = sensor(dg.build_sensor_context(instance, resources={"media": library}))
        assert len(logged) == lines
        assert isinstance(result, dg.SensorResult)
        assert sentence(report) in str(result.skip_reason)
