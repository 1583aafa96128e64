"""Named fault points: tests and benchmarks make the process die, fail or wait there; otherwise they cost nothing."""

from __future__ import annotations

import os
import signal
import time

VARIABLE = "MEDIA_FAULT"
_hits: dict[str, int] = {}


def fault(point: str) -> None:
    """Act on `MEDIA_FAULT=point:action[:n]` at the n-th passage (default 1).

    Actions: `kill` (SIGKILL to this process), `raise` (RuntimeError), `disk_full` (OSError ENOSPC); `slow` waits n
    milliseconds at every passage.
    """
    wanted = os.environ.get(VARIABLE)
    if not wanted:
        return
    name, action, *count = wanted.split(":")
    if name != point:
        return
    if action == "slow":
        time.sleep(int(count[0]) / 1000)
        return
    _hits[point] = _hits.get(point, 0) + 1
    if _hits[point] != int(count[0] if count else 1):
        return
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if action == "disk_full":
        raise OSError(28, "No space left on device (injected)")
    raise RuntimeError(f"injected at {point}")
