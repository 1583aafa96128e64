"""The workload as a plain Ray Data pipeline: binary files, a pool of actors that hold the model, Parquet.

python -m benchmarks.peers.ray_data images FOLDER OUT EVENTS HOME --workers 2 --threads 1
"""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from benchmarks.peers.options import Options, options
from benchmarks.peers.work import TASKS, Worker


class Actor(Worker):
    """The worker, on Arrow blocks."""

    def __call__(self, batch: pa.Table) -> pa.Table:  # type: ignore[override]
        """Columns `path` and those of the answer."""
        paths = batch["path"].to_pylist()
        answers: list[dict[str, Any]] = super().__call__(paths, batch["bytes"].to_pylist())
        columns = pa.array(answers, self._task.answer).flatten()
        names = [field.name for field in self._task.answer]
        return pa.table([paths, *columns], ["path", *names])


def run(chosen: Options) -> None:
    """Run the pipeline on a Ray of its own; with `tolerant`, a block that fails is dropped."""
    import ray

    ray.init(num_cpus=chosen.cores, include_dashboard=False, log_to_driver=False, configure_logging=False)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    if chosen.tolerant:
        context.max_errored_blocks = -1
    files = ray.data.read_binary_files(chosen.folder, include_paths=True)
    answers = files.map_batches(
        Actor,
        fn_constructor_args=(chosen.task, chosen.home, chosen.threads, chosen.events),
        batch_size=TASKS[chosen.task].batch,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=chosen.workers),
        num_cpus=(chosen.cores - 1) / chosen.workers,  # a task that reads or writes asks for a whole one
    )
    answers.write_parquet(chosen.out)
    ray.shutdown()


if __name__ == "__main__":
    run(options(__doc__))
