"""The keeper: the one Ray actor that decides which model servers are up."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from resources.compute.model_server import Limits, ModelServer, Recipe, Status
from resources.errors import ServingUnavailable

KEEPER = "keeper"
STATUS_TIMEOUT_S = 5.0
END_TIMEOUT_S = 10.0


class Keeper:
    """Opens servers, one request at a time: the body of a Ray actor. Its state is the cluster's own."""

    def __init__(self, namespace: str) -> None:
        self._namespace = namespace
        self._sizes: dict[str, int] = {}

    def open(self, recipe: Recipe, limits: Limits) -> bool:
        """See to it that the recipe's server is up, or starting; False when there is no room for it just now.

        Servers of the same slot with another digest are told to go once they are quiet.
        Raises ServingUnavailable for a model that is larger than the whole budget.
        """
        import ray

        budget = limits.memory_bytes
        if budget is not None and recipe.memory_bytes > budget:
            raise ServingUnavailable(
                f"{recipe.slot} holds {recipe.memory_bytes} bytes, more than serving.memory_bytes ({budget}).",
                "Raise serving.memory_bytes.",
            )
        servers = self._servers()
        if recipe.name in servers:
            handle, status = servers.pop(recipe.name)
            if status is None or not status.leaving:
                return True
            self._end(recipe.name, handle)
        if budget is not None and not self._made_room(servers, budget - recipe.memory_bytes):
            return False
        for name, (handle, _) in servers.items():  # also of one that is too busy to give its status
            if name.rpartition(":")[0] == recipe.slot:
                handle.retire.remote()
        actor: Any = ray.remote(ModelServer)
        actor.options(
            name=recipe.name,
            namespace=self._namespace,
            lifetime="detached",
            get_if_exists=True,
            num_cpus=limits.cpus,
            num_gpus=limits.gpus,
            max_restarts=0,
        ).remote(recipe, limits)
        self._sizes[recipe.name] = recipe.memory_bytes
        return True

    def statuses(self) -> dict[str, Status | None]:
        """Status of every server, by name; None for one that is still starting or is stuck."""
        return {name: status for name, (_, status) in self._servers().items()}

    def _servers(self) -> dict[str, tuple[Any, Status | None]]:
        import ray
        from ray.exceptions import ActorUnavailableError, RayError

        handles: dict[str, Any] = {}
        for entry in ray.util.list_named_actors(all_namespaces=True):
            if entry["namespace"] == self._namespace and entry["name"] != KEEPER:
                try:
                    handles[entry["name"]] = ray.get_actor(entry["name"], self._namespace)
                except ValueError:
                    continue  # gone meanwhile
        asked = {name: handle.status.remote() for name, handle in handles.items()}
        if not asked:
            return {}
        done, _ = ray.wait(list(asked.values()), num_returns=len(asked), timeout=STATUS_TIMEOUT_S)
        found: dict[str, tuple[Any, Status | None]] = {}
        for name, reference in asked.items():
            try:
                found[name] = handles[name], ray.get(reference) if reference in done else None
            except ActorUnavailableError:  # busy, or its connection broke: it is there, and may have to be told to go
                found[name] = handles[name], None
            except RayError:
                continue  # dead; its name is free
        return found

    def _made_room(self, servers: Mapping[str, tuple[Any, Status | None]], room: int) -> bool:
        """Whether the servers hold at most `room` bytes, after the least recently used quiet ones were ended."""
        import ray

        held = sum(status.memory_bytes if status else self._sizes.get(name, 0) for name, (_, status) in servers.items())
        quiet = [(name, handle, status) for name, (handle, status) in servers.items() if status and not status.calls]
        for name, handle, status in sorted(quiet, key=lambda server: -server[2].quiet_s):
            if held <= room:
                break
            if ray.get(handle.leave_if_quiet.remote(), timeout=STATUS_TIMEOUT_S):
                self._end(name, handle)
                held -= status.memory_bytes
        return held <= room

    def _end(self, name: str, handle: Any) -> None:
        """Kill a server and wait until its name is free."""
        import ray

        ray.kill(handle)
        deadline = time.monotonic() + END_TIMEOUT_S
        while time.monotonic() < deadline:
            try:
                ray.get_actor(name, self._namespace)
            except ValueError:
                return
            time.sleep(0.02)
