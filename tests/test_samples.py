"""The shipped samples: the files are those of the manifest, and the manifest tells the truth about them."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evals.golden import SAMPLES, Golden

MAX_BYTES = 3_500_000


@pytest.fixture(scope="module")
def manifest() -> dict[str, dict[str, Any]]:
    return {entry["file"]: entry for entry in json.loads((SAMPLES / "manifest.json").read_text(encoding="utf-8"))}


@pytest.fixture(scope="module")
def frames() -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Every frame of the film, eight times smaller."""
    import av

    with av.open(str(SAMPLES / "media" / "film.mp4")) as container:
        return np.stack([f.to_ndarray(format="rgb24")[::8, ::8] for f in container.decode(video=0)])


def test_the_manifest_lists_exactly_the_media_with_their_digests(manifest: dict[str, dict[str, Any]]) -> None:
    found = {str(path.relative_to(SAMPLES)): path for path in (SAMPLES / "media").rglob("*") if path.is_file()}
    assert found.keys() == manifest.keys()
    for name, path in found.items():
        assert hashlib.sha256(path.read_bytes()).hexdigest() == manifest[name]["sha256"]
    assert sum(path.stat().st_size for path in found.values()) < MAX_BYTES


def test_the_samples_are_a_golden_set_for_every_evaluation() -> None:
    golden = Golden.load(SAMPLES)
    assert golden.name == "samples"
    assert golden.media_folder == SAMPLES / "media"
    for truth in ("speech", "cuts", "screen_text", "print", "subject", "moderation", "copies", "truth_column"):
        assert any(getattr(item, truth) for item in golden.items), truth


def test_every_licence_is_stated(manifest: dict[str, dict[str, Any]]) -> None:
    table = (SAMPLES / "LICENCES.md").read_text(encoding="utf-8")
    for name, entry in manifest.items():
        assert entry["licence"].startswith(("CC0-1.0", "public domain"))
        assert f"`{name}`" in table


def test_the_film_jumps_at_its_cuts_and_nowhere_else(
    manifest: dict[str, dict[str, Any]], frames: np.ndarray[Any, np.dtype[np.uint8]]
) -> None:
    truth = manifest["media/film.mp4"]["ground_truth"]
    assert len(frames) == truth["frames"]
    jumps = np.abs(np.diff(frames.astype(np.int16), axis=0)).mean(axis=(1, 2, 3))
    largest = np.argsort(jumps)[-len(truth["hard_cuts"]) :] + 1
    assert sorted(largest.tolist()) == truth["hard_cuts"]


def test_the_fade_goes_through_black(
    manifest: dict[str, dict[str, Any]], frames: np.ndarray[Any, np.dtype[np.uint8]]
) -> None:
    (fade,) = manifest["media/film.mp4"]["ground_truth"]["gradual"]
    first, last = fade["around"]
    middle = (first + last) // 2
    assert frames[middle].mean() < 3
    assert frames[first].mean() > 50
    assert frames[last].mean() > frames[middle + 5].mean() > frames[middle + 1].mean()


def test_the_film_speaks_only_where_the_truth_says(manifest: dict[str, dict[str, Any]]) -> None:
    import av

    with av.open(str(SAMPLES / "media" / "film.mp4")) as container:
        rate = container.streams.audio[0].rate
        sound = np.concatenate([frame.to_ndarray()[0] for frame in container.decode(audio=0)])
    segments = manifest["media/film.mp4"]["ground_truth"]["speech"]["segments"]
    loud = [float(np.abs(sound[round(s["start"] * rate) : round(s["end"] * rate)]).max()) for s in segments]
    gaps = [(a["end"] + 0.1, b["start"] - 0.1) for a, b in pairwise(segments)]
    quiet = [float(np.abs(sound[round(a * rate) : round(b * rate)]).max()) for a, b in gaps if b - a > 0.2]
    assert min(loud) > 0.1
    assert quiet
    assert max(quiet) < 0.01


def test_a_copy_has_the_same_bytes_and_the_smaller_picture_has_not(manifest: dict[str, dict[str, Any]]) -> None:
    digests = {Path(name).stem: entry["sha256"] for name, entry in manifest.items()}
    assert digests["coffee_copy"] == digests["coffee"]
    assert digests["cat_smaller"] != digests["cat"]


def test_the_truncated_film_cannot_be_opened() -> None:
    import av

    with pytest.raises(av.error.InvalidDataError):
        av.open(str(SAMPLES / "media" / "broken" / "film_truncated.mp4"))


REMAKE = """
import json, sys
from pathlib import Path
folder = Path(sys.argv[2])
sys.path.insert(0, sys.argv[1])
import make_samples as samples
library, espeak = samples.Library(folder), samples.Espeak()
samples.add_photos(library)
truth = samples.film_truth(samples.film_sound(espeak)[1])
(folder / "film.json").write_text(json.dumps(truth))
samples.add_sounds(library, espeak)
samples.add_texts(library)
library.finish()
"""
"""All of `make` but encoding the film, which takes most of the time; a fresh process, since espeak-ng keeps state."""


def test_making_the_samples_again_gives_the_same_truth(manifest: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    pytest.importorskip("skimage", reason="the extra `samples` is not installed")
    pytest.importorskip("espeakng_loader", reason="the extra `samples` is not installed")
    subprocess.run([sys.executable, "-c", REMAKE, str(SAMPLES), str(tmp_path)], check=True)
    again = {entry["file"]: entry for entry in json.loads((tmp_path / "manifest.json").read_text(encoding="utf-8"))}
    assert again.keys() == {name for name in manifest if "film" not in name}
    for name, entry in again.items():
        assert entry["ground_truth"] == manifest[name]["ground_truth"]
    film = json.loads((tmp_path / "film.json").read_text())
    assert film == manifest["media/film.mp4"]["ground_truth"]
