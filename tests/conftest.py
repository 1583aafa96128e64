"""Shared fixtures: one embedded Postgres server for the whole test session, and a library on it per test."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from resources.library import Library
from resources.models.registry import ModelRegistry
from resources.records import embedded_postgres
from resources.records.database import Database
from resources.settings import Settings

HERE = Path(__file__).parent
SILENT = {"telemetry": {"enabled": False}}  # of a Dagster instance, which would write to ~/.dagster
ONE_STORY = ("test_dagster", "cluster")  # of one running system, warmer with each test: they stay in their order
LONGEST = ("test_dagster", "cluster", "test_main_job", "test_s3", "test_s3_events", "test_planner", "test_purge")


def pytest_configure(config: pytest.Config) -> None:
    """Give the session temporary folders of its own.

    What is killed with -9 leaves files behind in them, as the tests of it do on purpose.
    """
    if hasattr(config, "workerinput"):
        # Several sessions share the cores: one thread each is faster than all of them at war. Children inherit it.
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    if config.option.basetemp is None:
        folder = tempfile.mkdtemp(prefix="mt-")  # short: paths of sockets may have 107 bytes
        config.option.basetemp = f"{folder}/b"
        os.environ["TMPDIR"] = tempfile.tempdir = f"{folder}/t"
        os.mkdir(tempfile.tempdir)
        # At the very end: servers that stop at exit still need their files.
        atexit.register(shutil.rmtree, folder, ignore_errors=True)


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--order`, by which no test can depend on another one of its file for long."""
    parser.addoption("--order", metavar="SEED", help="run the tests of each file in an order made from this word")


def pytest_report_header(config: pytest.Config) -> str | None:
    """How to repeat the order."""
    seed = config.getoption("order")
    return f"order of the tests in each file: --order={seed}" if seed else None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The longest come first, so that none of them is left over at the end; in a file, any order will do."""
    groups = {item: _group(item.nodeid) for item in items}
    if seed := config.getoption("order"):
        places = {item: sha256(f"{seed} {item.nodeid}".encode()).digest() for item in items}
        items.sort(key=lambda item: (item.path, b"" if groups[item] in ONE_STORY else places[item]))
    items.sort(key=lambda item: LONGEST.index(groups[item]) if groups[item] in LONGEST else len(LONGEST))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With several workers the tests of a file share one, and so do those of a folder with a server of its own.

    xdist 3.8 takes groups from `Item._nodeid`, which pytest 9.2 does not read: its `loadgroup` would group nothing.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByGroup(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _group(nodeid)

    return ByGroup(config, log)


def _group(nodeid: str) -> str:
    path = Path(nodeid.partition("::")[0])
    return path.stem if path.parent.name == HERE.name else path.parent.name


@pytest.fixture(scope="session")
def server_url(tmp_path_factory: pytest.TempPathFactory) -> str:
    """URL of a Postgres server that lives as long as the session."""
    return embedded_postgres.serve(tmp_path_factory.mktemp("server") / "postgres")


@pytest.fixture(scope="session")
def model_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home folder whose model cache the whole session shares, all its processes: weights are built once."""
    base = tmp_path_factory.getbasetemp()
    home = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "model-home"
    (home / "models").mkdir(parents=True, exist_ok=True)
    return home


@pytest.fixture(scope="session")
def models(model_home: Path) -> ModelRegistry:
    """The registry of the session: each model is loaded once for all tests."""
    return ModelRegistry(Settings(home=model_home))


@pytest.fixture
def database_url(server_url: str) -> Iterator[str]:
    """URL of an empty database of its own."""
    name = f"t{uuid.uuid4().hex[:12]}"
    admin = sa.create_engine(server_url, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(sa.text(f"create database {name}"))
    yield sa.make_url(server_url).set(database=name).render_as_string(hide_password=False)
    with admin.connect() as connection:
        connection.execute(sa.text(f"drop database {name} with (force)"))
    admin.dispose()


@pytest.fixture
def database(database_url: str, tmp_path: Path) -> Iterator[Database]:
    """An open database with the current schema."""
    opened = Database.open(Settings(home=tmp_path / "home", database_url=database_url))
    yield opened
    opened.close()


@pytest.fixture
def library(database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Library]:
    """An empty library in a temporary home, on a database of its own."""
    monkeypatch.setenv("MEDIA_DATABASE_URL", database_url)
    opened = Library(Settings.load(tmp_path / "home"))
    yield opened
    opened.close()
