"""What is true of this process as a whole, and what its helper processes are started with."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

from resources import faults

INHERITED = frozenset(
    {"PATH", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "PYTHONDONTWRITEBYTECODE", faults.VARIABLE}
)
SINGLE_THREADED = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
PR_SET_PDEATHSIG, PR_SET_DUMPABLE = 1, 4
SIGKILL = 9
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
