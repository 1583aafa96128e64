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
DEADLINE_S = 60.0


def _say(name: str) -> None:
    (Path(os.environ[FOLDER]) / f"{name}-{os.getpid()}").write_text(os.environ.get("CUDA_VISIBLE_DEVICES", ""))


@dg.op(tags=op_tags("decode", Needs(cpus=1, memory_bytes=2**20), Compute()))
def without_gpu() -> None:
    """Says what it sees."""
    _say("cpu")


@dg.op(tags=op_tags("analyse", Needs(cpus=1, gpus=8, memory_bytes=2**20), Compute()))
def too_large() -> None:
    """Never runs."""


@dg.op(tags=op_tags("analyse", Needs(cpus=1, gpus=0.5, memory_bytes=2**20), Compute()))
def lasting() -> None:
    """Waits, the first time, for somebody to kill its node; the second time it ends."""
    _say("lasting")
    if len(list(Path(os.environ[FOLDER]).glob("lasting-*"))) == 1:
        time.sleep(DEADLINE_S)


@dg.job(executor_def=ON_RAY)
def placed() -> None:
    """A step for a GPU that outlives its node, and one for any node."""
    lasting()
    without_gpu()


@dg.job(executor_def=ON_RAY)
def oversized() -> None:
    """A step that no node can take."""
    too_large()
