"""Jobs for the Ray executor, whose steps say which devices they see."""

from __future__ import annotations

import os
import time
from pathlib import Path

import dagster as dg

from jobs.on_ray import executor
from resources.compute import Needs, op_tags
from resources.settings import Compute, Settings

ON_RAY = executor(Settings.load())
FOLDER = "MEDIA_TEST_FOLDER"
DEADLINE_S = 120.0


def _say(name: str) -> None:
    file = Path(os.environ[FOLDER]) / f"{name}-{os.getpid()}"
    with file.open("a") as opened:
        opened.write(os.environ.get("CUDA_VISIBLE_DEVICES", "") + "\n")


@dg.op(tags=op_tags("decode", Needs(cpus=1, memory_bytes=2**30), Compute()))
def without_gpu() -> None:
    """Says what it sees."""
    _say("cpu")


@dg.op(tags=op_tags("analyse", Needs(cpus=1, gpus=8, memory_bytes=2**30), Compute()))
def too_large() -> None:
    """Never runs."""


@dg.op(tags=op_tags("analyse", Needs(cpus=1, gpus=0.5, memory_bytes=2**30), Compute()))
def lasting() -> None:
    """Waits, the first time, for somebody to kill its node; the second time it ends."""
    _say("lasting")
    if len(list(Path(os.environ[FOLDER]).glob("lasting-*"))) == 1:
        time.sleep(DEADLINE_S)


@dg.op(tags=op_tags("decode", Needs(cpus=1, memory_bytes=2**30), Compute()))
def endless() -> None:
    """Goes on until it is interrupted, or until the second time."""
    _say("endless")
    if sum(len(file.read_text().splitlines()) for file in Path(os.environ[FOLDER]).glob("endless-*")) > 1:
        return
    try:
        time.sleep(DEADLINE_S)
    except BaseException:
        _say("interrupted")
        raise


@dg.job(executor_def=ON_RAY)
def waiting() -> None:
    """A step that has to be ended."""
    endless()


@dg.job(executor_def=ON_RAY)
def plain() -> None:
    """A step for any node."""
    without_gpu()


@dg.job(executor_def=ON_RAY)
def placed() -> None:
    """A step for a GPU that outlives its node, and one for any node."""
    lasting()
    without_gpu()


@dg.job(executor_def=ON_RAY)
def oversized() -> None:
    """A step that no node can take."""
    too_large()
