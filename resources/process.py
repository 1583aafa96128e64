"""What is true of this process as a whole, and what its helper processes are started with."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from resources import faults

INHERITED = frozenset(
    {"PATH", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "PYTHONDONTWRITEBYTECODE", faults.VARIABLE}
)
SINGLE_THREADED = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
PR_SET_PDEATHSIG, PR_SET_DUMPABLE = 1, 4
SIGKILL = 9
AUTOGROUP = Path("/proc/self/autogroup")
AUTOGROUP_TRIES, AUTOGROUP_WAIT_S = 10, 0.11
_hung = 0


def helper_environment(root: Path) -> dict[str, str]:
    """Environment of a helper process, which imports from `root` and computes in one thread.

    No more than it needs: what strangers' bytes have taken over must not find passwords.
    """
    kept = {name: value for name, value in os.environ.items() if name in INHERITED}
    return {**kept, **dict.fromkeys(SINGLE_THREADED, "1"), "PYTHONPATH": str(root)}


def die_with(parent: int) -> None:
    """Let this process end with the process `parent`: with the thread that started it, where the kernel is Linux."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, SIGKILL)
    if os.getppid() != parent:
        sys.exit(0)


@cache
def hide_from_others() -> None:
    """Close this process's memory and environment to other processes of its user, such as a decoder taken over.

    No core is dumped and no debugger attaches any more, except root's.
    """
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 0)


def giving_way(niceness: int, work: Callable[[], None]) -> None:
    """Do `work` in a thread whose priority is lower by `niceness`, as that of this process' session is meanwhile.

    With `sched_autogroup` a process of another session competes as its whole session does, whatever its own niceness.
    Where threads have no priority of their own, as outside Linux, the whole process keeps the lower one.
    """
    before = _session_niceness()
    _set_session_niceness(niceness)
    try:
        with ThreadPoolExecutor(1, "giving-way", os.nice, (niceness,)) as low:
            low.submit(work).result()
    finally:
        _set_session_niceness(before)


def _session_niceness() -> int:
    try:
        return int(AUTOGROUP.read_text().split()[-1])  # /autogroup-12 nice 0
    except OSError:  # a system without it
        return 0


def _set_session_niceness(niceness: int) -> None:
    for _ in range(AUTOGROUP_TRIES):
        try:
            AUTOGROUP.write_text(str(niceness))
        except BlockingIOError:  # the kernel takes one such change in a tenth of a second, of all users but root
            time.sleep(AUTOGROUP_WAIT_S)
        except OSError:
            return
        else:
            return


def fate(child: subprocess.Popen[bytes], wait_s: float) -> str:
    """How a helper process that answers no more came to its end, as far as is known within `wait_s` seconds."""
    try:
        code = child.wait(wait_s)
    except subprocess.TimeoutExpired:
        return "closed its pipe"
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def usable_cpus() -> int:
    """Cores this process may use: those it is bound to, at most OMP_NUM_THREADS, by which Ray tells its workers."""
    affinity = getattr(os, "sched_getaffinity", None)  # not every system knows it
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    told = os.environ.get("OMP_NUM_THREADS", "")
    return min(cores, int(told)) if told.isdecimal() and int(told) else cores


def note_hung(calls: int) -> None:
    """Calls that did not answer still run in this process: it should end after its run, not serve another."""
    global _hung
    _hung += calls


def is_tainted() -> bool:
    """Whether a call hangs in this process."""
    return _hung > 0


def may_stay(most_bytes: int) -> bool:
    """Whether this process may serve another run: no call hangs in it, and no more than this is resident (0: any)."""
    import psutil  # type: ignore[import-untyped]

    return not is_tainted() and (not most_bytes or psutil.Process().memory_info().rss <= most_bytes)
