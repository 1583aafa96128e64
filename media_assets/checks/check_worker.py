"""The program of a checker process: reads tables from its pipe, checks one at a time, answers with a line of JSON.

Started as `python -P -m media_assets.checks.check_worker PARENT_PID`. A request is a line of JSON that names the asset,
then two Arrow streams, its rows and those of `media`. The answer is `{"report": …}` or `{"error": …}`.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from dataclasses import asdict

import pyarrow as pa

from resources.compute.process import die_with
from resources.errors import printable
from resources.faults import fault


def main(parent: int) -> None:
    """Serve requests until the parent closes the pipe."""
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not get between the answers
    die_with(parent)
    fault("checker.start")
    _prepare()
    while line := requests.readline():
        table, media = (pa.ipc.open_stream(requests).read_all() for _ in range(2))
        answers.write(_answer(json.loads(line)["asset"], table, media) + b"\n")
        answers.flush()


def _prepare() -> None:
    from media_assets.checks import expectations

    expectations.prepare()


def _answer(asset: str, table: pa.Table, media: pa.Table) -> bytes:
    from media_assets.checks.expectations import validate

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
