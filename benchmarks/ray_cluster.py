"""Steps on a Ray cluster of separate raylets on this machine: where they run, what a dead node costs, what Ray costs.

    python -m benchmarks.ray_cluster [--items 720] [--rounds 3] [--seed 7] [--apart]

The same photos go through the decode stages, tagged as work for a GPU:

1. local: one in-process run with both cores, in a process of its own.
2. spread: two runs at once on the cluster, each with half of the photos on a node with one CPU and one logical GPU.
   Steps start seconds after their run; `in work` counts from the first claim of an item to the last finished one.
   Local and spread take turns for as many rounds as asked for; ratios are those of their means.
3. killed: one run with all photos on a cluster of a CPU node and two GPU nodes; the node it is on is killed with -9
   when a third of the photos is done. The run must succeed on the other GPU node, with the bytes of the local run, and
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
from collections.abc import Callable, Sequence
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
from media_assets.grouping import groups
from media_assets.groups import build_group
from media_assets.partitions import add_partitions, explicit_batch_tags
from resources.compute import Needs
from resources.library import Library
from resources.registry import Upload, discover
from resources.settings import Settings
from tests.cluster.ray_cluster import Cluster, ray_cluster

ON_GPU = replace(groups(Settings())[0], needs=Needs(cpus=1, gpus=1, memory_bytes=2**30))
ASSETS = tuple(path.partition(":")[0] for path in ON_GPU.stages)
ONE_CORE = {"MEDIA_DECODING__WORKERS": "1", "MEDIA_ENGINE__PREPARE_THREADS": "2"}
POLL_S = 0.05
DEADLINE_S = 300.0


def _job(library: Library, runs_on: dg.ExecutorDefinition) -> dg.JobDefinition:
    definitions = dg.Definitions(
        assets=[build_group(ON_GPU, library.settings, library.models)],
        jobs=[dg.define_asset_job("process_decode", dg.AssetSelection.groups(ON_GPU.name))],
        resources={"media": dg.ResourceDefinition(lambda _: library)},
        executor=runs_on,
    )
    return definitions.resolve_job_def("process_decode")


def local_job() -> dg.JobDefinition:
    """The decode group in the run's process."""
    return _job(Library.open(), dg.in_process_executor)


def ray_job() -> dg.JobDefinition:
    """The decode group as Ray jobs."""
    library = Library.open()
    return _job(library, executor(library.settings))


def execute(library: Library, instance: dg.DagsterInstance, job: Any, keys: Sequence[str]) -> bool:
    """One run over these media items."""
    result = dg.execute_job(
        dg.reconstructable(job),
        instance,
        run_config={
            "ops": {"decode": {"config": {"keys": list(keys)}}},
            "loggers": {"console": {"config": {"log_level": "CRITICAL"}}},
        },
        tags=explicit_batch_tags(keys, library.settings),
        asset_selection=[dg.AssetKey(name) for name in ASSETS],
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

    def query(self, text: str) -> list[Any]:
        """Rows of a query over the records."""
        with self.library.database.engine.connect() as connection:
            return list(connection.execute(sa.text(text)))

    def done(self) -> int:
        """Items whose last asset is finished."""
        return int(self.query("select count(*) from outcomes where asset = 'audio' and status <> 'running'")[0][0])

    def in_work_s(self) -> float:
        """Seconds from the first claim to the last finished outcome."""
        return float(self.query("select extract(epoch from max(at) - min(at)) from outcome_history")[0][0])

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


def local(bench: Bench) -> float:
    """Wall seconds of one run with all cores."""
    return _runs(bench, local_job, [bench.keys])


def spread(bench: Bench, apart: bool) -> float:
    """Wall seconds of two runs at once, on two nodes with one CPU each."""
    with ray_cluster((1, 1), (1, 1), dashboard=True, apart=apart) as cluster:
        os.environ |= {"RAY_ADDRESS": cluster.dashboard, **ONE_CORE}
        return _runs(bench, ray_job, [bench.keys[::2], bench.keys[1::2]])


def _runs(bench: Bench, job: Any, shares: Sequence[Sequence[str]]) -> float:
    """Wall seconds of a run for each share of the items, all at once.

    A process each, as a launcher gives them: two runs in one process lock each other out of Python's logging.
    """
    spawn = get_context("spawn")
    opened = (bench.library.settings.home, spawn.Barrier(len(shares)))
    with ProcessPoolExecutor(len(shares), spawn, _open, opened) as pool:
        for each in [pool.submit(bool) for _ in shares]:  # all have imported
            each.result()
        start = time.perf_counter()
        if not all(pool.map(partial(_run, job), shares)):
            raise SystemExit("a run failed")
        return time.perf_counter() - start


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

    in_work_s: list[float] = field(default_factory=list)
    whole_s: list[float] = field(default_factory=list)
    files: list[dict[str, str]] = field(default_factory=list)

    def add(self, bench: Bench, whole_s: float) -> None:
        """Take up what a finished round left."""
        self.in_work_s.append(bench.in_work_s())
        self.whole_s.append(whole_s)
        self.files.append(bench.files())


def compared(local: Rounds, ray: Rounds) -> dict[str, Any]:
    """Seconds of every round, and how often as fast Ray was, by the means."""
    return {
        "local_in_work_s": [round(seconds, 2) for seconds in local.in_work_s],
        "ray_in_work_s": [round(seconds, 2) for seconds in ray.in_work_s],
        "ratio_in_work": round(sum(local.in_work_s) / sum(ray.in_work_s), 3),
        "overhead_s": round(fmean(ray.in_work_s) - fmean(local.in_work_s), 2),
        "local_s": [round(seconds, 2) for seconds in local.whole_s],
        "ray_s": [round(seconds, 2) for seconds in ray.whole_s],
        "ratio_whole": round(sum(local.whole_s) / sum(ray.whole_s), 3),
    }


def killed(bench: Bench, apart: bool) -> dict[str, Any]:
    """One run whose node is killed in the middle: what became of it."""
    with ray_cluster((1, 0), (1, 1), (1, 1), dashboard=True, apart=apart) as cluster:
        os.environ |= {"RAY_ADDRESS": cluster.dashboard, **ONE_CORE}
        killer = _Killer(bench, cluster)
        killer.start()
        succeeded = bench.run(ray_job, bench.keys)
        killer.join()
        nodes = _nodes_of_steps(cluster)
    gpu_nodes = {node.node_id for node in cluster.nodes[1:]}
    twice = bench.query(
        "select media_id, asset from outcome_history where status in ('ok', 'not_applicable')"
        " group by 1, 2 having count(*) > 1"
    )
    again = bench.query("select media_id, asset from outcomes where claim > 1")
    return {
        "succeeded": succeeded,
        "only_gpu_nodes": set(nodes) <= gpu_nodes,
        "nodes_used": len(set(nodes)),
        "done_at_kill": killer.done,
        "finished_twice": len(twice),
        "outcomes_claimed_again": len(again),
    }


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


def _nodes_of_steps(cluster: Cluster) -> list[str]:
    from ray.job_submission import JobSubmissionClient

    return [str(job.driver_node_id) for job in JobSubmissionClient(cluster.dashboard).list_jobs()]


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
        for name, data in photos(arguments.items, arguments.seed).items():
            (root / "media" / name).write_bytes(data)
        ways: dict[str, Callable[[Bench], float]] = {"local": local, "ray": partial(spread, apart=arguments.apart)}
        rounds = {name: Rounds() for name in ways}
        for turn in range(arguments.rounds):
            for name in list(ways)[:: -1 if turn % 2 else 1]:
                os.environ.clear()
                os.environ.update(before)
                bench = Bench(root / f"{name}-{turn}", root / "media")
                rounds[name].add(bench, ways[name](bench))
                bench.close()
                told = f"{rounds[name].in_work_s[-1]:.1f} s in work, {rounds[name].whole_s[-1]:.1f} s whole"
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
    held = all(figures[name] for name in ("succeeded", "only_gpu_nodes", "outputs_identical"))
    held = held and figures["finished_twice"] == 0 and figures["nodes_used"] == 2
    versions = {name: version(name) for name in ("media-assets", "dagster", "dagster-ray", "ray")}
    print(json.dumps({"name": "ray_cluster", **figures, "python": platform.python_version(), "versions": versions}))
    return 0 if held else 1


if __name__ == "__main__":
    # The runs' processes, and those of their steps, find the jobs by the name of their module.
    from benchmarks.ray_cluster import main as of_the_module

    sys.exit(of_the_module())
