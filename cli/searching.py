"""Opens what answers questions: the search engine and the SQL views of a library."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from media_assets.schemas import NEAR_DUPLICATES, PER_MEDIA
from resources.files.views import connect, outcomes_table
from resources.library import Library

if TYPE_CHECKING:
    import duckdb

    from search.engine import SearchEngine, Vectors

CONCEPTS = (
    "a dog", "a cat", "a bird", "a fish", "an insect", "a reptile", "a flower", "a mushroom", "a person", "a crowd",
    "a car", "a bus", "a ship", "an airplane", "a rocket", "an astronaut", "a building", "a tower", "a bridge",
    "a mountain", "the sea", "a forest", "a street", "a cup of coffee", "food on a plate", "a fruit", "a ball",
    "a computer", "a musical instrument", "a clock",
)  # fmt: skip


def open_views(library: Library) -> duckdb.DuckDBPyConnection:
    """The read-only views of the library."""
    registered = [media_id for media_id, _, _ in library.items()]
    records = outcomes_table(library.outcomes.rows())
    return connect(library.store, records, PER_MEDIA, NEAR_DUPLICATES, registered=registered)


def open_search(library: Library) -> SearchEngine:
    """The search engine of the library; its text encoder is loaded at the first query."""
    from search.engine import LazyEncoder, SearchEngine

    spec = library.models.spec("embedding")
    encoder = LazyEncoder(spec.identity, lambda: _encoder(library))
    return SearchEngine(library.store, encoder, lambda: outcomes_table(library.outcomes.rows()))


def _encoder(library: Library) -> Callable[[list[str]], Vectors]:
    """Encodes texts in the joint space: with the warm model of the cluster where models are served, else in here."""
    from media_assets.engine.remote import text_encoder

    return text_encoder(library.settings, library.models)


def example_queries(library: Library) -> list[str]:
    """Up to three queries the library can answer: a concept seen, words said, and words shown on screen."""
    views = open_views(library)
    queries = []
    if (concept := _concept_seen(library, views)) is not None:
        queries.append(concept)
    for table, floor in (("transcript", 0.5), ("ocr_text", 0.8)):
        row = views.execute(
            f"select text from {table} join media using (media_id) where confidence >= {floor} and length(text) >= 8"  # noqa: S608 - both from the tuple above
            " order by kind = 'text', kind != 'video', length(text) desc, text limit 1"
        ).fetchone()
        if row:
            queries.append(" ".join(row[0].split()[:6]))
    return queries


def _concept_seen(library: Library, views: duckdb.DuckDBPyConnection) -> str | None:
    import numpy as np

    column = views.execute(
        "select vector from embeddings where space = 'joint' and unit in ('image', 'frame') limit 5000"
    ).fetchnumpy()["vector"]
    if not len(column):
        return None
    pictures = np.stack([np.asarray(vector, np.float32) for vector in column])
    concepts = _encoder(library)([f"a photo of {concept}" for concept in CONCEPTS])
    best = (pictures @ concepts.T).max(axis=0)
    return CONCEPTS[int(best.argmax())]
