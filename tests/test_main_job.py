"""The main job, from the command line, on the shipped samples with the real models."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from cli.searching import open_views
from resources.files.views import query as select
from resources.library import Library
from resources.models.registry import CATALOGUE
from resources.settings import Settings

PROJECT = Path(__file__).parents[1]
SAMPLES = PROJECT / "samples" / "media"
ASSETS = (
    "media",
    "frames",
    "audio",
    "shots",
    "transcript",
    "ocr_text",
    "embeddings",
    "moderation_scores",
    "moderation_labels",
)
MODEL_TABLES = ("shots", "transcript", "ocr_text", "embeddings", "moderation_scores", "moderation_labels")


@dataclass(frozen=True, slots=True)
class Installation:
    """A home folder and how to call the command line on it."""

    home: Path
    database_url: str

    def start(self, *arguments: str, **variables: str) -> subprocess.Popen[str]:
        """`media-assets arguments…`, running."""
        environment = {**os.environ, "MEDIA_DATABASE_URL": self.database_url, "COLUMNS": "200", **variables}
        return subprocess.Popen(
            [sys.executable, "-m", "cli.main", *arguments, "--home", str(self.home)],
            env=environment,
            cwd=PROJECT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def call(self, *arguments: str, code: int = 0, **variables: str) -> str:
        """`media-assets arguments…`; returns stdout, and asserts the exit code."""
        process = self.start(*arguments, **variables)
        output, errors = process.communicate()
        assert process.returncode == code, errors[-3000:]
        return output

    def json(self, *arguments: str, code: int = 0, **variables: str) -> Any:
        """What `media-assets arguments… --json` prints."""
        return json.loads(self.call(*arguments, "--json", code=code, **variables))

    def sql(self, query: str) -> list[dict[str, Any]]:
        """Rows of a query over the views, in this process."""
        library = Library(Settings(home=self.home, database_url=self.database_url or None))
        try:
            rows: list[dict[str, Any]] = select(open_views(library), query).to_pylist()
        finally:
            library.close()
        return rows

    def table(self, asset: str, media_id: str) -> pa.Table:
        """A stored table."""
        return pq.read_table(str(self.home / "derived" / asset / f"{media_id}.parquet"), partitioning=None)


@pytest.fixture(scope="module")
def installation(server_url: str, tmp_path_factory: pytest.TempPathFactory, model_home: Path) -> Installation:
    """An empty installation on a database of its own."""
    import sqlalchemy as sa

    admin = sa.create_engine(server_url, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(sa.text("create database main_job"))
    admin.dispose()
    url = sa.make_url(server_url).set(database="main_job").render_as_string(hide_password=False)
    return Installation(home_with_models(tmp_path_factory, model_home), url)


def home_with_models(factory: pytest.TempPathFactory, model_home: Path) -> Path:
    """A new home folder that shares the session's model cache."""
    home = factory.mktemp("home")
    (home / "models").symlink_to(model_home / "models")
    return home


@pytest.fixture(scope="module")
def first(installation: Installation) -> dict[str, Any]:
    """The summary of the first run over the samples: interrupted by kill -9 in mid-batch, then run again."""
    interrupted = installation.start("run", str(SAMPLES), MEDIA_FAULT="engine.before_commit:kill:40")
    interrupted.communicate()
    assert interrupted.returncode == -signal.SIGKILL
    summary: dict[str, Any] = installation.json("run", str(SAMPLES))
    return summary


@pytest.fixture(scope="module")
def media(installation: Installation, first: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Rows of `media` of the samples, by file name."""
    rows = installation.sql("select * from media")
    return {Path(row["uri"]).name: row for row in rows if SAMPLES in Path(row["uri"]).parents}


def truths() -> dict[str, Any]:
    """Entries of the samples' manifest, by file name."""
    entries = json.loads((PROJECT / "samples" / "manifest.json").read_text())
    return {Path(entry["file"]).name: entry for entry in entries}


def names(rows: Sequence[dict[str, Any]], column: str) -> set[str]:
    """Distinct values of a column."""
    return {str(row[column]) for row in rows}


def test_every_sample_has_an_outcome_for_every_asset(installation: Installation, first: dict[str, Any]) -> None:
    """Given a run that was killed and repeated, then each file has one settled outcome per asset."""
    files = [path for path in SAMPLES.rglob("*") if path.is_file()]
    assert first["items"] == len(files)
    assert set(first["outcomes"]) == set(ASSETS)
    for asset, counts in first["outcomes"].items():
        assert sum(counts.values()) == len(files), asset
        assert not counts.keys() & {"running", "retryable"}, asset


def test_only_the_broken_sample_fails_and_says_why(installation: Installation, first: dict[str, Any]) -> None:
    """Given one broken file among the samples, then it alone is quarantined, with a stable class and a remedy."""
    broken = {path.name for path in (SAMPLES / "broken").iterdir()}
    assert {Path(failure["uri"]).name for failure in first["failures"]} == broken
    assert names(first["failures"], "error_class") <= {"truncated", "undecodable"}
    assert all("upload" in failure["error"] for failure in first["failures"])


def test_a_killed_run_is_resumed_and_not_repeated(installation: Installation, first: dict[str, Any]) -> None:
    """Given 39 commits before the kill, then only records still open were worked on again."""
    history = installation.sql("select media_id, asset, attempts from outcomes where attempts > 1")
    in_flight_at_most = 24 * len(ASSETS)
    assert len(history) < in_flight_at_most
    recomputed = sum(first["computed"].values())
    total = sum(sum(counts.values()) for counts in first["outcomes"].values())
    assert total - recomputed >= 39


def jobs_of(installation: Installation, summary: dict[str, Any]) -> list[str]:
    """Names of the jobs that a run executed."""
    import sqlalchemy as sa

    engine = sa.create_engine(installation.database_url)
    with engine.connect() as connection:
        query = sa.text("select pipeline_name from runs where run_id = any(:ids) order by id")
        names = list(connection.execute(query, {"ids": summary["runs"]}).scalars())
    engine.dispose()
    return names


def test_items_go_through_all_groups_in_one_run(installation: Installation, first: dict[str, Any]) -> None:
    """Given files of which some were decoded when the first run was killed, then there is one run for what needs each
    set of groups, and none of one group alone."""
    names = jobs_of(installation, first)
    assert names[-1] == "rebuild"
    assert set(names[:-1]) == {"process_all"}


def test_running_again_finds_nothing_to_do(installation: Installation, first: dict[str, Any]) -> None:
    """Given a finished run, when it is repeated, then no Dagster run starts and no table changes."""
    before = {path: path.stat().st_mtime_ns for path in (installation.home / "derived").rglob("*.parquet")}
    again = installation.json("run", str(SAMPLES))
    assert again["runs"] == []
    assert again["computed"] == {}
    assert {path: path.stat().st_mtime_ns for path in (installation.home / "derived").rglob("*.parquet")} == before
    assert "Nothing to do: 14 of 15 items are up to date; set aside after a failure: 1." in " ".join(
        installation.call("run", str(SAMPLES)).split()
    )


def test_speech_is_transcribed_with_times(installation: Installation, media: dict[str, dict[str, Any]]) -> None:
    """Given the narrated audio file, then its transcript has the words, in order, within the duration."""
    manifest = truths()
    item = media["narration.mp3"]
    rows = installation.table("transcript", item["media_id"]).to_pylist()
    said = " ".join(row["text"] for row in rows).lower()
    truth = manifest["narration.mp3"]["ground_truth"]["transcript"].lower().replace(".", "").replace(",", "").split()
    assert sum(word in said for word in truth) / len(truth) > 0.8
    words = [word for row in rows for word in row["words"]]
    assert [word["start_s"] for word in words] == sorted(word["start_s"] for word in words)
    assert words[-1]["end_s"] <= item["duration_s"] + 0.05
    assert names(rows, "language") == {"en"}


def test_cuts_of_the_film_are_found(installation: Installation, media: dict[str, dict[str, Any]]) -> None:
    """Given a film with known hard cuts and a fade, then each is a boundary and the shots tile the film."""
    manifest = truths()
    truth = manifest["film.mp4"]["ground_truth"]
    rows = installation.table("shots", media["film.mp4"]["media_id"]).to_pylist()
    starts = [row["start_frame"] for row in rows]
    for cut in truth["hard_cuts"]:
        assert min(abs(cut - start) for start in starts) <= 2
    assert [row["start_frame"] for row in rows[1:]] == [row["end_frame"] + 1 for row in rows[:-1]]
    assert "gradual" in names(rows, "transition")


def test_text_on_screen_is_read_once_with_its_span(
    installation: Installation, media: dict[str, dict[str, Any]]
) -> None:
    """Given a title card shown for seconds, then it is one row with a span, and repeated frames were spared."""
    rows = installation.table("ocr_text", media["film.mp4"]["media_id"]).to_pylist()
    assert rows
    assert any(row["end_s"] - row["start_s"] >= 1.0 for row in rows)
    texts = [row["text"].lower() for row in rows]
    assert len(texts) == len(set(texts))


def test_search_finds_pictures_speech_and_text(installation: Installation, media: dict[str, dict[str, Any]]) -> None:
    """Given the samples, then a thing seen and words said are found, with the time where they are."""
    seen = installation.json("search", "a cup of coffee", "--limit", "5")["hits"]
    assert {"coffee.jpg", "film.mp4"} & {Path(hit["uri"]).name for hit in seen if "picture" in hit["why"]}
    assert "cat.jpg" not in {Path(hit["uri"]).name for hit in seen}
    spoken = installation.table("transcript", media["narration.mp3"]["media_id"])["text"][0].as_py()
    phrase = " ".join(spoken.split()[:5])
    said = installation.json("search", phrase)["hits"]
    hit = next(hit for hit in said if Path(hit["uri"]).name == "narration.mp3")
    assert 0 <= hit["start_s"] < hit["end_s"]


def test_duplicates_are_grouped(installation: Installation, media: dict[str, dict[str, Any]]) -> None:
    """Given an exact copy and an edited copy of photos, then both pairs are found, the exact one without models."""
    rows = installation.sql("select * from near_duplicates")
    assert {"exact", "perceptual"} <= names(rows, "method")
    (copy,) = [row for row in media.values() if row["duplicate_of"]]
    pair = {copy["media_id"], copy["duplicate_of"]}
    records = installation.sql("select * from outcomes where asset = 'embeddings' and copied_from is not null")
    of_samples = {row["media_id"] for row in media.values()}
    copied = [record for record in records if record["media_id"] in of_samples]  # others copy samples elsewhere
    assert [{record["media_id"], record["copied_from"]} for record in copied] == [pair]


def test_every_item_has_a_moderation_decision(installation: Installation, first: dict[str, Any]) -> None:
    """Given the samples, then every item that was scored has at least one decision with its rule and policy."""
    undecided = installation.sql(
        "select media_id from outcomes where asset = 'moderation_labels' and status = 'ok' and media_id not in"
        " (select media_id from moderation_labels where rule != '' and policy_version != '')"
    )
    assert undecided == []


def test_an_uninterrupted_run_makes_the_same_tables_and_leaves_nothing_elsewhere(
    installation: Installation, first: dict[str, Any], tmp_path_factory: pytest.TempPathFactory, model_home: Path
) -> None:
    """Given sound, a poster, text and a photo in a fresh home, then their tables equal those of the killed run.

    The run with its embedded server leaves nothing in the user's home and in the folder for temporary files.
    """
    chosen = [SAMPLES / name for name in ("narration.mp3", "poster.png", "notes.txt", "photos/cat.jpg")]
    fresh = Installation(home_with_models(tmp_path_factory, model_home), "")
    user = tmp_path_factory.mktemp("user")
    fresh.json("run", *map(str, chosen), HOME=str(user), TMPDIR=str(user))
    assert list(user.rglob("*")) == []
    rows = {row["uri"]: row["media_id"] for row in fresh.sql("select uri, media_id from media")}
    assert set(rows) == set(map(str, chosen))
    for media_id in rows.values():
        for asset in MODEL_TABLES:
            assert_same(fresh.table(asset, media_id), installation.table(asset, media_id))


def assert_same(one: pa.Table, other: pa.Table) -> None:
    """Equal tables; floating-point columns within 1e-4, since a micro-batch of another size may round differently."""
    assert one.schema.equals(other.schema)
    assert one.num_rows == other.num_rows
    for name in one.column_names:
        left, right = one[name].combine_chunks(), other[name].combine_chunks()
        if pa.types.is_floating(left.type):
            difference = pc.max(pc.abs(pc.subtract(left, right))).as_py()
            assert difference is None or difference <= 1e-4, name
        elif name == "vector":
            difference = pc.max(pc.abs(pc.subtract(left.flatten(), right.flatten()))).as_py()
            assert difference is None or difference <= 1e-4
        elif name not in ("words", "polygon"):
            assert left.equals(right), name


def test_a_model_change_recomputes_exactly_its_dependants(
    installation: Installation, first: dict[str, Any], tmp_path: Path
) -> None:
    """Given another toxicity model parameter, then moderation is recomputed and nothing else is."""
    before = installation.sql("select media_id, asset, version from outcomes")
    catalogue = CATALOGUE.read_text()
    head, mark, tail = catalogue.partition("[[offline.toxicity]]")
    assert mark
    changed = tail.replace("max_characters = 100", "max_characters = 99", 1)
    assert changed != tail
    (installation.home / "models.toml").write_text(head + mark + changed)
    try:
        summary = installation.json("run", str(SAMPLES))
        after = {(row["media_id"], row["asset"]): row["version"] for row in installation.sql("select * from outcomes")}
    finally:
        (installation.home / "models.toml").unlink()
        back = installation.json("run", str(SAMPLES))
    assert jobs_of(installation, summary)[:2] == ["process_analyse", "process_label"]  # nothing else is touched
    assert set(summary["computed"]) <= {"moderation_scores", "moderation_labels"}
    assert summary["computed"]["moderation_scores"] > 0
    assert set(back["computed"]) == set(summary["computed"])
    changed_assets = {row["asset"] for row in before if after[row["media_id"], row["asset"]] != row["version"]}
    assert changed_assets == {"moderation_scores", "moderation_labels"}


def test_retry_gives_a_broken_file_a_fresh_start(installation: Installation, first: dict[str, Any]) -> None:
    """Given a quarantined file, when its class is retried, then the next run tries it again and ends the same."""
    classes = {failure["error_class"] for failure in first["failures"]}
    arguments = [part for name in sorted(classes) for part in ("--error-class", name)]
    assert installation.json("retry", *arguments)["reset"] >= 1
    again = installation.json("run", str(SAMPLES))
    assert {failure["uri"] for failure in again["failures"]} == {failure["uri"] for failure in first["failures"]}
    assert again["runs"]


def test_strict_runs_say_so_by_their_exit_code(installation: Installation, first: dict[str, Any]) -> None:
    """Given a broken file, then `run --strict` exits 3; a folder that is not there exits 4."""
    installation.call("run", str(SAMPLES), "--strict", code=3)
    installation.call("run", str(SAMPLES / "nowhere"), code=4)


def test_a_removed_folder_and_an_odd_name_do_not_stop_a_run(
    installation: Installation, first: dict[str, Any], tmp_path: Path
) -> None:
    """Given a name that is not UTF-8, one with a newline and a missing folder, then the good ones are processed."""
    note = (SAMPLES / "notes.txt").read_bytes()
    for name in (b"caf\xe9.txt", b"a\nline.txt", b"-rf $(x) ';drop table.txt"):
        Path(os.fsdecode(bytes(tmp_path) + b"/" + name)).write_bytes(note)
    summary = installation.json("run", str(tmp_path), str(tmp_path / "gone"))
    assert summary["items"] == 3
    assert summary["failures"] == []
    assert [problem["reason"] for problem in summary["problems"]] == ["No such file or directory"]
    assert (
        len(installation.sql("select uri from media where contains(uri, 'caf%E9') or contains(uri, 'line.txt')")) == 2
    )


def test_status_tells_counts_and_one_item(installation: Installation, media: dict[str, dict[str, Any]]) -> None:
    """Given processed samples, then `status` counts them and `status MEDIA_ID` tells one item's records."""
    assert installation.json("status")["items"] >= len(media)
    item = installation.json("status", media["film.mp4"]["media_id"])
    assert {record["asset"] for record in item["outcomes"]} == set(ASSETS)
    assert all(record["seconds"] is not None for record in item["outcomes"])
    assert installation.call("status", "no-such-item", "--json", code=4) == ""


def test_sql_is_read_only_and_says_what_is_wrong(installation: Installation, first: dict[str, Any]) -> None:
    """Given SQL that writes, reads files or does not parse, then it is refused with exit code 8."""
    for query in ("drop table outcomes", "select * from read_csv('/etc/passwd')", "selec 1", "copy media to '/tmp/x'"):
        installation.call("sql", query, code=8)


def test_ctrl_c_keeps_what_is_finished(installation: Installation, first: dict[str, Any], tmp_path: Path) -> None:
    """Given a run that is interrupted once it has work in flight, then it exits 130 and nothing stays in flight."""
    shutil.copytree(SAMPLES / "photos", tmp_path / "photos")
    process = installation.start("run", str(tmp_path / "photos"))
    assert process.stderr is not None
    for line in process.stderr:
        if "/7 items" in line:
            break
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130
    assert "Interrupted" in errors
    assert installation.sql("select * from outcomes where status = 'running'") == []


@pytest.fixture(autouse=True, scope="module")
def _no_leftover_decoders() -> Iterator[None]:
    """After the module, no decoder process of a killed run is left."""
    yield
    import psutil

    left = [
        process.pid
        for process in psutil.process_iter(["cmdline", "ppid"])
        if "resources.decoding.worker" in (process.info["cmdline"] or []) and process.info["ppid"] == 1
    ]
    assert left == []
