"""Progress of `run` on stderr: one line for the whole work, drawn over on a terminal, every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich.console import Console

if TYPE_CHECKING:
    from media_assets.engine.events import Event


_EVERY_S = 5.0
_EVERY_LIVE_S = 0.5
_BAR = 24  # characters
_SURE_S = 5.0  # seconds of work after which the time left is told
Task = tuple[str, str]
"""A media ID and an asset."""
Expected = Mapping[Task, tuple[str, float]]
"""Of every task to be made, the kind of its media and the seconds that it is expected to take."""
_DOUBT_S = 1.0  # so much work of an asset has to be seen before it outweighs what was expected


class Account:
    """What of the work is done and what is left, in seconds of work.

    What is reused is no work. How long an asset takes, for media of a kind, corrects what is expected of the rest.
    """

    def __init__(self, expected: Expected) -> None:
        self._left = dict(expected)
        self._open = Counter(media_id for media_id, _ in expected)
        self._left_of: defaultdict[tuple[str, str], float] = defaultdict(float)  # by asset and kind, as the next two
        for (_, asset), (kind, seconds) in expected.items():
            self._left_of[asset, kind] += seconds
        self._expected_of_done: defaultdict[tuple[str, str], float] = defaultdict(float)
        self._took_of: defaultdict[tuple[str, str], float] = defaultdict(float)
        self._took: defaultdict[str, float] = defaultdict(float)
        self._spent: defaultdict[str, float] = defaultdict(float)
        self.items = len(self._open)
        self.items_done = 0
        self.failed: set[str] = set()

    def take(self, event: Event) -> None:
        """Take in what a batch engine says."""
        from media_assets.engine.events import OutcomeCommitted, WorkDone

        if isinstance(event, WorkDone):
            self._spent[event.asset] += event.seconds
        elif isinstance(event, OutcomeCommitted):
            outcome = event.result.outcome
            self._settle(str(event.result.how), outcome.media_id, outcome.asset, outcome.seconds)
            if not outcome.status.done and outcome.error_class not in (None, "upstream_failed"):
                self.failed.add(outcome.media_id)

    def _settle(self, how: str, media_id: str, asset: str, seconds: float | None) -> None:
        if (media_id, asset) not in self._left:
            return
        kind, expected = self._left.pop((media_id, asset))
        self._left_of[asset, kind] -= expected
        self._open[media_id] -= 1
        self.items_done += not self._open[media_id]
        if how == "computed":
            self._expected_of_done[asset, kind] += expected
            self._took_of[asset, kind] += seconds or 0.0
            self._took[asset] += seconds or 0.0

    @property
    def spent_s(self) -> float:
        """Seconds of work so far."""
        return sum(self._spent.values())

    @property
    def left_s(self) -> float:
        """Seconds of work that are left."""
        left: defaultdict[str, float] = defaultdict(float)
        for (asset, kind), expected in self._left_of.items():
            seen = self._expected_of_done[asset, kind] + _DOUBT_S
            left[asset] += expected * (self._took_of[asset, kind] + _DOUBT_S) / seen
        return sum(max(seconds - self._begun_s(asset), 0.1 * seconds) for asset, seconds in left.items())

    def _begun_s(self, asset: str) -> float:
        """Seconds of work on items in flight."""
        return self._spent[asset] - self._took[asset]

    @property
    def share(self) -> float:
        """Share of the work that is done, 0 to 1."""
        if not self._left:
            return 1.0
        return self.spent_s / (self.spent_s + self.left_s) if self.spent_s else 0.0


class Reporter:
    """Listens to one batch after another, and draws the progress of the whole work."""

    def __init__(self, console: Console, expected: Expected) -> None:
        self._console = console
        self._live = console.is_terminal
        self._started: float | None = None
        self._last = 0.0
        self._account = Account(expected)
        self._running = ""
        self._drawn = False
        self._share = 0.0
        self.facts: defaultdict[str, Counter[str]] = defaultdict(Counter)

    def __call__(self, event: Event) -> None:
        """Draw when it is time to."""
        from media_assets.engine.events import InferenceBegun, OutcomeCommitted

        now = time.monotonic()
        self._started = self._started or now
        self._account.take(event)
        if isinstance(event, InferenceBegun):
            self._running = f"loading the models of {event.asset}" if event.loads else event.asset
        elif isinstance(event, OutcomeCommitted):
            counts = {name: value for name, value in event.result.facts.items() if isinstance(value, int)}
            self.facts[event.result.asset].update(counts)
        if now - self._last >= (_EVERY_LIVE_S if self._live else _EVERY_S):
            self._last = now
            self._draw(self._running)

    def clear(self) -> None:
        """Make room for other output."""
        if self._live and self._drawn:
            self._write("\r\x1b[2K")
            self._drawn = False

    def close(self) -> None:
        """Draw the end, if anything was done."""
        if self._started is not None:
            self._draw("")
            if self._live:
                self._write("\n")
            self._started = None

    def _draw(self, running: str) -> None:
        assert self._started is not None
        self._share = max(self._share, self._account.share)  # what is expected may grow, a bar that shrinks alarms
        parts = line(self._account, self._share, running, time.monotonic() - self._started)
        if not self._live:
            print(" · ".join(parts), file=sys.stderr, flush=True)
            return
        filled = round(self._share * _BAR)
        text = " · ".join([f"{'█' * filled}{'░' * (_BAR - filled)} {parts[0]}", *parts[1:]])
        self._write("\r\x1b[2K" + text[: self._console.width - 1])
        self._drawn = True

    def _write(self, text: str) -> None:
        self._console.file.write(text)
        self._console.file.flush()


def line(account: Account, share: float, running: str, elapsed_s: float) -> list[str]:
    """The parts of one line: share of the work and items done, what runs, time left, items that failed."""
    return [
        f"{share:.0%}",
        f"{account.items_done}/{account.items} items",
        *([running] if running else []),
        *([_left(account, elapsed_s)] if account.items_done < account.items else [f"{elapsed_s:.0f} s"]),
        *([f"{len(account.failed)} failed"] if account.failed else []),
    ]


def _left(account: Account, elapsed_s: float) -> str:
    spent_s = account.spent_s
    if spent_s < _SURE_S:
        return "time left not known yet"
    seconds = account.left_s * elapsed_s / spent_s
    return f"about {seconds:.0f} s left" if seconds < 90 else f"about {seconds / 60:.0f} min left"
