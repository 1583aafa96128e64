"""Steps on a Ray cluster of separate raylets on this machine: where they run, what they and a dead node cost.

    python -m benchmarks.ray_cluster [--items 720] [--rounds 3] [--seed 7] [--apart]

The same photos go through the decode stages:

1. local: one in-process run with both cores, in a process of its own.
2. spread: two runs at once on the cluster, each with half of the photos on a node with one CPU.
   In both, the processes have done a run with a few photos before, as warm workers have; what that took is `first`.
   On Ray that warms the run's process alone: each step is a Ray job, a new process. `start` is the time from its
   submission to its first event.
   `in work` counts from the first claim of an item to the last finished one, without a run's beginning and end.
   Local and spread take turns for as many rounds as asked for; ratios are those of their means.
3. killed: one run with all photos, tagged as work for a GPU, on a cluster of a CPU node and two nodes with a logical
   GPU; the node it is on is killed with -9 when a third of the photos is done. The run must fail, and the batches that
   the planner makes of what it left must finish the rest on the other GPU node, with the bytes of the local run, and
   without an item finished twice.

With `--apart` each node has a network namespace of its own (Linux, as root): what is killed takes its network along.

Ends with one JSON line; exit 1 when one of these does not hold.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import Any

import dagster as dg
import sqlalchemy as sa

from benchmarks.chaos import photos
from cli.instance import open_instance
from jobs.on_ray import executor
from jobs.planner import Planner
from media_assets.orchestration.grouping import Group, groups
from media_assets.orchestration.groups import build_group
from media_assets.orchestration.partitions import add_partitions, explicit_batch_tags
from resources.compute.needs import Needs
from resources.ingest.discovery import discover
from resources.ingest.uploads import Upload
from resources.library import Library
from resources.settings import Settings
from sensors.planner import follow, request
from tests.cluster.ray_cluster import Cluster, ray_cluster

ON_CPU = replace(groups(Settings())[0], needs=Needs(cpus=1, memory_bytes=2 * 2**30))
ON_GPU = replace(ON_CPU, needs=replace(ON_CPU.needs, gpus=1))
ASSETS = tuple(path.partition(":")[0] for path in ON_CPU.stages)
FIRST = 8  # photos of the first run
ONE_CORE = {"MEDIA_DECODING__WORKERS": "1", "MEDIA_ENGINE__PREPARE_THREADS": "2"}
POLL_S = 0.05
DEADLINE_S = 300.0


def _job(library: Library, group: Group, runs_on: dg.ExecutorDefinition) -> dg.JobDefinition:
    definitions = dg.Definitions(
        assets=[build_group(group, library.settings, library.models)],
        jobs=[dg.define_asset_job("process_decode", dg.AssetSelection.groups(group.name))],
        resources={"media": dg.ResourceDefinition(lambda _: library)},
        executor=runs_on,
    )
    return definitions.resolve_job_def("process_decode")


def local_job() -> dg.JobDefinition:
    """The decode group in the run's process."""
    return _job(Library.open(), ON_CPU, dg.in_process_executor)


def ray_job() -> dg.JobDefinition:
    """The decode group on any node of the cluster."""
    library = Library.open()
    return _job(library, ON_CPU, executor(library.settings))


def gpu_job() -> dg.JobDefinition:
    """The decode group on a node with a GPU."""
    library = Library.open()
    return _job(library, ON_GPU, executor(library.settings))


def execute(library: Library, instance: dg.DagsterInstance, job: Any, keys: Sequence[str]) -> bool:
    """One run over these media items."""
    config = {"ops": {"decode": {"config": {"keys": list(keys)}}}}
    return _execute(instance, job, config, explicit_batch_tags(keys, library.settings))


def _execute(instance: dg.DagsterInstance, job: Any, config: Mapping[str, Any], tags: Mapping[str, str]) -> bool:
    result = dg.execute_job(
        dg.reconstructable(job),
        instance,
        run_config={**config, "loggers": {"console": {"config": {"log_level": "CRITICAL"}}}},
        tags=dict(tags),
        asset_selection=[dg.AssetKey(name) for name in ASSETS],
        raise_on_error=False,
    )
    return bool(result.success)


class Bench:
    """A library of its own with the photos registered, and its Dagster instance."""

    def __init__(self, home: Path, media: Path) -> None:
        home.mkdir()
        for name in [name for name in os.environ if name.startswith(("MEDIA_", "DAGSTER_"))]:
            del os.environ[name]
        self.library = Library.open(home)
        self.instance = open_instance(self.library)
        found = [upload for upload in discover([str(media)]) if isinstance(upload, Upload)]
        self.keys = self.library.registry.add(found)
        add_partitions(self.instance, self.library.settings, self.keys)

    def run(self, job: Any, keys: Sequence[str]) -> bool:
        """One run over these media items."""
        return execute(self.library, self.instance, job, keys)

    def finish(self, job: Any) -> int:
        """What the planner makes of the rest, batch by batch; returns how many runs it took. A run must succeed."""
        planner, runs = Planner(self.library, [ON_CPU.name]), 0
        while batches := planner.tick().batches:
            for wanted in [request(batch, self.library.settings) for batch in batches]:
                if not _execute(self.instance, job, wanted.run_config, wanted.tags):
                    raise SystemExit("a run of the planner's failed")
                runs += 1
            follow(self.library, self.instance)
        return runs

    def query(self, text: str) -> list[Any]:
        """Rows of a query over the records."""
        with self.library.database.engine.connect() as connection:
            return list(connection.execute(sa.text(text)))

    def done(self) -> int:
        """Items whose last asset is finished."""
        return int(self.query("select count(*) from outcomes where asset = 'audio' and status <> 'running'")[0][0])

    def in_work_s(self, keys: Sequence[str]) -> float:
        """Seconds from the first claim of one of these items to the last finished outcome."""
        with self.library.database.engine.connect() as connection:
            told = connection.execute(
                sa.text(
                    "select extract(epoch from max(at) - min(at)) from outcome_history where media_id = any(:keys)"
                ),
                {"keys": list(keys)},
            )
            return float(told.scalar_one())

    def starts_s(self) -> list[float]:
        """Seconds from the submission of a step to its first event, of each run on a cluster."""
        kinds = (dg.DagsterEventType.STEP_WORKER_STARTING, dg.DagsterEventType.STEP_START)
        found = []
        for run in self.instance.get_runs():
            records = self.instance.get_records_for_run(run.run_id, of_type=set(kinds)).records
            at = {record.event_log_entry.get_dagster_event().event_type: record.timestamp for record in records}
            if len(at) == len(kinds):
                found.append(at[kinds[1]] - at[kinds[0]])
        return found

    def files(self) -> dict[str, str]:
        """SHA-256 of every derived file."""
        root = self.library.settings.home / "derived"
        return {
            str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(root.rglob("*.parquet"))
        }

    def close(self) -> None:
        """Close instance and library."""
        self.instance.dispose()
        self.library.close()


@dataclass(frozen=True, slots=True)
class Took:
    """Wall seconds of the first run or runs, of those that are measured, and of these in work; and of steps' starts."""

    first_s: float
    whole_s: float
    in_work_s: float
    starts_s: list[float]


def local(bench: Bench) -> Took:
    """One run with all cores."""
    return _runs(bench, local_job, 1)


def spread(bench: Bench, apart: bool) -> Took:
    """Two runs at once, on two nodes with one CPU each."""
    with ray_cluster((1, 0), (1, 0), dashboard=True, apart=apart) as cluster:
        os.environ |= {"RAY_ADDRESS": cluster.address, **ONE_CORE}
        return _runs(bench, ray_job, 2)


def _runs(bench: Bench, job: Any, count: int) -> Took:
    """So many runs at once, each with its share of the items, after the first ones.

    A process each, as a launcher gives them: two runs in one process lock each other out of Python's logging.
    """
    spawn = get_context("spawn")
    opened = (bench.library.settings.home, spawn.Barrier(count))
    with ProcessPoolExecutor(count, spawn, _open, opened) as pool:
        for each in [pool.submit(bool) for _ in range(count)]:  # all have imported
            each.result()
        seconds = []
        for keys in (bench.keys[:FIRST], bench.keys[FIRST:]):
            start = time.perf_counter()
            if not all(pool.map(partial(_run, job), [keys[at::count] for at in range(count)])):
                raise SystemExit("a run failed")
            seconds.append(time.perf_counter() - start)
    first_s, whole_s = seconds
    return Took(first_s, whole_s, bench.in_work_s(bench.keys[FIRST:]), bench.starts_s())


_opened: list[Any] = []


def _open(home: Path, all_open: Any) -> None:
    """Open the library and its Dagster instance in a process of their own."""
    library = Library.open(home)
    _opened.extend((library, open_instance(library)))
    all_open.wait(DEADLINE_S)


def _run(job: Any, keys: Sequence[str]) -> bool:
    library, instance = _opened
    return execute(library, instance, job, keys)


@dataclass(slots=True)
class Rounds:
    """What one way of doing the work took, and the files it made, round by round."""

    took: list[Took] = field(default_factory=list)
    files: list[dict[str, str]] = field(default_factory=list)


def compared(local: Rounds, ray: Rounds) -> dict[str, Any]:
    """Seconds of every round, and how often as fast Ray was, by the means."""
    figures: dict[str, Any] = {}
    for what in ("in_work", "whole", "first"):
        seconds = [[getattr(took, f"{what}_s") for took in way.took] for way in (local, ray)]
        figures |= {
            f"local_{what}_s": [round(each, 2) for each in seconds[0]],
            f"ray_{what}_s": [round(each, 2) for each in seconds[1]],
            f"ratio_{what}": round(sum(seconds[0]) / sum(seconds[1]), 3),
        }
    overhead_s = fmean(took.in_work_s for took in ray.took) - fmean(took.in_work_s for took in local.took)
    starts_s = sorted(round(start_s, 1) for took in ray.took for start_s in took.starts_s)
    told = {"overhead_s": round(overhead_s, 2), "step_start_s": round(fmean(starts_s), 1), "step_starts_s": starts_s}
    return figures | told


def killed(bench: Bench, apart: bool) -> dict[str, Any]:
    """One run whose node is killed in the middle: what became of it."""
    with ray_cluster((1, 0), (1, 1), (1, 1), dashboard=True, apart=apart) as cluster:
        os.environ |= {"RAY_ADDRESS": cluster.address, **ONE_CORE}
        killer = _Killer(bench, cluster)
        killer.start()
        failed = not bench.run(gpu_job, bench.keys)
        killer.join()
        runs = bench.finish(gpu_job)
        nodes = _nodes_of_steps(cluster)
    gpu_nodes = {node.node_id for node in cluster.nodes[1:]}
    twice = bench.query(
        "select media_id, asset from outcome_history where status in ('ok', 'not_applicable')"
        " group by 1, 2 having count(*) > 1"
    )
    again = bench.query("select media_id, asset from outcomes where claim > 1")
    return {
        "run_failed": failed,
        "runs_after_it": runs,
        "only_gpu_nodes": set(nodes) <= gpu_nodes,
        "nodes_used": len(set(nodes)),
        "done_at_kill": killer.done,
        "finished_twice": len(twice),
        "outcomes_claimed_again": len(again),
    }


def _nodes_of_steps(cluster: Cluster) -> list[str]:
    """Ray nodes on which the jobs of steps ran, or run."""
    from ray.job_submission import JobSubmissionClient

    jobs = JobSubmissionClient(cluster.dashboard).list_jobs()
    return [str(job.driver_node_id) for job in jobs if "dagster/op" in (job.metadata or {})]


class _Killer(threading.Thread):
    """Kills the node of the running step once a third of the items is done."""

    def __init__(self, bench: Bench, cluster: Cluster) -> None:
        super().__init__()
        self.bench, self.cluster, self.done = bench, cluster, 0

    def run(self) -> None:
        """Wait for the moment, then kill."""
        deadline = time.monotonic() + DEADLINE_S
        while self.bench.done() < len(self.bench.keys) // 3:
            if time.monotonic() > deadline:
                return
            time.sleep(POLL_S)
        (node,) = _nodes_of_steps(self.cluster)
        self.cluster.kill([each.node_id for each in self.cluster.nodes].index(node))
        self.done = self.bench.done()


def main() -> int:
    """Measure, print a table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=720)
    parser.add_argument("--rounds", type=int, default=3, help="of local and spread, in turn")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--apart", action="store_true", help="a network namespace for each node")
    arguments = parser.parse_args()
    before = dict(os.environ)
    with tempfile.TemporaryDirectory(prefix="ray-bench-") as folder:
        root = Path(folder)
        (root / "media").mkdir()
        for name, data in photos(arguments.items + FIRST, arguments.seed).items():
            (root / "media" / name).write_bytes(data)
        ways: dict[str, Callable[[Bench], Took]] = {"local": local, "ray": partial(spread, apart=arguments.apart)}
        rounds = {name: Rounds() for name in ways}
        for turn in range(arguments.rounds):
            for name in list(ways)[:: -1 if turn % 2 else 1]:
                os.environ.clear()
                os.environ.update(before)
                bench = Bench(root / f"{name}-{turn}", root / "media")
                rounds[name].took.append(took := ways[name](bench))
                rounds[name].files.append(bench.files())
                bench.close()
                told = f"{took.in_work_s:.1f} s in work, {took.whole_s:.1f} s whole, {took.first_s:.1f} s first"
                print(f"round {turn + 1}: {name}: {told}", file=sys.stderr, flush=True)
        victim = Bench(root / "killed", root / "media")
        figures = killed(victim, arguments.apart)
        every = [victim.files(), *rounds["local"].files, *rounds["ray"].files]
        figures["outputs_identical"] = all(files == every[0] for files in every)
        victim.close()
    os.environ.clear()
    os.environ.update(before)
    figures = {"items": arguments.items, "network_namespaces": arguments.apart} | compared(**rounds) | figures
    figures["overhead_ms_per_item"] = round(figures["overhead_s"] / arguments.items * 1000, 1)
    for name, value in figures.items():
        print(f"{name:>24}  {value}")
    held = all(figures[name] for name in ("run_failed", "only_gpu_nodes", "outputs_identical"))
    held = held and figures["finished_twice"] == 0 and figures["nodes_used"] == 2
    versions = {name: version(name) for name in ("media-assets", "dagster", "dagster-ray", "ray")}
    print(json.dumps({"name": "ray_cluster", **figures, "python": platform.python_version(), "versions": versions}))
    return 0 if held else 1


if __name__ == "__main__":
    # The runs' processes, and those of their steps, find the jobs by the name of their module.
    from benchmarks.ray_cluster import main as of_the_module

    sys.exit(of_the_module())
