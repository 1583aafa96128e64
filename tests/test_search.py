"""Search: vectors and words answer together, hits are typed and time-coded, and what is gone never shows."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from media_assets import schemas
from media_assets.library.catalog import compact
from media_assets.library.index_shard import Vectors, build
from resources.files import views
from resources.files.derived import DerivedStore
from resources.ingest.registry import UnknownMedia
from search.engine import BadSearch, LazyEncoder, ModelMismatch, SearchEngine

MODEL = "clip@111111111111"
CONCEPTS = ("truck", "cat", "rain", "budget", "fire", "sea", "music", "noise")
"""Axes of a toy joint space: a text or picture points to the concepts it holds."""

Row = dict[str, Any]


def point(*concepts: str) -> list[float]:
    vector = np.array([concept in concepts for concept in CONCEPTS], np.float32)
    return [float(value) for value in vector / (np.linalg.norm(vector) or 1.0)]


def encode(texts: list[str]) -> Vectors:
    """Stands in for the text tower: synonyms lie on the same axis, unknown words on the last."""
    synonyms = {"lorry": "truck", "kitten": "cat", "storm": "rain", "spending": "budget"}
    found = [[synonyms.get(word, word) for word in text.lower().split()] for text in texts]
    return np.array([point(*words) if set(words) & set(CONCEPTS) else point("noise") for words in found], np.float32)


class Library:
    """A small library whose items are written as tables, compacted and indexed on demand."""

    def __init__(self, store: DerivedStore) -> None:
        self.store = store
        self.live: dict[str, dict[str, str]] = {"media": {}, "transcript": {}, "ocr_text": {}, "embeddings": {}}
        self.outcome_reads = 0

    def add(
        self,
        media_id: str,
        *,
        kind: str = "video",
        pictures: tuple[tuple[str, float, float, str], ...] = (),
        speech: tuple[tuple[str, float, float, str], ...] = (),
        signs: tuple[tuple[str, float, float], ...] = (),
        model: str = MODEL,
    ) -> None:
        """`pictures` and `speech` give (text, start, end, concept), `signs` the text on screen."""
        base = {"media_id": media_id, "version": "v1"}
        media = base | {"uri": f"/library/{media_id}.mp4", "sha256": "0" * 64, "kind": kind, "mime": "video/mp4"}
        self._write("media", media_id, schemas.MEDIA, [media | {"bytes": 1, "has_audio": True}])
        spans = [{"start_s": start, "end_s": end} for _, start, end, _ in speech]
        said = [
            base | span | {"segment": n, "text": text, "language": "en", "confidence": 0.9, "words": []}
            for n, (span, (text, *_)) in enumerate(zip(spans, speech, strict=True))
        ]
        self._write(
            "transcript", media_id, schemas.TRANSCRIPT, [row | {"timing": "none", "model": "asr"} for row in said]
        )
        corner = [{"x": 0.0, "y": 0.0}] * 4
        read = [
            base | {"line": n, "start_s": start, "end_s": end, "text": text, "confidence": 0.9, "polygon": corner}
            for n, (text, start, end) in enumerate(signs)
        ]
        ocr = {"frame": 0, "frames_seen": 1, "model": "ocr"}
        self._write("ocr_text", media_id, schemas.OCR_TEXT, [row | ocr for row in read])
        vectors = [
            base
            | {"unit": unit, "ordinal": n, "start_s": start, "end_s": end, "space": "joint", "model": model}
            | {"vector": point(*concepts.split())}
            for unit, rows in (("shot", pictures), ("transcript", speech))
            for n, (_, start, end, concepts) in enumerate(rows)
        ]
        self._write("embeddings", media_id, schemas.EMBEDDINGS, vectors)

    def _write(self, asset: str, media_id: str, schema: pa.Schema, rows: list[Row]) -> None:
        self.store.write(asset, media_id, schemas.table(schema, rows))
        self.live[asset][media_id] = "v1"

    def remove(self, media_id: str) -> None:
        for pairs in self.live.values():
            pairs.pop(media_id, None)

    def index(self) -> None:
        compact(self.store, 0, self.live, list(self.live))
        build(self.store, 0, self.live["embeddings"], 0.95)

    def outcomes(self) -> pa.Table:
        self.outcome_reads += 1
        return views.outcomes_table(
            [
                {"media_id": media_id, "asset": asset, "version": version, "status": "ok"}
                for asset, pairs in self.live.items()
                for media_id, version in pairs.items()
            ]
        )

    def engine(
        self, load: Callable[[], Callable[[list[str]], Vectors]] = lambda: encode, **options: Any
    ) -> SearchEngine:
        return SearchEngine(self.store, LazyEncoder(MODEL, load), self.outcomes, **options)


@pytest.fixture
def library(tmp_path: Path) -> Library:
    made = Library(DerivedStore(tmp_path / "derived"))
    made.add(
        "street",
        pictures=(("", 0.0, 4.0, "truck"), ("", 4.0, 9.0, "rain")),
        speech=(("Here comes the heavy lorry now", 1.0, 3.0, "truck"), ("Nothing else happened", 5.0, 8.0, "noise")),
        signs=(("FIRE EXIT", 6.0, 7.0),),
    )
    made.add("meeting", kind="audio", speech=(("We discuss the annual budget today", 10.0, 14.0, "budget"),))
    made.add("pet", kind="image", pictures=(("", 0.0, 0.0, "cat"),))
    made.index()
    return made


def test_a_text_finds_the_picture_and_where_it_is(library: Library) -> None:
    response = library.engine().search("storm")
    best = response.hits[0]
    assert (best.media_id, best.kind, best.unit, best.start_s, best.end_s) == ("street", "video", "shot", 4.0, 9.0)
    assert best.uri == "/library/street.mp4"
    assert best.similarity == pytest.approx(1.0, abs=1e-5)
    assert best.why == "picture (shot 1, cosine 1.000)"
    assert (response.vectors, response.notes) == (6, ())


def test_words_find_what_was_said_and_what_was_written(library: Library) -> None:
    said = library.engine().search("ANNUAL budget").hits[0]
    assert (said.media_id, said.unit, said.start_s, said.end_s) == ("meeting", "transcript", 10.0, 14.0)
    assert said.snippet == "We discuss the annual budget today"
    assert "words in transcript: annual, budget" in said.why
    written = next(hit for hit in library.engine().search("exit").hits if "ocr_text" in hit.why)
    assert (written.media_id, written.snippet, written.start_s) == ("street", "FIRE EXIT", 6.0)


def test_meaning_finds_speech_without_a_common_word(library: Library) -> None:
    hit = next(hit for hit in library.engine().search("spending").hits if hit.media_id == "meeting")
    assert (hit.unit, hit.why) == ("transcript", "text (transcript 0, cosine 1.000)")
    assert hit.snippet == "We discuss the annual budget today"


def test_overlapping_hits_of_one_media_merge_and_outrank_single_ones(library: Library) -> None:
    hits = library.engine().search("lorry").hits
    assert (hits[0].media_id, hits[0].unit, hits[0].start_s, hits[0].end_s) == ("street", "transcript", 1.0, 3.0)
    assert {part.split(" ")[0] for part in hits[0].why.split("; ")} == {"picture", "text", "words"}
    assert hits[0].score == pytest.approx(3 / 61)
    spans = [(hit.media_id, hit.start_s, hit.end_s) for hit in hits]
    assert len(spans) == len(set(spans))
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)


def test_common_words_alone_are_no_match(library: Library) -> None:
    assert not [hit for hit in library.engine().search("the zebra").hits if "words" in hit.why]


def test_accents_case_and_punctuation_do_not_matter(library: Library) -> None:
    library.add("paris", speech=(("Un café, s'il vous plaît!", 0.0, 2.0, "noise"),))
    library.index()
    assert library.engine().search("CAFE plait").hits[0].media_id == "paris"


def test_similar_finds_items_that_look_alike_but_not_the_item_itself(library: Library) -> None:
    library.add("traffic", pictures=(("", 0.0, 5.0, "truck rain"),))
    library.index()
    response = library.engine().similar("traffic")
    assert response.hits[0].media_id == "street"
    assert response.hits[0].similarity == pytest.approx(2**-0.5, abs=1e-5)
    assert "traffic" not in {hit.media_id for hit in response.hits}
    with pytest.raises(UnknownMedia, match="No live item nobody"):
        library.engine().similar("nobody'; drop table media; --")


def test_similar_needs_vectors(library: Library) -> None:
    library.add("silent")
    library.index()
    with pytest.raises(UnknownMedia, match="no vectors"):
        library.engine().similar("silent")


def test_items_that_are_gone_are_dropped_though_the_shard_still_has_them(library: Library) -> None:
    engine = library.engine(live=lambda media_ids: set(media_ids) - {"street"})
    assert "street" not in {hit.media_id for hit in engine.search("truck").hits}
    library.remove("street")
    assert "street" not in {hit.media_id for hit in library.engine().search("truck").hits}


def test_a_running_engine_sees_a_swapped_shard_and_new_texts_at_once(library: Library) -> None:
    engine = library.engine(max_age_s=3600)
    engine.search("sea")
    library.add("beach", pictures=(("", 0.0, 3.0, "sea"),), speech=(("waves everywhere", 4.0, 5.0, "noise"),))
    assert "beach" not in {hit.media_id for hit in engine.search("sea").hits}
    library.index()
    assert engine.search("sea").hits[0].media_id == "beach"
    assert engine.search("waves").hits[0].media_id == "beach"
    library.remove("beach")
    library.index()
    assert "beach" not in {hit.media_id for hit in engine.search("sea").hits}


def test_items_are_read_once_until_asked_to_refresh(library: Library) -> None:
    engine = library.engine(max_age_s=3600)
    engine.search("truck")
    engine.search("cat")
    assert library.outcome_reads == 1
    engine.refresh()
    engine.search("cat")
    assert library.outcome_reads == 2


def test_an_index_of_another_model_is_an_error_that_names_both(library: Library) -> None:
    engine = SearchEngine(library.store, LazyEncoder("siglip@9", lambda: encode), library.outcomes)
    with pytest.raises(ModelMismatch, match=f"built with {MODEL}, queries are encoded by siglip@9"):
        engine.search("truck")


def test_a_model_of_another_width_is_an_error(library: Library) -> None:
    narrow = library.engine(lambda: lambda texts: np.ones((len(texts), 3), np.float32))
    with pytest.raises(ModelMismatch, match="the index has 8 dimensions"):
        narrow.search("truck")


def test_buckets_of_another_model_are_left_out_with_a_note(library: Library) -> None:
    library.add("late", pictures=(("", 0.0, 1.0, "cat"),), model="clip@2")
    build(library.store, 1, {"late": "v1"}, 0.95)
    response = library.engine().search("cat")
    assert response.hits[0].media_id == "pet"
    assert response.notes == (f"1 index shards were built with another model than {MODEL} and were not searched.",)


def test_an_empty_library_answers_with_nothing_and_loads_no_model(tmp_path: Path) -> None:
    library = Library(DerivedStore(tmp_path / "empty"))
    loads: list[str] = []

    def load() -> Callable[[list[str]], Vectors]:
        loads.append("loaded")
        return encode

    assert library.engine(load).search("anything").hits == ()
    library.index()
    assert library.engine(load).search("anything").hits == ()
    assert loads == []


def test_the_model_is_loaded_once_at_the_first_query(library: Library) -> None:
    loads: list[str] = []

    def load() -> Callable[[list[str]], Vectors]:
        loads.append("loaded")
        return encode

    engine = library.engine(load)
    engine.similar("pet")
    assert loads == []
    engine.search("cat")
    engine.search("truck")
    assert loads == ["loaded"]


@pytest.mark.parametrize(("text", "limit"), [("", 5), (" \n\t", 5), ("x" * 2000, 5), ("cat", 0), ("cat", 10**9)])
def test_senseless_queries_are_refused(library: Library, text: str, limit: int) -> None:
    with pytest.raises(BadSearch):
        library.engine().search(text, limit)


@pytest.mark.parametrize("text", ["'; drop table media; --", "%_\\", "((", "🦊", "\x00cat", "\ud800", "a" * 1000])
def test_strange_queries_are_just_text(library: Library, text: str) -> None:
    engine = library.engine()
    engine.search(text)
    assert engine.search("kitten").hits[0].media_id == "pet"


def test_the_limit_bounds_the_hits(library: Library) -> None:
    assert len(library.engine().search("truck", 1).hits) == 1


def test_a_long_text_is_cut_around_the_word(library: Library) -> None:
    library.add("talk", speech=((f"{'filler ' * 60}the zeppelin rises {'after ' * 60}", 0.0, 60.0, "noise"),))
    library.index()
    snippet = library.engine().search("zeppelin").hits[0].snippet
    assert "zeppelin" in snippet
    assert (snippet[0], snippet[-1]) == ("…", "…")
    assert len(snippet) <= 162


def test_importing_the_engine_loads_no_model_library() -> None:
    code = "import sys, search.engine; print([m for m in ('torch', 'faiss', 'great_expectations') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
