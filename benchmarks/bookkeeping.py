"""What records and Dagster events cost per item and asset, at two sizes of the library, beside stock Dagster.

    python benchmarks/bookkeeping.py [--sizes 10000,100000] [--items 300] [--partitions bucket]

Stages that do nothing go through the real group step, engine, outcome records, storage and events, over items
scattered through a registry and a partition set of each size, on the embedded Postgres. Beside it, in the same
database: the same number of materializations yielded by a plain asset, with Dagster's own connections. With
buckets as partitions there is no stock way beside it.

Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import dagster as dg
from dagster._core.instance.ref import InstanceRef  # an instance with other settings has no public way

from cli.instance import open_instance, prepare_environment
from media_assets.engine.contract import Inputs, Prepared, Product, Stage
from media_assets.orchestration.grouping import Group
from media_assets.orchestration.groups import build_group
from media_assets.orchestration.partitions import MEDIA, add_partitions, explicit_batch_tags, range_tags
from media_assets.orchestration.quality import EXPECTATIONS, ITEMS
from resources.compute.needs import Needs
from resources.ingest.uploads import Upload
from resources.library import Library
from resources.models.registry import ModelRegistry
from resources.settings import Settings

ASSETS = ("media", "frames", "audio")


class Bare(Stage[None, None]):
    """A stage that makes an empty table."""

    code_version = "bare"

    def prepare(self, inputs: Inputs) -> Prepared[None]:  # noqa: ARG002
        """No units."""
        return Prepared()

    def assemble(self, inputs: Inputs, carry: Any, outputs: Mapping[str, None]) -> Product:  # noqa: ARG002
        """No rows."""
        sides = {name: schema.empty_table() for name, schema in self.side_schemas.items()}
        return Product(self.schema.empty_table(), sides)


class Media(Bare):
    """The first of the chain."""

    name = "media"


class Frames(Bare):
    """After `media`."""

    name = "frames"
    inputs = ("media",)


class Audio(Bare):
    """After `media`, too."""

    name = "audio"
    inputs = ("media",)


class BareGroup(Group):
    """A group of the bare stages."""

    def load(self, settings: Settings, models: ModelRegistry) -> list[Stage[Any, Any]]:
        """The bare stages."""
        return [kind(settings, models) for kind in (Media, Frames, Audio)]


class Clock:
    """Seconds and calls per part, measured by wrapping methods."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def wrap(self, owner: Any, method: str, part: str) -> None:
        """Count the time of `owner.method` as `part`."""
        call: Callable[..., Any] = getattr(owner, method)

        def timed(*arguments: Any, **named: Any) -> Any:
            start = time.perf_counter()
            try:
                return call(*arguments, **named)
            finally:
                self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - start

        setattr(owner, method, timed)


def grow(library: Library, instance: dg.DagsterInstance, size: int) -> list[str]:
    """Media IDs of `size` registered uploads, all partitions."""
    now = datetime.now(UTC)
    uploads = [Upload(f"s3://bucket/{n:07d}.jpg", "etag", 1000, now, "benchmark") for n in range(size)]
    keys = library.registry.add(uploads)
    add_partitions(instance, library.settings, keys)
    return keys


def ours(library: Library, instance: dg.DagsterInstance, keys: Sequence[str]) -> dict[str, float]:
    """Milliseconds per item and asset, whole and by part."""
    group = BareGroup("decode", (), Needs(), 100)
    assets = build_group(group, library.settings, library.models)
    selection = [dg.AssetKey(name) for name in ASSETS]
    checks = dg.AssetSelection.checks(
        *(dg.AssetCheckKey(key, name) for key in selection for name in (ITEMS, EXPECTATIONS))
    )
    definitions = dg.Definitions(
        assets=[assets],
        jobs=[dg.define_asset_job("bare", dg.AssetSelection.assets(*selection) - checks)],
        resources={"media": dg.ResourceDefinition(lambda _: library)},
        executor=dg.in_process_executor,
    )
    job = definitions.resolve_job_def("bare")
    clock = Clock()
    for method in ("claim_many", "end", "load"):
        clock.wrap(library.outcomes, method, "records")
    clock.wrap(instance, "get_latest_storage_id_by_partition", "provenance")
    clock.wrap(instance.event_log_storage, "store_event_batch", "events")
    work: dict[str, float] = {}
    clock.wrap(library.store, "write", "parquet (background threads)")
    start = time.perf_counter()
    result = job.execute_in_process(
        instance=instance,
        run_config={
            "ops": {"decode": {"config": {"keys": list(keys)}}},
            "loggers": {"console": {"config": {"log_level": "CRITICAL"}}},
        },
        tags=explicit_batch_tags(list(keys), library.settings),
    )
    work["whole"] = time.perf_counter() - start
    assert result.success
    for name in ("claim_many", "end", "load"):
        delattr(library.outcomes, name)
    delattr(library.store, "write")
    delattr(instance, "get_latest_storage_id_by_partition")
    delattr(instance.event_log_storage, "store_event_batch")
    tasks = len(keys) * len(ASSETS)
    return {name: 1000 * seconds / tasks for name, seconds in (work | clock.seconds).items()}


def stock(instance: dg.DagsterInstance, keys: Sequence[str]) -> float:
    """Milliseconds per materialization of a plain asset's step, on Dagster's own connections."""

    @dg.asset(partitions_def=dg.DynamicPartitionsDefinition(name=MEDIA), output_required=False)
    def plain() -> Iterator[dg.AssetMaterialization]:
        for key in keys:
            yield dg.AssetMaterialization("plain", partition=key)

    job = dg.Definitions(assets=[plain], jobs=[dg.define_asset_job("plain_job", [plain])]).resolve_job_def("plain_job")
    start = time.perf_counter()
    job.execute_in_process(
        instance=instance,
        tags=range_tags(keys[0], keys[0]),
        run_config={"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}},
    )
    return 1000 * (time.perf_counter() - start) / len(keys)


def main() -> None:
    """Measure, print a table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="10000,100000")
    parser.add_argument("--items", type=int, default=300)
    parser.add_argument("--partitions", choices=["media", "bucket"], default="media")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    figures: dict[str, Any] = {"items": arguments.items, "assets": len(ASSETS), "partitions": arguments.partitions}
    with tempfile.TemporaryDirectory(prefix="bookkeeping-") as folder:
        library = Library(Settings(home=Path(folder), partitions=arguments.partitions))
        with open_instance(library) as instance:
            for size in (int(text) for text in arguments.sizes.split(",")):
                started = time.perf_counter()
                keys = grow(library, instance, size)
                print(f"{size} uploads registered in {time.perf_counter() - started:.0f} s", flush=True)
                step = max(1, size // arguments.items)
                chosen = keys[::step][: arguments.items]
                library.outcomes.reset(chosen, finished=True)
                with library.database.engine.begin() as connection:
                    connection.exec_driver_sql("truncate outcomes, outcome_history")
                ours(library, instance, keys[1::step][:20])  # imports and connections
                figures[f"ms at {size}"] = {name: round(ms, 2) for name, ms in ours(library, instance, chosen).items()}
                if arguments.partitions == "media":
                    folder_of_instance = str(prepare_environment(library))
                    own = {"storage": {"postgres": {"postgres_url": {"env": "MEDIA_DATABASE_URL"}}}}
                    reference = InstanceRef.from_dir(folder_of_instance, overrides=own)
                    with dg.DagsterInstance.from_ref(reference) as dagsters_own:
                        figures[f"stock ms at {size}"] = round(stock(dagsters_own, chosen), 2)
                print({name: value for name, value in figures.items() if name.endswith(f" {size}")}, flush=True)
        library.close()
    versions = {name: version(name) for name in ("media-assets", "dagster", "sqlalchemy")}
    print(json.dumps({"name": "bookkeeping", **figures, "python": platform.python_version(), "versions": versions}))


if __name__ == "__main__":
    main()
