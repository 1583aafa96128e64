"""Dagster's records over connections that stay open, on a real server."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from urllib.parse import quote

import dagster as dg
import pytest
import sqlalchemy as sa
from dagster._core.instance.ref import InstanceRef

PROJECT = Path(__file__).parents[1]
THREADS = 6

Opened = Callable[[], dg.DagsterInstance]


@pytest.fixture
def opened(tmp_path: Path, database_url: str) -> Iterator[Opened]:
    """Opens instances on one database, as each tick of a sensor does."""
    opened: list[dg.DagsterInstance] = []
    storage = {"module": "jobs.dagster_storage", "class": "PooledPostgresStorage"}

    def make() -> dg.DagsterInstance:
        overrides = {"storage": {"custom": {**storage, "config": {"postgres_url": database_url}}}}
        opened.append(dg.DagsterInstance.from_ref(InstanceRef.from_dir(str(tmp_path), overrides=overrides)))
        return opened[-1]

    yield make
    for instance in opened:
        instance.dispose()


@pytest.fixture
def backends(database_url: str) -> Iterator[Callable[[], set[int]]]:
    """Tells the processes of the server that serve this database's connections but the one that asks."""
    engine = sa.create_engine(database_url, poolclass=sa.NullPool, isolation_level="AUTOCOMMIT")
    others = (
        "select pid from pg_stat_activity where datname = current_database()"
        " and pid <> pg_backend_pid() and backend_type = 'client backend'"
    )

    def pids() -> set[int]:
        with engine.connect() as connection:
            return {int(pid) for pid in connection.execute(sa.text(others)).scalars()}

    yield pids
    engine.dispose()


def use(instance: dg.DagsterInstance) -> None:
    """Ask each part of the storage, and have an event written."""
    instance.report_runless_asset_event(dg.AssetMaterialization("shots"))
    assert instance.get_latest_materialization_event(dg.AssetKey("shots")) is not None
    assert instance.get_runs_count() == 0
    assert instance.all_instigator_state() == []


def test_a_process_has_two_connections_for_all(opened: Opened, backends: Callable[[], set[int]]) -> None:
    """Given an empty database, then it gets Dagster's tables, and whatever is asked afterwards, by that instance and by
    others, goes over the same connections, two at most, which outlive the instance."""
    first = opened()
    use(first)
    used = backends()
    first.dispose()
    for _ in range(3):
        use(opened())
    assert backends() == used
    assert 1 <= len(used) <= 2


def test_a_broken_connection_costs_nothing(opened: Opened, backends: Callable[[], set[int]], database_url: str) -> None:
    """Given a server that has ended the connections, as when it restarts, then the next statement has a new one."""
    instance = opened()
    use(instance)
    before = backends()
    admin = sa.create_engine(database_url, poolclass=sa.NullPool)
    with admin.connect() as connection:
        for pid in before:
            connection.execute(sa.text("select pg_terminate_backend(:pid, 5000)"), {"pid": pid})
    use(instance)
    assert backends().isdisjoint(before)


def test_threads_do_not_wait_for_each_other(opened: Opened, backends: Callable[[], set[int]]) -> None:
    """Given more threads at once than connections are kept, then each has one; later the kept ones are left."""
    instance = opened()
    use(instance)
    together = Barrier(THREADS, timeout=30)

    def ask(_: int) -> int:
        with instance.event_log_storage.index_connection() as connection:  # type: ignore[attr-defined]
            together.wait()
            return int(connection.execute(sa.text("select pg_backend_pid()")).scalar())

    with ThreadPoolExecutor(THREADS) as pool:
        assert len(set(pool.map(ask, range(THREADS)))) == THREADS
    deadline = time.monotonic() + 30
    while len(backends()) > 2 and time.monotonic() < deadline:  # the server ends a closed connection in its own time
        time.sleep(0.05)
    assert len(backends()) == 2


def test_the_webserver_has_connections_of_its_own(opened: Opened, backends: Callable[[], set[int]]) -> None:
    """Given Dagster's webserver, which replaces a storage's engines by its own, then other instances keep theirs."""
    use(opened())
    before = backends()
    webserver = opened()
    webserver.optimize_for_webserver(statement_timeout=5000, pool_recycle=-1, max_overflow=5)
    use(webserver)
    assert before < backends()
    use(opened())
    assert before <= backends()
    with webserver.event_log_storage.index_connection() as connection:  # type: ignore[attr-defined]
        assert connection.execute(sa.text("show statement_timeout")).scalar() == "5s"
    with opened().event_log_storage.index_connection() as connection:  # type: ignore[attr-defined]
        assert connection.execute(sa.text("show statement_timeout")).scalar() == "0"


def in_a_clone(*command: str, home: Path) -> subprocess.CompletedProcess[str]:
    """What a Dagster user types in a clone first, with nothing set but where the state goes."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MEDIA_", "DAGSTER_"))}
    environment = clean | {"MEDIA_HOME": str(home), "DAGSTER_HOME": str(PROJECT)}
    return subprocess.run(command, env=environment, cwd=PROJECT, capture_output=True, text=True, check=False)


def test_an_instance_without_a_url_uses_the_homes_own_server(tmp_path: Path) -> None:
    """Given the clone's dagster.yaml and no database set, then Dagster's records are in the home's embedded server."""
    asks = "print(instance.get_runs_count(), instance.event_log_storage.postgres_url)"
    code = f"import dagster as dg; instance = dg.DagsterInstance.get(); {asks}"
    done = in_a_clone(sys.executable, "-c", code, home=tmp_path / "home")
    assert done.returncode == 0, done.stderr
    count, url = done.stdout.split()
    assert count == "0"
    assert quote(str(tmp_path / "home" / "postgres"), safe="") in url
