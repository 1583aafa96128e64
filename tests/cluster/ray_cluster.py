"""A real Ray cluster on loopback for tests and benchmarks: separate raylets, GPUs that exist by number only."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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
class Member:
    """A node: its ID at Ray, and its processes when asked for."""

    node_id: str
    processes: Callable[[], Sequence[psutil.Process]]


@dataclass(frozen=True, slots=True)
class Cluster:
    """A running cluster: its address, and its nodes in the order asked for, behind a head without CPUs."""

    address: str
    dashboard: str
    nodes: Sequence[Member]

    def kill(self, number: int) -> None:
        """Kill all processes of a node with SIGKILL: its raylet, its workers and the jobs they started.

        A job would outlive its raylet alone, which a machine that fails does not allow.
        """
        for process in self.nodes[number].processes():
            with suppress(psutil.NoSuchProcess):
                process.kill()


@contextmanager
def ray_cluster(*nodes: tuple[float, float], dashboard: bool = False, apart: bool = False) -> Iterator[Cluster]:
    """A head and one raylet for each (CPUs, GPUs); all processes are gone when the block ends.

    This process is no driver yet. With `dashboard` the cluster accepts Ray jobs. Nodes that are `apart` have network
    namespaces of their own and reach each other over a bridge only, as machines do; that takes Linux, root, and `ip`.
    """
    import ray
    from ray.cluster_utils import Cluster as Raylets

    # Paths of sockets are short.
    folder = tempfile.mkdtemp(prefix="ray-")
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        # Ray notes the cluster that "auto" means below this folder, by default in /tmp/ray, which a machine may lack.
        (Path(folder) / "ray").mkdir()
        stack.enter_context(_environment({"RAY_TMPDIR": folder}))
        network = stack.enter_context(_bridge(len(nodes))) if apart else None
        host = network.address(0) if network else "127.0.0.1"
        ports = _free_ports(host, len(nodes) + 2)
        head = {
            "num_cpus": 0,
            "num_gpus": 0,
            "include_dashboard": dashboard,
            "dashboard_host": host,
            "dashboard_port": ports[0],
            "dashboard_agent_listen_port": ports[1],
            "object_store_memory": STORE_BYTES,
            "temp_dir": folder,
            **({"node_ip_address": host} if apart else {}),
        }
        with _environment(ENVIRONMENT):
            raylets = Raylets(initialize_head=True, head_node_args=head)
            stack.callback(raylets.shutdown)
            stack.callback(ray.shutdown)
            if network:
                members = [_start_apart(raylets, network, at, *node) for at, node in enumerate(nodes, start=1)]
            else:
                members = [_start(raylets, port, *node) for port, node in zip(ports[2:], nodes, strict=True)]
                raylets.wait_for_nodes()
        yield Cluster(raylets.address, f"http://{host}:{ports[0]}", members)


def _start(raylets: Any, agent_port: int, cpus: float, gpus: float) -> Member:
    """A raylet on loopback beside the others."""
    node = raylets.add_node(
        wait=False,
        num_cpus=cpus,
        num_gpus=gpus,
        dashboard_agent_listen_port=agent_port,
        object_store_memory=STORE_BYTES,
    )
    (info,) = node.all_processes["raylet"]
    raylet = psutil.Process(info.process.pid)
    return Member(node.node_id, lambda: [raylet, *raylet.children(recursive=True)])


def _start_apart(raylets: Any, network: _Network, number: int, cpus: float, gpus: float) -> Member:
    """A raylet in the network namespace of this number."""
    address = network.address(number)
    own = [f"--address={raylets.address}", f"--node-ip-address={address}", f"--num-cpus={cpus:g}"]
    sizes = [f"--num-gpus={gpus:g}", f"--object-store-memory={STORE_BYTES}", "--disable-usage-stats"]
    ray = str(Path(sys.executable).parent / "ray")
    network.run(number, ray, "start", *own, *sizes)
    for _ in range(300):
        for node in raylets.global_state.node_table():
            if node["Alive"] and node["NodeManagerAddress"] == address:
                return Member(node["NodeID"], lambda: network.processes(number))
        time.sleep(0.1)
    raise RuntimeError(f"the node at {address} did not join the cluster")


@dataclass(frozen=True, slots=True)
class _Network:
    """Namespaces `<name>-1`, `<name>-2`, … on a bridge of this name, whose end here is number 0."""

    name: str
    prefix: str

    def address(self, number: int) -> str:
        return f"{self.prefix}.{number + 1}"

    def run(self, number: int, *command: str) -> None:
        _ip("netns", "exec", f"{self.name}-{number}", *command)

    def processes(self, number: int) -> list[psutil.Process]:
        found = []
        for pid in _ip("netns", "pids", f"{self.name}-{number}").split():
            with suppress(psutil.NoSuchProcess):
                found.append(psutil.Process(int(pid)))
        return found


@contextmanager
def _bridge(count: int) -> Iterator[_Network]:
    """`count` network namespaces on a bridge; they and all processes in them are gone when the block ends."""
    number = os.getpid() % 250
    network = _Network(f"mar{number}", f"10.213.{number}")
    with ExitStack() as stack:
        _ip("link", "add", network.name, "type", "bridge")
        stack.callback(_ip, "link", "del", network.name)
        _ip("addr", "add", f"{network.address(0)}/24", "dev", network.name)
        _ip("link", "set", network.name, "up")
        for at in range(1, count + 1):
            space, outer, inner = f"{network.name}-{at}", f"{network.name}o{at}", f"{network.name}i{at}"
            _ip("netns", "add", space)
            stack.callback(_ip, "netns", "del", space)
            stack.callback(_end, network, at)
            _ip("link", "add", outer, "type", "veth", "peer", "name", inner, "netns", space)
            _ip("link", "set", outer, "master", network.name, "up")
            network.run(at, "ip", "addr", "add", f"{network.address(at)}/24", "dev", inner)
            for device in ("lo", inner):
                network.run(at, "ip", "link", "set", device, "up")
        yield network


def _end(network: _Network, number: int) -> None:
    processes = network.processes(number)
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, 10)


def _ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr or done.stdout}")
    return done.stdout


@contextmanager
def _environment(own: Mapping[str, str]) -> Iterator[None]:
    """What the processes of the cluster inherit; no other cluster."""
    names = (*own, "RAY_ADDRESS")
    before = {name: os.environ[name] for name in names if name in os.environ}
    os.environ.pop("RAY_ADDRESS", None)
    os.environ.update(own)
    try:
        yield
    finally:
        for name in names:
            os.environ.pop(name, None)
        os.environ.update(before)


def _free_ports(host: str, count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind((host, 0))
        return [each.getsockname()[1] for each in sockets]
