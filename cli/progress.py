"""Draws progress on stderr: live bars on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections import Counter
from typing import TYPE_CHECKING

from rich.console import Console

if TYPE_CHECKING:
    from media_assets.engine import Progress

_EVERY_S = 5.0
_EVERY_LIVE_S = 0.5


class Reporter:
    """Receives the progress of one batch and says items, stage, rate, failures and time left."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = console.is_terminal
        self._started = time.monotonic()
        self._last = 0.0
        self._finished = False
        self.facts: dict[str, Counter[str]] = {}

    def __call__(self, group: str, progress: Progress) -> None:
        """Draw when it is time to."""
        self.facts = progress.facts
        now = time.monotonic()
        finished = progress.items_done == progress.items
        if self._finished or (not finished and now - self._last < (_EVERY_LIVE_S if self._live else _EVERY_S)):
            return
        self._last, self._finished = now, finished
        text = line(group, progress, now - self._started)
        if self._live:
            self._console.file.write("\r\x1b[2K" + text + ("\n" if finished else ""))
            self._console.file.flush()
        else:
            print(text, file=sys.stderr, flush=True)


def line(group: str, progress: Progress, elapsed_s: float) -> str:
    """One line: items and stages done, the stage that is running, stages per second, time left, failures."""
    rate = progress.tasks_done / elapsed_s if elapsed_s > 0 else 0.0
    left = f"{(progress.tasks - progress.tasks_done) / rate:.0f} s left" if rate else "estimating"
    failed = sum(count for (_, status), count in progress.settled.items() if status in ("retryable", "quarantined"))
    inputs = ", ".join(f"{name} {count}" for name, count in progress.units.items())
    parts = [
        f"{group}: {progress.items_done}/{progress.items} items",
        f"{progress.tasks_done}/{progress.tasks} outcomes",
        *([progress.running] if progress.running else []),
        f"{rate:.2f}/s",
        left,
        f"{failed} failed",
        *([f"model inputs: {inputs}"] if inputs else []),
    ]
    return " · ".join(parts)
