"""A decoder that a file has taken over: it does what the file's text says, then what the decoder would have done."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from typing import Any

from resources.decoding import probe, worker

honest = probe.probe


def _fork_without_end() -> None:
    while True:
        os.fork()


ACTS: dict[str, Callable[[str], object]] = {
    "open a socket": lambda _: socket.create_connection(("127.0.0.1", 9)),
    "start a program": lambda _: os.execv("/bin/sh", ["sh", "-c", "exit 0"]),
    "write a file": lambda path: open(path + ".written", "w"),  # noqa: SIM115
    "delete a file": os.unlink,
    "fork without end": lambda _: _fork_without_end(),
    "read its parent": lambda _: open(f"/proc/{os.getppid()}/environ", "rb").read(),  # noqa: SIM115
    "kill its parent": lambda _: os.kill(os.getppid(), 9),
}


def _taken_over(request: Any, emit: Any, fetch: Any) -> None:
    path = os.fsdecode(bytes.fromhex(request.path))
    with open(path) as file:
        said = file.read().strip()
    if said in ACTS:
        ACTS[said](path)
    honest(request, emit, fetch)


if __name__ == "__main__":
    probe.probe = _taken_over
    worker.main(int(sys.argv[1]), int(sys.argv[2]))
