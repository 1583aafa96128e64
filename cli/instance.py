"""The Dagster instance of a library: its home folder, its environment, and an open instance."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.executors import instance_file, pool_limits
from resources.files.local import made, replacing
from resources.library import Library
from resources.settings import HOME_VARIABLE

if TYPE_CHECKING:
    from dagster import DagsterInstance

PROJECT = Path(__file__).parents[1]
_NOT_CAPTURED = {
    "module": "dagster._core.storage.noop_compute_log_manager",
    "class": "NoOpComputeLogManager",
    "config": {},
}


def prepare_environment(library: Library, database_url: str | None = None) -> Path:
    """Write <home>/dagster/dagster.yaml and set the variables child processes read; returns that folder.

    `database_url` is the library's own unless given. Raises FolderUnusable.
    """
    folder = made(library.settings.home / "dagster")
    _put(instance_file(library.settings).read_bytes(), folder / "dagster.yaml")
    os.environ["DAGSTER_HOME"] = str(folder)
    os.environ["MEDIA_DATABASE_URL"] = database_url or library.database.url
    os.environ[HOME_VARIABLE] = str(library.settings.home)
    golden = library.settings.golden
    if golden and Path(golden).exists():  # the child's working directory is another one
        os.environ["MEDIA_GOLDEN"] = str(Path(golden).absolute())
    return folder


def _put(data: bytes, path: Path) -> None:
    """Have `data` in the file, which others may be reading: of one half written, Dagster takes its own defaults."""
    if path.exists() and path.read_bytes() == data:
        return
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def open_instance(library: Library) -> DagsterInstance:
    """The Dagster instance for runs in this very process.

    What such runs print goes where it always did. To keep it for the UI as well, Dagster would start four processes
    per run, and what reaches the terminal would come through two of them.
    """
    from dagster import DagsterInstance
    from dagster._core.instance.ref import InstanceRef  # an instance with other settings has no public way

    logging.getLogger().addFilter(_is_no_retry)
    folder = str(prepare_environment(library))
    instance = DagsterInstance.from_ref(InstanceRef.from_dir(folder, overrides={"compute_logs": _NOT_CAPTURED}))
    _limit(instance, pool_limits(library.settings))
    return instance


def _is_no_retry(record: logging.LogRecord) -> bool:
    """Dagster says each of its tries to reach a lost database in three lines; its error at their end says it once."""
    return not str(record.msg).startswith("Retrying failed database")


def limit_pools(library: Library) -> None:
    """Let as many runs into the pools of GPU work as this machine has devices for; nothing to do where it has none."""
    if limits := pool_limits(library.settings):
        from dagster import DagsterInstance

        with DagsterInstance.from_config(str(prepare_environment(library))) as instance:
            _limit(instance, limits)


def _limit(instance: DagsterInstance, limits: Mapping[str, int]) -> None:
    for name, limit in limits.items():
        instance.event_log_storage.set_concurrency_slots(name, limit)
