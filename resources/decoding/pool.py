"""A pool of decoder processes: started lazily, watched, replaced when they die, recycled when they grow."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import selectors
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from resources.compute.heartbeat import beat
from resources.compute.process import fate, helper_environment, hide_from_others
from resources.decoding.protocol import (
    LENGTHS,
    MAX_HEADER_BYTES,
    MAX_PAYLOAD_BYTES,
    MAX_RANGE_BYTES,
    Fetch,
    Request,
    encode,
)
from resources.errors import DecoderCrashed, DecodeTimeout, Hostile, MediaError

START_TIMEOUT_S = 120.0
LISTEN_S = 1.0
RECYCLE_FILES = 5_000
RECYCLE_RSS_BYTES = 768 * 2**20
READ_BYTES = 1 << 20
PIPE_BYTES = 1 << 20
"""Holds the answer on a usual picture, so that a worker need not wait for a busy parent between its pieces."""
EXIT_WAIT_S = 2.0
FORBIDDEN_CALL = "signal 31"  # SIGSYS, by the filter of resources.decoding.jail
PROGRAM = "resources.decoding.worker"


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a decoder process, framed but not yet validated."""

    kind: str
    fields: dict[str, Any]
    payload: bytes


Budget = Callable[[], float]
"""Wall time the job may take in all, seconds; asked again as the job reports how far it is."""


class DecoderPool:
    """At most `workers` decoder processes, one file each at a time. Thread-safe.

    `memory_bytes` bounds the address space of each process; a process silent for `silence_s`, or at work
    for longer than the job's budget, is killed. Processes start when first needed.
    """

    def __init__(self, workers: int, memory_bytes: int, silence_s: float) -> None:
        self._memory_bytes = memory_bytes
        self._silence_s = silence_s
        self._slots = threading.BoundedSemaphore(workers)
        self._lock = threading.Lock()
        self._idle: list[_Process] = []
        self._closed = False
        # A worker dies with the thread that started it (PR_SET_PDEATHSIG), so one lasting thread starts all.
        self._starter = ThreadPoolExecutor(1, "decoder-starter")

    def run(self, request: Request, budget: Budget, fetch: Fetch | None = None) -> Generator[Message]:
        """The worker's messages for one request, up to its last.

        `fetch` reads the object of a request without a path; its time does not count, and what it raises ends
        the request. Leaving the iterator early kills the worker. Raises DecoderCrashed when it dies or breaks
        the protocol, DecodeTimeout when it is silent or over budget; a new one then takes its place.
        """
        while not self._slots.acquire(timeout=LISTEN_S):
            beat()  # those at work have limits of their own
        try:
            process = self._take()
            finished = False
            try:
                for message in process.answers(request, budget, self._silence_s, fetch):
                    if message.kind == "done":
                        finished = True
                        break
                    yield message
            finally:
                self._give_back(process, keep=finished and not process.worn)
        finally:
            self._slots.release()

    def pids(self) -> tuple[int, ...]:
        """Process IDs of the idle workers."""
        with self._lock:
            return tuple(process.pid for process in self._idle)

    def close(self) -> None:
        """End every idle worker; those at work end when their file does."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for process in idle:
            process.end()
        self._starter.shutdown(wait=False)

    def _take(self) -> _Process:
        while True:
            with self._lock:
                if self._closed:
                    raise DecoderCrashed("The decoder pool is closed.")
                process = self._idle.pop() if self._idle else None
            if process is None:
                return self._starter.submit(_Process, self._memory_bytes).result()
            if process.alive():
                return process
            process.end()

    def _give_back(self, process: _Process, keep: bool) -> None:
        with self._lock:
            keep = keep and not self._closed
            if keep:
                self._idle.append(process)
        if not keep:
            process.end()


def _deadline(silent: float, started: float, budget: Budget) -> float:
    return min(silent, started + budget())


class _Process:
    """One decoder process and its pipe."""

    def __init__(self, memory_bytes: int) -> None:
        hide_from_others()
        self._child = subprocess.Popen(
            [sys.executable, "-P", "-m", PROGRAM, str(memory_bytes), str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=helper_environment(Path(__file__).parents[2]),
            bufsize=0,
            start_new_session=True,
        )
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._requests = self._child.stdin
        self._answers = self._child.stdout
        with contextlib.suppress(OSError):  # beyond what a user may have in pipes the kernel's own size will do
            if sys.platform == "linux":
                fcntl.fcntl(self._answers, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        os.set_blocking(self._answers.fileno(), False)
        os.set_blocking(self._requests.fileno(), False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._answers, selectors.EVENT_READ)
        self._buffer = bytearray()
        self._files = 0
        self._rss_bytes = 0
        try:
            deadline = time.monotonic() + START_TIMEOUT_S
            self._message(lambda: deadline)
        except MediaError as error:
            self.end()
            raise DecoderCrashed(f"A decoder process could not be started: {error.message}") from None

    @property
    def pid(self) -> int:
        """Process ID."""
        return self._child.pid

    @property
    def worn(self) -> bool:
        """Whether a fresh process should take over, so that leaks of a decoder cannot add up."""
        return self._files >= RECYCLE_FILES or self._rss_bytes > RECYCLE_RSS_BYTES

    def alive(self) -> bool:
        """Whether the process still runs."""
        return self._child.poll() is None

    def answers(
        self, request: Request, budget: Budget, silence_s: float, fetch: Fetch | None = None
    ) -> Generator[Message]:
        """Messages for `request`, the last of kind `done`. Raises DecoderCrashed, DecodeTimeout."""
        self._files += 1
        started = time.monotonic()
        self._write(encode(request.header()), started + silence_s)
        while True:
            silent = time.monotonic() + silence_s
            message = self._message(partial(_deadline, silent, started, budget))
            if message.kind == "read":
                began = time.monotonic()
                data = self._range(message, request, fetch)
                started += time.monotonic() - began
                self._write(encode({}, data), time.monotonic() + silence_s, data)
                continue
            if message.kind == "done":
                self._rss_bytes = int(message.fields.get("rss_bytes") or 0)
            yield message
            if message.kind == "done":
                return

    def _range(self, message: Message, request: Request, fetch: Fetch | None) -> bytes:
        """The range the worker asks for. Raises DecoderCrashed for one that no decoder would want."""
        offset, size = message.fields.get("offset"), message.fields.get("size")
        if (
            fetch is None
            or type(offset) is not int
            or type(size) is not int
            or not 0 <= offset < request.remote_bytes
            or not 0 < size <= MAX_RANGE_BYTES
        ):
            raise DecoderCrashed("The decoder process asked for bytes that are not there.")
        return fetch(offset, size)

    def _write(self, header: bytes, deadline: float, payload: bytes = b"") -> None:
        """Send one message; a worker that does not take it in time is given up."""
        for part in (header, payload):
            view = memoryview(part)
            while view:
                try:
                    view = view[os.write(self._requests.fileno(), view) :]
                except BlockingIOError:
                    self._await_room(deadline)
                except OSError:
                    raise DecoderCrashed("The decoder process was gone before it got the file.") from None

    def _await_room(self, deadline: float) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._requests, selectors.EVENT_WRITE)
            if not selector.select(max(0.0, deadline - time.monotonic())):
                raise DecodeTimeout("The decoder process took no data in the time it is given.")

    def end(self) -> None:
        """Kill the process and reap it."""
        with contextlib.suppress(OSError):
            self._child.kill()
        with contextlib.suppress(OSError):
            self._requests.close()
        self._selector.close()
        self._answers.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.wait(EXIT_WAIT_S)

    def _message(self, deadline: Callable[[], float]) -> Message:
        header_size, payload_size = LENGTHS.unpack(self._read(LENGTHS.size, deadline))
        if header_size > MAX_HEADER_BYTES or payload_size > MAX_PAYLOAD_BYTES:
            raise DecoderCrashed("The decoder process sent a message of impossible size.")
        header = self._read(header_size, deadline)
        payload = self._read(payload_size, deadline)
        try:
            fields = json.loads(header)
            return Message(str(fields.pop("type")), fields, payload)
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
            raise DecoderCrashed("The decoder process sent a message that cannot be read.") from None

    def _read(self, size: int, deadline: Callable[[], float]) -> bytes:
        while len(self._buffer) < size:
            wait_s = deadline() - time.monotonic()
            beat()
            if wait_s <= 0 or not self._selector.select(min(wait_s, LISTEN_S)):
                if deadline() > time.monotonic():
                    continue
                raise DecodeTimeout("Decoding the file made no progress in the time it is given.")
            chunk = self._answers.read(READ_BYTES)
            if chunk == b"":
                end = fate(self._child, EXIT_WAIT_S)
                if end == FORBIDDEN_CALL:
                    raise Hostile("The file made the decoder try what decoding never does, such as to open a socket.")
                raise DecoderCrashed(f"The decoder process died on the file ({end}).")
            self._buffer += chunk or b""
        taken = bytes(self._buffer[:size])
        del self._buffer[:size]
        return taken
