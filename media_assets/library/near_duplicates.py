"""`near_duplicates`: groups of media that are the same bytes, the same picture or film, or look alike, with evidence.

Candidates come from FAISS, never from a loop over pairs; each candidate is then verified:

- exact: equal SHA-256. One member stands for its copies in everything below.
- perceptual, images: 64-bit perceptual hashes (Zauner, 2010) at most `image_bits` apart, confirmed by the
  cosine of the pictures' visual vectors; the further apart the hashes, the higher the cosine asked for.
  Without vectors only nearly equal hashes count.
- perceptual, videos: the longest sequence of stills that match in the same order in both; its share of
  the longer film must reach `video_share`. A clip cut from a film is therefore no duplicate of it.
- semantic: visual vectors nearly parallel though the hashes differ (crops, frames, overlays).

Hashes of flat pictures (black, blank) carry no information and are ignored, as are stills that very
many films share (logos, test cards). Groups grow from the closest pair on, and two groups join only if
their representatives resemble each other, so that a chain of small steps does not tie strangers together.

Cost, n distinct hashes: up to `EXACT_SEARCH_LIMIT` an exhaustive comparison in FAISS (n^2 / 2 popcounts, 14 s
for 100,000 on two busy cores); beyond, multi-index hashing (Norouzi et al., 2012), which finds every pair
up to 7 bits and most up to 10. Vectors: exhaustive up to the same limit / 10, then an HNSW graph.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from media_assets import schemas
from resources.files.derived import DerivedStore

NAME, FILE = "near_duplicates", "all"
HASH_BITS = 64
HASH_BYTES = HASH_BITS // 8
INFORMATIVE_ONES = (20, 44)
EXACT_SEARCH_LIMIT = 300_000
FULL_PAIRS_LIMIT = 50
HNSW_LINKS, HNSW_NEIGHBOURS = 32, 16

Hashes = npt.NDArray[np.uint8]
Vector = npt.NDArray[np.float32]
Vectors = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Thresholds:
    """When two media count as duplicates. Bits are Hamming distances of 64-bit hashes, cosines of visual vectors."""

    image_bits: int = 10
    sure_bits: int = 4
    cosine_if_sure: float = 0.40
    cosine_if_unsure: float = 0.65
    video_bits: int = 12
    video_share: float = 0.5
    video_stills: int = 3
    max_sharers: int = 100
    semantic_cosine: float = 0.92
    guard_bits: int = 14
    guard_share: float = 0.35
    guard_cosine: float = 0.40


@dataclass(frozen=True, slots=True)
class Pair:
    """Two media that match, `one` < `other`; `distance` is 0 (exact) to 1."""

    one: str
    other: str
    method: str
    distance: float
    evidence: str


@dataclass(frozen=True, slots=True)
class Look:
    """What is known of one image or video: hashes of its distinct, informative stills, uint8 [n, 8], in order."""

    kind: str
    hashes: Hashes
    vector: Vector | None = None


def find(media: pa.Table, frames: pa.Table, embeddings: pa.Table, thresholds: Thresholds | None = None) -> pa.Table:
    """Every matching pair within every group, in both directions, as `near_duplicates` rows.

    Args:
        media: columns media_id, kind, sha256.
        frames: columns media_id, frame, phash, repeat_of.
        embeddings: columns media_id, unit, space, vector; only unit `image` in space `visual` is used.
        thresholds: when two media count as duplicates.

    An exact group above FULL_PAIRS_LIMIT members is listed as pairs with its smallest ID only.
    """
    limits = thresholds or Thresholds()
    kinds = dict(zip(media.column("media_id").to_pylist(), media.column("kind").to_pylist(), strict=True))
    shas = dict(zip(media.column("media_id").to_pylist(), media.column("sha256").to_pylist(), strict=True))
    copies = exact_groups(shas)
    spared = {member for members in copies for member in members[1:]}
    looks = _looks({m: kind for m, kind in kinds.items() if m not in spared}, frames, embeddings)
    pairs = [pair for members in copies for pair in exact_pairs(members)]
    pairs += image_pairs(looks, limits)
    pairs += video_pairs(looks, limits)
    known = {(pair.one, pair.other) for pair in pairs}
    pairs += [pair for pair in semantic_pairs(looks, limits) if (pair.one, pair.other) not in known]
    groups = group_pairs(pairs, lambda one, other: resemble(looks[one], looks[other], limits))
    return _table(pairs, groups)


def find_in(store: DerivedStore, live: Mapping[str, Mapping[str, str]], media_ids: Sequence[str]) -> pa.Table:
    """`find` over stored tables.

    `live` gives the version of each finished item by asset and media ID; `media_ids` the registered items.
    Pictures and vectors are read one item at a time, and only the columns needed.
    """
    chosen = [media_id for media_id in media_ids if media_id in live.get("media", {})]
    return find(
        _gather(store, "media", chosen, ["media_id", "kind", "sha256"]),
        _gather(store, "frames", _finished(live, "frames", chosen), ["media_id", "frame", "phash", "repeat_of"]),
        _gather(store, "embeddings", _finished(live, "embeddings", chosen), ["media_id", "unit", "space", "vector"]),
    )


def without(table: pa.Table, media_ids: Collection[str]) -> pa.Table:
    """`near_duplicates` rows that name none of `media_ids`; a group named after one gets a new name."""
    gone = set(media_ids)
    rows = [row for row in table.to_pylist() if not gone & {row["media_id"], row["other_id"]}] if gone else None
    if rows is None:
        return table
    heads: dict[str, str] = {}
    for row in rows:
        heads[row["group_id"]] = min(row["media_id"], heads.get(row["group_id"], row["media_id"]))
    for row in rows:
        row["group_id"] = heads[row["group_id"]] if row["group_id"] in gone else row["group_id"]
    rows.sort(key=lambda row: (row["group_id"], row["media_id"], row["other_id"]))
    return schemas.table(schemas.NEAR_DUPLICATES, rows)


def exact_groups(shas: Mapping[str, str]) -> list[list[str]]:
    """Media IDs with equal SHA-256, sorted, in groups of two and more."""
    by_sha: dict[str, list[str]] = defaultdict(list)
    for media_id in sorted(shas):
        by_sha[shas[media_id]].append(media_id)
    return [members for members in by_sha.values() if len(members) > 1]


def exact_pairs(members: Sequence[str]) -> Iterator[Pair]:
    """Pairs of one exact group; all of them, or for a large group those with its first member."""
    pairs = combinations(members, 2) if len(members) <= FULL_PAIRS_LIMIT else ((members[0], m) for m in members[1:])
    for one, other in pairs:
        yield Pair(one, other, "exact", 0.0, "same SHA-256")


def image_pairs(looks: Mapping[str, Look], limits: Thresholds) -> list[Pair]:
    """Verified perceptual pairs of images."""
    ids = sorted(media_id for media_id, look in looks.items() if look.kind == "image" and len(look.hashes))
    if len(ids) < 2:
        return []
    hashes = np.concatenate([looks[media_id].hashes[:1] for media_id in ids])
    pairs: list[Pair] = []
    for i, j, bits in close_hashes(hashes, limits.image_bits):
        verdict = _verify(looks[ids[i]], looks[ids[j]], bits, limits)
        if verdict is not None:
            pairs.append(Pair(ids[i], ids[j], "perceptual", bits / HASH_BITS, verdict))
    return pairs


def video_pairs(looks: Mapping[str, Look], limits: Thresholds) -> list[Pair]:
    """Perceptual pairs of videos: enough stills match in the same order."""
    ids = sorted(media_id for media_id, look in looks.items() if look.kind == "video" and len(look.hashes))
    if len(ids) < 2:
        return []
    pairs: list[Pair] = []
    for one, other in _video_candidates([looks[media_id].hashes for media_id in ids], limits):
        a, b = looks[ids[one]], looks[ids[other]]
        match = align(a.hashes, b.hashes, limits.video_bits)
        longer = max(len(a.hashes), len(b.hashes))
        if not _is_same_film(match, longer, limits):
            continue
        evidence = f"{match.length} of {longer} stills match in order, {match.mean_bits:.1f} of {HASH_BITS} bits apart"
        pairs.append(Pair(ids[one], ids[other], "perceptual", match.mean_bits / HASH_BITS, evidence))
    return pairs


def semantic_pairs(looks: Mapping[str, Look], limits: Thresholds) -> list[Pair]:
    """Pairs of images whose visual vectors are nearly parallel."""
    ids = sorted(media_id for media_id, look in looks.items() if look.kind == "image" and look.vector is not None)
    if len(ids) < 2:
        return []
    vectors = np.stack([v for media_id in ids if (v := looks[media_id].vector) is not None])
    return [
        Pair(ids[i], ids[j], "semantic", max(0.0, 1.0 - cosine), f"visual cosine {cosine:.3f}")
        for i, j, cosine in close_vectors(vectors, limits.semantic_cosine)
    ]


def close_hashes(hashes: Hashes, max_bits: int) -> Iterator[tuple[int, int, int]]:
    """(i, j, Hamming distance) with i < j and distance <= `max_bits`, over the rows of uint8 [n, 8].

    Rows with equal hashes are searched once; above FULL_PAIRS_LIMIT of them only pairs with the first are given.
    """
    distinct, owner = np.unique(np.ascontiguousarray(hashes), axis=0, return_inverse=True)
    members: list[list[int]] = [[] for _ in distinct]
    for row, index in enumerate(owner.ravel()):
        members[int(index)].append(row)
    for rows in members:
        for i, j in combinations(rows, 2) if len(rows) <= FULL_PAIRS_LIMIT else ((rows[0], row) for row in rows[1:]):
            yield i, j, 0
    for a, b, bits in _search_hashes(distinct, max_bits):
        for i in members[a][:FULL_PAIRS_LIMIT]:
            for j in members[b][:FULL_PAIRS_LIMIT]:
                yield min(i, j), max(i, j), bits


def _search_hashes(distinct: Hashes, max_bits: int) -> Iterator[tuple[int, int, int]]:
    import faiss

    if len(distinct) <= EXACT_SEARCH_LIMIT:
        index: Any = faiss.IndexBinaryFlat(HASH_BITS)
    else:
        index = faiss.IndexBinaryMultiHash(HASH_BITS, 4, HASH_BITS // 4)
        index.nflip = 1
    index.add(distinct)
    block = 4096
    for at in range(0, len(distinct), block):
        # FAISS excludes the radius itself.
        bounds, bits, found = index.range_search(distinct[at : at + block], max_bits + 1)
        rows = np.repeat(np.arange(at, at + len(bounds) - 1), _counts(bounds))
        keep = rows < found
        for a, b, distance in zip(rows[keep], found[keep], bits[keep], strict=True):
            yield int(a), int(b), int(distance)


def close_vectors(vectors: Vectors, min_cosine: float) -> Iterator[tuple[int, int, float]]:
    """(i, j, cosine) with i < j and cosine >= `min_cosine`, over unit-normalised rows, float32 [n, d].

    Exhaustive up to EXACT_SEARCH_LIMIT / 10 rows; beyond, among each row's nearest HNSW_NEIGHBOURS.
    """
    import faiss

    vectors = np.ascontiguousarray(vectors, np.float32)
    count, size = vectors.shape
    if count <= EXACT_SEARCH_LIMIT // 10:
        flat = faiss.IndexFlatIP(size)
        flat.add(vectors)
        bounds, cosines, found = flat.range_search(vectors, min_cosine)
        rows = np.repeat(np.arange(count), _counts(bounds))
    else:
        graph = faiss.IndexHNSWFlat(size, HNSW_LINKS, faiss.METRIC_INNER_PRODUCT)
        graph.add(vectors)
        near, names = graph.search(vectors, HNSW_NEIGHBOURS)
        rows, cosines, found = np.repeat(np.arange(count), HNSW_NEIGHBOURS), near.ravel(), names.ravel()
    # A graph search may find a pair from one side only: order each pair, then drop repeats.
    seen: set[tuple[int, int]] = set()
    for a, b, cosine in zip(rows.tolist(), found.tolist(), cosines.tolist(), strict=True):
        key = (min(a, b), max(a, b))
        if b >= 0 and a != b and cosine >= min_cosine and key not in seen:
            seen.add(key)
            yield *key, cosine


def _counts(bounds: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Results per query of a FAISS range search, from its offsets."""
    return bounds[1:].astype(np.int64) - bounds[:-1].astype(np.int64)


@dataclass(frozen=True, slots=True)
class Alignment:
    """Stills that match in the same order in two films, and how far apart they are on average, bits."""

    length: int
    mean_bits: float


def align(one: Hashes, other: Hashes, max_bits: int) -> Alignment:
    """The longest sequence of still pairs at most `max_bits` apart that advances in both films.

    `one` uint8 [n, 8], `other` uint8 [m, 8]. A longest increasing subsequence: O(k log k) for k matching pairs.
    """
    bits = distances(one, other)
    first, second = np.nonzero(bits <= max_bits)
    # Descending in the second film within a still of the first, so that each still is used once.
    order = np.lexsort((-second, first))
    tails: list[int] = []
    best: list[int] = []
    back: list[int] = []
    for position, pair in enumerate(order):
        value = int(second[pair])
        at = bisect_left(tails, value)
        back.append(best[at - 1] if at else -1)
        if at == len(tails):
            tails.append(value)
            best.append(position)
        else:
            tails[at], best[at] = value, position
    chain: list[float] = []
    position = best[-1] if best else -1
    while position >= 0:
        pair = order[position]
        chain.append(float(bits[first[pair], second[pair]]))
        position = back[position]
    return Alignment(len(chain), float(np.mean(chain)) if chain else float(HASH_BITS))


def distances(one: Hashes, other: Hashes) -> npt.NDArray[np.int64]:
    """Hamming distances, int [n, m], of uint8 [n, 8] and uint8 [m, 8]."""
    bits: npt.NDArray[np.int64] = np.bitwise_count(one[:, None, :] ^ other[None, :, :]).sum(axis=2, dtype=np.int64)
    return bits


def is_informative(hashes: Hashes) -> npt.NDArray[np.bool_]:
    """Which rows of uint8 [n, 8] come from a picture with structure.

    A DCT hash compares coefficients with their median, so that half of its bits are set; a flat picture
    has no coefficients to tell apart, and hardly a bit is set.
    """
    ones = np.bitwise_count(hashes).sum(axis=1)
    kept: npt.NDArray[np.bool_] = (ones >= INFORMATIVE_ONES[0]) & (ones <= INFORMATIVE_ONES[1])
    return kept


def resemble(one: Look, other: Look, limits: Thresholds) -> bool:
    """Whether two media are near enough for their groups to join: a looser test than that of a pair."""
    if one.kind != other.kind:
        return False
    if one.vector is not None and other.vector is not None:
        cosine = float(one.vector @ other.vector)
        if cosine >= limits.semantic_cosine:
            return True
        if cosine < limits.guard_cosine:
            return False
    if not len(one.hashes) or not len(other.hashes):
        return False
    if one.kind == "video":
        match = align(one.hashes, other.hashes, limits.guard_bits)
        return match.length >= limits.guard_share * max(len(one.hashes), len(other.hashes))
    return int(distances(one.hashes[:1], other.hashes[:1])[0, 0]) <= limits.guard_bits


def group_pairs(pairs: Iterable[Pair], resembles: Callable[[str, str], bool]) -> dict[str, str]:
    """Media ID -> group ID (the smallest ID of its group).

    Connected components, grown from the closest pair on; groups of more than one member join only if
    `resembles` holds between their representatives: the first members of the larger and the smaller group.
    """
    forest = _Forest()
    for pair in sorted(pairs, key=lambda p: (p.method != "exact", p.distance, p.one, p.other)):
        one, other = forest.root(pair.one), forest.root(pair.other)
        if one == other:
            continue
        single = forest.size[one] == forest.size[other] == 1
        if pair.method == "exact" or single or resembles(one, other):
            forest.join(one, other)
    smallest: dict[str, str] = {}
    for media_id in sorted(forest.parent):
        smallest.setdefault(forest.root(media_id), media_id)
    return {media_id: smallest[forest.root(media_id)] for media_id in forest.parent}


@dataclass(slots=True)
class _Forest:
    """Disjoint sets; the root of a set is its representative, and the larger set's root stays."""

    parent: dict[str, str] = field(default_factory=dict)
    size: dict[str, int] = field(default_factory=dict)

    def root(self, media_id: str) -> str:
        self.parent.setdefault(media_id, media_id)
        self.size.setdefault(media_id, 1)
        while self.parent[media_id] != media_id:
            self.parent[media_id] = self.parent[self.parent[media_id]]
            media_id = self.parent[media_id]
        return media_id

    def join(self, one: str, other: str) -> None:
        # Of equal sets the one with the smaller ID stays, which is also the one that stands for its copies.
        keep, drop = sorted((one, other), key=lambda m: (-self.size[m], m))
        self.parent[drop] = keep
        self.size[keep] += self.size[drop]


def _verify(one: Look, other: Look, bits: int, limits: Thresholds) -> str | None:
    """The evidence for a pair of images whose hashes are `bits` apart, or None where it does not hold."""
    if one.vector is None or other.vector is None:
        return f"hashes {bits} of {HASH_BITS} bits apart" if bits <= limits.sure_bits else None
    cosine = float(one.vector @ other.vector)
    needed = limits.cosine_if_sure if bits <= limits.sure_bits else limits.cosine_if_unsure
    return f"hashes {bits} of {HASH_BITS} bits apart, visual cosine {cosine:.2f}" if cosine >= needed else None


def _is_same_film(match: Alignment, longer: int, limits: Thresholds) -> bool:
    if longer < limits.video_stills:
        # So few stills are little evidence: all must match, and closely.
        return match.length == longer and match.mean_bits <= limits.sure_bits
    return match.length >= max(limits.video_stills, limits.video_share * longer)


def _video_candidates(films: Sequence[Hashes], limits: Thresholds) -> list[tuple[int, int]]:
    """Pairs of films that share enough stills to be worth aligning."""
    hashes = np.concatenate(films)
    owner = np.repeat(np.arange(len(films)), [len(film) for film in films])
    distinct, inverse = np.unique(hashes, axis=0, return_inverse=True)
    owners: list[set[int]] = [set() for _ in distinct]
    for film, index in zip(owner.tolist(), inverse.ravel().tolist(), strict=True):
        owners[index].add(film)
    shared: dict[tuple[int, int], int] = defaultdict(int)
    for index, films_there in enumerate(owners):
        if len(films_there) <= limits.max_sharers:
            _count(shared, owners[index], owners[index])
    for a, b, _ in _search_hashes(distinct, limits.video_bits):
        if len(owners[a]) <= limits.max_sharers and len(owners[b]) <= limits.max_sharers:
            _count(shared, owners[a], owners[b])
    sizes = [len(film) for film in films]
    return sorted(
        (one, other)
        for (one, other), stills in shared.items()
        if stills >= min(limits.video_stills, sizes[one], sizes[other])
    )


def _count(shared: dict[tuple[int, int], int], some: set[int], others: set[int]) -> None:
    for pair in {(min(i, j), max(i, j)) for i in some for j in others if i != j}:
        shared[pair] += 1


def _looks(kinds: Mapping[str, str], frames: pa.Table, embeddings: pa.Table) -> dict[str, Look]:
    stills: dict[str, list[tuple[int, bytes]]] = defaultdict(list)
    for row in frames.select(["media_id", "frame", "phash", "repeat_of"]).to_pylist():
        if row["repeat_of"] is None:
            stills[row["media_id"]].append((row["frame"], row["phash"]))
    vectors = _visual_vectors(embeddings)
    looks: dict[str, Look] = {}
    for media_id, kind in kinds.items():
        packed = b"".join(phash for _, phash in sorted(stills.get(media_id, [])))
        hashes = np.frombuffer(packed, np.uint8).reshape(-1, HASH_BYTES)
        looks[media_id] = Look(kind, hashes[is_informative(hashes)], vectors.get(media_id))
    return looks


def _visual_vectors(embeddings: pa.Table) -> dict[str, Vector]:
    import pyarrow.compute as pc

    chosen = embeddings.filter(
        pc.and_(pc.equal(embeddings.column("space"), "visual"), pc.equal(embeddings.column("unit"), "image"))
    )
    return {
        row["media_id"]: np.asarray(row["vector"], np.float32)
        for row in chosen.select(["media_id", "vector"]).to_pylist()
    }


def _finished(live: Mapping[str, Mapping[str, str]], asset: str, media_ids: Sequence[str]) -> list[str]:
    return [media_id for media_id in media_ids if media_id in live.get(asset, {})]


def _gather(store: DerivedStore, asset: str, media_ids: Sequence[str], columns: list[str]) -> pa.Table:
    schema = pa.schema([schemas.PER_MEDIA[asset].field(name) for name in columns])
    tables = [store.read(asset, media_id, columns=columns).cast(schema) for media_id in media_ids]
    return pa.concat_tables([schema.empty_table(), *tables])


def _table(pairs: Sequence[Pair], groups: Mapping[str, str]) -> pa.Table:
    rows: list[dict[str, object]] = [
        {
            "group_id": groups[pair.one],
            "media_id": media_id,
            "other_id": other_id,
            "method": pair.method,
            "distance": pair.distance,
            "evidence": pair.evidence,
        }
        for pair in pairs
        if groups[pair.one] == groups[pair.other]
        for media_id, other_id in ((pair.one, pair.other), (pair.other, pair.one))
    ]
    rows.sort(key=lambda row: (str(row["group_id"]), str(row["media_id"]), str(row["other_id"])))
    return schemas.table(schemas.NEAR_DUPLICATES, rows)
