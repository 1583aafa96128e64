"""A real Ray cluster on loopback for tests and benchmarks: separate raylets, GPUs that exist by number only."""

from __future__ import annotations

import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

PROJECT = Path(__file__).parents[2]
STORE_BYTES = 100 * 2**20
ENVIRONMENT = {
    # Of the workers, and of the jobs they start.
    "PYTHONPATH": str(PROJECT),
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
    # A killed node is noticed within seconds.
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_failure_threshold": "4",
}


@dataclass(frozen=True, slots=True)
class Cluster:
    """A running cluster: its address, and its nodes in the order asked for, behind a head without CPUs."""

    address: str
    dashboard: str
    nodes: Sequence[Any]

    def kill(self, number: int) -> None:
        """Kill all processes of a node with SIGKILL: its raylet, its workers and the jobs they started.

        A job would outlive its raylet alone, which a machine that fails does not allow.
        """
        (info,) = self.nodes[number].all_processes["raylet"]
        raylet = psutil.Process(info.process.pid)
        for process in (raylet, *raylet.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                process.kill()


@contextmanager
def ray_cluster(*nodes: tuple[float, float], dashboard: bool = False) -> Iterator[Cluster]:
    """A head and one raylet for each (CPUs, GPUs); all processes are gone when the block ends.

    This process is no driver yet. With `dashboard` the cluster accepts Ray jobs.
    """
    import ray
    from ray.cluster_utils import Cluster as Raylets

    # Paths of sockets are short.
    folder = tempfile.mkdtemp(prefix="ray-")
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        ports = _free_ports(len(nodes) + 2)
        head = {
            "num_cpus": 0,
            "num_gpus": 0,
            "include_dashboard": dashboard,
            "dashboard_port": ports[0],
            "dashboard_agent_listen_port": ports[1],
            "object_store_memory": STORE_BYTES,
            "temp_dir": folder,
        }
        with _environment():
            raylets = Raylets(initialize_head=True, head_node_args=head)
            stack.callback(raylets.shutdown)
            stack.callback(ray.shutdown)
            started = [
                raylets.add_node(
                    wait=False,
                    num_cpus=cpus,
                    num_gpus=gpus,
                    dashboard_agent_listen_port=port,
                    object_store_memory=STORE_BYTES,
                )
                for port, (cpus, gpus) in zip(ports[2:], nodes, strict=True)
            ]
        raylets.wait_for_nodes()
        yield Cluster(raylets.address, f"http://127.0.0.1:{ports[0]}", started)


@contextmanager
def _environment() -> Iterator[None]:
    """What the processes of the cluster inherit."""
    before = dict(os.environ)
    os.environ.update(ENVIRONMENT)
    os.environ.pop("RAY_ADDRESS", None)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
