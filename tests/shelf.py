"""A library filled without models: registered uploads with tables and records as the stages would leave them."""

from __future__ import annotations

from typing import Any

import dagster as dg
import numpy as np
import pyarrow as pa
from rich.console import Console

from cli.run import Work
from media_assets import schemas
from resources.ingest.uploads import Upload
from resources.library import Library
from resources.records.outcome import Claim, Cost, Status

MODEL = "clip@111111111111"
CONCEPTS = ("lighthouse", "harbour", "tram", "orchard")
VERSION = "v1"


def point(word: str) -> list[float]:
    """The vector of a word: an axis of its own, or of a concept."""
    axis = CONCEPTS.index(word) if word in CONCEPTS else len(CONCEPTS)
    return [float(number == axis) for number in range(len(CONCEPTS) + 1)]


class Encoder:
    """Stands in for the text tower of the toy space."""

    identity = MODEL

    def encode_texts(self, texts: list[str]) -> Any:
        """float32 [n, d]."""
        return np.array([point(text) for text in texts], np.float32)


def register(library: Library, name: str, etag: str = "1") -> str:
    """Register `/shelf/<name>`; returns its media ID."""
    (media_id,) = library.registry.register([Upload(f"/shelf/{name}", etag, 1, None)]).media_ids
    return media_id


def finish(library: Library, media_id: str, asset: str, table: pa.Table, content: str = "") -> None:
    """Store a table and commit its record."""
    with library.outcomes.lease("shelf") as lease:
        claim = library.outcomes.claim(media_id, asset, VERSION, "shelf", lease.liveness)
        assert isinstance(claim, Claim)
        library.store.write(asset, media_id, table)
        library.outcomes.succeed(claim, Status.OK, content or VERSION, Cost(rows=table.num_rows))


def put(library: Library, name: str, concept: str, sha256: str = "0" * 64) -> str:
    """Register an upload that shows `concept` and says its name; returns its media ID."""
    media_id = register(library, name)
    fill(library, media_id, f"/shelf/{name}", concept, sha256)
    return media_id


def fill(library: Library, media_id: str, uri: str, concept: str, sha256: str) -> None:
    """Tables and records of one item: media, transcript and embeddings."""
    base: dict[str, object] = {"media_id": media_id, "version": VERSION}
    media = base | {"uri": uri, "sha256": sha256, "kind": "audio", "mime": "audio/mpeg", "bytes": 1, "has_audio": True}
    finish(library, media_id, "media", schemas.table(schemas.MEDIA, [media]), f"code:{sha256}")
    span = {"start_s": 0.0, "end_s": 1.0}
    said = (
        base | span | {"segment": 0, "text": f"we saw the {concept}", "language": "en", "confidence": 0.9, "words": []}
    )
    said |= {"timing": "none", "model": "asr@1"}
    finish(library, media_id, "transcript", schemas.table(schemas.TRANSCRIPT, [said]))
    vector = base | span | {"unit": "frame", "ordinal": 0, "space": "joint", "model": MODEL, "vector": point(concept)}
    finish(library, media_id, "embeddings", schemas.table(schemas.EMBEDDINGS, [vector]))


def rebuild(library: Library, instance: dg.DagsterInstance) -> bool:
    """What `media-assets run` does at its end; whether it found something to rebuild."""
    work = Work(library, Console(quiet=True))
    work._instance = instance
    work._rebuild()
    return bool(work.summary.runs)
