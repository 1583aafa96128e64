"""The embedded PostgreSQL server: any path, several processes, other users of the machine, and what is left of it."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import sqlalchemy as sa

from resources.errors import DatabaseUnavailable
from resources.files.local import FolderUnusable
from resources.records import embedded_postgres
from tests.conftest import HERE

IS_ROOT = os.geteuid() == 0
USE = """
import sys
from pathlib import Path
from resources.records.embedded_postgres import serve
print(serve(Path(sys.argv[1])), flush=True)
sys.stdin.read()
"""
LONG = "Bücher und Filme " + "x" * 135
ALICE, BOB = [entry.pw_uid for entry in pwd.getpwall() if entry.pw_uid and entry.pw_name != "nobody"][:2]


class Use:
    """A process that uses the server of a folder until it is told to stop."""

    def __init__(self, folder: Path, temporary: Path, user: int | None = None) -> None:
        environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(HERE.parent), "TMPDIR": str(temporary)}
        self._process = subprocess.Popen(
            [*(_become(user) if user else ()), sys.executable, "-c", USE, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        assert self._process.stdout is not None
        self.url = self._process.stdout.readline().strip()

    def stop(self) -> None:
        self._process.communicate()
        assert self._process.returncode == 0

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()


def _become(user: int) -> list[str]:
    """Run as this user, who may read everything: the interpreter may be in root's home."""
    ids = ["--reuid", str(user), "--regid", str(user), "--clear-groups"]
    return ["setpriv", *ids, "--inh-caps", "+dac_read_search", "--ambient-caps", "+dac_read_search"]


@pytest.fixture
def temporary() -> Iterator[Path]:
    """A short folder for temporary files, which any user may write to, as /tmp."""
    folder = Path(tempfile.mkdtemp(prefix="mp-"))
    folder.chmod(0o1777)
    yield folder
    shutil.rmtree(folder)


def server_of(folder: Path) -> psutil.Process | None:
    """The server that runs on the folder."""
    file = folder / "postmaster.pid"
    return psutil.Process(int(file.read_text().split()[0])) if file.exists() else None


def is_gone(server: psutil.Process) -> bool:
    """Whether it ended; where the first process of a container collects no orphans, its number stays."""
    return not server.is_running() or server.status() == psutil.STATUS_ZOMBIE


def socket_of(url: str) -> Path:
    host = sa.make_url(url).query["host"]
    assert isinstance(host, str)
    return Path(host) / ".s.PGSQL.5432"


def answer(url: str, statement: str = "select 6 * 7") -> object:
    engine = sa.create_engine(url, poolclass=sa.NullPool)
    with engine.connect() as connection:
        return connection.execute(sa.text(statement)).scalar()


@contextmanager
def as_user(user: int) -> Iterator[None]:
    """This process as another user, for what the kernel allows it."""
    os.setegid(user)
    os.seteuid(user)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


@pytest.mark.parametrize("name", ["plain", LONG, """it's $HOME `id` "q",b:c?d&e=f#;%41"""])
def test_any_path_serves(name: str, tmp_path: Path, temporary: Path) -> None:
    """Given a home whose path is long, or means something to shells and URLs, then its server answers and goes."""
    folder = tmp_path / name / "postgres"
    use = Use(folder, temporary)
    assert answer(use.url) == 42
    assert answer(use.url, "select lower('ÜBER')") == "über"  # on a machine without that locale, too
    server = server_of(folder)
    use.stop()
    assert server is not None
    assert is_gone(server)
    assert list(temporary.iterdir()) == []
    assert {path.name for path in folder.parent.iterdir()} == {"postgres", "postgres.lock", "postgres.users"}


def test_what_was_written_is_there_the_next_time(tmp_path: Path, temporary: Path) -> None:
    """Given a server that stopped, when its folder is used again, also at another path, then its data are there."""
    use = Use(tmp_path / "home" / "postgres", temporary)
    engine = sa.create_engine(use.url)
    with engine.begin() as connection:
        connection.execute(sa.text("create table kept as select 7 as n"))
    engine.dispose()
    use.stop()
    (tmp_path / "home").rename(tmp_path / LONG)
    again = Use(tmp_path / LONG / "postgres", temporary)
    assert answer(again.url, "select n from kept") == 7
    again.stop()


def test_the_last_user_stops_the_server(tmp_path: Path, temporary: Path) -> None:
    """Given three processes on one server, one of them killed, then it stops with the last of the others."""
    folder = tmp_path / "postgres"
    first, second, third = (Use(folder, temporary) for _ in range(3))
    server = server_of(folder)
    assert server is not None
    assert first.url == second.url == third.url
    second.kill()
    first.stop()
    assert answer(third.url) == 42
    assert server_of(folder) == server
    third.stop()
    assert is_gone(server)


def test_a_server_whose_users_were_all_killed_is_used_and_stopped_by_the_next(tmp_path: Path, temporary: Path) -> None:
    """Given a server whose only user was killed, then the next process finds it, and stops it at its end."""
    folder = tmp_path / "postgres"
    Use(folder, temporary).kill()
    server = server_of(folder)
    use = Use(folder, temporary)
    assert server_of(folder) == server
    assert server is not None
    use.stop()
    assert is_gone(server)


@pytest.mark.parametrize("name", ["home", LONG])
def test_a_killed_server_comes_back_at_the_same_address(name: str, tmp_path: Path, temporary: Path) -> None:
    """Given a server that was killed with its processes' connections open, when it is asked for, then it runs again."""
    folder = tmp_path / name / "postgres"
    first = Use(folder, temporary)
    server = server_of(folder)
    assert server is not None
    server.send_signal(signal.SIGKILL)
    while not is_gone(server):
        time.sleep(0.01)
    second = Use(folder, temporary)
    assert second.url == first.url
    assert answer(first.url) == 42
    second.stop()
    first.stop()
    assert list(temporary.iterdir()) == []


def test_a_foreign_process_with_the_servers_old_pid_is_no_server(tmp_path: Path, temporary: Path) -> None:
    """Given a `postmaster.pid` of before a restart of the machine, whose PID is another program's now, it starts."""
    folder = tmp_path / "postgres"
    Use(folder, temporary).stop()
    (folder / "postmaster.pid").write_text(f"{os.getpid()}\n{folder}\n1\n5432\n{folder}\n\n1 1\nready\n")
    use = Use(folder, temporary)
    assert answer(use.url) == 42
    use.stop()


def test_a_server_that_was_half_made_is_made_anew(tmp_path: Path, temporary: Path) -> None:
    """Given a process that was killed while it made the data, then the next one begins again."""
    half = tmp_path / ".postgres.new"
    half.mkdir()
    (half / "PG_VERSION").write_text("18\n")
    use = Use(tmp_path / "postgres", temporary)
    assert answer(use.url) == 42
    use.stop()
    assert not half.exists()


def test_nothing_above_the_data_is_opened_to_others(tmp_path: Path, temporary: Path) -> None:
    """Given a folder for its user alone, when a server is made in it, then it stays so, and no user is added."""
    users = pwd.getpwall()
    private = tmp_path / "private"
    private.mkdir(mode=0o700)
    use = Use(private / "home" / "postgres", temporary)
    modes = [stat.S_IMODE(path.stat().st_mode) for path in (private, private / "home", private / "home" / "postgres")]
    assert modes == [0o700] * 3
    assert pwd.getpwall() == users
    use.stop()


@pytest.mark.skipif(not IS_ROOT, reason="only root can be two users")
def test_two_users_of_a_machine_cannot_reach_each_other(tmp_path: Path, temporary: Path) -> None:
    """Given two users with a home each, its path long, with a space and an umlaut, then each has a server of its own.

    Neither may read the other's home or speak to its server, be it by the socket's path.
    """
    open_way(tmp_path)
    uses: dict[int, Use] = {}
    for user in (ALICE, BOB):
        own = tmp_path / str(user)
        own.mkdir(mode=0o755)
        os.chown(own, user, user)
        uses[user] = Use(own / LONG / "postgres", temporary, user)
        assert answer(uses[user].url) == 42
    assert uses[ALICE].url != uses[BOB].url
    for user, other in ((ALICE, BOB), (BOB, ALICE)):
        path = socket_of(uses[other].url)
        with as_user(user):
            with pytest.raises(PermissionError):
                os.listdir(tmp_path / str(other) / LONG)
            with socket.socket(socket.AF_UNIX) as client, pytest.raises(PermissionError):
                client.connect(os.fspath(path))
    for use in uses.values():
        use.stop()
    assert list(temporary.iterdir()) == []


@pytest.mark.skipif(not IS_ROOT, reason="only root can be two users")
@pytest.mark.parametrize("first", [True, False])
def test_root_in_a_users_home_takes_nothing_from_them(first: bool, tmp_path: Path, temporary: Path) -> None:
    """Given a user's home, its path long, when root uses its server, first or before them, then both can, then they."""
    open_way(tmp_path)
    own = tmp_path / "own"
    own.mkdir()
    os.chown(own, ALICE, ALICE)
    folder = own / LONG / "postgres"
    Use(folder, temporary, ALICE).stop()
    if first:
        for lock in folder.parent.glob("postgres.*"):  # a home of an earlier version has none
            lock.unlink()
    root = Use(folder, temporary)
    server = server_of(folder)
    assert server is not None
    assert "CapEff:\t0000000000000000" in Path(f"/proc/{server.pid}/status").read_text()
    user = Use(folder, temporary, ALICE)
    assert answer(root.url) == answer(user.url) == 42
    root.stop()
    assert answer(user.url) == 42
    user.stop()
    assert {path.owner() for path in folder.rglob("*")} == {pwd.getpwuid(ALICE).pw_name}
    assert list(temporary.iterdir()) == []


@pytest.mark.skipif(not IS_ROOT, reason="only root can")
def test_a_copy_that_root_made_serves(tmp_path: Path, temporary: Path) -> None:
    """Given data that belong to root, as a restored backup may, then the server runs on them."""
    folder = tmp_path / "postgres"
    Use(folder, temporary).stop()
    for path in (folder, *folder.rglob("*")):
        os.chown(path, 0, 0)
    use = Use(folder, temporary)
    assert answer(use.url) == 42
    use.stop()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda home: home.mkdir() or (home / "postgres.lock").symlink_to("/etc/hostname"), "symbolic links"),
        (lambda home: (home / "postgres").mkdir(parents=True) or (home / "postgres" / "x").touch(), "not empty"),
        (lambda home: (home / "postgres").mkdir(parents=True) or version(home, "9.6"), "PostgreSQL 9.6"),
        (lambda home: (home / "postgres").mkdir(parents=True) or version(home, "18"), "did not start"),
    ],
)
def test_a_server_that_cannot_run_is_one_sentence(spoil: Callable[[Path], object], said: str, tmp_path: Path) -> None:
    """Given a home that holds something else, or damaged data, then the error says which and what."""
    spoil(tmp_path / "home")
    with pytest.raises(DatabaseUnavailable, match=said) as raised:
        embedded_postgres.serve(tmp_path / "home" / "postgres")
    assert str(tmp_path / "home" / "postgres") in str(raised.value) or "PostgreSQL 9.6" in str(raised.value)


def test_a_server_below_a_home_that_is_none_is_one_sentence(tmp_path: Path) -> None:
    """Given a home that is a file, then the error says that the home is what is wrong."""
    (tmp_path / "home").write_text("a file")
    with pytest.raises(FolderUnusable, match=f"folder {tmp_path / 'home'} cannot be made: File exists"):
        embedded_postgres.serve(tmp_path / "home" / "postgres")


def version(home: Path, name: str) -> None:
    (home / "postgres" / "PG_VERSION").write_text(f"{name}\n")


def open_way(folder: Path) -> None:
    """Let every user pass through to the folder, which pytest makes for its own user alone."""
    for closed in (each for each in (folder, *folder.parents) if not each.stat().st_mode & 0o001):
        closed.chmod(closed.stat().st_mode | 0o011)
