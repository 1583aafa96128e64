"""The checker: a process of its own, beside the steps' process, that checks tables with Great Expectations.

The library takes seconds to import, and a check holds Python's lock for a tenth of a second and more; over there
neither is at the cost of the step. Tables go through a pipe as Arrow streams, a report comes back as a line of JSON.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa

from media_assets.checks.check_report import CheckReport
from resources.compute.process import fate, helper_environment
from resources.errors import printable

EXIT_WAIT_S = 2.0
_SAID_CHARACTERS = 2_000
_log = logging.getLogger(__name__)


class CheckerDied(RuntimeError):
    """The checker process ended before its answer."""


class Checker:
    """One process that checks one table at a time; started when first needed, replaced when it died. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: _Process | None = None
        # The process dies with the thread that started it (PR_SET_PDEATHSIG), so one lasting thread starts all.
        self._starter = ThreadPoolExecutor(1, "checker-starter")

    def warm(self) -> None:
        """Have the process started, so that it imports while the caller does its work; does not wait for it."""
        if self._lock.acquire(blocking=False):  # else it is at work
            try:
                with suppress(OSError):  # told by the first table
                    self._running()
            finally:
                self._lock.release()

    def validate(self, asset: str, table: pa.Table, media: pa.Table, limit_s: float) -> CheckReport:
        """What `expectations.validate` says of the table.

        A process that dies over it is replaced once. Raises CheckerDied when the second dies too, TimeoutError when the
        answer takes longer than `limit_s`, the start of the process included, and RuntimeError with the message and
        the traceback of whatever `expectations.validate` raised.
        """
        with self._lock:
            try:
                answer = self._ask(asset, table, media, limit_s)
            except CheckerDied as died:
                _log.warning("%s Another one takes its place.", died)
                answer = self._ask(asset, table, media, limit_s)
        if "error" in answer:
            raise RuntimeError(f"The rows of {asset} could not be checked: {answer['error']}")
        return CheckReport.of(answer["report"])

    def pid(self) -> int | None:
        """Process ID of the checker process, None while there is none."""
        process = self._process
        return process.pid if process is not None else None

    def close(self) -> None:
        """End the process; there will be no other."""
        self._starter.shutdown(wait=False)
        self._end()

    def _ask(self, asset: str, table: pa.Table, media: pa.Table, limit_s: float) -> dict[str, Any]:
        process = self._running()
        try:
            return process.ask(asset, table, media, limit_s)
        except BaseException:  # half a conversation: the next table needs another process
            self._end()
            raise

    def _running(self) -> _Process:
        if self._process is not None and not self._process.alive():
            self._end()
        if self._process is None:
            self._process = self._starter.submit(_Process).result()
        return self._process

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.end()


class _Process:
    """A checker process and its pipes."""

    def __init__(self) -> None:
        self._late = threading.Event()
        self._said = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - open as long as the process
        self._child = subprocess.Popen(
            [sys.executable, "-P", "-X", "faulthandler", "-m", "media_assets.checks.check_worker", str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            env=helper_environment(Path(__file__).parents[2]),
            start_new_session=True,
        )
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._requests = self._child.stdin
        self._answers = self._child.stdout

    @property
    def pid(self) -> int:
        """Process ID."""
        return self._child.pid

    def alive(self) -> bool:
        """Whether the process still runs."""
        return self._child.poll() is None

    def ask(self, asset: str, table: pa.Table, media: pa.Table, limit_s: float) -> dict[str, Any]:
        """Its answer on one table. Raises CheckerDied, TimeoutError."""
        # It kills the process, which ends a blocked write as well as a blocked read.
        alarm = threading.Timer(limit_s, self._give_up)
        alarm.daemon = True
        alarm.start()
        answer = b""
        try:
            self._send(asset, table, media)
            answer = self._answers.readline()
        except OSError:
            pass  # it is gone
        finally:
            alarm.cancel()
        if not answer.endswith(b"\n"):
            if self._late.is_set():
                raise TimeoutError(
                    f"The checker process gave no answer on {asset} within {limit_s:g} s (engine.infer_timeout_s)."
                )
            how = fate(self._child, EXIT_WAIT_S)
            raise CheckerDied(f"The checker process died on the rows of {asset} ({how}).{self._last_words()}")
        if words := self._last_words():
            _log.warning("The checker process answered on %s, and%s", asset, words)
        return json.loads(answer)  # type: ignore[no-any-return]

    def _send(self, asset: str, table: pa.Table, media: pa.Table) -> None:
        self._requests.write(json.dumps({"asset": asset}).encode() + b"\n")
        for one in (table, media):
            with pa.ipc.new_stream(self._requests, one.schema) as stream:
                stream.write_table(one)
        self._requests.flush()

    def _give_up(self) -> None:
        self._late.set()
        self._child.kill()

    def _last_words(self) -> str:
        """What it wrote to its standard error since the last answer, at most its end; empty for nothing."""
        self._said.seek(0)
        text = self._said.read().decode(errors="replace")[-_SAID_CHARACTERS:]
        self._said.seek(0)  # where the process writes on, which has the same position
        self._said.truncate()
        lines = "\n".join(printable(line) for line in text.splitlines())
        return f" It said:\n{lines}" if lines else ""

    def end(self) -> None:
        """Kill the process and reap it."""
        self._child.kill()
        for pipe in (self._requests, self._answers, self._said):
            with suppress(OSError):  # a request half written
                pipe.close()
        with suppress(subprocess.TimeoutExpired):
            self._child.wait(EXIT_WAIT_S)


_checker = Checker()


def checker() -> Checker:
    """The checker of this process."""
    return _checker


def _forget() -> None:
    """A forked process must not talk on its parent's pipes: it gets a checker of its own."""
    global _checker
    _checker = Checker()


@atexit.register
def close_checker() -> None:
    """End the checker process of this one."""
    _checker.close()


os.register_at_fork(after_in_child=_forget)
