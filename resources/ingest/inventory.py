"""The inventory of S3 prefixes: listings page by page against the registry, to find what events have missed.

A pass over a prefix goes on where the last tick ended, one page back. A page is registered, and then the live URIs in
its stretch of the alphabet that it did not hold are asked for one by one: a listing alone does not prove that an
object is gone (SeaweedFS lists folder by folder, not in the order of the bytes). Between two passes each tick looks at
the last page alone, where keys that begin with a date or a number arrive.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import pairwise

from pydantic import BaseModel, ConfigDict

from resources.errors import MediaError
from resources.files.object_store import SCHEME, Page, is_gone, list_page, split
from resources.ingest.discovery import upload_of
from resources.ingest.registry import Registry
from resources.ingest.uploads import Removal
from resources.settings import S3, Ingestion

SOURCE = "s3_inventory"
FIRST_IMPORT_PRIORITY = 5
LOOKS_AT_ONCE = 8
LOOKS_PER_ROUND = 100
CANDIDATES = 2_000
SETTLED = ("live", "purged")

Announce = Callable[[list[str]], None]
"""Told the media IDs that are about to be registered for the first time."""


class PrefixState(BaseModel):
    """How far the listing of one prefix is. Keys are where it goes on; both may be gone by then.

    In a pass, `after` is the key behind which the next page starts, `back` the one behind which the last page started,
    and `reached` how far, in the order of the bytes, removals have been looked for. Between passes `back` stands before
    the last page. `ordered` says whether the store has listed in the order of the bytes so far.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    after: str | None = None
    back: str = ""
    reached: str = ""
    served_at: datetime | None = None
    finished_at: datetime | None = None
    passes: int = 0
    ordered: bool = True

    def is_due(self, now: datetime, every_s: float) -> bool:
        """Whether a pass is under way, or a new one is to start."""
        if self.after is not None or self.finished_at is None:
            return True
        return now - self.finished_at >= timedelta(seconds=every_s)


class Cursor(BaseModel):
    """What is kept between ticks: the state of every prefix, by its URL."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prefixes: dict[str, PrefixState] = {}

    @classmethod
    def parse(cls, text: str | None) -> Cursor:
        """The cursor of the last tick. One that cannot be read means starting over, which is harmless."""
        try:
            return cls.model_validate_json(text) if text else cls()
        except ValueError:
            return cls()


@dataclass(slots=True)
class Report:
    """What one tick did with one prefix.

    `missed` uploads are new although a listing had been complete before: their events were lost, or are on their way.
    `removed` objects are gone without a word. `looks` are objects asked for one by one.
    `between` says that no pass was due and the last page alone was looked at.
    """

    prefix: str
    pages: int = 0
    keys: int = 0
    new: int = 0
    missed: int = 0
    removed: int = 0
    looks: int = 0
    finished: bool = False
    between: bool = False
    error: MediaError | None = None


@dataclass
class Inventory:
    """Lists prefixes within a budget of wall time. One tick at a time."""

    registry: Registry
    s3: S3
    settings: Ingestion
    announce: Announce
    clock: Callable[[], float] = field(default=time.monotonic)

    def tick(self, cursor: Cursor) -> tuple[Cursor, list[Report]]:
        """List until nothing is due or the budget is spent; the prefix that waited longest goes first.

        An error of the store ends the work on its prefix for this tick and stands in its report.
        """
        deadline = self.clock() + self.settings.tick_budget_s
        prefixes = list(dict.fromkeys(self.settings.prefixes))
        states = {prefix: cursor.prefixes.get(prefix, PrefixState()) for prefix in prefixes}
        never = datetime.min.replace(tzinfo=UTC)
        reports: list[Report] = []
        for prefix in sorted(prefixes, key=lambda each: states[each].served_at or never):
            if self.clock() >= deadline:
                break
            run = _Run(self, prefix, states[prefix], deadline)
            try:
                run.go()
            except MediaError as error:
                run.report.error = error
            states[prefix] = run.state.model_copy(update={"served_at": datetime.now(UTC)})
            reports.append(run.report)
        return Cursor(prefixes=states), reports


class _Run:
    """One tick's work on one prefix; `state` is always what the next tick may start from."""

    def __init__(self, inventory: Inventory, prefix: str, state: PrefixState, deadline: float) -> None:
        self.inventory = inventory
        self.bucket, self.prefix = split(prefix)
        self.state = state
        self.report = Report(prefix)
        self._deadline = deadline
        self._patience_s = inventory.settings.tick_budget_s / 2

    def go(self) -> None:
        if self.state.is_due(datetime.now(UTC), self.inventory.settings.inventory_every_s):
            self._pass()
        else:
            self._tail()

    def _pass(self) -> None:
        """Pages of a full listing, from the page before the one where the last tick ended."""
        again = self.state.after is not None
        start = self.state.back if again else ""
        while True:
            page = self._list(start)
            self._note(ordered=self.state.ordered and _in_order(page, start))
            self._register(page)
            high = max(self.state.reached, page.last or "") if page.more else None
            if not self._find_removed(page, self.state.reached, high, remember=True):
                return
            if not page.more:
                self.report.finished = True
                done = {"passes": self.state.passes + 1, "ordered": self.state.ordered}
                self.state = PrefixState(back=start, finished_at=datetime.now(UTC), **done)
                return
            assert page.last is not None
            self._note(after=page.last, back=start, reached=high)
            start = page.last
            # The page before does not count, or a store that manages one page per tick would never get on.
            if self._spent() and not again:
                return
            again = False

    def _tail(self) -> None:
        """The last page of the listing once more, and what has come behind it."""
        self.report.between = True
        start = self.state.back
        while True:
            page = self._list(start)
            self._register(page)
            # Without order, keys behind the first of this page may stand on any page.
            if self.state.ordered and not self._find_removed(page, start, page.last if page.more else None):
                return
            self._note(back=start)
            if not page.more or self._spent():
                return
            assert page.last is not None
            start = page.last

    def _list(self, start: str) -> Page:
        settings = self.inventory.settings
        s3, size = self.inventory.s3, settings.inventory_page
        page = list_page(s3, self.bucket, self.prefix, start, size, self._patience_s)
        self.report.pages += 1
        self.report.keys += len(page.objects)
        return page

    def _register(self, page: Page) -> None:
        uploads = [upload_of(self.bucket, found, page.observed_at, SOURCE) for found in page.objects]
        if not uploads:
            return
        registry, first = self.inventory.registry, self.state.passes == 0
        ids = [upload.media_id for upload in uploads]
        known = registry.known(ids)
        # Partitions first: if this process dies in between, the next listing finds the items unregistered again.
        if unknown := [media_id for media_id in ids if media_id not in known]:
            self.inventory.announce(unknown)
        unsettled = [upload for upload in uploads if known.get(upload.media_id) not in SETTLED]
        registered = registry.register(unsettled, priority=FIRST_IMPORT_PRIORITY if first else 0)
        self.report.new += len(registered.new)
        self.report.missed += 0 if first else len(registered.new)

    def _find_removed(self, page: Page, after: str, upto: str | None, remember: bool = False) -> bool:
        """Register what is gone between two keys; False when the budget ended before, how far it got `remember`ed."""
        registry = self.inventory.registry
        root = f"{SCHEME}{self.bucket}/"
        listed = {f"{root}{found.key}" for found in page.objects}
        low = f"{root}{after}" if after else ""
        high = None if upto is None else f"{root}{upto}"
        while True:
            candidates = registry.live_between(f"{root}{self.prefix}", low, high, CANDIDATES)
            unlisted = [uri for uri in candidates if uri not in listed]
            for start in range(0, len(unlisted), LOOKS_PER_ROUND):
                chunk = unlisted[start : start + LOOKS_PER_ROUND]
                self._look(chunk, page.observed_at)
                if remember:
                    self._note(reached=max(self.state.reached, split(chunk[-1])[1]))
                if self._spent():
                    return False
            if len(candidates) < CANDIDATES:
                return True
            low = candidates[-1]

    def _look(self, uris: Sequence[str], observed_at: datetime) -> None:
        """Ask for each object and register the removal of those that are gone.

        It dates from the listing: whatever an event tells of a later moment wins.
        """
        inventory = self.inventory
        with ThreadPoolExecutor(LOOKS_AT_ONCE) as pool:
            answers = list(pool.map(lambda uri: is_gone(inventory.s3, uri, self._patience_s), uris))
        self.report.looks += len(uris)
        gone = [Removal(uri, observed_at) for uri, is_missing in zip(uris, answers, strict=True) if is_missing]
        self.report.removed += len(inventory.registry.register((), gone).removed)

    def _note(self, **changes: object) -> None:
        self.state = self.state.model_copy(update=changes)

    def _spent(self) -> bool:
        return self.inventory.clock() >= self._deadline


def _in_order(page: Page, start: str) -> bool:
    keys = [start, *(found.key for found in page.objects)]
    return all(one < other for one, other in pairwise(keys))
