"""Copies, variants and look-alikes among pictures and films: which are grouped, and on what evidence."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Sequence
from pathlib import Path

import imagehash
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image, ImageEnhance, ImageFilter

from media_assets import schemas
from media_assets.library.near_duplicates import (
    FULL_PAIRS_LIMIT,
    Pair,
    Thresholds,
    align,
    close_hashes,
    close_vectors,
    distances,
    exact_pairs,
    find,
    group_pairs,
    is_informative,
)

Picture = Image.Image
MEDIA = pa.schema([schemas.MEDIA.field(name) for name in ("media_id", "kind", "sha256")])
FRAMES = pa.schema([schemas.FRAMES.field(name) for name in ("media_id", "frame", "phash", "repeat_of")])
EMBEDDINGS = pa.schema([schemas.EMBEDDINGS.field(name) for name in ("media_id", "unit", "space", "vector")])
VARIANTS: dict[str, Callable[[Picture], Picture]] = {
    "blurred": lambda p: p.filter(ImageFilter.GaussianBlur(3)),
    "contrast": lambda p: ImageEnhance.Contrast(p).enhance(1.6),
    "saturated": lambda p: ImageEnhance.Color(p).enhance(2.0),
    "shrunk": lambda p: p.resize((96, 64)),
    "squeezed": lambda p: p.resize((256, 256)),
    "recompressed": lambda p: _jpeg(p, 20),
}


def _jpeg(picture: Picture, quality: int) -> Picture:
    data = io.BytesIO()
    picture.save(data, "JPEG", quality=quality)
    return Image.open(data).convert("RGB")


def photo(name: str) -> Picture:
    import skimage

    return Image.open(Path(skimage.__file__).parent / "data" / name).convert("RGB")


def phash(picture: Picture) -> bytes:
    return np.packbits(imagehash.phash(picture).hash.ravel()).tobytes()


class Shelf:
    """Tables of a few media, as the assets would hold them."""

    def __init__(self) -> None:
        self.media: list[dict[str, object]] = []
        self.frames: list[dict[str, object]] = []
        self.vectors: list[dict[str, object]] = []

    def put(self, media_id: str, pictures: Sequence[Picture], vector: Sequence[float] | None = None) -> None:
        kind = "image" if len(pictures) == 1 else "video"
        sha = hashlib.sha256(b"".join(p.tobytes() for p in pictures)).hexdigest()
        self.media.append({"media_id": media_id, "kind": kind, "sha256": sha})
        for number, picture in enumerate(pictures):
            self.frames.append({"media_id": media_id, "frame": number, "phash": phash(picture), "repeat_of": None})
        if vector is not None:
            unit = np.asarray(vector) / np.linalg.norm(vector)
            self.vectors.append({"media_id": media_id, "unit": "image", "space": "visual", "vector": unit.tolist()})

    def find(self) -> list[dict[str, object]]:
        table = find(
            pa.Table.from_pylist(self.media, MEDIA),
            pa.Table.from_pylist(self.frames, FRAMES),
            pa.Table.from_pylist(self.vectors, EMBEDDINGS),
        )
        assert table.schema.equals(schemas.NEAR_DUPLICATES)
        rows: list[dict[str, object]] = table.to_pylist()
        return rows


def groups(rows: list[dict[str, object]]) -> dict[object, set[object]]:
    found: dict[object, set[object]] = {}
    for row in rows:
        found.setdefault(row["group_id"], set()).update((row["media_id"], row["other_id"]))
    return found


def test_variants_of_a_photo_are_one_group_and_other_photos_none() -> None:
    shelf = Shelf()
    for name in ("astronaut.png", "coffee.png", "rocket.jpg", "motorcycle_left.png", "brick.png"):
        shelf.put(name, [photo(name)])
    for name, make in VARIANTS.items():
        shelf.put(f"cat-{name}", [make(photo("chelsea.png"))])
    shelf.put("cat", [photo("chelsea.png")])
    rows = shelf.find()
    assert groups(rows) == {"cat": {"cat", *(f"cat-{name}" for name in VARIANTS)}}
    assert {row["method"] for row in rows} == {"perceptual"}
    assert {(row["media_id"], row["other_id"]) for row in rows} == {(row["other_id"], row["media_id"]) for row in rows}


def test_copies_are_exact_and_their_variant_joins_them() -> None:
    shelf = Shelf()
    for media_id in ("c", "b", "a"):
        shelf.put(media_id, [photo("coffee.png")])
    shelf.put("variant", [VARIANTS["shrunk"](photo("coffee.png"))])
    rows = shelf.find()
    assert groups(rows) == {"a": {"a", "b", "c", "variant"}}
    exact = {(row["media_id"], row["other_id"]) for row in rows if row["method"] == "exact"}
    assert exact == {("a", "b"), ("a", "c"), ("b", "a"), ("b", "c"), ("c", "a"), ("c", "b")}
    assert {row["distance"] for row in rows if row["method"] == "exact"} == {0.0}


def test_equal_hashes_of_different_looking_pictures_are_refused() -> None:
    shelf = Shelf()
    shelf.put("one", [photo("coffee.png")], [1.0, 0.0])
    shelf.put("two", [_jpeg(photo("coffee.png"), 30)], [0.1, 1.0])
    assert shelf.find() == []


def test_black_pictures_are_not_duplicates_of_each_other() -> None:
    shelf = Shelf()
    shelf.put("black", [Image.new("RGB", (64, 64))])
    shelf.put("blacker", [Image.new("RGB", (65, 64), (1, 1, 1))])
    shelf.put("grey", [Image.new("RGB", (64, 64), (90, 90, 90))])
    assert shelf.find() == []


def test_a_crop_is_found_by_its_looks() -> None:
    shelf = Shelf()
    whole = photo("astronaut.png")
    shelf.put("crop", [whole.crop((100, 0, 400, 300))], [1.0, 0.1])
    shelf.put("whole", [whole], [1.0, 0.0])
    shelf.put("other", [photo("coffee.png")], [0.0, 1.0])
    (row, _) = shelf.find()
    assert (row["media_id"], row["other_id"], row["method"]) == ("crop", "whole", "semantic")
    assert "cosine 0.995" in str(row["evidence"])


SCENES = ("astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg", "motorcycle_left.png", "brick.png")


def film(order: Sequence[str]) -> list[Picture]:
    return [photo(name) for name in order]


def test_a_film_with_a_logo_and_black_frames_matches_and_a_reordered_one_does_not() -> None:
    shelf = Shelf()
    shelf.put("film", film(SCENES))
    marked = film(SCENES)
    for picture in marked:
        picture.paste((255, 255, 255), (0, 0, picture.width // 10, picture.height // 12))
    shelf.put("marked", [Image.new("RGB", (64, 64)), *marked, Image.new("RGB", (64, 64))])
    shelf.put("reversed", film(SCENES[::-1]))
    shelf.put("clip", film(SCENES[:2]))
    shelf.put("black", [Image.new("RGB", (64, 64))] * 8)
    rows = shelf.find()
    assert groups(rows) == {"film": {"film", "marked"}}
    # The two black stills of the marked film carry no information and do not count.
    assert "of 6 stills match in order" in str(rows[0]["evidence"])


def test_a_chain_of_small_steps_does_not_tie_strangers_together() -> None:
    links = [Pair(f"m{i}", f"m{i + 1}", "perceptual", 0.1, "") for i in range(9)]
    apart = group_pairs(links, lambda one, other: abs(int(one[1:]) - int(other[1:])) <= 2)
    spread: dict[str, list[int]] = {}
    for media_id, group in apart.items():
        spread.setdefault(group, []).append(int(media_id[1:]))
    assert len(spread) > 1
    assert max(max(members) - min(members) for members in spread.values()) <= 4


def test_a_large_exact_group_is_listed_from_its_first_member() -> None:
    members = [f"m{i:03d}" for i in range(FULL_PAIRS_LIMIT + 1)]
    pairs = list(exact_pairs(members))
    assert len(pairs) == FULL_PAIRS_LIMIT
    assert {pair.one for pair in pairs} == {"m000"}


HASHES = hnp.arrays(np.uint8, st.tuples(st.integers(2, 30), st.just(8)), elements=st.sampled_from([0, 1, 3, 255]))


@given(HASHES, st.integers(0, 20))
def test_the_index_finds_what_comparing_all_pairs_finds(hashes: npt.NDArray[np.uint8], bits: int) -> None:
    found = {(i, j): d for i, j, d in close_hashes(hashes, bits)}
    matrix = distances(hashes, hashes)
    count = len(hashes)
    expected = {(i, j): matrix[i, j] for i in range(count) for j in range(i + 1, count) if matrix[i, j] <= bits}
    assert found == expected


@given(HASHES, HASHES)
def test_an_alignment_is_symmetric_and_no_longer_than_either_film(
    one: npt.NDArray[np.uint8], other: npt.NDArray[np.uint8]
) -> None:
    length = align(one, other, 4).length
    assert length == align(other, one, 4).length
    assert length <= min(len(one), len(other))
    assert align(one, one, 0).length == len(one)


@pytest.mark.parametrize("limit", [10, 1_000_000])
def test_vectors_are_found_by_exhaustive_and_by_graph_search(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setattr("media_assets.library.near_duplicates.EXACT_SEARCH_LIMIT", limit)
    rng = np.random.default_rng(7)
    vectors = rng.normal(size=(200, 32)).astype(np.float32)
    vectors[150] = vectors[3] + 0.05 * vectors[150]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    assert [(i, j) for i, j, _ in close_vectors(vectors, 0.95)] == [(3, 150)]


def test_multi_index_hashing_finds_every_pair_within_seven_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("media_assets.library.near_duplicates.EXACT_SEARCH_LIMIT", 0)
    rng = np.random.default_rng(3)
    hashes = rng.integers(0, 256, (300, 8), np.uint8)
    flipped = np.unpackbits(hashes, axis=1)
    for row in flipped:
        row[rng.choice(64, 7, replace=False)] ^= 1
    both = np.concatenate([hashes, np.packbits(flipped, axis=1)])
    assert {(i, i + 300) for i in range(300)} <= {(i, j) for i, j, _ in close_hashes(both, Thresholds().image_bits)}


def test_a_hash_of_a_flat_picture_is_told_from_one_of_a_photo() -> None:
    pictures = [Image.new("RGB", (64, 64), (200, 10, 10)), photo("coffee.png")]
    hashes = np.frombuffer(b"".join(phash(picture) for picture in pictures), np.uint8).reshape(-1, 8)
    assert is_informative(hashes).tolist() == [False, True]
