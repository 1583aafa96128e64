"""`media-assets run`: register files, materialize everything pending for them, say what was made."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

from rich.console import Console

from cli.instance import open_instance
from cli.progress import Expected, Reporter
from resources.ingest.discovery import Problem, discover
from resources.ingest.uploads import Upload
from resources.library import Library
from resources.records.outcome import Status

if TYPE_CHECKING:
    from dagster import DagsterInstance

    from media_assets.engine.contract import MediaItem, Stage

SPANNING = ("catalog", "index_shard", "near_duplicates")


@dataclass(slots=True)
class Summary:
    """What one `run` found and did; `--json` prints exactly this."""

    items: int = 0
    registered: int = 0
    problems: list[dict[str, str]] = field(default_factory=list)
    outcomes: dict[str, dict[str, int]] = field(default_factory=dict)
    failures: list[dict[str, Any]] = field(default_factory=list)
    in_flight: list[dict[str, Any]] = field(default_factory=list)
    computed: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    facts: dict[str, dict[str, int]] = field(default_factory=dict)
    seconds_total: float = 0.0
    runs: list[str] = field(default_factory=list)

    def json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


class Work:
    """One invocation: the library, the console, and the Dagster instance once there is something to run."""

    def __init__(self, library: Library, console: Console, select: Sequence[str] = ()) -> None:
        self.library = library
        self.console = console
        self.select = frozenset(select)
        self.summary = Summary()
        self._instance: DagsterInstance | None = None
        self._definitions: Any = None
        self._reporter: Reporter | None = None

    def run(self, paths: Sequence[str]) -> Summary:
        """Register `paths` and process what is pending for them (for every live item when there are none)."""
        start = time.monotonic()
        items = self._items(paths)
        self.summary.items = len(items)
        try:
            self._process(items)
        finally:
            if self._reporter is not None:
                self._reporter.close()
                self.library.listeners.remove(self._reporter)
                self.summary.facts = {asset: dict(counts) for asset, counts in self._reporter.facts.items()}
        self._rebuild()
        self._account(items)
        self.summary.seconds_total = round(time.monotonic() - start, 2)
        return self.summary

    # -- items ----------------------------------------------------------------------------------------

    def _items(self, paths: Sequence[str]) -> list[MediaItem]:
        from media_assets.engine.contract import MediaItem

        ids: list[str] | None = None
        if paths:
            self._say("looking for media files")
            settings = self.library.settings
            found, problems = _split(discover(paths, settings.s3, settings.ingestion.follow_links))
            self.summary.problems = [{"path": _shown(p.path), "reason": p.reason} for p in problems]
            registered = self.library.registry.register(found)
            ids = list(registered.media_ids)
            self.summary.registered = len(registered.new)
        rows = self.library.registry.live(ids)
        rows.sort(key=lambda row: (row["discovered_at"], row["uri"]))
        return [MediaItem(row["media_id"], row["uri"], row["etag"]) for row in rows]

    # -- processing -----------------------------------------------------------------------------------

    def _process(self, items: Sequence[MediaItem]) -> None:
        from jobs.express import WHOLE, WHOLE_JOB, pools
        from media_assets.engine.planning import pending
        from media_assets.orchestration.grouping import groups
        from media_assets.orchestration.partitions import explicit_batch_tags

        settings, models = self.library.settings, self.library.models
        every = {group.name: self._selected(group.load(settings, models)) for group in groups(settings)}
        stages = {name: chosen for name, chosen in every.items() if chosen}
        ids = [item.media_id for item in items]
        self._reporter = Reporter(self.console, self._expected(items, stages))
        self.library.listeners.append(self._reporter)
        # Items that need several groups go through them in one run, unless the settings limit groups apart.
        together = self._needing_several(items, stages) if len(pools(settings)) == 1 else {}
        for names, keys in together.items():
            self._say(f"{', '.join(names)}: {len(keys)} of {len(items)} items to do")
            assets = [stage.name for name in names for stage in stages[name]]
            for batch in self._batches(keys):
                self._execute(WHOLE_JOB, WHOLE, {}, {**batch, "assets": assets})
        for name, chosen in stages.items():
            tried = {key for names, keys in together.items() if name in names for key in keys}
            left = [item for item in items if item.media_id not in tried]
            if not left:
                continue
            waiting = pending(left, chosen, self.library.outcomes.load(ids))
            self._say(f"{name}: {len(waiting)} of {len(left)} items to do")
            for batch in self._batches(waiting):
                tags = explicit_batch_tags(batch["keys"], settings)
                self._execute(f"process_{name}", name, tags, batch, [stage.name for stage in chosen])

    def _expected(self, items: Sequence[MediaItem], stages: Mapping[str, list[Stage[Any, Any]]]) -> Expected:
        from jobs.costs import SAMPLE, Costs, kind_of
        from media_assets.engine.planning import to_do

        ids = [item.media_id for item in items]
        every = [stage for members in stages.values() for stage in members]
        tasks = list(to_do(items, every, self.library.outcomes.load(ids)))
        if not tasks:  # what work has cost is no question then
            return {}
        rows = {row["media_id"]: row for row in self.library.registry.live(ids)}
        costs = Costs(self.library.backlog.past_work(SAMPLE))
        return {
            (media_id, asset): (
                kind_of(rows[media_id]["uri"]),
                costs.of_asset(asset, rows[media_id]["uri"], rows[media_id]["bytes"]),
            )
            for media_id, asset in tasks
        }

    def _needing_several(
        self, items: Sequence[MediaItem], stages: Mapping[str, list[Stage[Any, Any]]]
    ) -> dict[tuple[str, ...], list[str]]:
        """Media IDs by the groups, two or more, in which something of them is pending."""
        from media_assets.engine.planning import pending

        records = self.library.outcomes.load([item.media_id for item in items])
        needed: dict[str, list[str]] = {}
        for name, chosen in stages.items():
            for key in pending(items, chosen, records):
                needed.setdefault(key, []).append(name)
        found: dict[tuple[str, ...], list[str]] = {}
        for item in items:
            if len(names := needed.get(item.media_id, [])) > 1:
                found.setdefault(tuple(names), []).append(item.media_id)
        return found

    def _batches(self, waiting: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Batches of the items waiting, as their op's config; they are partitions before the first is worked on.

        What was in flight when its process died, and may have killed it, comes last and goes one at a time.
        """
        from media_assets.checks.checker import checker
        from media_assets.orchestration.partitions import add_partitions

        if waiting:
            checker().warm()  # beside Dagster's imports; the first check may come soon after
            add_partitions(self.instance, self.library.settings, waiting)
        suspected = self._suspects(waiting)
        if suspected:
            self._say(f"{len(suspected)} items were in flight when their process died or hung: these go one at a time")
        for keys in ([key for key in waiting if key not in suspected], [key for key in waiting if key in suspected]):
            size = self.library.settings.engine.batch_items
            for first in range(0, len(keys), size):
                yield {"keys": keys[first : first + size], "careful": keys[first] in suspected}

    def _suspects(self, waiting: Sequence[str]) -> set[str]:
        from media_assets.engine.planning import suspects

        outcomes = self.library.outcomes
        return suspects(outcomes.load(waiting), cache(lambda run_id: not outcomes.alive([run_id])))

    def _selected(self, stages: list[Stage[Any, Any]]) -> list[Stage[Any, Any]]:
        return [stage for stage in stages if not self.select or stage.name in self.select]

    def _rebuild(self) -> None:
        from media_assets.library.buckets import key as bucket_key
        from media_assets.orchestration.global_assets import library_changed
        from media_assets.orchestration.partitions import range_tags

        wanted = [name for name in SPANNING if not self.select or name in self.select]
        if not wanted or not library_changed(self.library):
            return
        self._say("rebuilding the catalog, the index shards and the near-duplicate groups")
        buckets = self.library.settings.index.buckets
        self._execute("rebuild", None, range_tags(bucket_key(0), bucket_key(buckets - 1)), {}, wanted)

    # -- Dagster ----------------------------------------------------------------------------------------

    @property
    def instance(self) -> DagsterInstance:
        """The Dagster instance, opened on first use."""
        if self._instance is None:
            self._say("opening the Dagster instance")
            self._instance = open_instance(self.library)
        return self._instance

    def _execute(
        self,
        job: str,
        op: str | None,
        tags: dict[str, str],
        config: dict[str, Any],
        assets: Sequence[str] | None = None,
    ) -> None:
        """Execute a job, with `config` for its op; `assets` are those chosen of an asset job."""
        import dagster as dg

        from media_assets.orchestration.partitions import HOST_TAG

        instance = self.instance
        if self._definitions is None:
            from media_assets.definitions import build

            self._definitions = build(self.library)
        result = self._definitions.resolve_job_def(job).execute_in_process(
            instance=instance,
            run_config={
                **({"ops": {op: {"config": config}}} if op else {}),
                "loggers": {"console": {"config": {"log_level": "CRITICAL"}}},
            },
            tags={**tags, HOST_TAG: socket.gethostname()},
            asset_selection=None if assets is None else [dg.AssetKey(name) for name in assets],
            raise_on_error=True,
        )
        self.summary.runs.append(result.run_id)

    # -- the account --------------------------------------------------------------------------------------

    def _account(self, items: Sequence[MediaItem]) -> None:
        summary = self.summary
        uris = {item.media_id: item.uri for item in items}
        records = self.library.outcomes.load(list(uris))
        seconds: dict[str, float] = {}
        in_flight: list[dict[str, Any]] = []
        for (media_id, asset), record in sorted(records.items()):
            by_status = summary.outcomes.setdefault(asset, {})
            by_status[record.status] = by_status.get(record.status, 0) + 1
            if record.run_id in summary.runs and record.claim:
                summary.computed[asset] = summary.computed.get(asset, 0) + 1
                seconds[asset] = seconds.get(asset, 0.0) + (record.seconds or 0.0)
            if record.status is Status.RUNNING:
                in_flight.append({"media_id": media_id, "asset": asset, "run_id": record.run_id})
            elif not record.status.done and record.error_class != "upstream_failed":
                summary.failures.append(
                    {
                        "media_id": media_id,
                        "uri": uris[media_id],
                        "asset": asset,
                        "status": str(record.status),
                        "error_class": record.error_class,
                        "error": record.error,
                    }
                )
        # What a process left when it died is in flight no more: it is claimed again by whoever works on it next.
        alive = set(self.library.outcomes.alive(sorted({entry["run_id"] for entry in in_flight})))
        summary.in_flight = [entry for entry in in_flight if entry["run_id"] in alive]
        summary.seconds = {asset: round(spent, 3) for asset, spent in seconds.items()}

    def _say(self, text: str) -> None:
        if self._reporter is not None:
            self._reporter.clear()
        self.console.print(text, style="dim")


def _split(found: Any) -> tuple[list[Upload], list[Problem]]:
    uploads: list[Upload] = []
    problems: list[Problem] = []
    for entry in found:
        if isinstance(entry, Upload):
            uploads.append(entry)
        else:
            problems.append(entry)
    return uploads, problems


def _shown(path: str) -> str:
    from resources.errors import printable

    return printable(path, 4096)
