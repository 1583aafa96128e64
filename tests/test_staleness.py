"""What the UI marks as unsynced: what a rebuild would change, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest
from dagster._core.definitions.data_version import CachingStaleStatusResolver, StaleStatus  # as the UI's server does
from dagster._core.loader import LoadingContextForTest

from media_assets.definitions import build
from media_assets.orchestration.partitions import add_partitions
from resources.ingest.discovery import discover
from resources.ingest.uploads import Upload
from resources.library import Library
from tests.local import DECODED, Local
from tests.shelf import rebuild


@pytest.fixture
def local(library: Library, tmp_path: Path) -> Iterator[Local]:
    """Documents in different buckets, and one that is empty and fails."""
    (tmp_path / "media").mkdir()
    (tmp_path / "media" / "empty.txt").write_text("")
    with dg.DagsterInstance.ephemeral() as instance:
        made = Local(library, instance, [])
        for name in ("harbour", "oven", "orchard"):
            (tmp_path / "media" / f"{name}.txt").write_text(f"Words about the {name}.")
        made.ids.extend(upload(made, tmp_path / "media"))
        yield made


def upload(local: Local, path: Path) -> list[str]:
    """Register what is at a path; its media IDs, which are partitions then."""
    ids = local.library.registry.add([found for found in discover([path]) if isinstance(found, Upload)])
    add_partitions(local.instance, local.library.settings, ids)
    return ids


def unsynced(local: Local) -> dict[str, list[str]]:
    """Reasons by asset and partition of all that the UI would mark."""
    graph = build(local.library).resolve_asset_graph()
    resolver = CachingStaleStatusResolver(local.instance, graph, LoadingContextForTest(local.instance))
    buckets = [f"{bucket:03d}" for bucket in range(local.library.settings.index.buckets)]
    spanning: list[tuple[str, str | None]] = [("near_duplicates", None)]
    spanning += [(name, bucket) for name in ("catalog", "index_shard") for bucket in buckets]
    spanning += [(name, key) for name in DECODED for key in local.ids]
    marked = {}
    for name, partition in spanning:
        key = dg.AssetKey(name)
        if resolver.get_status(key, partition) is StaleStatus.STALE:
            causes = resolver.get_stale_causes(key, partition)
            marked[f"{name} {partition or ''}".strip()] = [f"{cause.reason} {cause.dependency}" for cause in causes]
    return marked


def test_nothing_is_marked_after_a_rebuild(local: Local, tmp_path: Path) -> None:
    """Given a library with a failed item, when it is rebuilt, then all is in sync, also after a backfill that finds
    everything there; a new upload marks what spans items, and the next rebuild clears the mark."""
    local.run(*DECODED, keys=local.ids)
    assert rebuild(local.library, local.instance)
    assert unsynced(local) == {}
    local.run(*DECODED)
    assert not rebuild(local.library, local.instance)
    assert unsynced(local) == {}
    new = tmp_path / "media" / "tram.txt"
    new.write_text("Words about the tram.")
    (added,) = upload(local, new)
    local.run(*DECODED, keys=[added])
    local.ids.append(added)
    assert set(unsynced(local)) == {"near_duplicates"}  # Dagster knows of no items of buckets
    assert rebuild(local.library, local.instance)
    assert unsynced(local) == {}


def test_a_bucket_that_is_asked_for_is_told_of(local: Local) -> None:
    """Given a rebuilt library, when somebody materializes a bucket again, then it is told of, as unchanged and with the
    version it had: a backfill of it is done. The planner's rebuild tells of what changed alone."""
    local.run(*DECODED, keys=local.ids)
    rebuild(local.library, local.instance)
    before = last(local, "catalog", "000")
    definitions = build(local.library)
    chosen = [dg.AssetKey("catalog"), dg.AssetKey("index_shard")]
    asked = definitions.get_implicit_global_asset_job_def().get_subset(asset_selection=set(chosen))
    result = asked.execute_in_process(instance=local.instance, partition_key="000")
    assert not [entry for entry in local.instance.all_logs(result.run_id) if "expected outputs" in entry.message]
    made = result.asset_materializations_for_node("rebuild_buckets")
    assert [(event.asset_key, event.partition) for event in made] == [(key, "000") for key in chosen]
    assert [event.metadata["changed"].value for event in made] == [False, False]
    after = last(local, "catalog", "000")
    assert (after.tags or {})["dagster/data_version"] == (before.tags or {})["dagster/data_version"]
    planned = definitions.resolve_job_def("rebuild").execute_in_process(
        instance=local.instance, asset_selection=chosen, partition_key="000"
    )
    assert planned.asset_materializations_for_node("rebuild_buckets") == []


def last(local: Local, asset: str, partition: str) -> dg.AssetMaterialization:
    """The last materialization of a partition."""
    wanted = dg.AssetRecordsFilter(dg.AssetKey(asset), asset_partitions=[partition])
    (record,) = local.instance.fetch_materializations(wanted, limit=1).records
    assert record.asset_materialization is not None
    return record.asset_materialization
