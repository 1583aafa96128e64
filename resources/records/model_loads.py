"""Notes in the database that a process loads a model: one that dies meanwhile has tried no item."""

from __future__ import annotations

import logging
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import sqlalchemy as sa

from resources.records.tables import model_loads

KEPT_DAYS = 30
"""How long the note of a dead process is kept; nobody asks for it later than its items are claimed again."""
log = logging.getLogger(__name__)


class ModelLoads:
    """The notes of one process that works for one run."""

    def __init__(self, engine: sa.Engine, run_id: str) -> None:
        self._engine = engine
        self._key = {"run_id": run_id, "process": uuid.uuid4().hex}
        self._lock = threading.Lock()
        self._depth = 0

    @contextmanager
    def under_way(self) -> Iterator[None]:
        """Within this a model is loaded; several threads may, and a load may need another one."""
        self._step(1)
        try:
            yield
        finally:
            self._step(-1)

    def _step(self, change: int) -> None:
        with self._lock:
            before, self._depth = self._depth, self._depth + change
            if before and self._depth:
                return
            try:
                with self._engine.begin() as connection:
                    connection.execute(sa.text("set local synchronous_commit to off"))
                    self._note(connection) if self._depth else self._forget(connection)
            except sa.exc.DBAPIError as error:
                # Then a death counts as an attempt, as any other. The batch itself notices a database that is gone.
                log.warning("It could not be noted that a model is being loaded: %s", error.orig)

    def _note(self, connection: sa.Connection) -> None:
        too_old = model_loads.c.since < sa.func.now() - sa.func.make_interval(0, 0, 0, KEPT_DAYS)
        connection.execute(sa.delete(model_loads).where(too_old))
        connection.execute(sa.insert(model_loads).values(**self._key))

    def _forget(self, connection: sa.Connection) -> None:
        connection.execute(sa.delete(model_loads).filter_by(**self._key))


def died_loading(connection: sa.Connection, run_id: str | None) -> bool:
    """Whether a process of this run, which is dead, died while it loaded a model."""
    query = sa.select(sa.exists().where(model_loads.c.run_id == run_id))
    return bool(connection.execute(query).scalar())
