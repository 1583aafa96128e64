"""The program of a checker process: reads tables from its pipe, checks one at a time, answers with a line of JSON.

Started as `python -P -m media_assets.check_worker PARENT_PID`. A request is a line of JSON that names the asset, then
two Arrow streams, its rows and those of `media`. The answer is `{"report": …}` or `{"error": …}`.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import LazyLoader
from types import ModuleType

import pyarrow as pa

from resources.errors import printable
from resources.faults import fault
from resources.process import die_with, giving_way

NICENESS = 10
"""By how much its import gives way to the step's work. The checks do not: a step's end waits for them."""


DEFERRED = frozenset({"altair", "scipy.stats"})
"""What Great Expectations imports for plots and for expectations about distributions: a third of all it takes."""

ABSENT = frozenset({"boto3", "botocore", "google", "psycopg2", "shapely", "sqlalchemy"})
"""What it does without where it is not installed, and uses for tables elsewhere: a quarter of the rest."""


class Spared:
    """A finder of modules the checks do not need: some are imported at their first use, others are not there."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """The module as found on the path, to be loaded later; None leaves it to the other finders.

        Raises ModuleNotFoundError for those of `ABSENT`, as if they were not installed.
        """
        if name in ABSENT:
            raise ModuleNotFoundError(f"{name} is not used in a checker process", name=name)
        spec = PathFinder.find_spec(name, path, target) if name in DEFERRED else None
        if spec is not None and spec.loader is not None:
            spec.loader = LazyLoader(spec.loader)
        return spec


def main(parent: int) -> None:
    """Serve requests until the parent closes the pipe."""
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not get between the answers
    die_with(parent)
    fault("checker.start")
    # Nothing of what is imported will be garbage; to look for some meanwhile takes a sixth of the time.
    gc.disable()
    sys.meta_path.insert(0, Spared)
    giving_way(NICENESS, _prepare)
    gc.freeze()
    gc.enable()
    while line := requests.readline():
        table, media = (pa.ipc.open_stream(requests).read_all() for _ in range(2))
        answers.write(_answer(json.loads(line)["asset"], table, media) + b"\n")
        answers.flush()


def _prepare() -> None:
    from media_assets import expectations

    expectations.prepare()


def _answer(asset: str, table: pa.Table, media: pa.Table) -> bytes:
    from media_assets.expectations import validate

    try:
        return json.dumps({"report": asdict(validate(asset, table, media))}).encode()
    except Exception as error:  # noqa: BLE001 - the last line: the parent raises it, the process lives on
        trace = "\n".join(printable(line) for line in traceback.format_exc().splitlines())
        return json.dumps({"error": f"{type(error).__name__}: {printable(str(error))}\n{trace}"}).encode()


if __name__ == "__main__":
    try:
        main(int(sys.argv[1]))
    except (BrokenPipeError, KeyboardInterrupt):
        sys.exit(0)
