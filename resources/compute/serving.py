"""Warm models: calls of a model that stays up on the Ray cluster, shared by runs and searches.

A call goes to the model's server (`resources.compute.model_server`) with its units in Ray's shared-memory object
store: on the other side NumPy arrays and Arrow buffers are read-only views of it, not copies. A server that died is
opened anew and the call made once more; one that gives no sign of life is killed first.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from resources.compute.keeper import KEEPER, Keeper
from resources.compute.model_server import Answer, Leaving, Limits, Recipe, Status
from resources.compute.ray_cluster import check_fits, connect, namespace
from resources.errors import ModelFailed, ServingUnavailable
from resources.settings import Settings

ROOM_POLL_S = 0.2
KEEPER_TIMEOUT_S = 60.0
TRIES = 2


class ServerDied(ModelFailed):
    """The server ended in the middle of a call, twice."""

    remedy = "An item may be killing the model; it is tried again by itself and then quarantined."


class _Gone(Exception):
    """The server of this handle is no more."""


class ServedModel:
    """A model on the cluster. One thread at a time may call it."""

    def __init__(self, recipe: Recipe, settings: Settings) -> None:
        self._recipe = recipe
        self._settings = settings
        serving = settings.serving
        self._limits = Limits(
            cpus=serving.cpus,
            gpus=serving.gpus,
            max_wait_s=serving.max_wait_ms / 1000,
            timeout_s=serving.timeout_s,
            load_timeout_s=serving.load_timeout_s,
            idle_s=serving.idle_s,
            memory_bytes=serving.memory_bytes,
        )
        self._server: Any = None
        self.device = ""

    def load(self) -> None:
        """See to it that the model is up and loaded. Raises ServingUnavailable, ModelTimeout, ModelUnavailable."""
        self._open()

    def infer(self, units: Sequence[Any]) -> Mapping[str, Any]:
        """Answers by unit ID; `device` then says where they were made.

        Raises what the model raised (memory exhaustion as MemoryError), ModelTimeout when it hung, ServerDied,
        ServingUnavailable.
        """
        for _ in range(TRIES):
            server = self._server or self._open()
            try:
                answer = self._call(server, units)
            except _Gone:
                self._server = None
                continue
            if answer.error is not None:
                raise answer.error
            self.device = answer.device
            return answer.answers
        raise ServerDied(f"The server of {self._recipe.slot} died in two calls on end.")

    def _open(self) -> Any:
        deadline = time.monotonic() + self._limits.load_timeout_s
        for _ in range(TRIES):
            try:
                self._server = self._opened(deadline)
            except _Gone:
                continue
            return self._server
        raise ServerDied(f"The server of {self._recipe.slot} died while it loaded.")

    def _opened(self, deadline: float) -> Any:
        """A handle of the loaded server. Raises _Gone when it ends meanwhile."""
        import ray

        connect(self._settings)
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
        check_fits(nodes, {"CPU": self._limits.cpus, "GPU": self._limits.gpus})
        while not _ask_keeper(self._settings, "open", self._recipe, self._limits):
            if time.monotonic() > deadline:
                raise ServingUnavailable(
                    f"The models in use leave no room for {self._recipe.slot}.", "Raise serving.memory_bytes."
                )
            time.sleep(ROOM_POLL_S)
        try:
            server = ray.get_actor(self._recipe.name, namespace(self._settings))
        except ValueError as error:
            raise _Gone from error
        ready: Any = server.ready.remote()
        done, _ = ray.wait([ready], timeout=max(0.0, deadline - time.monotonic()))
        if not done:
            ray.kill(server)
            limit = self._limits.load_timeout_s
            raise ServingUnavailable(
                f"{self._recipe.slot} was not placed and loaded within {limit:g} s; the cluster may be full.",
                "Free resources of the cluster, or raise serving.load_timeout_s.",
            )
        error = _result(ready)
        if isinstance(error, Leaving):
            raise _Gone
        if error is not None:
            raise error
        return server

    def _call(self, server: Any, units: Sequence[Any]) -> Answer:
        import ray

        # Put and not passed, since arguments of some kilobytes would travel inside the call.
        pending = server.call.remote(ray.put(list(units)))
        while not ray.wait([pending], timeout=self._settings.serving.health_s)[0]:
            self._expect_life(server)
        answer: Answer = _result(pending)
        if isinstance(answer.error, Leaving):
            raise _Gone
        return answer

    def _expect_life(self, server: Any) -> None:
        """Kill a server that cannot even say how it is. Its own limit ends a call of the model that hangs."""
        import ray

        alive = server.status.remote()
        if not ray.wait([alive], timeout=self._settings.serving.health_s)[0]:
            ray.kill(server)
            raise _Gone
        _result(alive)


def servers(settings: Settings) -> dict[str, Status | None]:
    """Status of every model server of the library, by name; None for one that does not answer.

    Raises ServingUnavailable.
    """
    connect(settings)
    found: dict[str, Status | None] = _ask_keeper(settings, "statuses")
    return found


def _ask_keeper(settings: Settings, method: str, *arguments: Any) -> Any:
    import ray

    where = namespace(settings)
    actor: Any = ray.remote(Keeper)
    options = {"namespace": where, "lifetime": "detached", "get_if_exists": True, "num_cpus": 0, "max_restarts": -1}
    for _ in range(TRIES):
        keeper = actor.options(name=KEEPER, **options).remote(where)
        with suppress(_Gone):
            return _result(getattr(keeper, method).remote(*arguments), KEEPER_TIMEOUT_S)
    raise ServingUnavailable("The keeper of the model servers died twice.")


def _result(reference: Any, timeout_s: float | None = None) -> Any:
    """The value of a reference. Raises _Gone when its actor is dead, and what the actor raised."""
    import ray
    from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

    try:
        return ray.get(reference, timeout=timeout_s)
    except RayActorError as error:
        raise _Gone from error
    except GetTimeoutError as error:
        raise ServingUnavailable(f"The Ray cluster did not answer within {timeout_s:g} s.") from error
    except RayTaskError as error:
        cause = error.cause
        raise (cause if isinstance(cause, ServingUnavailable) else ModelFailed(f"Ray: {error}")) from error
