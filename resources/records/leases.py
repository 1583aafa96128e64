"""Which runs are alive: each holds an advisory lock of the database for as long as its process lives."""

from __future__ import annotations

import hashlib
from contextlib import AbstractContextManager, ExitStack
from types import TracebackType
from typing import Self

import sqlalchemy as sa

from resources.records.database import LOCK_NAMESPACE


class Liveness:
    """Tells which runs are alive. Each lives as long as its database session holds an advisory lock."""

    def __init__(self, connection: sa.Connection) -> None:
        self._connection = connection

    def is_alive(self, run_id: str | None) -> bool:
        """Whether a process holds the lease of `run_id`."""
        if run_id is None:
            return False
        query = sa.text(
            "select exists (select from pg_locks where locktype = 'advisory' and classid = :space"
            " and objid = :key and objsubid = 2 and granted"
            " and database = (select oid from pg_database where datname = current_database()))"
        )
        values = {"space": LOCK_NAMESPACE, "key": _lock_key(run_id)}
        alive: bool = self._connection.execute(query, values).scalar_one()
        self._connection.commit()
        return alive


class Lease(AbstractContextManager["Lease"]):
    """An advisory lock of the database session, gone the moment the process dies."""

    def __init__(self, engine: sa.Engine, run_id: str) -> None:
        self._engine = engine
        self.run_id = run_id
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        connection = self._stack.enter_context(self._engine.connect())
        values = {"space": LOCK_NAMESPACE, "key": _signed(_lock_key(self.run_id))}
        connection.execute(sa.text("select pg_advisory_lock_shared(:space, :key)"), values)
        connection.commit()
        self.liveness = Liveness(connection)
        self._stack.callback(self._release, connection, values)
        return self

    @staticmethod
    def _release(connection: sa.Connection, values: dict[str, int]) -> None:
        connection.execute(sa.text("select pg_advisory_unlock_shared(:space, :key)"), values)
        connection.commit()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()


def _lock_key(run_id: str) -> int:
    return int.from_bytes(hashlib.blake2b(run_id.encode(), digest_size=4).digest())


def _signed(value: int) -> int:
    return value - (1 << 32) if value >= 1 << 31 else value
