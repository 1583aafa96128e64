"""Evaluations on derived tables made by hand: what a perfect and a flawed model get, and what the checks say."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np
import pytest

from evals.assets import check_result, eval_assets, eval_checks
from evals.baseline import Baseline, home_folder, path_of, regressions, store_baseline
from evals.evaluate import EVALS, evaluate
from evals.golden import Golden, GoldenSetError, Range, local_path
from evals.pictures import MAX_DATA_URI_BYTES, Timeline, bars, data_uri, timelines
from evals.result import EvalResult, Figure, NotProcessedError, Reader, Vectors, Verdict
from media_assets import schemas
from resources.files.derived import DerivedStore
from resources.models.registry import ModelRegistry
from resources.records.database import Database
from resources.records.outcomes import OutcomeStore
from resources.settings import Settings

MANIFEST: list[dict[str, Any]] = [
    {
        "file": "a/talk.wav",
        "kind": "speech",
        "ground_truth": {"language": "en", "transcript": "Good morning, Mr. Fox."},
    },
    {"file": "a/rain.wav", "kind": "speech", "ground_truth": {"transcript": "", "speech": False}},
    {
        "file": "a/film.mp4",
        "kind": "video",
        "ground_truth": {
            "hard_cuts": [50, 100],
            "gradual": [{"kind": "fade", "around": [150, 170]}],
            "ambiguous": [],
            "on_screen_text": [{"text": ["THE END"], "frames": [175, 199]}],
            "speech": {"language": "en", "segments": [{"start": 0.5, "text": "hello there"}]},
        },
    },
    {"file": "a/sign.png", "kind": "ocr", "ground_truth": {"text_lines": ["EXIT", "Room 2"], "languages": ["en"]}},
    {
        "file": "a/cat.jpg",
        "kind": "images",
        "ground_truth": {"label": "cat", "caption": "a cat asleep", "group": "cat"},
    },
    {"file": "a/cat2.jpg", "kind": "duplicates", "ground_truth": {"group": "cat", "variant": "smaller"}},
    {
        "file": "a/gun.jpg",
        "kind": "moderation",
        "ground_truth": {"label": "revolver", "expected": ["weapon", "museum piece"], "group": None},
    },
    {"file": "a/talk.csv", "kind": "moderation", "ground_truth": {"rows": 2, "column": "is_toxic"}},
    {"file": "a/broken.mp4", "kind": "hostile", "ground_truth": {"expected": "clean error"}},
]
MODEL = "model@0123456789ab"
VECTORS = {"cat": [1.0, 0.0], "a cat asleep": [0.8, 0.6], "revolver": [0.0, 1.0]}
SPAN: dict[str, object] = {"start_s": 0.0, "end_s": 8.0, "model": MODEL, "version": "v"}


class Encoder:
    """Texts with known vectors."""

    identity = MODEL

    def encode_texts(self, texts: Sequence[str]) -> Vectors:
        return np.array([VECTORS[text] for text in texts], np.float32)


class Moderator:
    """Finds harm in texts that say `fool`."""

    identity = "words@1"

    def judge(self, texts: Sequence[str]) -> list[Verdict]:
        return [
            Verdict(frozenset({"toxicity"}) if "fool" in t else frozenset(), False, float("fool" in t)) for t in texts
        ]


@dataclass
class Media:
    """Stands in for the `media` resource."""

    settings: Settings
    store: DerivedStore
    models: ModelRegistry
    golden: Golden
    outcomes: OutcomeStore

    def items(self) -> list[tuple[str, str, str | None]]:
        return library_of(self.golden)


def media_id(file: str) -> str:
    return file.rpartition("/")[2].replace(".", "-")


def library_of(golden: Golden) -> list[tuple[str, str, str | None]]:
    return [(media_id(item.file), str(golden.root / item.file), None) for item in golden.items]


def write(store: DerivedStore, asset: str, file: str, rows: list[dict[str, object]]) -> None:
    full = [{"media_id": media_id(file), **row} for row in rows]
    store.write(asset, media_id(file), schemas.table(schemas.PER_MEDIA[asset], full))


def said(text: str) -> list[dict[str, object]]:
    return [{**SPAN, "segment": 0, "text": text, "language": "en", "confidence": 0.9, "words": [], "timing": "none"}]


def shot(
    number: int, start: int, end: int, kind: str = "cut", span: tuple[int, int] | None = None
) -> dict[str, object]:
    first, last = span or (start, start)
    return {
        **SPAN,
        "shot": number,
        "start_frame": start,
        "end_frame": end,
        "confidence": 0.9,
        "transition": kind,
        "transition_start_frame": first,
        "transition_end_frame": last,
    }


def line(number: int, text: str, start_s: float = 0.0, end_s: float = 0.0) -> dict[str, object]:
    where = {"start_s": start_s, "end_s": end_s, "model": MODEL, "version": "v"}
    return {**where, "line": number, "text": text, "confidence": 0.9, "polygon": [], "frame": 0, "frames_seen": 1}


def vector(values: list[float], model: str = MODEL) -> dict[str, object]:
    return {**SPAN, "unit": "image", "ordinal": 0, "space": "joint", "vector": values, "model": model}


def finding(label: str, action: str = "allow") -> dict[str, object]:
    rest = {"severity": "low", "rule": "r", "score": 0.7, "modality": "image", "policy_version": "p1"}
    return {**SPAN, **rest, "label": label, "action": action}


@pytest.fixture
def golden(tmp_path: Path) -> Golden:
    folder = tmp_path / "tiny"
    (folder / "a").mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps(MANIFEST))
    (folder / "a" / "talk.csv").write_text('text,is_toxic\n"well done, friend",Not Toxic\nyou fool,Toxic\n')
    return Golden.load(folder)


@pytest.fixture
def store(tmp_path: Path) -> DerivedStore:
    """Derived tables of a flawless run."""
    store = DerivedStore(tmp_path / "derived")
    write(store, "transcript", "a/talk.wav", said("good morning mister fox"))
    write(store, "transcript", "a/rain.wav", [])
    write(store, "transcript", "a/film.mp4", said("Hello there!"))
    fade = shot(3, 171, 199, "gradual", (150, 170))
    write(store, "shots", "a/film.mp4", [shot(0, 0, 49, "start"), shot(1, 50, 99), shot(2, 100, 149), fade])
    write(store, "ocr_text", "a/sign.png", [line(0, "EXIT"), line(1, "Room 2")])
    write(store, "ocr_text", "a/film.mp4", [line(0, "The End", 7.0, 8.0)])
    media: dict[str, object] = {
        "uri": "u",
        "sha256": "0",
        "kind": "video",
        "mime": "video/mp4",
        "bytes": 1,
        "fps": 25.0,
    }
    write(store, "media", "a/film.mp4", [{**media, "has_audio": True, "version": "v"}])
    write(store, "embeddings", "a/cat.jpg", [vector([1.0, 0.0])])
    write(store, "embeddings", "a/gun.jpg", [vector([0.0, 1.0])])
    write(store, "moderation_labels", "a/cat.jpg", [finding("none")])
    write(store, "moderation_labels", "a/gun.jpg", [finding("weapons", "review")])
    for file, phash in (("a/cat.jpg", 0), ("a/cat2.jpg", 3), ("a/gun.jpg", 2**40 - 1)):
        still: dict[str, object] = {
            "frame": 0,
            "start_s": 0.0,
            "end_s": 0.0,
            "width": 1,
            "height": 1,
            "reason": "image",
        }
        write(store, "frames", file, [{**still, "phash": phash.to_bytes(8), "image": b"", "version": "v"}])
    write_duplicates(store, [("cat-jpg", "cat2-jpg", "perceptual")])
    return store


def write_duplicates(store: DerivedStore, links: list[tuple[str, str, str]]) -> None:
    rows: list[dict[str, object]] = [
        {"group_id": a, "media_id": a, "other_id": b, "method": method, "distance": 0.1, "evidence": "e"}
        for a, b, method in links
    ]
    store.write("near_duplicates", "all", schemas.table(schemas.NEAR_DUPLICATES, rows))


@pytest.fixture
def reader(store: DerivedStore, golden: Golden) -> Reader:
    return Reader(store, library_of(golden), Encoder(), Moderator())


def values(result: EvalResult) -> dict[str, float]:
    return {name: figure.value for name, figure in result.figures.items()}


@pytest.mark.parametrize("name", sorted(EVALS))
def test_a_flawless_model_gets_the_best_figures(name: str, golden: Golden, reader: Reader) -> None:
    result = evaluate(name, golden, reader)
    best = {"higher": 1.0, "lower": 0.0}
    judged = {key: figure.value for key, figure in result.figures.items() if figure.better is not None}
    assert judged
    expected = {key: best[str(result.figures[key].better)] for key in judged}
    if name == "retrieval":
        expected["recall@1_captions"] = 1.0
    assert judged == expected
    assert result.rows.num_rows > 0
    assert result.picture.startswith(b"\x89PNG")


def test_wrong_words_and_invented_sentences_are_counted(golden: Golden, reader: Reader, store: DerivedStore) -> None:
    write(store, "transcript", "a/talk.wav", said("good evening fox"))
    write(store, "transcript", "a/rain.wav", said("Thank you for watching."))
    result = evaluate("asr", golden, reader)
    assert values(result)["wer_en"] == pytest.approx(2 / 6, abs=1e-6)
    assert values(result)["hallucination_rate"] == 1.0
    assert result.model == MODEL


def test_an_item_whose_processing_failed_counts_as_wrong(golden: Golden, reader: Reader, store: DerivedStore) -> None:
    store.delete("transcript", media_id("a/talk.wav"))
    result = evaluate("asr", golden, reader)
    assert values(result)["wer_en"] == pytest.approx(4 / 6, abs=1e-6)
    assert values(result)["unprocessed"] == 1


def test_late_false_and_missing_cuts_lower_the_score(golden: Golden, reader: Reader, store: DerivedStore) -> None:
    write(store, "shots", "a/film.mp4", [shot(0, 0, 50, "start"), shot(1, 51, 119), shot(2, 120, 199)])
    found = values(evaluate("shots", golden, reader))
    assert (found["precision"], found["recall"], found["gradual_recall"]) == (0.5, 0.5, 0.0)


def test_reading_order_and_time_matter_to_recognised_text(golden: Golden, reader: Reader, store: DerivedStore) -> None:
    write(store, "ocr_text", "a/sign.png", [line(0, "Room 2"), line(1, "EXIT")])
    write(store, "ocr_text", "a/film.mp4", [line(0, "The End", 0.0, 2.0)])
    found = values(evaluate("ocr", golden, reader))
    assert found["cer_printed_en"] > 0.5
    assert found["cer_any_order_printed_en"] == 0
    assert found["screen_text_recall"] == 0


def test_vectors_of_another_model_are_refused(golden: Golden, reader: Reader, store: DerivedStore) -> None:
    write(store, "embeddings", "a/cat.jpg", [vector([1.0, 0.0], "older@111111111111")])
    with pytest.raises(NotProcessedError, match="embedded by older@111111111111"):
        evaluate("retrieval", golden, reader)


def test_a_missed_and_a_false_label_show_per_label(golden: Golden, reader: Reader, store: DerivedStore) -> None:
    write(store, "moderation_labels", "a/gun.jpg", [finding("tobacco")])
    write(store, "moderation_labels", "a/cat.jpg", [finding("nudity", "block")])
    found = values(evaluate("moderation", golden, reader))
    assert (found["recall_weapons"], found["precision_tobacco"], found["ordinary_flagged"]) == (0.0, 0.0, 1.0)


def test_semantic_matches_are_reported_apart(golden: Golden, reader: Reader, store: DerivedStore) -> None:
    write_duplicates(store, [("cat-jpg", "cat2-jpg", "semantic"), ("cat-jpg", "gun-jpg", "perceptual")])
    found = values(evaluate("duplicates", golden, reader))
    assert (found["precision"], found["recall"], found["recall_findable"]) == (0.0, 0.0, 0.0)
    assert found["recall_semantic"] == 1.0


def test_media_that_are_not_registered_name_the_command(golden: Golden, reader: Reader) -> None:
    for name in EVALS:
        with pytest.raises(NotProcessedError, match=f"media-assets run {golden.root / 'a'}"):
            evaluate(name, golden, replace(reader, library=[]))


def test_registered_media_without_tables_name_the_command(golden: Golden, reader: Reader, tmp_path: Path) -> None:
    empty = replace(reader, store=DerivedStore(tmp_path / "nothing"))
    for name in EVALS:
        with pytest.raises(NotProcessedError, match="media-assets run"):
            evaluate(name, golden, empty)


def test_media_elsewhere_are_matched_by_content(tmp_path: Path) -> None:
    for name in ("one.txt", "two.txt"):
        (tmp_path / name).write_text("same bytes")
    manifest: list[dict[str, object]] = [{"file": name, "ground_truth": {}} for name in ("one.txt", "two.txt")]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    golden = Golden.load(tmp_path)
    digest = hashlib.sha256(b"same bytes").hexdigest()
    library = [
        ("m1", "s3://bucket/x", digest),
        ("m2", f"file://{tmp_path / 'two.txt'}", digest),
        ("m3", "/z", "0" * 64),
    ]
    assert golden.match(library) == {"one.txt": "m1", "two.txt": "m2"}


def test_a_remote_uri_is_no_local_path() -> None:
    assert local_path("s3://bucket/key.jpg") is None
    assert local_path("file:///tmp/a%20b.jpg") == Path("/tmp/a b.jpg").resolve()


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "not JSON"), ("{}", "not a list"), ('[{"kind": "x"}]', "names no file")],
)
def test_a_manifest_that_cannot_be_used_says_why(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(GoldenSetError, match=message):
        Golden.load(tmp_path)


def test_odd_forms_of_ground_truth_are_understood(tmp_path: Path) -> None:
    fades = {"kind": "cycles", "black_at": [0, 84], "white_at": [42, 126]}
    truth = {"hard_cuts": [], "gradual": [fades], "ambiguous": [[3, 9], 20], "on_screen_text": ["a", " ", "b"]}
    (tmp_path / "manifest.json").write_text(json.dumps([{"file": "v.mp4", "ground_truth": truth}]))
    item = Golden.load(tmp_path).items[0]
    assert item.cuts is not None
    assert item.cuts.gradual == (Range(0, 126),)
    assert item.cuts.ambiguous == (Range(3, 9), Range(20, 20))
    assert item.screen_text == ()


def test_a_result_is_read_back_as_it_was_written(golden: Golden, reader: Reader, tmp_path: Path) -> None:
    result = evaluate("shots", golden, reader)
    path = result.write(tmp_path)
    assert path == tmp_path / "evals" / "shots" / f"{MODEL}.parquet"
    again = EvalResult.read(path)
    assert (again.name, again.model, again.figures) == (result.name, result.model, result.figures)
    assert again.rows.to_pylist() == result.rows.to_pylist()


def test_a_loss_beyond_the_tolerance_is_a_regression(golden: Golden, reader: Reader, tmp_path: Path) -> None:
    result = evaluate("asr", golden, reader)
    store_baseline([result], home_folder(tmp_path))
    stored = Baseline.load(golden, tmp_path)
    assert stored is not None
    within = replace(result, figures={**result.figures, "wer_en": Figure(0.02, "lower", 0.02)})
    beyond = replace(result, figures={**result.figures, "wer_en": Figure(0.03, "lower", 0.02)})
    gone = replace(result, figures={name: f for name, f in result.figures.items() if name != "wer_en"})
    assert regressions(within, stored.evals["asr"]) == []
    assert [str(r) for r in regressions(beyond, stored.evals["asr"])] == ["wer_en: 0.03, baseline 0, tolerance 0.02"]
    assert [r.value for r in regressions(gone, stored.evals["asr"])] == [None]


def test_an_edited_tolerance_and_other_evals_survive_storing(golden: Golden, reader: Reader, tmp_path: Path) -> None:
    asr, shots = evaluate("asr", golden, reader), evaluate("shots", golden, reader)
    (path,) = store_baseline([asr], tmp_path)
    document = json.loads(path.read_text())
    document["evals"]["asr"]["figures"]["wer_en"]["tolerance"] = 0.3
    path.write_text(json.dumps(document))
    store_baseline([shots], tmp_path)
    store_baseline([asr], tmp_path)
    stored = Baseline.model_validate_json(path_of(tmp_path, golden.name).read_text())
    assert sorted(stored.evals) == ["asr", "shots"]
    assert stored.evals["asr"].figures["wer_en"].tolerance == 0.3


def test_without_a_baseline_the_check_warns_how_to_store_one(golden: Golden, reader: Reader, tmp_path: Path) -> None:
    check = check_result(evaluate("asr", golden, reader), golden, tmp_path)
    assert (check.passed, check.severity) == (False, dg.AssetCheckSeverity.WARN)
    assert "--store-baseline" in str(check.description)


def test_the_asset_writes_rows_and_the_check_fails_on_a_regression(
    golden: Golden, reader: Reader, store: DerivedStore, database: Database, tmp_path: Path
) -> None:
    settings = Settings.load(tmp_path / "home").model_copy(update={"golden": str(golden.root)})
    media = Media(settings, store, ModelRegistry(settings), golden, OutcomeStore(database, settings.engine))
    asset = next(asset for asset in eval_assets if asset.key == dg.AssetKey(["evals", "shots"]))
    check = next(check for check in eval_checks if asset.key in {key.asset_key for key in check.check_keys})
    resources = {"media": dg.ResourceDefinition.hardcoded_resource(media)}

    store_baseline([evaluate("shots", golden, reader)], home_folder(settings.home))
    first = dg.materialize([asset, check], resources=resources)
    assert [found.passed for found in first.get_asset_check_evaluations()] == [True]
    metadata = first.asset_materializations_for_node("evals__shots")[0].metadata
    assert metadata["f1"].value == 1.0
    assert str(metadata["picture"].value).startswith("![picture](data:image/png;base64,")
    assert (settings.home / "evals" / "shots" / f"{MODEL}.parquet").exists()

    write(store, "shots", "a/film.mp4", [shot(0, 0, 199, "start")])
    second = dg.materialize([asset, check], resources=resources)
    (evaluation,) = second.get_asset_check_evaluations()
    assert (evaluation.passed, evaluation.severity) == (False, dg.AssetCheckSeverity.ERROR)
    assert "recall" in str(evaluation.description)


def test_every_eval_has_an_asset_and_a_check() -> None:
    keys = {dg.AssetKey(["evals", name]) for name in EVALS}
    assert {asset.key for asset in eval_assets} == keys
    assert {key.asset_key for check in eval_checks for key in check.check_keys} == keys


def test_pictures_of_many_odd_names_stay_small() -> None:
    names = [f"folder/{'x' * 80}\n{index}-日本.jpg" for index in range(300)]
    chart = bars("Error rate", [(name, index / 300) for index, name in enumerate(names)])
    strip = timelines("Cuts", [Timeline(name, 700, (75, 200), (76,), ((450, 499),)) for name in names])
    for picture in (chart, strip):
        assert 0 < len(data_uri(picture)) <= MAX_DATA_URI_BYTES
