"""Dagster's records in Postgres, over connections that stay open.

Dagster's own storage opens a connection for each statement. A new one costs the server a process and both sides some
milliseconds, several times what the statement itself costs, and a run of one photo made hundreds of them.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from typing import Any, Self

import dagster as dg
import sqlalchemy as sa
from dagster._serdes import ConfigurableClassData
from dagster_postgres import DagsterPostgresStorage

from resources.files.local import private
from resources.records import embedded_postgres
from resources.records.database import KEEPALIVE
from resources.records.database_url import psycopg2_url
from resources.settings import Settings

_KEPT = 2  # idle connections a process keeps at most
_RECYCLE_S = 1800  # age at which one is replaced
_created: set[str] = set()
_engines: dict[tuple[str, int], sa.Engine] = {}
_lock = threading.Lock()


class PooledPostgresStorage(DagsterPostgresStorage):
    """Dagster's Postgres storage, whose three parts share the process's few connections.

    A connection is tried before it is handed out, so that a restart of the server costs no statement.
    """

    def __init__(self, postgres_url: str, inst_data: ConfigurableClassData | None = None) -> None:
        url = psycopg2_url(postgres_url)
        # Whether the tables are there needs to be asked once per process, not at every tick of a sensor.
        super().__init__(url, should_autocreate_tables=url not in _created, inst_data=inst_data)
        _created.add(url)
        engine = _engine(url)
        for part in (self._run_storage, self._event_log_storage, self._schedule_storage):
            part._engine = engine

    @classmethod
    def config_type(cls) -> dict[str, Any]:
        """`postgres_url`."""
        told = "URL of the database; default: that of the settings, which is the embedded server's"
        return {"postgres_url": dg.Field(dg.StringSource, is_required=False, description=told)}

    @classmethod
    def from_config_value(cls, inst_data: ConfigurableClassData | None, config_value: Mapping[str, Any]) -> Self:
        """The storage as dagster.yaml configures it. Raises BadSettings, DatabaseUnavailable, FolderUnusable."""
        return cls(config_value.get("postgres_url") or _of_settings(), inst_data)


def _of_settings() -> str:
    """The URL of the home's database, whose embedded server is started: for `dagster dev` and the like in a clone."""
    settings = Settings.load()
    return settings.database_url or embedded_postgres.serve(private(settings.home) / "postgres")


def _engine(url: str) -> sa.Engine:
    with _lock:
        key = url, os.getpid()  # connections must not be shared with a forked child
        if key not in _engines:
            _engines[key] = sa.create_engine(
                url,
                isolation_level="AUTOCOMMIT",
                pool_size=_KEPT,
                max_overflow=-1,  # beyond those kept, connections are closed after use, as without a pool
                pool_pre_ping=True,
                pool_recycle=_RECYCLE_S,
                connect_args=KEEPALIVE,
            )
        return _engines[key]
