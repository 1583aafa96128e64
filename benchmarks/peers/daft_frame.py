"""The workload as a plain Daft pipeline: paths, downloads, a class with the model in its own processes, Parquet.

python -m benchmarks.peers.daft_frame images FOLDER OUT EVENTS HOME --workers 2 --threads 1
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa

from benchmarks.peers.options import Options, options
from benchmarks.peers.work import TASKS, Worker


def run(chosen: Options) -> None:
    """Run the pipeline on Daft's own runner; with `tolerant`, rows of a batch that fails are null."""
    import daft  # type: ignore[import-not-found]

    task = TASKS[chosen.task]

    @daft.cls(use_process=True, max_concurrency=chosen.workers, on_error="ignore" if chosen.tolerant else "raise")
    class Model:
        def __init__(self) -> None:
            self.worker = Worker(chosen.task, chosen.home, chosen.threads, chosen.events)

        @daft.method.batch(  # type: ignore[untyped-decorator]
            return_dtype=daft.DataType.from_arrow_type(task.answer), batch_size=task.batch, unnest=True
        )
        def answer(self, path: daft.Series, data: daft.Series) -> Any:
            return pa.array(self.worker(path.to_pylist(), data.to_pylist()), task.answer)

    paths = sorted(str(path) for path in Path(chosen.folder).iterdir())
    frame = daft.from_pydict({"path": paths}).with_column("bytes", daft.col("path").download())
    frame.select("path", Model().answer(daft.col("path"), daft.col("bytes"))).write_parquet(chosen.out)


if __name__ == "__main__":
    run(options(__doc__))
