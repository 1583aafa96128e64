"""Jobs for the run launcher's tests, in a module that its workers can import."""

import os
import time
from pathlib import Path

import dagster as dg

LOADS: list[int] = []


@dg.op(config_schema={"folder": str, "seconds": dg.Field(float, default_value=0.0)})
def note(context: dg.OpExecutionContext) -> None:
    """Say which process this is and its how manieth run, then stay as long as asked."""
    LOADS.append(len(LOADS))
    folder = Path(context.op_config["folder"])
    (folder / context.run_id).write_text(f"{os.getpid()} {len(LOADS)}")
    end = time.monotonic() + context.op_config["seconds"]
    while time.monotonic() < end:
        time.sleep(0.05)


@dg.job(executor_def=dg.in_process_executor)
def toy() -> None:
    """One op."""
    note()
