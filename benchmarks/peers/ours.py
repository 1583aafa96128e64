"""The workload through the engine, as `media-assets run` does it: Dagster runs, outcome records, asset checks.

    python -m benchmarks.peers.ours images FOLDER OUT EVENTS HOME

`HOME` is the library's; models found there are taken, and its `models.toml` counts. Pictures go through `media`,
`frames` and `embeddings`, which here reads no texts and shots, since pictures have none; clips through `media`,
`audio` and `transcript`. Two files are processed before the clock starts, so that the models are loaded and both
decoders have started.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import sqlalchemy as sa
from rich.console import Console

from benchmarks.peers.options import WARM_UP, Options, options
from benchmarks.peers.work import TASKS
from cli.run import Work
from media_assets import schemas
from media_assets.engine.contract import Inputs, Prepared
from media_assets.stages.embeddings import JOINT, VISUAL, Embeddings
from resources.library import Library

ASSETS = {"images": ("media", "frames", "embeddings"), "speech": ("media", "audio", "transcript")}
TWICE = """select count(*) from (select 1 from outcome_history where status in ('ok', 'not_applicable')
    group by media_id, asset having count(*) > 1) as again"""
CLAIMED_AGAIN = "select count(*) from outcomes where claim > 1"


def without_texts() -> None:
    """Let `embeddings` need no assets beside `media` and `frames`; those it misses are empty tables."""
    prepare = Embeddings.prepare
    there = ("media", "frames")
    none = {name: schemas.PER_MEDIA[name].empty_table() for name in Embeddings.inputs if name not in there}
    Embeddings.inputs = there  # type: ignore[assignment]

    def prepared(self: Embeddings, inputs: Inputs) -> Prepared[Any]:
        read = inputs.table

        def table(asset: str, side: str = "", columns: list[str] | None = None) -> pa.Table:
            return read(asset, side, columns) if asset in there else none[asset]

        inputs.table = table  # type: ignore[method-assign]
        return prepare(self, inputs)

    Embeddings.prepare = prepared  # type: ignore[method-assign]


def answers(library: Library, task: str) -> pa.Table:
    """What was stored of each file, in the columns of the other variants."""
    rows = []
    for media_id, uri, _ in library.items():
        if not library.store.exists(ASSETS[task][-1], media_id):
            continue
        found = library.store.read(ASSETS[task][-1], media_id).to_pylist()
        if task == "speech":
            rows.append({"path": uri, "text": " ".join(row["text"] for row in found)})
        else:
            vectors = {row["space"]: row["vector"] for row in found}
            rows.append({"path": uri, "joint": vectors[JOINT], "visual": vectors[VISUAL]})
    return pa.Table.from_pylist(rows, pa.schema([("path", pa.string()), *TASKS[task].answer]))


def run(chosen: Options) -> None:
    """Process the folder and write what came of it; what was done already is not done again."""
    if chosen.task == "images":
        without_texts()
    library = Library.open(chosen.home)
    work = Work(library, Console(stderr=True), ASSETS[chosen.task])
    paths = sorted(str(path) for path in Path(chosen.folder).iterdir())
    try:
        work.run(paths[:WARM_UP])
        started = time.monotonic()
        summary = work.run(paths[WARM_UP:])
        ended = time.monotonic()
        with library.database.engine.connect() as connection:
            twice = connection.execute(sa.text(TWICE)).scalar()
            again = connection.execute(sa.text(CLAIMED_AGAIN)).scalar()
        table = answers(library, chosen.task)
    finally:
        library.close()
    Path(chosen.out).mkdir(exist_ok=True)
    pq.write_table(table, Path(chosen.out, "ours.parquet"))
    names = [path.rpartition("/")[2] for path in paths[WARM_UP:]]
    line = {"pid": os.getpid(), "start_s": started, "end_s": ended, "names": names}
    said = {"finished_twice": twice, "claimed_again": again, "summary": asdict(summary)}
    Path(chosen.events, f"{os.getpid()}.jsonl").write_text(json.dumps({**line, **said}) + "\n")


if __name__ == "__main__":
    run(options(__doc__))
