"""Pictures and text are scored by the real models, item by item, and the policy decides on what they say."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from media_assets import schemas
from media_assets.checks.checker import checker
from media_assets.engine.contract import Inputs, MediaItem, Product, Stage, Unit
from media_assets.moderation.policy import DEFAULT_POLICY
from media_assets.moderation.taxonomy import CONCEPTS, LABELS
from media_assets.stages.moderation_labels import ModerationLabels
from media_assets.stages.moderation_scores import (
    MAX_CHARACTERS,
    ModerationScores,
    StillUnit,
    TextUnit,
    label_map,
    pieces_of_text,
    relabel,
    spans_of_stills,
)
from media_assets.stages.support.concepts import Encode, load_concepts
from media_assets.stages.support.screening import Answers
from resources.errors import Failure, ModelUnavailable, NotApplicable
from resources.files.derived import DerivedStore
from resources.models.nudity import load_image_scorer
from resources.models.openclip import OpenClip
from resources.models.registry import ModelRegistry, ModelSpec
from resources.models.toxicity import load_text_scorer
from resources.settings import Settings

VERSION = "v1"


@pytest.fixture(scope="module")
def settings(models: ModelRegistry) -> Settings:
    return models.settings


@pytest.fixture(scope="module")
def stage(settings: Settings, models: ModelRegistry) -> ModerationScores:
    return ModerationScores(settings, models)


def photo(name: str) -> Image.Image:
    import skimage

    return Image.open(Path(skimage.__file__).parent / "data" / name).convert("RGB")


def png(picture: Image.Image) -> bytes:
    data = io.BytesIO()
    picture.save(data, "PNG")
    return data.getvalue()


class Item:
    """One media item with hand-made upstream tables on disk."""

    def __init__(self, root: Path, media_id: str, kind: str) -> None:
        self.store, self.media_id = DerivedStore(root), media_id
        media = {"uri": media_id, "sha256": "0", "kind": kind, "mime": "x/x", "bytes": 1, "has_audio": False}
        self.write("media", [media])
        for asset in ("frames", "transcript", "ocr_text", "embeddings"):
            self.write(asset, [])

    def write(self, asset: str, rows: list[dict[str, Any]]) -> Item:
        common = {"media_id": self.media_id, "version": VERSION}
        self.store.write(asset, self.media_id, schemas.table(schemas.PER_MEDIA[asset], [common | row for row in rows]))
        return self

    def stills(self, *pictures: Image.Image | bytes | int) -> Item:
        """Stills of one second each; an int repeats that still."""
        rows: list[dict[str, Any]] = []
        for number, picture in enumerate(pictures):
            repeat = picture if isinstance(picture, int) else None
            image = b"" if isinstance(picture, int) else picture if isinstance(picture, bytes) else png(picture)
            rows.append({"frame": number, "start_s": float(number), "end_s": number + 1.0, "repeat_of": repeat})
            rows[-1] |= {"width": 1, "height": 1, "reason": "interval", "phash": bytes(8), "image": image}
        return self.write("frames", rows)

    def vectors(self, vectors: np.ndarray[Any, Any]) -> Item:
        rows = [
            {"unit": "frame", "ordinal": i, "start_s": 0.0, "end_s": 0.0, "space": "joint", "vector": v, "model": "m"}
            for i, v in enumerate(vectors.tolist())
        ]
        return self.write("embeddings", rows)

    def said(self, *segments: tuple[str, str]) -> Item:
        rows = [
            {"segment": i, "start_s": 2.0 * i, "end_s": 2.0 * i + 1, "text": text, "language": language}
            | {"confidence": 1.0, "timing": "none", "words": [], "model": "m"}
            for i, (language, text) in enumerate(segments)
        ]
        return self.write("transcript", rows)

    def inputs(self) -> Inputs:
        return Inputs(MediaItem(self.media_id, self.media_id, "e"), self.store, VERSION)


def run(stage: Stage[Any, Any], item: Item) -> Product:
    """All units of one item in one micro-batch, as a serial engine would."""
    inputs = item.inputs()
    prepared = stage.prepare(inputs)
    outputs = stage.infer(prepared.units) if prepared.units else {}
    failures = {key: value for key, value in outputs.items() if isinstance(value, Failure)}
    assert not failures
    return stage.assemble(inputs, prepared.carry, outputs)


def by_label(table: pa.Table) -> dict[str, list[tuple[float, float, float]]]:
    found: dict[str, list[tuple[float, float, float]]] = {}
    for row in table.to_pylist():
        found.setdefault(row["label"], []).append((row["start_s"], row["end_s"], row["score"]))
    return found


def registry_with(models: ModelRegistry, folder: Path, old: str, new: str) -> ModelRegistry:
    """A registry whose catalogue differs in one place."""
    text = models.path.read_text()
    assert text.count(old) == 1
    path = folder / "models.toml"
    path.write_text(text.replace(old, new))
    return ModelRegistry(models.settings, path)


def decided(settings: Settings, models: ModelRegistry, item: Item, scores: Product) -> list[dict[str, Any]]:
    item.store.write("moderation_scores", item.media_id, scores.table)
    rows: list[dict[str, Any]] = run(ModerationLabels(settings, models), item).table.to_pylist()
    return rows


def test_innocent_stills_score_low_and_repeats_share_the_score_of_the_first(
    stage: ModerationScores, settings: Settings, models: ModelRegistry, tmp_path: Path
) -> None:
    item = Item(tmp_path, "film", "video").stills(photo("coffee.png"), photo("chelsea.png"), 0, 0, photo("brick.png"))
    product = run(stage, item)
    assert product.table.schema.equals(schemas.MODERATION_SCORES)
    found = by_label(product.table)
    assert set(found) == {"sexual", "nudity"}
    # Still 0 holds for its own second and, two later, for its repeats.
    assert [(start, end) for start, end, _ in found["sexual"]] == [(0, 1), (2, 4), (1, 2), (4, 5)]
    assert found["sexual"][0][2] == found["sexual"][1][2]
    assert max(score for _, _, score in found["sexual"]) < 0.5
    assert product.facts["stills"] == 3
    assert product.facts["stills_spared"] == 2
    (row,) = decided(settings, models, item, product)
    assert (row["label"], row["action"], row["rule"], row["end_s"]) == ("none", "allow", "default", 5.0)


def test_the_detector_is_spared_where_the_classifier_is_sure_and_its_labels_are_null_not_zero(
    settings: Settings, models: ModelRegistry, tmp_path: Path
) -> None:
    """Given a still above the screen's threshold and one below, then only the first has a score of nudity."""
    pictures = [photo("coffee.png"), photo("chelsea.png")]
    unscreened = registry_with(models, tmp_path, 'task = "nudity"', 'enabled = false\ntask = "nudity"')
    everything = ModerationScores(settings, unscreened)
    plain = by_label(run(everything, Item(tmp_path / "a", "film", "video").stills(*pictures)).table)
    assert all(score is not None for _, _, score in plain["nudity"])
    low, high = sorted(score for _, _, score in plain["sexual"])
    between = registry_with(models, tmp_path, "ask_above = 0.1\nsecond_look = 0.02", f"ask_above = {(low + high) / 2}")
    item = Item(tmp_path / "b", "film", "video").stills(*pictures)
    product = run(ModerationScores(settings, between), item)
    rows = {(row["label"], row["start_s"]): row for row in product.table.to_pylist()}
    for (_, start), row in rows.items():
        if row["label"] == "nudity":
            seen = rows["sexual", start]
            asked = seen["score"] == high
            assert row["screening"] == ("asked" if asked else "skipped")
            assert (row["score"] is None) == (not asked)
            assert (row["screened_by"], row["screen_score"]) == (seen["model"], seen["score"])
            assert row["model"].startswith("nudenet-320n@")
    assert product.facts["screening_skipped"] == 1
    assert [name.partition("@")[0] for name in product.models or ()] == ["nudenet-320n", "open-nsfw"]
    assert [row["rule"] for row in decided(settings, models, item, product)] == ["default"]
    media = schemas.table(schemas.MEDIA, [item.inputs().media() | {"duration_s": 2.0}])
    assert checker().validate("moderation_scores", product.table, media, 300).passed


def test_a_second_look_asks_the_detector_all_the_same_and_says_so(
    settings: Settings, models: ModelRegistry, tmp_path: Path
) -> None:
    sampled = registry_with(models, tmp_path, "second_look = 0.02", "second_look = 1.0")
    item = Item(tmp_path / "store", "film", "video").stills(photo("brick.png"))
    rows = run(ModerationScores(settings, sampled), item).table.to_pylist()
    assert [(row["label"], row["screening"]) for row in rows] == [("nudity", "second_look"), ("sexual", None)]
    assert rows[0]["score"] == 0.0


def test_speech_is_scored_where_the_model_knows_the_language(
    stage: ModerationScores, settings: Settings, models: ModelRegistry, tmp_path: Path
) -> None:
    item = Item(tmp_path, "talk", "audio").said(
        ("en", "Ask what you can do for your country."),
        ("en", "You are a fucking asshole and a piece of shit."),
        ("fr", "Il fait beau à Paris aujourd'hui."),
    )
    product = run(stage, item)
    calm, rude = by_label(product.table)["profanity"]
    assert calm[2] < 0.3
    assert rude[2] > 0.95
    assert set(by_label(product.table)) == {"profanity"}
    assert product.facts["texts_in_other_languages"] == 1
    (row,) = decided(settings, models, item, product)
    assert (row["label"], row["action"], row["modality"], row["start_s"]) == ("profanity", "review", "speech", 2.0)
    assert row["model"].startswith("alt-profanity-check@")
    assert row["policy_version"] == ModerationLabels(settings, models).policy.version


def test_text_on_screen_and_documents_name_their_modality(stage: ModerationScores, tmp_path: Path) -> None:
    line = {"line": 0, "start_s": 1.0, "end_s": 4.0, "text": "what the fuck", "confidence": 0.9, "polygon": []}
    film = Item(tmp_path, "film", "video").write("ocr_text", [line | {"frame": 0, "frames_seen": 3, "model": "m"}])
    (seen,) = run(stage, film).table.to_pylist()
    assert (seen["modality"], seen["start_s"], seen["end_s"], seen["source"]) == ("ocr", 1.0, 4.0, "0")
    document = Item(tmp_path, "letter", "text").said(("en", "kind words " * 300 + "fuck you all"))
    (read,) = run(stage, document).table.to_pylist()
    assert read["modality"] == "text"
    # The insult stands at the end of a text longer than one piece, and still decides its score.
    assert read["score"] > 0.5


def test_an_item_with_nothing_to_score_is_not_applicable_and_still_gets_a_decision(
    stage: ModerationScores, settings: Settings, models: ModelRegistry, tmp_path: Path
) -> None:
    item = Item(tmp_path, "noise", "audio")
    with pytest.raises(NotApplicable, match="no picture and no text"):
        stage.prepare(item.inputs())
    (row,) = decided(settings, models, item, Product(schemas.table(schemas.MODERATION_SCORES, [])))
    assert (row["label"], row["action"], row["rule"]) == ("none", "allow", "unscored")


def test_a_broken_still_fails_alone_and_answers_are_keyed(stage: ModerationScores) -> None:
    good = StillUnit(png(photo("coffee.png")))
    units: list[Unit[StillUnit | TextUnit]] = [
        Unit("a", TextUnit("hello")),
        Unit("b", StillUnit(b"no picture")),
        Unit("c", good),
    ]
    answers = dict(stage.infer(units))
    assert isinstance(answers["b"], Failure)
    assert isinstance(answers["a"], Answers)
    assert [name.partition("@")[0] for name in answers["a"].labels] == ["alt-profanity-check"]
    assert answers["c"] == stage.infer([Unit("c", good)])["c"]


def test_concepts_are_recognised_in_the_joint_space(
    stage: ModerationScores, models: ModelRegistry, settings: Settings, tmp_path: Path
) -> None:
    spec = models.spec("embedding")
    encoder = models.loaded(spec, lambda: OpenClip(spec, models.cache))
    pictures = [photo(name) for name in ("rocket.jpg", "coffee.png", "chelsea.png")]
    item = Item(tmp_path, "film", "video").stills(*pictures).vectors(encoder.encode_images(pictures))
    product = run(stage, item)
    found = by_label(product.table)
    assert set(found) == {"sexual", "nudity", *CONCEPTS}
    # The offline embedding knows missiles and no space rockets: it takes the one for the other.
    rocket, coffee, cat = (score for _, _, score in found["military"])
    assert rocket > 0.4 > max(coffee, cat)
    others = [score for label in CONCEPTS if label != "military" for _, _, score in found[label][1:]]
    assert max(others) < 0.4
    assert [(r["label"], r["action"]) for r in decided(settings, models, item, product)] == [("military", "allow")]


def test_the_embedding_model_is_not_needed_once_the_prompts_are_encoded(models: ModelRegistry, tmp_path: Path) -> None:
    """Given two processes with one home, then the second scores concepts alike without opening the text encoder."""
    opened: list[int] = []

    def open_encoder() -> Encode:
        opened.append(1)
        return lambda texts: np.stack(
            [np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8).astype(np.float32) for text in texts]
        )

    spec = models.spec("embedding")
    first = load_concepts(spec, tmp_path, open_encoder)
    second = load_concepts(spec, tmp_path, open_encoder)
    assert opened == [1]
    vector = np.full(32, 32**-0.5, np.float32)
    assert first.score(vector) == second.score(vector)
    assert sum(first.score(vector).values()) < 1
    load_concepts(spec.model_copy(update={"source": "file:/other"}), tmp_path, open_encoder)
    assert opened == [1, 1], "another model has prompts of its own"
    for path in tmp_path.iterdir():
        path.write_bytes(b"cut short")
    with pytest.raises(ModelUnavailable, match=r"cannot be read: .* Delete"):
        load_concepts(spec, tmp_path, open_encoder)


def test_what_a_model_server_holds_is_no_embedding_model(models: ModelRegistry) -> None:
    """Given a fresh registry, as a server has it, then loading and answering load each classifier once and no more."""
    fresh = ModelRegistry(models.settings)
    stage = ModerationScores(models.settings, fresh)
    stage.load()
    stage.infer([Unit("a", StillUnit(png(photo("coffee.png")))), Unit("b", TextUnit("hello"))])
    assert fresh.loads == {spec.identity: 1 for spec in stage.held()}
    assert {spec.task for spec in stage.held()} == {"nudity", "nsfw", "toxicity"}


def test_a_changed_policy_changes_the_version_and_the_decision_without_any_model(
    settings: Settings, models: ModelRegistry, tmp_path: Path
) -> None:
    item = Item(tmp_path / "store", "film", "video")
    row = {"modality": "image", "start_s": 0.0, "end_s": 2.0, "label": "weapons", "score": 0.5, "source": "0"}
    item.write("moderation_scores", [row | {"model": "m@1"}])
    before = ModerationLabels(settings, models)
    strict_home = tmp_path / "strict"
    strict_home.mkdir()
    text = DEFAULT_POLICY.read_text()
    assert text.count('min_score = 0.6, severity = "medium"') == 1
    (strict_home / "policy.toml").write_text(text.replace('0.6, severity = "medium"', '0.45, severity = "medium"'))
    after = ModerationLabels(Settings(home=strict_home), models)
    assert before.parameters() != after.parameters()
    assert [run(labels, item).table.column("action")[0].as_py() for labels in (before, after)] == ["allow", "review"]
    assert before.specs() == ()


@pytest.mark.parametrize("profile", ["offline", "gpu"])
def test_every_declared_model_maps_to_labels_of_the_taxonomy(profile: str, tmp_path: Path) -> None:
    registry = ModelRegistry(Settings.model_validate({"home": tmp_path, "profile": profile}))
    for task in ("nudity", "nsfw", "toxicity"):
        for spec in registry.candidates(task):
            assert set(label_map(spec).values()) <= set(LABELS)


def test_a_mapping_to_a_class_the_model_lacks_is_an_error_and_no_zero() -> None:
    assert relabel({"a": 0.2, "b": 0.7, "c": 0.9}, {"a": "hate", "b": "hate"}) == {"hate": 0.7}
    with pytest.raises(ModelUnavailable, match="no class typo"):
        relabel({"a": 0.2}, {"typo": "hate"})


def test_repeats_of_repeats_belong_to_the_first_still() -> None:
    rows = [
        {"frame": frame, "start_s": float(i), "end_s": i + 1.0, "repeat_of": repeat}
        for i, (frame, repeat) in enumerate([(0, None), (7, 0), (9, 7), (12, None), (20, 9)])
    ]
    assert spans_of_stills(rows) == {0: ((0.0, 3.0), (4.0, 5.0)), 12: ((3.0, 4.0),)}


def test_long_text_is_cut_between_words_and_nothing_is_lost() -> None:
    text = "word " * 1000
    pieces = pieces_of_text(text)
    assert all(len(piece) <= MAX_CHARACTERS for piece in pieces)
    assert " ".join(pieces).split() == text.split()
    assert "".join(pieces_of_text("x" * 3000)) == "x" * 3000
    assert pieces_of_text(" \n ") == []


@pytest.fixture(scope="module")
def image_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny image classifier with random weights, saved as a hub checkpoint is."""
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    folder = tmp_path_factory.mktemp("vit")
    config = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=32)
    config.id2label, config.label2id = {0: "normal", 1: "nsfw"}, {"normal": 0, "nsfw": 1}
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny multi-label text classifier with random weights."""
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

    folder = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "you", "are", "kind"]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(words), hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    config.id2label, config.label2id = {0: "toxic", 1: "insult"}, {"toxic": 0, "insult": 1}
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def spec_of(folder: Path, task: str, **parameters: object) -> ModelSpec:
    digests = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}
    return ModelSpec(
        task=task,
        name="tiny",
        adapter="nudity",
        source=f"file:{folder}",
        sha256=digests,
        parameters={"library": "transformers", **parameters},
        precision="fp16",
        licence="none",
    )


def test_a_transformers_image_classifier_answers_by_its_own_class_names(image_checkpoint: Path, tmp_path: Path) -> None:
    scorer = load_image_scorer(spec_of(image_checkpoint, "nsfw", activation="softmax"), tmp_path)
    pictures = [np.asarray(photo(name)) for name in ("coffee.png", "chelsea.png")]
    both = scorer.score(pictures)
    assert [set(scores) for scores in both] == [{"normal", "nsfw"}] * 2
    assert all(sum(scores.values()) == pytest.approx(1.0, abs=1e-5) for scores in both)
    assert scorer.score(pictures[1:])[0] == pytest.approx(both[1], abs=1e-5)


def test_a_transformers_text_classifier_scores_each_class_on_its_own(text_checkpoint: Path, tmp_path: Path) -> None:
    scorer = load_text_scorer(spec_of(text_checkpoint, "toxicity", activation="sigmoid"), tmp_path)
    one, padded = scorer.score(["you", "you are kind " * 400])
    assert set(one) == {"toxic", "insult"}
    assert scorer.score(["you"])[0] == pytest.approx(one, abs=1e-5)
    assert all(0 < value < 1 for value in (*one.values(), *padded.values()))
    assert scorer.score([]) == []


def test_a_light_text_model_looks_first_and_answers_where_it_was_sure(
    text_checkpoint: Path, models: ModelRegistry, tmp_path: Path
) -> None:
    """Given a multilingual classifier behind the profanity check, then calm English is not sent on, all else is."""
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in text_checkpoint.iterdir()}
    heavy = f"""
[[offline.screens]]
task = "toxicity"
screened_by = "alt-profanity-check"
ask_above = 0.2

[[offline.toxicity]]
name = "tiny"
adapter = "toxicity"
source = "file:{text_checkpoint}"
licence = "none"
sha256 = {{ {", ".join(f'"{name}" = "{digest}"' for name, digest in digests.items())} }}
[offline.toxicity.parameters]
library = "transformers"
activation = "sigmoid"
labels = {{ toxic = "toxicity", insult = "harassment" }}

[[offline.toxicity]]
"""
    heavier = registry_with(models, tmp_path, "[[offline.toxicity]]", heavy)
    stage = ModerationScores(models.settings, heavier)
    # The last one hides its insult in a text longer than the profanity check reads at once.
    said = [
        ("en", "Have a nice day."),
        ("en", "You fucking asshole."),
        ("fr", "Bonjour."),
        ("en", "kind words " * 90 + "fuck you"),
    ]
    product = run(stage, Item(tmp_path / "store", "talk", "audio").said(*said))
    rows = [
        (row["source"], row["model"].partition("@")[0], row["label"], row["score"] is None, row["screening"])
        for row in product.table.to_pylist()
    ]
    assert [row for row in rows if row[0] == "0"] == [
        ("0", "tiny", "harassment", True, "skipped"),
        ("0", "tiny", "toxicity", True, "skipped"),
        ("0", "alt-profanity-check", "profanity", False, None),
    ]
    assert [row for row in rows if row[0] != "0"] == [
        (source, "tiny", label, False, "asked") for source in "123" for label in ("harassment", "toxicity")
    ]
    # What the light model cannot read has no score of it.
    assert {row["screen_score"] for row in product.table.to_pylist() if row["source"] == "2"} == {None}
    assert {name.partition("@")[0] for name in product.models or ()} == {"tiny", "alt-profanity-check"}


def test_a_checkpoint_that_cannot_be_used_says_what_to_do(text_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelUnavailable, match="activation"):
        load_text_scorer(spec_of(text_checkpoint, "toxicity"), tmp_path)
    with pytest.raises(ModelUnavailable, match="unknown library"):
        load_text_scorer(spec_of(text_checkpoint, "toxicity", library="magic"), tmp_path)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ModelUnavailable, match="complete checkpoint"):
        load_text_scorer(spec_of(broken, "toxicity", activation="sigmoid"), tmp_path)
