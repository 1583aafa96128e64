"""The planner: packs unsettled uploads into batches per group, from records alone, and says why.

One tick: free the batches whose runs ended, judge the uploads at the head of the backlog, pack what is due,
and stop at the limit of batches in flight per group; what is left stays in the registry. It reads neither
Dagster's partitions nor its run queue. `Planner.tick` decides and records; launching is the caller's.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from jobs.batch_sizes import express_s, most_items
from jobs.costs import SAMPLE, Costs, kind_of
from jobs.express import EXPRESS, pools
from media_assets.engine.contract import MediaItem, Stage
from media_assets.engine.planning import Judgement, Need, judge
from media_assets.engine.versions import code_version
from media_assets.orchestration.grouping import groups as groups_of
from resources.library import Library
from resources.records.backlog import Backlog, Waiting
from resources.records.outcome import Outcome

LONG = "long"
CAREFUL = "careful"
MIXED = "mixed"
COST_MAX_AGE_S = 120.0
BUSY_DELAY_S = 30.0
LOOK_ON_S = 3.0
_PAGE = 1000


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch to launch: media IDs for one group. `id` is None in a dry run; `seconds` is the expected work."""

    id: int | None
    group: str
    lane: str
    keys: tuple[str, ...]
    seconds: float
    reason: str

    @property
    def is_careful(self) -> bool:
        """Whether its items are suspected of killing or hanging the process and go one at a time."""
        return self.lane == CAREFUL


@dataclass(slots=True)
class Tick:
    """What one tick decided: batches to launch, and a sentence for everything that was and was not."""

    batches: list[Batch] = field(default_factory=list)
    explanations: list[str] = field(default_factory=list)
    settled: int = 0
    looked_at: int = 0


@dataclass(frozen=True, slots=True)
class _Candidate:
    upload: Waiting
    need: Need
    seconds: float
    seconds_to_end: float
    is_guess: bool
    lane: str
    waited_s: float


def plan_digest(stages: Mapping[str, Sequence[Stage[Any, Any]]]) -> str:
    """Digest of all code and models: what being settled refers to."""
    versions = [f"{stage.name}:{code_version(stage)}" for members in stages.values() for stage in members]
    return hashlib.blake2b("\n".join(versions).encode(), digest_size=12).hexdigest()


class Planner:
    """Plans for one library: all groups, or the `groups` named."""

    def __init__(self, library: Library, groups: Sequence[str] | None = None) -> None:
        self._library = library
        self._settings = library.settings.planner
        self._most_items = most_items(library.settings)
        self._backlog: Backlog = library.backlog
        self.stages = {
            group.name: group.load(library.settings, library.models)
            for group in groups_of(library.settings)
            if groups is None or group.name in groups
        }
        self._takes_all = groups is None
        self.plan = plan_digest(self.stages)
        self._inputs = sorted({stage.name for members in self.stages.values() for stage in members})
        self._costs: tuple[float, Costs] | None = None

    def tick(self, now: datetime | None = None) -> Tick:
        """Decide and record. The batches returned are committed as `requested`."""
        moment = now or datetime.now(UTC)
        tick = Tick()
        in_flight = Counter(batch.group for batch in self._backlog.open_batches())
        room = {name: self._settings.max_in_flight - in_flight[name] for name in self.stages}
        queues = self._judged(tick, moment, self._settings.lookahead, writes=True)
        started = time.monotonic()
        # Where a whole look found nothing to do, the next stretch of the backlog may hold something.
        while not any(queues.values()) and tick.looked_at and time.monotonic() - started < LOOK_ON_S:
            looked_at = tick.looked_at
            queues = self._judged(tick, moment, self._settings.lookahead, writes=True)
            if tick.looked_at == looked_at:
                break
        if not self._express(tick, queues, in_flight):
            for group, candidates in queues.items():
                self._launch(tick, group, candidates, room[group], in_flight[group] + in_flight[EXPRESS])
        depth = self._backlog.depth(self.plan)
        tick.explanations.append(
            f"backlog: {depth.ready} uploads ready, {depth.waiting} waiting for a retry,"
            f" {depth.in_batches} in {sum(in_flight.values()) + len(tick.batches)} batches;"
            f" looked at {tick.looked_at}, {tick.settled} of them had nothing left to do"
        )
        self._backlog.note(tick.explanations)
        return tick

    def dry_run(self, limit: int) -> Tick:
        """What would be launched for the first `limit` uploads, limits in flight aside; writes nothing."""
        tick = Tick()
        for group, candidates in self._judged(tick, datetime.now(UTC), limit, writes=False).items():
            for lane, members in self._lanes(candidates):
                for chosen in self._packed(members):
                    tick.batches.append(_planned(group, lane, chosen))
        return tick

    # -- judging ------------------------------------------------------------------------------------------

    def _judged(self, tick: Tick, now: datetime, limit: int, writes: bool) -> dict[str, list[_Candidate]]:
        """Candidates by group, in order of the backlog; what is settled or must wait is recorded as such."""
        queues: dict[str, list[_Candidate]] = {name: [] for name in self.stages}
        settled: list[str] = []
        due: dict[str, datetime] = {}
        costs = self._known_costs()
        read_at = self._backlog.now()
        uploads = self._backlog.waiting(self.plan, limit)
        dead = self._dead_runs()
        for start in range(0, len(uploads), _PAGE):
            page = uploads[start : start + _PAGE]
            records = self._library.outcomes.load([upload.media_id for upload in page], self._inputs)
            for upload in page:
                group, judgement = self._group_of(upload, records, now)
                if group is None:
                    settled.append(upload.media_id)
                elif judgement.need is Need.RUNNING and not all(dead(run) for run in judgement.runs):
                    due[upload.media_id] = now + timedelta(seconds=BUSY_DELAY_S)
                elif judgement.need is Need.WAITING and judgement.due_at is not None:
                    due[upload.media_id] = judgement.due_at
                else:
                    queues[group].append(self._candidate(upload, group, judgement, costs, now))
        if writes:
            self._backlog.settle(settled, self.plan, read_at)
            self._backlog.defer(due)
        tick.looked_at += len(uploads)
        tick.settled += len(settled)
        return queues

    def _group_of(
        self, upload: Waiting, records: Mapping[tuple[str, str], Outcome], now: datetime
    ) -> tuple[str | None, Judgement]:
        """The first group with something left for the upload; later groups wait until it is through."""
        item = MediaItem(upload.media_id, upload.uri, upload.etag)
        for name, stages in self.stages.items():
            judgement = judge(item, stages, records, now)
            if judgement.need is not Need.NOTHING:
                return name, judgement
        return None, Judgement(Need.NOTHING)

    def _dead_runs(self) -> Callable[[str], bool]:
        """Whether a run holds no lease any more; asked once per run."""
        answers: dict[str, bool] = {}

        def is_dead(run_id: str) -> bool:
            if run_id not in answers:
                answers[run_id] = not self._library.outcomes.alive([run_id])
            return answers[run_id]

        return is_dead

    def _candidate(self, upload: Waiting, group: str, judgement: Judgement, costs: Costs, now: datetime) -> _Candidate:
        names = list(self.stages)
        following = names[names.index(group) :]
        (seconds, is_guess), *later = [self._expected(costs, name, upload) for name in following]
        since = max(upload.discovered_at, upload.due_at or upload.discovered_at)
        if judgement.need is Need.RUNNING or judgement.hung:
            lane = CAREFUL
        else:
            lane = LONG if seconds >= self._settings.long_s else kind_of(upload.uri)
        whole = seconds + sum(more for more, _ in later)
        return _Candidate(upload, judgement.need, seconds, whole, is_guess, lane, (now - since).total_seconds())

    def _expected(self, costs: Costs, group: str, upload: Waiting) -> tuple[float, bool]:
        return costs.seconds([stage.name for stage in self.stages[group]], upload.uri, upload.bytes)

    def _known_costs(self) -> Costs:
        if self._costs is None or time.monotonic() - self._costs[0] > COST_MAX_AGE_S:
            self._costs = (time.monotonic(), Costs(self._backlog.past_work(SAMPLE)))
        return self._costs[1]

    # -- packing ------------------------------------------------------------------------------------------

    def _express(self, tick: Tick, queues: Mapping[str, Sequence[_Candidate]], in_flight: Mapping[str, int]) -> bool:
        """Launch all there is as one batch through all groups, where nothing is in flight and it is little."""
        candidates = [candidate for members in queues.values() for candidate in members]
        if (
            not self._takes_all
            or not candidates
            or any(in_flight.values())
            or any(candidate.lane == CAREFUL for candidate in candidates)
            or len(candidates) > self._most_items
            or sum(candidate.seconds_to_end for candidate in candidates) > express_s(self._library.settings)
        ):
            return False
        if len(held := pools(self._library.settings)) > 1:
            tick.explanations.append(f"{EXPRESS}: not taken, for the groups have several pools: {', '.join(held)}")
            return False
        batch = self._create(EXPRESS, EXPRESS, [replace(c, seconds=c.seconds_to_end) for c in candidates])
        if batch is not None:
            tick.batches.append(batch)
            tick.explanations.append(f"{EXPRESS}: batch {batch.id} through all groups, {batch.reason}")
        return True

    def _launch(self, tick: Tick, group: str, candidates: Sequence[_Candidate], room: int, in_flight: int) -> None:
        """Launch what may be; the rest waits for a fuller batch, or for a batch in flight to end."""
        left = len(candidates)
        for lane, members in self._lanes(candidates):
            for chosen in self._packed(members):
                if room <= 0:
                    tick.explanations.append(
                        f"{group}: {left} uploads wait; {self._settings.max_in_flight} batches are in flight, the limit"
                    )
                    return
                if in_flight and not self._is_full(chosen) and not self._is_overdue(chosen):
                    wait = f"at most {self._settings.max_wait_s:g} s"
                    tick.explanations.append(
                        f"{group}: {len(chosen)} {lane} uploads wait {wait} for their batch to fill while {in_flight}"
                        f" {'batch is' if in_flight == 1 else 'batches are'} in flight"
                    )
                    continue
                batch = self._create(group, lane, chosen)
                if batch is None:
                    continue
                room, left = room - 1, left - len(batch.keys)
                tick.batches.append(batch)
                tick.explanations.append(f"{group}: batch {batch.id}, {batch.reason}")

    def _lanes(self, candidates: Sequence[_Candidate]) -> Iterator[tuple[str, list[_Candidate]]]:
        """What may ride together, the lane whose head comes first in the backlog first.

        Suspects go alone and long items among themselves; the others by kind, or all together where one batch
        holds them: a run less is worth more than a pure batch.
        """
        lanes: dict[str, list[_Candidate]] = {}
        for candidate in candidates:
            lanes.setdefault(candidate.lane, []).append(candidate)
        short = [candidate for candidate in candidates if candidate.lane not in (LONG, CAREFUL)]
        fits = len(short) <= self._most_items and (
            sum(candidate.seconds for candidate in short) <= self._settings.batch_seconds
        )
        if fits and len({candidate.lane for candidate in short}) > 1:
            lanes = {name: members for name, members in lanes.items() if name in (LONG, CAREFUL)}
            lanes[MIXED] = short
        yield from lanes.items()

    def _packed(self, members: Sequence[_Candidate]) -> Iterator[list[_Candidate]]:
        """Batches of at most so many items and of about the planner's seconds, in order."""
        chosen: list[_Candidate] = []
        seconds = 0.0
        for candidate in members:
            if chosen and (
                len(chosen) >= self._most_items or seconds + candidate.seconds > self._settings.batch_seconds
            ):
                yield chosen
                chosen, seconds = [], 0.0
            chosen.append(candidate)
            seconds += candidate.seconds
        if chosen:
            yield chosen

    def _is_full(self, chosen: Sequence[_Candidate]) -> bool:
        return len(chosen) >= self._most_items or sum(c.seconds for c in chosen) >= 0.8 * self._settings.batch_seconds

    def _is_overdue(self, chosen: Sequence[_Candidate]) -> bool:
        return max(candidate.waited_s for candidate in chosen) >= self._settings.max_wait_s

    def _create(self, group: str, lane: str, chosen: Sequence[_Candidate]) -> Batch | None:
        planned = _planned(group, lane, chosen)
        batch_id, keys = self._backlog.create(group, lane, planned.keys, planned.seconds, planned.reason)
        if not keys:
            self._backlog.ended(batch_id, "lost", 0.0)
            return None
        return Batch(batch_id, group, lane, tuple(keys), planned.seconds, planned.reason)


def _planned(group: str, lane: str, chosen: Sequence[_Candidate]) -> Batch:
    seconds = sum(candidate.seconds for candidate in chosen)
    why = Counter(_why(candidate) for candidate in chosen)
    told = ", ".join(f"{count} {name}" for name, count in why.most_common())
    noun = "upload" if len(chosen) == 1 else "uploads"
    guess = ", partly a guess" if any(c.is_guess for c in chosen) else ""
    reason = f"{len(chosen)} {lane} {noun} ({told}), about {seconds:.0f} s of work{guess}"
    return Batch(None, group, lane, tuple(c.upload.media_id for c in chosen), seconds, reason)


def _why(candidate: _Candidate) -> str:
    if candidate.upload.was_settled and candidate.need is Need.NEW:
        return "stale"
    if candidate.lane == CAREFUL and candidate.need is Need.RETRY:
        return "to retry after a hung call"
    return _WHY[candidate.need]


_WHY = {
    Need.NEW: "new",
    Need.STALE: "stale",
    Need.RETRY: "to retry",
    Need.RUNNING: "in flight when their run died",
}
