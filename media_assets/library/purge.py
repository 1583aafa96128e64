"""Purging what many items share: catalog files, index shards and near-duplicates, without the items purged.

A rebuild that is under way holds the lock of its bucket; what it wrote before is rewritten here, and what it writes
after was read after the tombstones. Each step may be repeated.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import pyarrow.parquet as pq

from media_assets import schemas
from media_assets.library import near_duplicates
from media_assets.library.buckets import bucket_of, exclusive, key
from media_assets.library.catalog import compact
from media_assets.library.index_shard import INDEX, build, forget_previous
from resources.errors import MediaError
from resources.faults import fault
from resources.files.catalog_files import CATALOG, arrow_path, filesystem
from resources.library import Library

Live = Mapping[int, Mapping[str, Mapping[str, str]]]


def purge_shared(library: Library, media_ids: Sequence[str]) -> tuple[dict[str, int], list[str]]:
    """Rebuild the buckets of these items without them, and take them out of `near_duplicates`.

    Their uploads must be tombstones already. Returns counts, and what could not be done, in sentences.
    """
    counts = {"catalog_files": 0, "index_builds": 0, "near_duplicates": 0}
    problems: list[str] = []
    live = _live(library, {bucket_of(media_id, library.settings.index.buckets) for media_id in media_ids})
    for bucket, versions in live.items():
        _try(problems, lambda b=bucket, v=versions: _add(counts, "catalog_files", _catalog(library, b, v)))  # type: ignore[misc]
        fault("purge.after_catalog")
        _try(problems, lambda b=bucket, v=versions: _add(counts, "index_builds", _index(library, b, v)))  # type: ignore[misc]
        fault("purge.after_index")
    _try(problems, lambda: _add(counts, "near_duplicates", _duplicates(library, media_ids)))
    return counts, problems


def _add(counts: dict[str, int], name: str, count: int) -> None:
    counts[name] += count


def _try(problems: list[str], step: Callable[[], None]) -> None:
    try:
        step()
    except (MediaError, OSError) as error:
        problems.append(str(error))


def _live(library: Library, buckets: Collection[int]) -> Live:
    """Versions of the live items of these buckets, by bucket, asset and media ID."""
    found: dict[int, dict[str, dict[str, str]]] = {
        bucket: {asset: {} for asset in schemas.PER_MEDIA} for bucket in sorted(buckets)
    }
    for media_id, asset, version in library.outcomes.finished():
        bucket = bucket_of(media_id, library.settings.index.buckets)
        if bucket in found and asset in found[bucket]:
            found[bucket][asset][media_id] = version
    return found


def _catalog(library: Library, bucket: int, live: Mapping[str, Mapping[str, str]]) -> int:
    """Compact what was compacted before; returns how many files were written anew or deleted."""
    folder, name = library.store.root / CATALOG, f"bucket={key(bucket)}."
    if not folder.exists():
        return 0
    present = {asset: path for path in folder.iterdir() if (asset := path.name) in schemas.PER_MEDIA}
    touched = 0
    with exclusive(library.store, f"catalog-{key(bucket)}"):
        # No writer is alive while the lock is held: hidden files are of one that died.
        for path in [path for asset in present.values() for path in asset.glob(f"**/.{name}*")]:
            path.unlink(missing_ok=True)
            touched += 1
        # Of assets that the code no longer knows, nothing could be made anew.
        for path in [p for asset in folder.iterdir() if asset.name not in present for p in asset.glob(f"**/{name}*")]:
            path.unlink(missing_ok=True)
            touched += 1
    report = compact(library.store, bucket, live, sorted(present))
    return touched + sum(not part.unchanged for part in report.assets.values())


def _index(library: Library, bucket: int, live: Mapping[str, Mapping[str, str]]) -> int:
    """Build the shards without the items and keep no older build; returns how many builds were deleted."""
    if not (library.store.root / INDEX / key(bucket)).exists():
        return 0
    champion = library.models.spec("embedding").identity
    build(library.store, bucket, live["embeddings"], library.settings.index.min_recall, champion)
    return forget_previous(library.store, bucket)


def _duplicates(library: Library, media_ids: Sequence[str]) -> int:
    """Take the items out of the stored table; returns how many rows. The next rebuild groups the rest anew."""
    path = library.store.path(near_duplicates.NAME, near_duplicates.FILE)
    folder = library.store.root / near_duplicates.NAME
    if not folder.exists():
        return 0
    with exclusive(library.store, near_duplicates.NAME):
        for left in list(folder.glob(".*")):
            left.unlink(missing_ok=True)
        if not path.exists():
            return 0
        table = pq.ParquetFile(arrow_path(path), filesystem=filesystem(library.store)).read()
        kept = near_duplicates.without(table, media_ids)
        library.store.write(near_duplicates.NAME, near_duplicates.FILE, kept)
        return int(table.num_rows - kept.num_rows)
