"""Typed answers of the decoder processes: `Decoder.probe` and `Decoder.decode`. What they send is not trusted."""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Callable, Generator
from contextlib import closing
from typing import TypeVar

from pydantic import BaseModel

from resources.decoding import protocol
from resources.decoding.answers import Decoded, Failed, MediaFacts, Probed, RemoteFacts, TextSegment
from resources.decoding.collector import Collector, expect, failure_of, parsed, segments_of
from resources.decoding.pool import DecoderPool, Message
from resources.decoding.sources import LocalFile, RemoteFile, Source
from resources.errors import DecoderCrashed, MediaError
from resources.settings import Decoding, Limits, Settings

M = TypeVar("M", bound=BaseModel)
HASH_BYTES_PER_S = 10e6
MAX_THREADS = 4


class Decoder:
    """Decodes untrusted files in the process-wide pool. Thread-safe; blocks while every worker is busy."""

    def __init__(self, limits: Limits, decoding: Decoding) -> None:
        self._limits = limits
        self._decoding = decoding
        self._threads = max(1, min(MAX_THREADS, (os.cpu_count() or 1) // decoding.workers))
        self.pool = DecoderPool(decoding.workers, limits.decode_memory_bytes, limits.decode_timeout_s)

    def probe(self, file: Source) -> Probed:
        """Facts and text of a file. Raises MediaError of the class that fits.

        A remote object is judged by ranges of it; only one that passes is read whole, for its hash.
        """
        if isinstance(file, LocalFile):
            facts, segments = self._probe(file, MediaFacts)
            return Probed(facts, segments)
        seen, segments = self._probe(file, RemoteFacts)
        if seen.bytes != file.bytes:
            raise DecoderCrashed("The decoder process sent a size that is not the object's.")
        return Probed(MediaFacts(**{**seen.model_dump(), "sha256": file.sha256()}), segments)

    def _probe(self, file: Source, model: type[M]) -> tuple[M, tuple[TextSegment, ...]]:
        facts: list[M] = []
        segments: list[TextSegment] = []
        budget_s = self._limits.decode_timeout_s + self._limits.max_bytes / HASH_BYTES_PER_S
        with closing(self._messages(self._request("probe", file), lambda: budget_s, _fetch(file))) as messages:
            for message in messages:
                if message.kind == "text":
                    segments += segments_of(message)
                elif message.kind == "media":
                    facts.append(parsed(model, message))
                else:
                    expect(message, "progress")
        if not facts:
            raise DecoderCrashed("The decoder process ended without an answer.")
        return facts[0], tuple(segments)

    def decode(self, file: Source, kind: str, size: int, duration_s: float | None, wanted: frozenset[str]) -> Decoded:
        """One pass for `wanted` (frames, audio) over a file probed as `kind` with `size` bytes.

        Raises MediaError where the file as a whole fails; a failure of one part is in the result.
        """
        file = file.copy or file if isinstance(file, RemoteFile) else file
        collector = Collector(self._limits)
        request = self._request("decode", file, kind, size, tuple(sorted(wanted)))

        def budget() -> float:
            media_s = min(self._limits.max_duration_s, max(duration_s or 0.0, collector.media_s))
            return self._limits.decode_timeout_s + self._limits.decode_factor * media_s

        with closing(self._messages(request, budget, _fetch(file))) as messages:
            for message in messages:
                collector.take(message)
        if isinstance(file, RemoteFile):
            file.check()
        return collector.decoded(wanted)

    def close(self) -> None:
        """End the decoder processes."""
        self.pool.close()

    def _request(
        self, operation: str, file: Source, kind: str = "", size: int = -1, wanted: tuple[str, ...] = ()
    ) -> protocol.Request:
        limits, decoding = self._limits, self._decoding
        return protocol.Request(
            operation,
            file.path_hex if isinstance(file, LocalFile) else "",
            file.suffix.encode(errors="replace").decode(),
            limits.max_bytes,
            limits.max_pixels,
            limits.max_duration_s,
            limits.max_text_bytes,
            kind,
            size,
            wanted,
            decoding.still_interval_s,
            decoding.still_change,
            decoding.still_max_side,
            decoding.image_max_side,
            self._threads,
            -1 if isinstance(file, LocalFile) else file.bytes,
            (file.etag or "") if isinstance(file, LocalFile) else "",
            file.within_hex if isinstance(file, LocalFile) else "",
        )

    def _messages(
        self, request: protocol.Request, budget: Callable[[], float], fetch: protocol.Fetch | None
    ) -> Generator[Message]:
        """Messages but failures of the whole file, which are raised at the end; nothing after one counts.

        To be closed by the caller: an error kept somewhere must not keep a worker with it.
        """
        failure: MediaError | None = None
        with closing(self.pool.run(request, budget, fetch)) as messages:
            for message in messages:
                if message.kind == "failed" and message.fields.get("part") == "file":
                    failure = failure_of(parsed(Failed, message))
                elif failure is None:
                    yield message
        if failure is not None:
            raise failure


_decoders: dict[tuple[Limits, Decoding], Decoder] = {}
_decoders_lock = threading.Lock()


def decoder(settings: Settings) -> Decoder:
    """The process-wide decoder for these limits and decode settings.

    Made on first use and closed at exit; every stage and thread with equal settings shares its workers.
    """
    key = (settings.limits, settings.decoding)
    with _decoders_lock:
        if key not in _decoders:
            _decoders[key] = Decoder(*key)
        return _decoders[key]


@atexit.register
def close_decoders() -> None:
    """End every decoder process of this one."""
    with _decoders_lock:
        for made in _decoders.values():
            made.close()
        _decoders.clear()


def _fetch(file: Source) -> protocol.Fetch | None:
    return file.blocks().read if isinstance(file, RemoteFile) else None
