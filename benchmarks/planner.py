"""The planner over a large library: scattered retries, a fresh import and a model change, beside stock Dagster.

    python benchmarks/planner.py [--items 100000] [--retries 1000] [--batch 200]

Registers uploads, writes an outcome for every asset of each, and takes the planner through:

1. retries: some uploads scattered over all of them get a fresh start; how many runs, and what a tick costs.
2. stale: another model makes everything stale; what a tick costs that looks at its 5,000 uploads of lookahead.

Beside it, the same scattered keys as Dagster's own backfill would cut them: runs over contiguous ranges.
Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import resource
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import dagster as dg
import sqlalchemy as sa

from cli.instance import open_instance
from jobs.planner import Planner
from media_assets.engine.contract import MediaItem
from media_assets.engine.versions import item_version
from media_assets.orchestration.partitions import add_partitions, media_partitions
from resources.ingest.uploads import Upload
from resources.library import Library


def fill(library: Library, planner: Planner, count: int) -> list[str]:
    """Register uploads and write finished outcomes with the versions the stages have; returns their IDs."""
    now = datetime.now(UTC)
    uploads = [Upload(f"s3://bucket/{n:07d}.jpg", "etag", 200_000, now, "benchmark") for n in range(count)]
    keys = library.registry.add(uploads)
    items = [MediaItem(upload.media_id, upload.uri, upload.etag) for upload in uploads]
    statement = sa.text(
        "insert into outcomes (media_id, asset, version, content, status, attempts, claim, seconds)"
        " select m, :asset, v, :content, 'ok', 1, 1, 0.2"
        " from unnest(cast(:ids as text[]), cast(:versions as text[])) as t(m, v)"
    )
    with library.database.engine.begin() as connection:
        for stages in planner.stages.values():
            for stage in stages:
                contents = [f"{name}-content" for name in stage.inputs]
                versions = [item_version(stage, item, contents) for item in items]
                values = {"asset": stage.name, "content": f"{stage.name}-content", "ids": keys, "versions": versions}
                connection.execute(statement, values)
        connection.execute(sa.text("update uploads set plan = :plan"), {"plan": planner.plan})
    with library.database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(sa.text("analyze"))
    return keys


def retried(library: Library, planner: Planner, chosen: Sequence[str]) -> dict[str, Any]:
    """Runs and seconds per tick until every one of the chosen uploads has been in a batch."""
    library.outcomes.reset(chosen, ["embeddings"], finished=True)
    ticks, runs = [], 0
    planned: set[str] = set()
    while planned < set(chosen):
        start = time.perf_counter()
        tick = planner.tick()
        ticks.append(time.perf_counter() - start)
        if not tick.batches:
            raise SystemExit(f"the planner stopped at {len(planned)} of {len(chosen)}: {tick.explanations}")
        for batch in tick.batches:
            runs += 1
            planned |= set(batch.keys)
            library.backlog.ended(batch.id or 0, "finished", 0.0)
            with library.database.engine.begin() as connection:
                # As if its run had made them.
                connection.execute(
                    sa.text("update outcomes set status = 'ok' where media_id = any(:ids)"), {"ids": list(batch.keys)}
                )
    return {"runs": runs, "ticks": len(ticks), "longest_tick_s": round(max(ticks), 2)}


def stale(library: Library, planner: Planner) -> dict[str, Any]:
    """A tick over a library that another model has made stale."""
    with library.database.engine.begin() as connection:
        connection.execute(sa.text("update uploads set plan = 'of another model'"))
        connection.execute(sa.text("update outcomes set version = 'older' where asset = 'embeddings'"))
    start = time.perf_counter()
    tick = planner.tick()
    took = time.perf_counter() - start
    return {"tick_s": round(took, 2), "looked_at": tick.looked_at, "batches": len(tick.batches)}


def stock(instance: dg.DagsterInstance, chosen: Sequence[str]) -> dict[str, Any]:
    """How Dagster's own backfill cuts the same keys: one run per contiguous range."""
    start = time.perf_counter()
    with dg.partition_loading_context(dynamic_partitions_store=instance):
        ranges = media_partitions.subset_with_partition_keys(chosen).get_partition_key_ranges(media_partitions)
    return {"runs": len(list(ranges)), "seconds": round(time.perf_counter() - start, 2)}


def main() -> None:
    """Measure, print a table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--retries", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=200)
    arguments = parser.parse_args()
    figures: dict[str, Any] = {"items": arguments.items, "retries": arguments.retries, "batch": arguments.batch}
    with tempfile.TemporaryDirectory(prefix="planner-") as folder:
        library = Library.open(Path(folder))
        engine = library.settings.engine.model_copy(update={"batch_items": arguments.batch})
        limits = library.settings.planner.model_copy(update={"batch_seconds": 1e9, "max_wait_s": 0.0})
        library.settings = library.settings.model_copy(update={"engine": engine, "planner": limits})
        planner = Planner(library)
        start = time.perf_counter()
        keys = fill(library, planner, arguments.items)
        print(f"{len(keys)} uploads with outcomes in {time.perf_counter() - start:.0f} s", flush=True)
        base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        chosen = keys[:: max(1, len(keys) // arguments.retries)][: arguments.retries]
        figures["retries_ours"] = retried(library, planner, chosen)
        figures["runs_expected"] = math.ceil(len(chosen) / arguments.batch)
        figures["stale"] = stale(library, planner)
        # Filling took memory that the ticks may use again: the peak is an upper bound.
        figures["peak_rss_mb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        figures["rss_before_ticks_mb"] = round(base / 1024)
        with open_instance(library) as instance:
            add_partitions(instance, library.settings, keys)
            figures["retries_stock"] = stock(instance, chosen)
        library.close()
    for name, value in figures.items():
        print(f"{name:>20}  {value}")
    versions = {name: version(name) for name in ("media-assets", "dagster", "sqlalchemy")}
    print(json.dumps({"name": "planner", **figures, "python": platform.python_version(), "versions": versions}))


if __name__ == "__main__":
    main()
