"""Signs of life of long calls in background threads: by them, whoever waits tells a slow call from one that hangs."""

from __future__ import annotations

import threading
import time


class Pulse:
    """When a call was heard of last, by the monotonic clock, seconds."""

    __slots__ = ("at",)

    def __init__(self) -> None:
        self.at = time.monotonic()


_thread = threading.local()


def begin() -> Pulse:
    """A new call begins in this thread: its pulse."""
    _thread.pulse = Pulse()
    return _thread.pulse  # type: ignore[no-any-return]


def pulse() -> Pulse | None:
    """The pulse of the call in this thread; None where nobody listens."""
    return getattr(_thread, "pulse", None)


def beat() -> None:
    """The call in this thread is getting on."""
    if (mine := pulse()) is not None:
        mine.at = time.monotonic()


def follow(other: Pulse | None) -> None:
    """The call in this thread waits for another one and is alive as long as that is."""
    if other is not None and (mine := pulse()) is not None:
        mine.at = max(mine.at, other.at)
