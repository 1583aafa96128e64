"""Whether a file is open for writing, asked of the real kernel; and that asking harms neither side."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sensors import folder_leases
from sensors.folder_leases import stat_if_closed

if sys.platform != "linux":
    pytest.skip("leases are Linux'", allow_module_level=True)

HOLD = """
    import fcntl, os, signal, sys
    from concurrent.futures import ThreadPoolExecutor
    from sensors.folder_leases import stat_if_closed

    real = fcntl.fcntl

    def held(descriptor, command, argument=0):
        if command == fcntl.F_SETSIG and "unsafe" in sys.argv:
            return 0
        answer = real(descriptor, command, argument)
        if (command, argument) == (fcntl.F_SETLEASE, fcntl.F_RDLCK):
            print("held", flush=True)
            while real(descriptor, fcntl.F_GETLEASE) == fcntl.F_RDLCK:  # until somebody wants to write
                pass
        return answer

    fcntl.fcntl = held
    with ThreadPoolExecutor(1) as thread:  # as the sensors of Dagster's daemon
        print(thread.submit(stat_if_closed, sys.argv[1]).result() is not None)
"""
ASK = """
    import sys
    from sensors.folder_leases import stat_if_closed

    answers = {True: 0, False: 0}
    print("asking", flush=True)
    while sum(answers.values()) < 20_000 or min(answers.values()) < 100:
        answers[stat_if_closed(sys.argv[1]) is not None] += 1
"""
WRITE = """
    import os, sys

    descriptor = os.open(sys.argv[1], os.O_WRONLY)
    print("open", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file with content on a file system that gives leases."""
    kind = subprocess.run(["stat", "-f", "-c", "%t", tmp_path], capture_output=True, text=True, check=True).stdout
    if int(kind, 16) not in folder_leases._LOCAL:
        pytest.skip(f"temporary files are on a file system of type {kind.strip()}")
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"x" * 8192)
    return path


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Runs Python source in a process of its own, and returns once it has written a line."""
    started = []

    def run(source: str, *arguments: str | Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", textwrap.dedent(source), *map(str, arguments)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline()
        return process

    yield run
    for process in started:
        process.kill()
        process.communicate()


def closed(path: Path) -> bool:
    return stat_if_closed(str(path)) is not None


def test_a_writer_in_another_process_is_seen_until_it_closes(
    file: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    """Given a process that has the file open for writing, then it is closed when that process has ended."""
    assert closed(file)
    writer = start(WRITE, file)
    assert not closed(file)
    writer.communicate("")
    assert stat_if_closed(str(file)) == os.stat(file)


def test_a_writable_mapping_counts_although_its_descriptor_is_closed(file: Path) -> None:
    """Given a shared mapping of a file already closed, then the file is closed when the mapping is gone."""
    with open(file, "r+b") as opened:
        mapping = mmap.mmap(opened.fileno(), 0)
    assert not closed(file)
    mapping.close()
    assert closed(file)


def test_writers_by_other_names_count_and_readers_do_not(file: Path) -> None:
    """Given a link to a file and a hard link of it, when it is written by another name, then all names say so."""
    link, twin = file.with_name("link.mp4"), file.with_name("twin.mp4")
    link.symlink_to(file)
    twin.hardlink_to(file)
    with open(file, "rb") as reader, mmap.mmap(reader.fileno(), 0, access=mmap.ACCESS_READ):
        assert [closed(path) for path in (file, link, twin)] == [True] * 3
        with open(twin, "ab"):
            assert [closed(path) for path in (file, link, twin)] == [False] * 3


@pytest.mark.parametrize("number", [errno.EACCES, errno.EINVAL, errno.ENOLCK, errno.EAGAIN])
@pytest.mark.parametrize("command", [fcntl.F_SETSIG, fcntl.F_SETLEASE])
def test_a_refused_lease_is_no_answer(file: Path, monkeypatch: pytest.MonkeyPatch, command: int, number: int) -> None:
    """Given a kernel that refuses (another's file, no leases there), then it cannot be told, and nothing stays open."""

    def refuse(descriptor: int, asked: int, argument: int) -> int:
        if asked == command:
            raise OSError(number, os.strerror(number))
        return 0

    monkeypatch.setattr(folder_leases.fcntl, "fcntl", refuse)
    before = os.listdir("/proc/self/fd")
    assert not closed(file)
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_what_is_not_a_local_file_cannot_be_told(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given no file, no regular one, one of the kernel's or of an unknown file system, then it is never opened or no
    answer comes of it."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    assert [closed(path) for path in (tmp_path / "none", pipe, tmp_path, Path("/proc/self/status"))] == [False] * 4
    monkeypatch.setattr(folder_leases, "_LOCAL", {})
    monkeypatch.setattr(os, "open", lambda *_: pytest.fail("opened"))
    assert not closed(file)


def test_who_opens_a_file_for_writing_meanwhile_waits_and_the_asking_process_lives(
    file: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    """Given a lease that is held, when another process opens the file for writing, then it does not end the holder."""
    holder = start(HOLD, file)
    file.write_bytes(b"written")
    assert holder.communicate()[0] == "True\n"
    assert holder.returncode == 0
    # Without its choice of a signal the same holder is ended.
    holder = start(HOLD, file, "unsafe")
    file.write_bytes(b"written")
    holder.communicate()
    assert holder.returncode == -signal.SIGIO


def test_asking_again_and_again_hinders_no_writer(file: Path, start: Callable[..., subprocess.Popen[str]]) -> None:
    """Given a process that asks without a pause, when a file is opened for writing all the time, then both go on."""
    asking = start(ASK, file)
    count = 0
    while asking.poll() is None:
        with open(file, "ab") as writer:
            writer.write(b".")
        count += 1
    assert asking.returncode == 0
    assert file.stat().st_size == 8192 + count
