"""Jobs for the Ray executor, whose steps say which devices they see."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

import dagster as dg

from jobs.on_ray import executor
from media_assets.orchestration.grouping import groups
from media_assets.orchestration.groups import build_group
from resources.compute.needs import Needs, op_tags
from resources.library import Library
from resources.settings import Compute, Settings

ON_RAY = executor(Settings.load())
FOLDER = "MEDIA_TEST_FOLDER"
DEADLINE_S = 120.0
DECODE = replace(groups(Settings())[0], needs=Needs(cpus=1, memory_bytes=2**30))


def _say(name: str) -> None:
    file = Path(os.environ[FOLDER]) / f"{name}-{os.getpid()}"
    with file.open("a") as opened:
        opened.write(os.environ.get("CUDA_VISIBLE_DEVICES", "") + "\n")


@dg.op(tags=op_tags("decode", Needs(cpus=1, memory_bytes=2**30), Compute()))
def without_gpu() -> None:
    """Says what it sees."""
    _say("cpu")


@dg.op(tags=op_tags("analyse", Needs(cpus=1, gpus=0.5, memory_bytes=2**30), Compute()))
def with_gpu() -> None:
    """Says what it sees."""
    _say("gpu")


@dg.op(tags=op_tags("analyse", Needs(cpus=1, gpus=8, memory_bytes=2**30), Compute()))
def too_large() -> None:
    """Never runs."""


@dg.op(tags=op_tags("decode", Needs(cpus=1, memory_bytes=2**30), Compute()))
def endless() -> None:
    """Goes on until it is interrupted."""
    _say("endless")
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
def placed() -> None:
    """A step for a share of a GPU, and one for any node."""
    with_gpu()
    without_gpu()


@dg.job(executor_def=ON_RAY)
def oversized() -> None:
    """A step that any node can take, and one that no node can."""
    without_gpu()
    too_large()


def decode() -> dg.JobDefinition:
    """The decode group of the library of MEDIA_HOME."""
    library = Library.open()
    definitions = dg.Definitions(
        assets=[build_group(DECODE, library.settings, library.models)],
        jobs=[dg.define_asset_job("process_decode", dg.AssetSelection.groups(DECODE.name))],
        resources={"media": dg.ResourceDefinition(lambda _: library)},
        executor=ON_RAY,
    )
    return definitions.resolve_job_def("process_decode")
