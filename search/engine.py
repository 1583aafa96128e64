"""The search engine: text or a media item in, time-coded hits out, from vectors and from words.

A query runs against three rankings: pictures by vector, texts by vector (kept apart, since in a joint space texts are
always nearer to a text than pictures are) and the words of transcripts and on-screen text by BM25 (Robertson &
Zaragoza, 2009). They are fused by reciprocal rank (Cormack, Clarke & Büttcher, 2009); overlapping hits of one media
merge. Rank fusion knows no relevance, so a text that is barely related enters no ranking at all: by vector it needs a
cosine of `text_floor`, by words half of what the query's words weigh.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from media_assets import schemas
from media_assets.library.index_shard import (
    JOINT,
    TEXT_UNITS,
    VISUAL,
    BucketShards,
    Shard,
    current_build,
    indexed_buckets,
    open_bucket,
)
from resources.errors import MediaError, printable
from resources.files import views
from resources.files.catalog_files import arrow_path, filesystem
from resources.files.derived import DerivedStore
from resources.ingest.registry import UnknownMedia

RANK_OFFSET = 60  # of reciprocal rank fusion, as published
BM25_K1, BM25_B = 1.2, 0.75
WORD_COVERAGE = 0.5  # share of the query's inverse document frequency a text must hold
MAX_QUERY_CHARS = 1_000
MAX_LIMIT = 1_000
SNIPPET_CHARS = 160
SIMILAR_VECTORS = 64
_WORDS = r"[\p{L}\p{N}]+"

Vectors = NDArray[np.float32]


class BadSearch(MediaError):
    """The query cannot be answered as asked."""

    code, http_status = "bad_search", 400
    remedy = "Ask with a few words, such as: a red car in the rain."


class ModelMismatch(MediaError):
    """The index was built with another embedding model than the one that encodes queries."""

    code, http_status = "model_mismatch", 409
    remedy = "Materialize embeddings and index_shard with the current model, or configure the model the index has."


class TextEncoder(Protocol):
    """Turns queries into vectors of the joint space."""

    @property
    def identity(self) -> str:
        """The model's identity, as in the `model` column of the embeddings."""

    def encode_texts(self, texts: list[str]) -> Vectors:
        """float32 [n, d], unit length."""


@dataclass(frozen=True, slots=True)
class LazyEncoder:
    """A text encoder whose identity is known before its model is loaded: `load` runs at the first query."""

    identity: str
    load: Callable[[], Callable[[list[str]], Vectors]]
    _cell: list[Callable[[list[str]], Vectors]] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def encode_texts(self, texts: list[str]) -> Vectors:
        """float32 [n, d], unit length."""
        with self._lock:
            if not self._cell:
                self._cell.append(self.load())
        return self._cell[0](texts)


@dataclass(frozen=True, slots=True)
class Hit:
    """A stretch of a media item that answers the query.

    `unit` is what matched best (image, frame, shot, transcript, ocr_text); the span is in seconds, 0-0 for images;
    `score` is the fused score (higher is better, comparable within one response alone); `similarity` the best cosine
    similarity, None for a match by words alone; `snippet` plain text from the media, to be escaped by whoever shows it;
    `why` says what matched.
    """

    media_id: str
    uri: str
    kind: str
    unit: str
    start_s: float
    end_s: float
    score: float
    similarity: float | None
    snippet: str
    why: str


@dataclass(frozen=True, slots=True)
class SearchResponse:
    """Hits, best first, what was searched, and anything the asker should know (such as buckets left out)."""

    query: str
    hits: tuple[Hit, ...]
    seconds: float
    vectors: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Match:
    """One entry of one ranking."""

    media_id: str
    unit: str
    ordinal: int
    start_s: float
    end_s: float
    source: str
    similarity: float | None = None
    words: tuple[str, ...] = ()


@dataclass
class _Group:
    """The best match of a stretch of one media item and those that overlap it; per ranking only the best one counts.

    The span stays that of the best match: what merely overlaps it adds evidence, not length.
    """

    best: _Match
    scores: dict[str, float] = field(default_factory=dict)
    matches: list[_Match] = field(default_factory=list)

    @property
    def score(self) -> float:
        return sum(self.scores.values())

    def overlaps(self, match: _Match) -> bool:
        best = self.best
        if match.start_s == match.end_s or best.start_s == best.end_s:
            return match.start_s <= best.end_s and best.start_s <= match.end_s
        return match.start_s < best.end_s and best.start_s < match.end_s

    def add(self, match: _Match, score: float) -> None:
        self.scores[match.source] = max(score, self.scores.get(match.source, 0.0))
        self.matches.append(match)


class SearchEngine:
    """Searches the index shards and the texts of one store. Safe to use from several threads.

    Args:
        store: where the tables, the catalog and the index are.
        encoder: the embedding model for queries; it is loaded when the first query comes.
        outcomes: records of live items (see `views.outcomes_table`), called when the texts are read anew.
        live: which of these media IDs are live now, asked for every response; by default those `outcomes` last knew.
        max_age_s: texts and items are read anew after so many seconds, and whenever a shard was swapped.
        text_floor: cosine similarity a text needs to be a match by vector; unrelated sentences lie below 0.3 in the
            MiniLM space. Image-text models without a sentence encoder may need another.
    """

    def __init__(
        self,
        store: DerivedStore,
        encoder: TextEncoder,
        outcomes: Callable[[], pa.Table],
        live: Callable[[Collection[str]], Collection[str]] | None = None,
        max_age_s: float = 60.0,
        text_floor: float = 0.3,
    ) -> None:
        self._store = store
        self._encoder = encoder
        self._outcomes = outcomes
        self._live = live
        self._max_age_s = max_age_s
        self._text_floor = text_floor
        self._lock = threading.RLock()
        self._shards: dict[int, BucketShards] = {}
        self._texts: _Texts | None = None
        self._read_at = 0.0

    def search(self, text: str, limit: int = 10) -> SearchResponse:
        """Hits for a text. Raises BadSearch, ModelMismatch, ModelUnavailable, ShardUnreadable."""
        started = time.monotonic()
        query, limit = _checked(text), _checked_limit(limit)
        shards, texts = self._refreshed()
        joint = [spaces.spaces[JOINT] for spaces in shards if JOINT in spaces.spaces]
        usable, notes = self._usable(joint)
        depth = max(50, 5 * limit)
        rankings = {"words": texts.rank(query, depth)}
        if usable:
            vectors = self._encode(query, usable[0])
            rankings["picture"] = _nearest(usable, vectors, depth, "pictures", "picture")
            nearest_texts = _nearest(usable, vectors, depth, "texts", "text")
            rankings["text"] = [match for match in nearest_texts if (match.similarity or 0.0) >= self._text_floor]
        hits = self._hits(rankings, texts, limit)
        return SearchResponse(text, hits, time.monotonic() - started, sum(s.report.vectors for s in usable), notes)

    def similar(self, media_id: str, limit: int = 10) -> SearchResponse:
        """Items that look like this one (space `visual` where the index has it, else `joint`), itself left out.

        Raises UnknownMedia, BadSearch, ShardUnreadable.
        """
        started = time.monotonic()
        limit = _checked_limit(limit)
        opened, texts = self._refreshed()
        if media_id not in texts.media:
            raise UnknownMedia(f"No live item {printable(media_id, 100)} has been processed.")
        for space in (VISUAL, JOINT):
            shards = [spaces.spaces[space] for spaces in opened if space in spaces.spaces]
            model, vectors = self._vectors(media_id, space)
            usable = [shard for shard in shards if shard.report.model == model]
            if usable and len(vectors):
                break
        else:
            remedy = "Materialize its embeddings and the index: media-assets run."
            raise UnknownMedia(f"{media_id} has no vectors of the index's model.", remedy)
        depth = max(50, 5 * limit) + len(vectors)
        nearest = _nearest(usable, vectors, depth, "all", "looks alike")
        ranking = [match for match in nearest if match.media_id != media_id]
        hits = self._hits({"looks alike": ranking}, texts, limit)
        notes = _left_out(len(shards) - len(usable), model)
        return SearchResponse(media_id, hits, time.monotonic() - started, sum(s.report.vectors for s in usable), notes)

    def refresh(self) -> None:
        """Read items and texts anew at the next query."""
        with self._lock:
            self._texts = None

    def _refreshed(self) -> tuple[list[BucketShards], _Texts]:
        with self._lock:
            changed = self._reload_shards()
            if self._texts is None or changed or time.monotonic() - self._read_at >= self._max_age_s:
                self._texts = _Texts(self._store, self._outcomes())
                self._read_at = time.monotonic()
            return list(self._shards.values()), self._texts

    def _reload_shards(self) -> bool:
        builds = {bucket: current_build(self._store, bucket) for bucket in indexed_buckets(self._store)}
        known = {bucket: shards.build for bucket, shards in self._shards.items()}
        wanted = {bucket: build for bucket, build in builds.items() if build}
        if wanted == known:
            return False
        opened = {bucket: open_bucket(self._store, bucket) for bucket in wanted if wanted[bucket] != known.get(bucket)}
        kept = {bucket: shards for bucket, shards in self._shards.items() if bucket in wanted and bucket not in opened}
        self._shards = kept | {bucket: shards for bucket, shards in opened.items() if shards}
        return True

    def _usable(self, shards: Sequence[Shard]) -> tuple[list[Shard], tuple[str, ...]]:
        """Shards of the encoder's model. Raises ModelMismatch when there are shards, but none of it."""
        identity = self._encoder.identity
        usable = [shard for shard in shards if shard.report.model == identity]
        if shards and not usable:
            others = ", ".join(sorted({shard.report.model for shard in shards}))
            raise ModelMismatch(f"The index was built with {others}, queries are encoded by {identity}.")
        return usable, _left_out(len(shards) - len(usable), identity)

    def _encode(self, query: str, shard: Shard) -> Vectors:
        vectors = np.asarray(self._encoder.encode_texts([query]), np.float32)
        if vectors.shape != (1, shard.report.dimension):
            raise ModelMismatch(
                f"{self._encoder.identity} gives vectors of shape {vectors.shape}, the index has "
                f"{shard.report.dimension} dimensions."
            )
        return vectors

    def _vectors(self, media_id: str, space: str) -> tuple[str, Vectors]:
        """Model and picture vectors (at most SIMILAR_VECTORS, evenly spaced) of an item; none when it has none."""
        path = arrow_path(self._store.path("embeddings", media_id))
        none = "", np.empty((0, 0), np.float32)
        try:
            file = pq.ParquetFile(path, filesystem=filesystem(self._store))
        except FileNotFoundError:
            return none
        rows = file.read(columns=["unit", "space", "model", "vector"]).to_pylist()
        wanted = [row for row in rows if row["space"] == space]
        wanted = [row for row in wanted if row["unit"] not in TEXT_UNITS] or wanted
        if not wanted:
            return none
        step = -(-len(wanted) // SIMILAR_VECTORS)
        return wanted[0]["model"], np.array([row["vector"] for row in wanted[::step]], np.float32)

    def _hits(self, rankings: Mapping[str, Sequence[_Match]], texts: _Texts, limit: int) -> tuple[Hit, ...]:
        known = {match.media_id for ranking in rankings.values() for match in ranking} & texts.media.keys()
        alive = set(self._live(known)) & known if self._live else known
        living = {name: [match for match in ranking if match.media_id in alive] for name, ranking in rankings.items()}
        groups = sorted(_fused(living), key=lambda group: (-group.score, group.best.media_id, group.best.start_s))[
            :limit
        ]
        snippets = texts.texts_of(match for group in groups for match in group.matches if match.unit in TEXT_UNITS)
        return tuple(_hit(group, texts.media, snippets) for group in groups)


class _Texts:
    """Live items and their texts as of one moment, with an inverted index of the words."""

    def __init__(self, store: DerivedStore, outcomes: pa.Table) -> None:
        self._lock = threading.Lock()
        self._connection = views.connect(store, outcomes, schemas.PER_MEDIA, schemas.NEAR_DUPLICATES)
        run = self._connection.execute
        self.media: dict[str, tuple[str, str]] = {
            media_id: (uri, kind) for media_id, uri, kind in run("select media_id, uri, kind from media").fetchall()
        }
        run(
            "create temp table _text as select row_number() over (order by media_id, unit, ordinal) as doc, * from ("
            "select media_id, 'transcript' as unit, segment as ordinal, start_s, end_s, text from transcript union all "
            "select media_id, 'ocr_text', line, start_s, end_s, text from ocr_text)"
        )
        run(
            "create temp table _posting as select term, doc, count(*)::double as tf from ("
            "select doc, unnest(regexp_extract_all(strip_accents(lower(text)), $words)) as term from _text)"
            " group by term, doc order by term, doc",
            {"words": _WORDS},
        )
        run("create temp table _length as select doc, sum(tf) as terms from _posting group by doc")
        row = run("select count(*), coalesce(avg(terms), 1) from _length").fetchone()
        self._documents, self._mean_terms = row if row else (0, 1.0)

    def rank(self, query: str, limit: int) -> list[_Match]:
        """Texts that hold any word of `query`, best BM25 first."""
        with self._lock:
            rows = self._connection.execute(
                "with word as (select distinct"
                " unnest(regexp_extract_all(strip_accents(lower($query)), $words)) as term),"
                " posting as (select p.* from _posting p semi join word on p.term = word.term),"
                " idf as (select w.term, ln(1 + ($n - count(p.doc) + 0.5) / (count(p.doc) + 0.5)) as weight"
                " from word w left join posting p on w.term = p.term group by w.term),"
                " scored as (select doc, list(term order by term) as terms, sum(weight) as covered,"
                " sum(weight * tf * ($k + 1) / (tf + $k * (1 - $b + $b * l.terms / $mean))) as score"
                " from posting join idf using (term) join _length l using (doc) group by doc)"
                " select media_id, unit, ordinal, start_s, end_s, s.terms from scored s join _text using (doc)"
                " where covered >= $coverage * (select sum(weight) from idf) order by score desc, doc limit $limit",
                {
                    "query": query,
                    "words": _WORDS,
                    "n": self._documents,
                    "mean": self._mean_terms,
                    "k": BM25_K1,
                    "b": BM25_B,
                    "coverage": WORD_COVERAGE,
                    "limit": limit,
                },
            ).fetchall()
        return [
            _Match(media_id, unit, ordinal, start_s, end_s, "words", words=tuple(terms))
            for media_id, unit, ordinal, start_s, end_s, terms in rows
        ]

    def texts_of(self, matches: Iterable[_Match]) -> dict[tuple[str, str, int], str]:
        """The text of each match, by media ID, unit and ordinal."""
        keys = sorted({(match.media_id, match.unit, match.ordinal) for match in matches})
        if not keys:
            return {}
        media_ids, units, ordinals = (list(column) for column in zip(*keys, strict=True))
        with self._lock:
            rows = self._connection.execute(
                "select t.media_id, t.unit, t.ordinal, t.text from _text t semi join"
                " (select unnest($media) as media_id, unnest($units) as unit, unnest($ordinals) as ordinal) k"
                " on t.media_id = k.media_id and t.unit = k.unit and t.ordinal = k.ordinal",
                {"media": media_ids, "units": units, "ordinals": ordinals},
            ).fetchall()
        return {(media_id, unit, ordinal): text for media_id, unit, ordinal, text in rows}


def _checked(text: str) -> str:
    query = " ".join(text.split())
    if not query:
        raise BadSearch("The query is empty.")
    if len(query) > MAX_QUERY_CHARS:
        raise BadSearch(f"The query has {len(query)} characters; the most is {MAX_QUERY_CHARS}.")
    return query.encode("utf-8", "replace").decode()


def _checked_limit(limit: int) -> int:
    if not 1 <= limit <= MAX_LIMIT:
        raise BadSearch(f"The limit is {limit}; it must be between 1 and {MAX_LIMIT}.", "Ask for fewer hits.")
    return limit


def _left_out(count: int, identity: str) -> tuple[str, ...]:
    if not count:
        return ()
    return (f"{count} index shards were built with another model than {identity} and were not searched.",)


def _nearest(
    shards: Sequence[Shard],
    queries: Vectors,
    limit: int,
    units: Literal["all", "pictures", "texts"],
    source: str,
) -> list[_Match]:
    """Matches of all shards, nearest first; of a row found by several queries the best counts."""
    found: list[tuple[float, dict[str, Any]]] = []
    for shard in shards:
        best: dict[int, float] = {}
        for numbers, scores in shard.search(queries, limit, units):
            for number, score in zip(numbers, scores, strict=True):
                best[number] = max(score, best.get(number, -1.0))
        found.extend(zip(best.values(), shard.at(list(best)), strict=True))
    found.sort(key=lambda pair: (-pair[0], pair[1]["media_id"], pair[1]["unit"], pair[1]["ordinal"]))
    return [
        _Match(row["media_id"], row["unit"], row["ordinal"], row["start_s"], row["end_s"], source, similarity=score)
        for score, row in found[:limit]
    ]


def _fused(rankings: Mapping[str, Sequence[_Match]]) -> list[_Group]:
    """Reciprocal rank fusion over groups of overlapping matches of one media item."""
    scored = [
        (1.0 / (RANK_OFFSET + rank), match)
        for ranking in rankings.values()
        for rank, match in enumerate(ranking, start=1)
    ]
    # Of equal ranks the shortest stretch leads: it tells best where to look.
    scored.sort(key=lambda pair: (-pair[0], pair[1].end_s - pair[1].start_s))
    groups: dict[str, list[_Group]] = {}
    for score, match in scored:
        mine = groups.setdefault(match.media_id, [])
        group = next((group for group in mine if group.overlaps(match)), None)
        if group is None:
            group = _Group(match)
            mine.append(group)
        group.add(match, score)
    return [group for mine in groups.values() for group in mine]


def _hit(group: _Group, media: Mapping[str, tuple[str, str]], texts: Mapping[tuple[str, str, int], str]) -> Hit:
    uri, kind = media[group.best.media_id]
    similarities = [match.similarity for match in group.matches if match.similarity is not None]
    words = sorted({word for match in group.matches for word in match.words})
    return Hit(
        media_id=group.best.media_id,
        uri=uri,
        kind=kind,
        unit=group.best.unit,
        start_s=group.best.start_s,
        end_s=group.best.end_s,
        score=group.score,
        similarity=max(similarities, default=None),
        snippet=_snippet(group, texts, words),
        why=_why(group, words),
    )


def _why(group: _Group, words: Sequence[str]) -> str:
    reasons: list[str] = []
    for source in group.scores:
        match = next(match for match in group.matches if match.source == source)
        if source == "words":
            reasons.append(f"words in {match.unit}: {', '.join(words[:8])}")
        else:
            reasons.append(f"{source} ({match.unit} {match.ordinal}, cosine {match.similarity:.3f})")
    return "; ".join(reasons)


def _snippet(group: _Group, texts: Mapping[tuple[str, str, int], str], words: Sequence[str]) -> str:
    """Up to SNIPPET_CHARS of the best text, around the first word that matched."""
    ordered = sorted(group.matches, key=lambda match: not match.words)
    keys = ((match.media_id, match.unit, match.ordinal) for match in ordered)
    text = next((texts[key] for key in keys if key in texts), "")
    lowered = text.lower()
    positions = [position for word in words if (position := lowered.find(word)) >= 0]
    start = max(0, min(positions, default=0) - SNIPPET_CHARS // 3)
    end = start + SNIPPET_CHARS
    return ("…" if start else "") + text[start:end].strip() + ("…" if end < len(text) else "")
