"""The Ray cluster: reached within a bounded time, or refused with what to do; Ray itself would wait for ever."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from urllib.parse import urlsplit

from resources.errors import ServingUnavailable
from resources.settings import Settings

ADDRESS_VARIABLE = "RAY_ADDRESS"
MISSING = "Install it: pip install 'media-assets[ray]'"


class ClusterUnavailable(ServingUnavailable):
    """There is no cluster at the address, or it lacks what is asked for."""

    remedy = (
        "Check RAY_ADDRESS, or ray.address where that is not set, and the cluster; without one, set compute.executor"
        " and serving.backend to local."
    )


def address(settings: Settings) -> str:
    """Address of the cluster: RAY_ADDRESS, as everywhere in Ray, then `ray.address`, then `auto`: this machine's."""
    return os.environ.get(ADDRESS_VARIABLE) or settings.ray.address or "auto"


def namespace(settings: Settings) -> str:
    """Ray namespace of this library's model servers: another library has other ones."""
    identity = settings.database_url or str(settings.home.absolute())
    return f"media-assets-{blake2b(identity.encode(), digest_size=6).hexdigest()}"


def connect(settings: Settings) -> None:
    """Make this process a driver of the cluster; nothing is done where it is one. Raises ClusterUnavailable."""
    try:
        import ray
    except ImportError as error:
        raise ClusterUnavailable("Ray is not installed.", MISSING) from error
    if ray.is_initialized():
        return
    where = address(settings)
    if where.startswith(("http://", "https://")):
        raise ClusterUnavailable(
            f"{where} is the address of Ray's job server; models are reached at host:port of its GCS.",
            "Set ray.address to what `ray start` printed, such as head:6379.",
        )
    check_reachable(where, settings.ray.connect_timeout_s)
    at_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(where, configure_logging=False, logging_level=logging.ERROR, log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise ClusterUnavailable(f"The Ray cluster at {where} cannot be used: {error}") from error
    finally:
        if callable(at_sigterm) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, at_sigterm)  # Ray puts in its own, by which a run would not end as it should


def check_reachable(where: str, timeout_s: float) -> None:
    """Raises ClusterUnavailable when nothing that speaks gRPC (or, for http://, TCP) answers there in time."""
    if where == "auto":
        return
    parts = urlsplit(where if "://" in where else f"gcs://{where}")
    try:
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if host is None or port is None:
        raise ClusterUnavailable(f"{where!r} is not an address of a Ray cluster.", "Give it as host:port, head:6379.")
    try:
        socket.create_connection((host, port), timeout_s).close()
    except OSError as error:
        raise ClusterUnavailable(f"Nothing answers at {where}: {error.strerror or error}.") from error
    if parts.scheme in ("gcs", "ray") and os.environ.get("RAY_USE_TLS", "0") in ("", "0"):
        import grpc  # type: ignore[import-untyped]

        with grpc.insecure_channel(f"{host}:{port}") as channel:
            try:
                grpc.channel_ready_future(channel).result(timeout_s)
            except grpc.FutureTimeoutError as error:
                message = f"What listens at {where} is no Ray cluster, or it does not answer within {timeout_s:g} s."
                raise ClusterUnavailable(message) from error


def check_fits(nodes: Sequence[Mapping[str, float]], wanted: Mapping[str, float]) -> None:
    """Raises ClusterUnavailable unless one of the nodes has all that is wanted, were it idle.

    `nodes` gives the total resources of each living node as Ray names them (CPU, GPU, memory in bytes).
    """
    needed = {name: amount for name, amount in wanted.items() if amount}
    if any(all(node.get(name, 0.0) >= amount for name, amount in needed.items()) for node in nodes):
        return
    most = {name: max((node.get(name, 0.0) for node in nodes), default=0.0) for name in needed}
    raise ClusterUnavailable(
        f"No node of the Ray cluster has {_told(needed)}; of {len(nodes)} nodes the most is {_told(most)}.",
        "Add such a node, or lower what is asked for.",
    )


def _told(resources: Mapping[str, float]) -> str:
    amounts = {
        name: f"{amount / 2**30:.1f} GiB" if name == "memory" else f"{amount:g}" for name, amount in resources.items()
    }
    return " and ".join(f"{amount} {name}" for name, amount in amounts.items())
