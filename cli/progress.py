"""Draws progress on stderr: live bars on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

from rich.console import Console

_EVERY_S = 5.0
_EVERY_LIVE_S = 0.5


class Reporter:
    """Receives the engine's progress of each group and says items, stage, rate, failures and time left."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = console.is_terminal
        self._started: dict[int, float] = {}
        self._last = 0.0

    def __call__(self, group: str, progress: Any) -> None:
        """Draw when it is time to."""
        now = time.monotonic()
        start = self._started.setdefault(id(progress), now)
        finished = progress.items_done == progress.items
        if not finished and now - self._last < (_EVERY_LIVE_S if self._live else _EVERY_S):
            return
        if finished and self._started[id(progress)] == -1.0:
            return
        self._last = now
        text = line(group, progress, now - start)
        if self._live:
            self._console.file.write("\r\x1b[2K" + text + ("\n" if finished else ""))
            self._console.file.flush()
        else:
            print(text, file=sys.stderr, flush=True)
        if finished:
            self._started[id(progress)] = -1.0


def line(group: str, progress: Any, elapsed_s: float) -> str:
    """One line: items done, the stage that is running, items per second, time left, failures."""
    rate = progress.items_done / elapsed_s if elapsed_s > 0 else 0.0
    left = f"{(progress.items - progress.items_done) / rate:.0f} s left" if rate else "estimating"
    failed = sum(count for (_, status), count in progress.settled.items() if status in ("retryable", "quarantined"))
    units = ", ".join(f"{name} {count}" for name, count in progress.units.items())
    parts = [
        f"{group}: {progress.items_done}/{progress.items} items",
        progress.running or "decoding",
        f"{rate:.2f} items/s",
        left,
    ]
    return " · ".join([*parts, f"{failed} failed"] + ([f"model inputs: {units}"] if units else []))
