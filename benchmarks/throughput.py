"""The whole graph through the engine, against a plain loop over the same models, and against one run per item.

All in one invocation, on the same files, so that only ratios matter:

    python benchmarks/throughput.py [FOLDER] [--items 40] [--single 10]

1. plain loop: for each file and stage, prepare, infer, assemble and write one item at a time, in one process;
   no records, no checks, no orchestration.
2. engine: the same stages through Dagster runs with outcome records and asset checks, in the same process.
   Both have processed one more file before their clock starts, so that imports and model loading are in neither.
3. one Dagster run per item: a new process per file that does what a run launcher's process does for one partition.

Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console

from cli.run import Work
from media_assets import schemas
from media_assets.engine.contract import Inputs, MediaItem, Memo, Stage, Unit
from media_assets.orchestration.grouping import groups
from resources.errors import Failure, MediaError, NotApplicable
from resources.ingest.discovery import discover
from resources.ingest.uploads import Upload
from resources.library import Library

PROJECT = Path(__file__).parents[1]
PARTS = tuple(schemas.PER_MEDIA)


class PlainLoop:
    """One item after the other through the bare stages."""

    def __init__(self, library: Library) -> None:
        self.library = library
        self.stages: list[Stage[Any, Any]] = [
            stage for group in groups(library.settings) for stage in group.load(library.settings, library.models)
        ]
        self.selected = frozenset(stage.name for stage in self.stages)

    def run(self, items: Sequence[MediaItem]) -> None:
        """Process every item; a bad one ends at its first error."""
        for item in items:
            memo = Memo()
            try:
                for stage in self.stages:
                    self._stage(stage, Inputs(item, self.library.store, "plain", self.selected, False, memo))
            except MediaError:
                continue

    def _stage(self, stage: Stage[Any, Any], inputs: Inputs) -> None:
        store = self.library.store
        try:
            prepared = stage.prepare(inputs)
        except NotApplicable:
            for side, schema in stage.side_schemas.items():
                store.write(stage.name, inputs.media_id, schema.empty_table(), side)
            store.write(stage.name, inputs.media_id, stage.schema.empty_table())
            return
        outputs: dict[str, Any] = {}
        units: list[Unit[Any]] = list(prepared.units)
        for first in range(0, len(units), stage.micro_batch):
            outputs.update(stage.infer(units[first : first + stage.micro_batch]))
        if any(isinstance(output, Failure) for output in outputs.values()):
            return
        product = stage.assemble(inputs, prepared.carry, outputs)
        for side, table in product.sides.items():
            store.write(stage.name, inputs.media_id, table, side)
        store.write(stage.name, inputs.media_id, product.table)

    def load(self) -> None:
        """Load every model."""
        for stage in self.stages:
            stage.load()


def chosen(folder: str, count: int) -> list[Upload]:
    """`count` files of the folder, the same in every invocation."""
    found = [upload for upload in discover([folder]) if isinstance(upload, Upload)]
    random.Random(7).shuffle(found)
    return found[:count]


def timed(call: Any) -> float:
    """Wall seconds of `call()`."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def plain(root: Path, uploads: Sequence[Upload], models: Any) -> float:
    """Seconds of the plain loop."""
    library = Library.open(root)
    library.__dict__["models"] = models
    loop = PlainLoop(library)
    loop.load()
    warm_up, *items = [MediaItem(u.media_id, u.uri, u.etag) for u in uploads]
    loop.run([warm_up])
    return timed(lambda: loop.run(items))


def engine(root: Path, uploads: Sequence[Upload], models: Any, console: Console) -> float:
    """Seconds of the engine through Dagster runs, the instance open and the models loaded before."""
    library = Library.open(root)
    library.__dict__["models"] = models
    work = Work(library, console, PARTS)
    try:
        work.run([uploads[0].uri])
        return timed(lambda: work.run([upload.uri for upload in uploads[1:]]))
    finally:
        library.close()


def one_run_per_item(root: Path, uploads: Sequence[Upload]) -> float:
    """Seconds of a process per item."""

    # The engine's run has named its own database in this process's environment.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MEDIA_", "DAGSTER_"))}

    def launch() -> None:
        for upload in uploads:
            command = [sys.executable, "-m", "cli.main", "run", upload.uri, "--home", str(root), "--json"]
            subprocess.run(command, cwd=PROJECT, check=True, capture_output=True, env=environment)

    return timed(launch)


def main() -> None:
    """Measure, print a table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", default=str(PROJECT / "samples" / "media"))
    parser.add_argument("--items", type=int, default=40)
    parser.add_argument("--single", type=int, default=10, help="items of the one-run-per-item variant; 0 leaves it out")
    parser.add_argument("--models", help="a home whose model cache is used, so that nothing is built in the clock")
    arguments = parser.parse_args()
    console = Console(stderr=True)
    uploads = chosen(arguments.folder, arguments.items + 1)
    with tempfile.TemporaryDirectory(prefix="throughput-") as folder:
        root = Path(folder)
        for name in ("plain", "engine", "single"):
            (root / name).mkdir()
            if arguments.models:
                (root / name / "models").symlink_to(Path(arguments.models, "models").resolve())
        models = Library.open(root / "plain").models
        seconds = {"plain loop": plain(root / "plain", uploads, models)}
        seconds["engine"] = engine(root / "engine", uploads, models, console)
        figures: dict[str, Any] = {
            "items": len(uploads) - 1,
            "plain_s": round(seconds["plain loop"], 2),
            "engine_s": round(seconds["engine"], 2),
            "ratio": round(seconds["plain loop"] / seconds["engine"], 3),
        }
        if arguments.single:
            single = uploads[1 : arguments.single + 1]
            alone = one_run_per_item(root / "single", single)
            figures["single_items"] = len(single)
            figures["single_s_per_item"] = round(alone / len(single), 2)
            figures["engine_s_per_item"] = round(seconds["engine"] / figures["items"], 2)
            figures["single_ratio"] = round(figures["single_s_per_item"] / figures["engine_s_per_item"], 2)
    for name, value in figures.items():
        print(f"{name:>20}  {value}")
    versions = {name: version(name) for name in ("media-assets", "dagster", "torch")}
    print(json.dumps({"name": "throughput", **figures, "python": platform.python_version(), "versions": versions}))


if __name__ == "__main__":
    main()
