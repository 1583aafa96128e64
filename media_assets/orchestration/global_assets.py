"""Assets that span items: the catalog and the index shards per bucket, and the near-duplicate groups."""

import hashlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from typing import Any

import dagster as dg

from media_assets import schemas
from media_assets.orchestration.grouping import LIBRARY
from media_assets.orchestration.provenance import LibraryProvenance
from media_assets.orchestration.quality import as_output
from resources.compute.needs import Needs, op_tags, stated
from resources.library import Library
from resources.records.outcomes import LIVE
from resources.settings import Settings

OWNERS = ["team:ml-platform"]
RECALL = "recall"
REBUILT = "rebuilt.digest"
REBUILT_MARK = "rebuilt_mark"
REBUILD_SECONDS = "rebuild_seconds"
REBUILD_LOCK = -2
"""Advisory lock of whoever rebuilds; folders of buckets are locked besides, against other databases."""
REBUILD = "rebuild"
"""The job of whoever wants the library up to date; other jobs materialize what somebody asked for."""
INPUTS = {
    "catalog": tuple(schemas.PER_MEDIA),
    "index_shard": ("embeddings",),
    "near_duplicates": ("media", "frames", "embeddings", "audio", "index_shard"),
}
SPANNING = frozenset(INPUTS)


def live_versions(library: Library) -> dict[str, dict[str, str]]:
    """Version of every live, finished item, by asset and media ID."""
    return read_live(library)[0]


def read_live(library: Library) -> tuple[dict[str, dict[str, str]], str]:
    """`live_versions` and their digest (see `library_digest`), from one look at the records."""
    found: dict[str, dict[str, str]] = {asset: {} for asset in schemas.PER_MEDIA}
    digest = hashlib.blake2b(digest_size=10)
    last = ""
    for media_id, asset, version in _hashed(library.outcomes.finished(), digest):
        last = media_id if media_id != last else last  # rows of one item come together: one text serves them all
        found[asset][last] = version
    return found, digest.hexdigest()


def by_bucket(live: Mapping[str, Mapping[str, str]], count: int) -> dict[int, dict[str, dict[str, str]]]:
    """`live_versions` split into buckets."""
    from media_assets.library.buckets import bucket_of

    split: dict[int, dict[str, dict[str, str]]] = {bucket: {asset: {} for asset in live} for bucket in range(count)}
    for asset, versions in live.items():
        for media_id, version in versions.items():
            split[bucket_of(media_id, count)][asset][media_id] = version
    return split


def library_digest(library: Library) -> str:
    """Digest of every live, finished item's versions: what the spanning assets are made from."""
    digest = hashlib.blake2b(digest_size=10)
    for _ in _hashed(library.outcomes.finished(), digest):
        pass
    return digest.hexdigest()


def _hashed(rows: Iterable[tuple[str, str, str]], digest: Any) -> Iterator[tuple[str, str, str]]:
    """The rows of assets there are, fed to `digest` on the way."""
    for row in rows:
        if row[1] in schemas.PER_MEDIA:
            digest.update("\t".join(row).encode() + b"\n")
            yield row


def rebuilt_digest(library: Library) -> str | None:
    """The `library_digest` of the last complete rebuild, or None."""
    path = library.store.root / REBUILT
    return path.read_text() if path.exists() else None


def library_changed(library: Library) -> bool:
    """Whether items came, went or changed since the last complete rebuild.

    Costs two index lookups while nothing happened at all, else one pass over the records.
    """
    mark, rebuilt = library.outcomes.library_mark(), rebuilt_digest(library)
    if rebuilt is None:
        return library.outcomes.exist()
    if mark == library.remembered(REBUILT_MARK):
        return False
    if library_digest(library) != rebuilt:
        return True
    library.remember(REBUILT_MARK, mark)
    return False


def needs_of_rebuild(settings: Settings) -> Needs:
    """What the step that makes the spanning assets asks for."""
    return stated(settings.compute, LIBRARY, Needs(cpus=2))


def build_global_assets(settings: Settings) -> list[dg.AssetsDefinition]:
    """The bucket assets and `near_duplicates` of one installation."""
    keys = [f"{bucket:03d}" for bucket in range(settings.index.buckets)]
    buckets = dg.StaticPartitionsDefinition(keys)
    needs = needs_of_rebuild(settings)

    @dg.multi_asset(
        name="rebuild_buckets",
        specs=[
            dg.AssetSpec(
                "catalog",
                deps=list(INPUTS["catalog"]),
                skippable=True,
                group_name=LIBRARY,
                kinds={"parquet", "duckdb"},
                owners=OWNERS,
                description="Per-media tables compacted into one Parquet file per asset and bucket.",
                partitions_def=buckets,
            ),
            dg.AssetSpec(
                "index_shard",
                deps=list(INPUTS["index_shard"]),
                skippable=True,
                group_name=LIBRARY,
                kinds={"faiss"},
                owners=OWNERS,
                description="One FAISS shard per bucket and vector space, built aside, checked for recall, swapped in.",
                partitions_def=buckets,
            ),
            dg.AssetSpec(
                "near_duplicates",
                deps=list(INPUTS["near_duplicates"]),
                skippable=True,
                group_name=LIBRARY,
                kinds={"parquet"},
                owners=OWNERS,
                description="Groups of exact, perceptual and semantic duplicates with their evidence.",
            ),
        ],
        # In the same step: a step that yields no output makes later steps of its run skip.
        check_specs=[dg.AssetCheckSpec(RECALL, asset="index_shard", description="Recall@10 against exact search.")],
        can_subset=True,
        backfill_policy=dg.BackfillPolicy.single_run(),
        op_tags=op_tags(LIBRARY, needs, settings.compute),
        pool=needs.pool_name,
        required_resource_keys={"media"},
    )
    def rebuild_buckets(context: dg.AssetExecutionContext) -> Iterator[Any]:
        library: Library = context.resources.media
        selected = {key.to_user_string() for key in context.selected_asset_keys}
        # Materialized alone, near_duplicates has no partitions.
        chosen = [int(key) for key in context.partition_keys] if selected - {"near_duplicates"} else []
        # While this run lives, it may write of items that were there when it began: a purge asks for its lease.
        with library.outcomes.lease(context.run.run_id):
            anew = context.job_name != REBUILD
            events = rebuild(library, context.instance, selected, chosen, anew)
            yield from map(as_output, events) if context.selected_asset_check_keys else events

    return [rebuild_buckets]


def rebuild(
    library: Library,
    instance: dg.DagsterInstance,
    selected: Set[str],
    chosen: Sequence[int],
    anew: bool = False,
) -> Iterator[Any]:
    """Make the `selected` spanning assets anew, of the buckets `chosen`; yields their events. Raises BucketBusy.

    A bucket in which nothing changed has an event only with `anew`: a backfill counts what its runs say.
    """
    from media_assets.library.buckets import BucketBusy

    start = time.monotonic()
    with library.database.exclusive(REBUILD_LOCK) as alone:
        if not alone:
            raise BucketBusy("Another run is rebuilding the library.")
        mark = library.outcomes.library_mark()
        versions, digest = read_live(library)
        live = by_bucket(versions, library.settings.index.buckets)
        read = {name for asset in selected for name in INPUTS[asset]} - SPANNING
        provenance = LibraryProvenance(instance, sorted(read), digest)
        if "catalog" in selected:
            yield from _catalog(library, {bucket: live[bucket] for bucket in chosen}, provenance, anew)
        if "index_shard" in selected:
            recalls: dict[str, float] = {}
            vectors = {bucket: live[bucket]["embeddings"] for bucket in chosen}
            yield from _index(library, vectors, recalls, provenance, anew)
            yield _recall_check(recalls, library.settings.index.min_recall)
        if "near_duplicates" in selected:
            yield _near_duplicates(library, versions, provenance)
        if selected == SPANNING and set(chosen) == set(live):
            library.store.write_bytes(library.store.root / REBUILT, digest.encode())
            library.remember(REBUILT_MARK, mark)
            library.remember(REBUILD_SECONDS, f"{time.monotonic() - start:.3f}")


def rebuild_seconds(library: Library) -> float | None:
    """Seconds the last complete rebuild took, or None before the first."""
    told = library.remembered(REBUILD_SECONDS)
    return None if told is None else float(told)


def _digest_of(versions: Mapping[str, Mapping[str, str]], assets: Iterable[str]) -> str:
    """Digest of the items and versions of these assets."""
    digest = hashlib.blake2b(digest_size=16)
    for asset in sorted(assets):
        for media_id, version in sorted(versions.get(asset, {}).items()):
            digest.update(f"{asset}\t{media_id}\t{version}\n".encode())
    return digest.hexdigest()


def _catalog(
    library: Library,
    live: Mapping[int, Mapping[str, Mapping[str, str]]],
    provenance: LibraryProvenance,
    anew: bool,
) -> Iterator[dg.AssetMaterialization]:
    from media_assets.library.buckets import Buckets, key
    from media_assets.library.catalog import compact

    Buckets(library.store, library.settings.index.buckets)
    for bucket, assets in live.items():
        report = compact(library.store, bucket, assets)
        is_changed = not all(part.unchanged for part in report.assets.values())
        if not (is_changed or anew):
            continue
        yield dg.AssetMaterialization(
            "catalog",
            partition=key(bucket),
            tags=provenance.tags(_digest_of(assets, INPUTS["catalog"]), INPUTS["catalog"]),
            metadata={
                "changed": is_changed,
                "dagster/row_count": sum(part.rows for part in report.assets.values()),
                "bytes": sum(part.bytes for part in report.assets.values()),
                "items": max((part.items for part in report.assets.values()), default=0),
                "left out": [f"{asset} of {item.media_id}: {item.reason}" for asset, item in report.skipped],
            },
        )


def _index(
    library: Library,
    live: Mapping[int, Mapping[str, str]],
    recalls: dict[str, float],
    provenance: LibraryProvenance,
    anew: bool,
) -> Iterator[dg.AssetMaterialization]:
    from media_assets.library.buckets import Buckets, key
    from media_assets.library.index_shard import build

    Buckets(library.store, library.settings.index.buckets)
    champion = library.models.spec("embedding").identity
    for bucket, versions in live.items():
        report = build(library.store, bucket, versions, library.settings.index.min_recall, champion)
        for name, space in report.spaces.items():
            recalls[f"{key(bucket)} {name}"] = space.recall
        if not (report.swapped or anew):
            continue
        metadata: dict[str, Any] = {"changed": report.swapped, "build": report.build}
        for name, space in report.spaces.items():
            metadata |= {
                f"{name} vectors": space.vectors,
                f"{name} index": space.factory,
                f"{name} recall@10": space.recall,
                f"{name} model": space.model,
                f"{name} stale items": len(space.stale_items),
            }
        tags = provenance.tags(report.build, INPUTS["index_shard"])
        yield dg.AssetMaterialization("index_shard", partition=key(bucket), metadata=metadata, tags=tags)


def _recall_check(recalls: Mapping[str, float], floor: float) -> dg.AssetCheckEvaluation:
    worst = min(recalls.values(), default=1.0)
    return dg.AssetCheckEvaluation(
        asset_key=dg.AssetKey("index_shard"),
        check_name=RECALL,
        passed=worst >= floor,
        metadata={"worst recall@10": worst, "floor": floor, "shards": dict(recalls)},
    )


def _near_duplicates(
    library: Library, live: Mapping[str, Mapping[str, str]], provenance: LibraryProvenance
) -> dg.AssetMaterialization:
    table = find_duplicates(library, live)
    methods = table.column("method").to_pylist()
    return dg.AssetMaterialization(
        "near_duplicates",
        tags=provenance.tags(_digest_of(live, INPUTS["near_duplicates"]), INPUTS["near_duplicates"]),
        metadata={
            "dagster/row_count": table.num_rows,
            "groups": len(set(table.column("group_id").to_pylist())),
            **{method: methods.count(method) for method in sorted(set(methods))},
        },
    )


def find_duplicates(library: Library, live: Mapping[str, Mapping[str, str]]) -> Any:
    """Find the groups over all live items and store them; returns the table. Raises BucketBusy."""
    from media_assets.library import near_duplicates
    from media_assets.library.buckets import exclusive

    with exclusive(library.store, near_duplicates.NAME):
        table = near_duplicates.find_in(library.store, live, [media_id for media_id, _, _ in library.items()])
        # It takes minutes on a large library: what was withdrawn meanwhile must not come back.
        states = library.registry.known(table.column("media_id").unique().to_pylist())
        gone = [media_id for media_id, state in states.items() if state != LIVE]
        table = near_duplicates.without(table, gone)
        library.store.write(near_duplicates.NAME, near_duplicates.FILE, table)
    return table
