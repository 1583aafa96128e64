"""The mirror's own thread: what it writes, and that its errors reach the step."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import dagster as dg
import pytest

from media_assets.engine.events import How, Result
from media_assets.orchestration import mirror as module
from media_assets.orchestration.mirror import Mirror
from resources.records.outcome import Outcome, Status


class Storage:
    """An event storage that remembers what it was given, by whom, and may be out of order."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.stored: list[tuple[str, str]] = []
        self.threads: set[str] = set()

    def store_event_batch(self, entries: Sequence[dg.EventLogEntry]) -> None:
        self.threads.add(threading.current_thread().name)
        if self.error is not None:
            raise self.error
        for entry in entries:
            event: Any = entry.get_dagster_event()
            self.stored.append((event.asset_key.to_user_string(), event.partition))


def made(storage: Storage) -> Mirror:
    context: Any = SimpleNamespace(
        instance=SimpleNamespace(event_log_storage=storage),
        run=SimpleNamespace(run_id="run"),
        job_name="process_decode",
        op_handle=SimpleNamespace(name="decode"),
    )
    provenance: Any = SimpleNamespace(tags=lambda results: {result.media_id: {} for result in results})
    return Mirror(
        context,
        ["media", "frames"],
        provenance,
        lambda result, tags, extra: dg.AssetMaterialization(result.asset, partition=result.media_id),
    )


def result(media_id: str, asset: str) -> Result:
    return Result(media_id, asset, How.COMPUTED, Outcome(media_id, asset, "1", "1", Status.OK, 1, 1))


def test_all_is_written_beside_the_caller_inputs_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Given results in any order and lots of three, then each is stored once, lot by lot, in the order of the graph."""
    monkeypatch.setattr(module, "MOST", 3)
    storage = Storage()
    mirror = made(storage)
    for media_id, asset in [("a", "frames"), ("a", "media"), ("b", "media"), ("b", "frames")]:
        mirror.add(result(media_id, asset))
    mirror.close()
    assert storage.stored == [("media", "a"), ("media", "b"), ("frames", "a"), ("frames", "b")]
    assert threading.current_thread().name not in storage.threads


def test_what_cannot_be_written_is_raised_by_the_next_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Given a storage that refuses, then the next lot or the end raises its error, and no thread is left."""
    monkeypatch.setattr(module, "MOST", 1)
    mirror = made(Storage(ConnectionError("the database is gone")))
    mirror.add(result("a", "media"))
    with pytest.raises(ConnectionError, match="the database is gone"):
        mirror.add(result("b", "media"))
    with pytest.raises(ConnectionError, match="the database is gone"):
        mirror.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("mirror")]
