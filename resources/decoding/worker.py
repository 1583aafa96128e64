"""The program of a decoder process: reads requests from its pipe, decodes one file at a time, answers.

Started as `python -P -m resources.decoding.worker MEMORY_BYTES PARENT_PID`. It dies with its parent, imports nothing
beyond PyAV, numpy, Pillow and this package, and gives up whatever decoding does not need before the first file
(`resources.decoding.jail`).
"""

from __future__ import annotations

import os
import sys
from typing import Any, BinaryIO

from resources.compute.process import die_with
from resources.decoding.jail import confine
from resources.decoding.protocol import Fetch, Request, encode, read_range, read_request
from resources.errors import Internal, MediaError, OutOfMemory
from resources.faults import fault

SEND_BYTES = 2**16
PROMPT = frozenset({"ready", "read", "progress", "done"})
"""Messages sent at once, with those before them: each that is sent wakes the parent."""


def main(memory_bytes: int, parent: int) -> None:
    """Serve requests until the parent closes the pipe."""
    requests = os.fdopen(os.dup(0), "rb")
    answers = os.fdopen(os.dup(1), "wb", buffering=SEND_BYTES)
    _silence_standard_streams()
    die_with(parent)
    sys.dont_write_bytecode = True
    import av
    import numpy
    import PIL.Image  # noqa: F401 - loaded before the first file, so that its time is not the file's

    av.logging.set_level(None)
    numpy.seterr(all="ignore")
    confine(memory_bytes)
    _send(answers, "ready")

    def fetch(offset: int, size: int) -> bytes:
        _send(answers, "read", offset=offset, size=size)
        try:
            return read_range(requests)
        except BaseException:  # noqa: BLE001 - half an answer read would be taken for the next request
            os._exit(1)

    while (request := read_request(requests)) is not None:
        _serve(request, answers, fetch)


def _serve(request: Request, answers: BinaryIO, fetch: Fetch) -> None:
    """Answer one request; whatever it raises becomes one `failed` message."""
    from resources.decoding import probe, streams

    def emit(message: str, payload: bytes = b"", /, **fields: Any) -> None:
        _send(answers, message, payload, **fields)

    try:
        fault("decoding.file")
        {"probe": probe.probe, "decode": streams.decode}[request.operation](request, emit, fetch)
    except MediaError as error:
        emit("failed", part="file", code=error.code, message=error.message, remedy=error.remedy_text)
    except MemoryError:
        emit(
            "failed",
            part="file",
            code=OutOfMemory.code,
            message="Decoding the file needs more memory than limits.decode_memory_bytes.",
            remedy="Raise that limit if this file is meant to be processed.",
        )
    except BrokenPipeError:
        raise
    except Exception as error:  # noqa: BLE001 - the last line: the parent learns the class, the process lives on
        message = f"Decoding failed unexpectedly ({type(error).__name__}: {error})."
        emit("failed", part="file", code=Internal.code, message=message, remedy=Internal.remedy)
    emit("done", rss_bytes=_rss_bytes())


def _send(answers: BinaryIO, message: str, payload: bytes = b"", /, **fields: Any) -> None:
    answers.write(encode({"type": message, **fields}, payload))
    answers.write(payload)
    if message in PROMPT:
        answers.flush()


def _silence_standard_streams() -> None:
    """Keep anything a C library prints out of the pipe."""
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1):
        os.dup2(null, standard)
    os.close(null)


def _rss_bytes() -> int:
    try:
        with open("/proc/self/statm", "rb") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


if __name__ == "__main__":
    try:
        main(int(sys.argv[1]), int(sys.argv[2]))
    except (BrokenPipeError, KeyboardInterrupt):
        sys.exit(0)
