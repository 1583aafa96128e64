"""What a partition's page in Dagster shows: pictures and figures that stay, and the reason where there is nothing."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np
import pytest
from PIL import Image

from media_assets.engine.contract import Prepared
from media_assets.orchestration import mirror
from media_assets.orchestration.partitions import add_partitions, partition_of
from media_assets.orchestration.quality import ITEMS
from media_assets.stages.frames import Frames
from resources.errors import StorageFailed, Truncated, UpstreamFailed, remedy_of
from resources.ingest.discovery import discover
from resources.ingest.uploads import Upload
from resources.library import Library
from resources.settings import Index
from tests.local import DECODED, Local

PICTURE = "picture: contact sheet"


@pytest.fixture
def local(library: Library, tmp_path: Path) -> Iterator[Local]:
    """A photo, its copy, another photo, and one whose upload broke off; nothing has been made of them."""
    folder = tmp_path / "media"
    folder.mkdir()
    rng = np.random.default_rng(5)
    for name in ("a.jpg", "c.jpg", "d.jpg"):
        Image.fromarray(rng.integers(0, 255, (12, 16, 3), dtype=np.uint8)).resize((320, 240)).save(folder / name)
    (folder / "b.jpg").write_bytes((folder / "a.jpg").read_bytes())
    (folder / "d.jpg").write_bytes((folder / "d.jpg").read_bytes()[:300])  # within its tables
    uploads = [found for found in discover([folder]) if isinstance(found, Upload)]
    ids = library.registry.add(uploads)
    with dg.DagsterInstance.ephemeral() as instance:
        add_partitions(instance, library.settings, ids)
        yield Local(library, instance, ids)


def latest(local: Local, media_id: str, asset: str = "frames") -> dg.AssetMaterialization:
    """The last materialization of an asset of an item."""
    wanted = dg.AssetRecordsFilter(dg.AssetKey(asset), asset_partitions=[media_id])
    (record,) = local.instance.fetch_materializations(wanted, limit=1).records
    assert record.asset_materialization is not None
    return record.asset_materialization


def told(event: dg.AssetMaterialization | dg.AssetObservation) -> dict[str, Any]:
    """Metadata as plain values."""
    return {name: entry.value for name, entry in event.metadata.items()}


def test_a_backfill_of_what_is_there_keeps_pictures_and_figures(local: Local) -> None:
    """Given a photo that was computed with a picture, when its partition is materialized again, then the latest event
    says that it was reused and shows the same picture and figures."""
    first, *_, last = local.ids
    local.run(*DECODED)
    before = told(latest(local, first))
    assert before[PICTURE].startswith("![contact sheet](data:image/")
    assert before["stills"] == 1
    again = local.run(*DECODED)
    after = told(local.made(again, "frames")[first])
    assert after.pop("how") == "reused"
    before.pop("how")
    del before["seconds"], after["seconds"]  # of the decoding alone, and of all of the asset
    assert after == before
    third = local.made(local.run(*DECODED), "frames")
    assert told(third[first])[PICTURE] == before[PICTURE]
    assert last not in third


def test_a_copy_shows_the_pictures_of_its_twin(local: Local, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given a photo and its copy, in the same run or in a later one, then the copied frames show the twin's picture."""
    original, copy = local.ids[:2]
    local.run(*DECODED, keys=[original])
    local.run(*DECODED, keys=[copy])
    assert told(latest(local, copy))["copied from"] == original
    assert told(latest(local, copy))["how"] == "copied"
    assert told(latest(local, copy))[PICTURE] == told(latest(local, original))[PICTURE]
    with local.library.database.engine.begin() as connection:
        connection.exec_driver_sql("delete from outcomes")
    # Within one lot, whose events are not in the log yet.
    monkeypatch.setattr(mirror, "LONGEST_S", 600.0)
    made = local.made(local.run(*DECODED, keys=[original, copy]), "frames")
    hows = {event.metadata["how"].value for event in made.values()}
    assert hows == {"computed", "copied"}
    assert told(made[original])[PICTURE] == told(made[copy])[PICTURE]


def test_pictures_of_another_version_are_not_carried_over(local: Local, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given frames of an older version in the event log, when those of today were finished by a run that died before
    it told, then the next run tells of them without the older picture."""
    item = local.ids[0]
    local.run(*DECODED, keys=[item])
    monkeypatch.setattr(Frames, "code_version", "of tomorrow")
    monkeypatch.setattr(mirror.Mirror, "_write", lambda *_: None)
    local.run(*DECODED, keys=[item])
    monkeypatch.undo()
    monkeypatch.setattr(Frames, "code_version", "of tomorrow")
    result = local.run(*DECODED, keys=[item])
    (event,) = local.made(result, "frames").values()
    assert event.metadata["how"].value == "reused"
    assert PICTURE not in event.metadata


def test_a_list_of_what_is_there_and_told_writes_nothing(local: Local, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given items that are finished, when a run meets them in its list, then an event is written of the one whose run
    died before it told, and of no other."""
    untold, *rest = local.ids[:3]
    with monkeypatch.context() as dying:
        dying.setattr(mirror.Mirror, "_write", lambda *_: None)
        local.run(*DECODED, keys=[untold])
    local.run(*DECODED, keys=rest)
    assert set(local.made(local.run(*DECODED, keys=[untold, *rest]), "frames")) == {untold}
    assert local.made(local.run(*DECODED, keys=[untold, *rest]), "frames") == {}


def test_a_failed_partition_says_why_and_what_to_do(local: Local) -> None:
    """Given an upload that broke off, then the asset's partition is observed with the error and its remedy, and so is
    what waits for it; a run that meets it again adds nothing, a backfill says it once more."""
    broken = local.ids[3]
    local.run(*DECODED, keys=[broken])
    (observed,) = local.seen(broken, "media")
    record = local.library.outcomes.load([broken])[broken, "media"]
    assert told(observed) == {
        "status": "quarantined",
        "error class": Truncated.code,
        "error": record.error,
        "what to do": Truncated.remedy,
        "attempts": 1,
        "version": record.version,
    }
    (waiting,) = local.seen(broken, "frames")
    assert told(waiting)["error class"] == UpstreamFailed.code
    assert told(waiting)["what to do"] == UpstreamFailed.remedy
    assert record.error in told(waiting)["error"]
    local.run(*DECODED, keys=[broken])
    assert [len(local.seen(broken, name)) for name in DECODED] == [1, 1, 1]
    local.run(*DECODED)
    assert [len(local.seen(broken, name)) for name in DECODED] == [2, 2, 2]
    assert told(local.seen(broken, "media")[0])["error"] == record.error
    assert local.seen(local.ids[0], "media") == []
    assert broken not in local.instance.get_materialized_partitions(dg.AssetKey("media"))


def test_every_attempt_says_when_the_next_is_due(local: Local, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given a stage that fails in a way that may pass, then each attempt is observed, with the time of the next."""
    item = local.ids[0]

    def fails(*_: Any) -> Prepared[None]:
        raise StorageFailed("the disk is full")

    monkeypatch.setattr(Frames, "prepare", fails)
    for attempt in (1, 2):
        local.run(*DECODED, keys=[item])
        seen = local.seen(item, "frames")
        assert len(seen) == attempt
        assert told(seen[0])["attempts"] == attempt
        assert told(seen[0])["status"] == "retryable"
        assert told(seen[0])["what to do"] == StorageFailed.remedy
        assert told(seen[0])["retry at"] > datetime.now(UTC).timestamp()


def test_buckets_are_observed_with_their_failed_items(local: Local) -> None:
    """Given partitions that are buckets, then the bucket of a failed item says how many failed, which and why."""
    local.library.settings = local.library.settings.model_copy(
        update={"partitions": "bucket", "index": Index(buckets=64)}
    )
    broken = local.ids[3]
    bucket = partition_of(broken, local.library.settings)
    buckets = Local(local.library, local.instance, [bucket])
    buckets.run("media")
    (observed,) = buckets.seen(bucket, "media")
    assert told(observed)["failed"] == 1
    assert told(observed)["error classes"] == {Truncated.code: 1}
    rows = observed.metadata["failed items"]
    assert isinstance(rows, dg.TableMetadataValue)
    (row,) = rows.records
    assert row.data["media_id"] == broken
    assert row.data["what_to_do"] == Truncated.remedy
    buckets.run("media", keys=[broken])
    assert len(buckets.seen(bucket, "media")) == 1


def test_a_run_does_not_say_that_its_checks_are_missing(local: Local) -> None:
    """Given a run that was asked for a check, then the check is evaluated and no line tells of an expected output."""
    check = dg.AssetCheckKey(dg.AssetKey("media"), ITEMS)
    result = local.run("media", checks=[check])
    (evaluation,) = result.get_asset_check_evaluations()
    assert (evaluation.asset_check_key, evaluation.passed) == (check, False)
    assert evaluation.target_materialization_data is not None
    assert evaluation.target_materialization_data.run_id == result.run_id
    lines = [entry.message for entry in local.instance.all_logs(result.run_id)]
    assert not [line for line in lines if "expected outputs" in line]


def test_every_class_has_its_remedy() -> None:
    """Given a class that items end in, then its own remedy is found; an unknown one is a defect to report."""
    assert remedy_of("truncated") == Truncated.remedy
    assert remedy_of("storage_failed") == StorageFailed.remedy
    assert remedy_of("of another version") == "Report this with the run id."
