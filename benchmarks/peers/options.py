"""The command line that every variant of the comparison has."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

WARM_UP = 2
"""Files that ours processes before its clock starts: its models are loaded then, and two decoders started."""


@dataclass(frozen=True, slots=True)
class Options:
    """What a variant is asked to do.

    A `-plain` task calls the model's library itself, the others our adapter of it.
    `folder` holds the files and nothing else, `out` gets the answers as Parquet, `events` what each worker did;
    `home` has the models.
    """

    task: str
    folder: str
    out: str
    events: str
    home: str
    workers: int
    threads: int
    cores: int
    tolerant: bool


def options(description: str | None) -> Options:
    """Options of this process."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("images", "speech", "images-plain", "speech-plain"))
    for name in ("folder", "out", "events", "home"):
        parser.add_argument(name)
    parser.add_argument("--workers", type=int, default=1, help="processes that hold the model")
    parser.add_argument("--threads", type=int, default=1, help="threads of each model")
    parser.add_argument("--cores", type=int, default=2, help="cores the pipeline may count on")
    parser.add_argument("--tolerant", action="store_true", help="go on after an error, as far as the library can")
    return Options(**vars(parser.parse_args()))
