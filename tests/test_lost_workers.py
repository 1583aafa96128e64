"""Processes that die at work: what they were loading, or doing, says which items were tried, and none is lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from media_assets.engine.planning import suspects
from media_assets.orchestration.groups import one_at_a_time
from resources.records.database import Database
from resources.records.outcome import Status
from resources.records.outcomes import OutcomeStore
from resources.records.tables import model_loads
from resources.settings import Engine
from tests.test_engine import Bench, items

PROJECT = Path(__file__).parents[1]
NAMES = ("a", "b", "c", "d")
WORKER = """
import os, signal, sys
from pathlib import Path
from resources.records.database import Database
from resources.settings import Settings
from tests.test_engine import Bench, items
from tests.toy_stages import CHAIN
from media_assets.orchestration.groups import one_at_a_time
url, root, careful, where = sys.argv[1:5]
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
class Dies:
    def __call__(self, method, media_id):
        if (method, media_id) == tuple(where.split(" ")):
            die()
class Loads(CHAIN[0]):
    def load(self):
        if where == "load":
            die()
        self.models.loaded(self.models.spec("shots"), die if where == "late load" else object)
bench = Bench(Database.open(Settings(home=Path("/nowhere"), database_url=url)), Path(root))
if careful == "careful":
    bench.settings = one_at_a_time(bench.settings)
bench.run(items("a", "b", "c", "d"), bench.stages(Dies(), [Loads, *CHAIN[1:]]), "run-" + sys.argv[5])
"""


class Deaths:
    """Worker processes on one library, of which each may die somewhere."""

    def __init__(self, database: Database, root: Path) -> None:
        self.bench = Bench(database, root)
        self.url = database.url
        self.root = root
        self.runs = 0

    def run(self, where: str = "", careful: bool = False) -> int:
        """Exit status of a worker that dies at `where`."""
        self.runs += 1
        mode = "careful" if careful else "normal"
        command = [sys.executable, "-c", WORKER, self.url, str(self.root), mode, where, str(self.runs)]
        return subprocess.run(command, cwd=PROJECT, check=False).returncode

    def records(self) -> dict[tuple[str, str], Any]:
        """The outcomes."""
        return self.bench.outcomes.load(NAMES)


@pytest.fixture
def deaths(database: Database, tmp_path: Path) -> Deaths:
    """Workers on a library of toy stages."""
    return Deaths(database, tmp_path)


@pytest.mark.parametrize("where", ["load", "late load"])
def test_a_death_while_a_model_loads_is_nobodys_attempt(deaths: Deaths, where: str) -> None:
    """Given four processes that die while a model loads, then the fifth makes everything at the first attempt."""
    for _ in range(4):
        assert deaths.run(where) == -signal.SIGKILL
    assert deaths.run() == 0
    records = deaths.records()
    assert len(records) == 3 * len(NAMES)
    assert {(record.status, record.attempts) for record in records.values()} == {(Status.OK, 1)}


def test_an_item_that_kills_is_set_aside_and_no_other(deaths: Deaths) -> None:
    """Given an item whose inference kills, then it is quarantined after its attempts, and its neighbours are done."""
    assert deaths.run("infer b") == -signal.SIGKILL
    dead = suspects(deaths.records(), lambda run: run not in deaths.bench.outcomes.alive([run]))
    assert "b" in dead
    assert deaths.run("infer b", careful=True) == -signal.SIGKILL
    assert deaths.run("infer b", careful=True) == -signal.SIGKILL
    assert deaths.run("infer b", careful=True) == 0
    records = deaths.records()
    lost = records["b", "numbers"]
    assert (lost.status, lost.error_class, lost.attempts) == (Status.QUARANTINED, "worker_lost", 3)
    assert "media-assets dead-letters --class worker_lost --replay" in (lost.error or "")
    assert {record.status for (media_id, _), record in records.items() if media_id != "b"} == {Status.OK}


def test_a_careful_batch_has_one_stage_in_flight(database: Database, tmp_path: Path) -> None:
    """Given items that go one at a time, then whenever something runs, nothing else of theirs is claimed."""
    bench = Bench(database, tmp_path)
    bench.settings = one_at_a_time(bench.settings)
    seen: list[list[str]] = []

    def look(method: str, media_id: str) -> object:
        running = [r for r in bench.outcomes.load(NAMES).values() if r.status is Status.RUNNING]
        seen.append([f"{record.media_id} {record.asset}" for record in running])
        return None

    results = bench.run(items(*NAMES), bench.stages(look))
    assert len(results) == 12
    assert all(result.done for result in results)
    assert {len(running) for running in seen} == {1}


def test_notes_of_loading_go_with_it(database: Database, tmp_path: Path) -> None:
    """Given loads within loads, then one note is there meanwhile and none afterwards."""
    loads = OutcomeStore(database, Engine()).model_loads("run")

    def count() -> int:
        with database.engine.connect() as connection:
            return int(connection.execute(sa.select(sa.func.count()).select_from(model_loads)).scalar_one())

    with loads.under_way():
        with loads.under_way():
            assert count() == 1
        assert count() == 1
    assert count() == 0


def test_run_goes_on_after_deaths_while_models_load(tmp_path: Path, model_home: Path) -> None:
    """Given `run` killed three times while its first model loads, then the fourth finishes every item."""
    home = tmp_path / "home"
    home.mkdir()
    (home / "models").symlink_to(model_home / "models")
    command = [sys.executable, "-m", "cli.main", "run", str(PROJECT / "samples" / "media" / "photos"), "--json"]
    command += ["--home", str(home), "--select", "media,frames,shots,ocr_text"]
    environment = {**os.environ, "MEDIA_FAULT": "models.loading:kill"}
    for _ in range(3):
        killed = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, check=False)
        assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=True)
    summary = json.loads(done.stdout)
    assert summary["failures"] == []
    assert summary["outcomes"]["ocr_text"] == {"ok": summary["items"]}
    assert "one at a time" in done.stderr
