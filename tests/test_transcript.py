"""Speech of real (synthesised) voices becomes timed text, batch by batch; what is not speech becomes nothing."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from media_assets import schemas
from media_assets.engine.contract import Inputs, MediaItem, Prepared, Product, Unit
from media_assets.stages.support.routing import Answered
from media_assets.stages.transcript import Payload, Transcript, sentences
from resources.errors import Failure, ModelUnavailable, NotApplicable
from resources.files.derived import DerivedStore
from resources.models.alignment import WordAligner
from resources.models.diarization import Turn, speaker_of
from resources.models.registry import CATALOGUE, ModelRegistry, ModelSpec
from resources.models.vad import SAMPLE_RATE, Span, merge
from resources.models.whisper import Recognised, Stretch, Word, _parts
from resources.settings import Settings
from tests.speech import say

PCM = npt.NDArray[np.int16]
VERSION = "v1"
ENGLISH = "Good morning everyone. Today we talk about the weather in London."
SECOND = "The quick brown fox jumps over the lazy dog."
GERMAN = "Guten Morgen. Heute sprechen wir über das Wetter in Berlin."


def silence(seconds: float) -> PCM:
    return np.zeros(int(seconds * SAMPLE_RATE), np.int16)


def flac(samples: PCM) -> bytes:
    import av

    sink = io.BytesIO()
    with av.open(sink, "w", format="flac") as container:
        stream = container.add_stream("flac", rate=SAMPLE_RATE, layout="mono")
        for at in range(0, len(samples), 4096):
            frame = av.AudioFrame.from_ndarray(samples[None, at : at + 4096], format="s16", layout="mono")
            frame.sample_rate = SAMPLE_RATE
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return sink.getvalue()


@pytest.fixture(scope="module")
def stage(models: ModelRegistry) -> Transcript:
    made = Transcript(models.settings, models)
    made.load()
    return made


class Library:
    """Media items as decoding would leave them in a store."""

    def __init__(self, root: Path) -> None:
        self.store = DerivedStore(root)

    def add(self, media_id: str, kind: str, has_audio: bool = False, preview: bool = False) -> Inputs:
        row = {
            "media_id": media_id,
            "uri": f"/library/{media_id}",
            "sha256": "0" * 64,
            "kind": kind,
            "mime": "application/octet-stream",
            "bytes": 1,
            "has_audio": has_audio,
            "version": VERSION,
        }
        self.store.write("media", media_id, schemas.table(schemas.MEDIA, [row]))
        return Inputs(MediaItem(media_id, row["uri"], ""), self.store, VERSION, wants_preview=preview)

    def sound(self, media_id: str, samples: PCM, preview: bool = False) -> Inputs:
        inputs = self.add(media_id, "audio", has_audio=True, preview=preview)
        rows = [
            {
                "media_id": media_id,
                "chunk": chunk,
                "start_s": at / SAMPLE_RATE,
                "end_s": (at + len(part)) / SAMPLE_RATE,
                "samples": len(part),
                "rms": 0.1,
                "peak": 0.5,
                "flac": flac(part),
                "version": VERSION,
            }
            for chunk, at in enumerate(range(0, len(samples), 5 * SAMPLE_RATE))
            if len(part := samples[at : at + 5 * SAMPLE_RATE])
        ]
        self.store.write("audio", media_id, schemas.table(schemas.AUDIO, rows))
        return inputs

    def text(self, media_id: str, rows: Sequence[dict[str, object]]) -> Inputs:
        inputs = self.add(media_id, "text")
        stamped = [{"media_id": media_id, "segment": i, "version": VERSION, **row} for i, row in enumerate(rows)]
        self.store.write("media", media_id, schemas.table(schemas.MEDIA_TEXT, stamped), "text")
        return inputs


@pytest.fixture
def library(tmp_path: Path) -> Library:
    return Library(tmp_path / "derived")


def together(stage: Transcript, items: Sequence[Inputs]) -> list[Product]:
    """All items in one micro-batch, as the engine would send it."""
    prepared = [stage.prepare(inputs) for inputs in items]
    batch = [replace(u, id=f"{i}/{u.id}") for i, one in enumerate(prepared) for u in one.units]
    answers = stage.infer(batch)
    assert set(answers) == {unit.id for unit in batch}
    return [
        stage.assemble(inputs, one.carry, {u.id: answers[f"{i}/{u.id}"] for u in one.units})  # type: ignore[misc]
        for i, (inputs, one) in enumerate(zip(items, prepared, strict=True))
    ]


def text_of(product: Product) -> str:
    return " ".join(product.table.column("text").to_pylist())


def assert_sound_rows(product: Product, duration_s: float) -> None:
    """What every consumer relies on: order, spans inside the media, words inside their segment."""
    assert product.table.schema.equals(schemas.TRANSCRIPT)
    at_s = 0.0
    for index, row in enumerate(product.table.to_pylist()):
        assert row["segment"] == index
        assert at_s <= row["start_s"] <= row["end_s"] <= duration_s
        assert 0 < row["confidence"] <= 1
        assert row["timing"] == "whisper"
        assert row["speaker"] is None
        assert row["model"].startswith(("whisper-base-short@", "whisper-base@"))
        assert " ".join(word["word"] for word in row["words"]) == row["text"]
        for word in row["words"]:
            assert at_s <= word["start_s"] <= word["end_s"] <= row["end_s"]
            at_s = word["end_s"]


def test_items_of_two_languages_in_one_batch_read_as_they_do_alone(stage: Transcript, library: Library) -> None:
    english, german = say(ENGLISH, "en-us"), say(GERMAN, "de")
    pair = np.concatenate([silence(1), english, silence(6), say(SECOND, "en-us"), silence(1)])
    items = [library.sound("pair", pair), library.sound("german", german), library.sound("quiet", silence(3))]
    both = together(stage, items)
    alone = [together(stage, [inputs])[0] for inputs in items]
    assert [p.table.to_pylist() for p in both] == [p.table.to_pylist() for p in alone]
    assert "talk about the weather in London" in text_of(both[0])
    assert "over the lazy dog" in text_of(both[0])
    assert "Guten Morgen" in text_of(both[1])
    assert [set(p.table.column("language").to_pylist()) for p in both] == [{"en"}, {"de"}, set()]
    assert both[0].facts["stretches"] == 2
    last = both[0].table.to_pylist()[-1]
    assert last["start_s"] > 1 + len(english) / SAMPLE_RATE + 5, "the second stretch keeps its place in the media"
    for product, samples in zip(both, (pair, german, silence(3)), strict=True):
        assert_sound_rows(product, len(samples) / SAMPLE_RATE)


def test_later_stretch_has_the_items_language_in_whatever_batch_it_comes(stage: Transcript, library: Library) -> None:
    mixed = np.concatenate([say(ENGLISH, "en-us"), silence(6), say(GERMAN, "de")])
    prepared = stage.prepare(library.sound("mixed", mixed))
    assert len(prepared.units) == 2
    whole = stage.infer(prepared.units)
    pieces = {key: answer for unit in prepared.units for key, answer in stage.infer([unit]).items()}
    assert whole == pieces
    assert [found.answer.language for found in whole.values() if isinstance(found, Answered)] == ["en", "en"]


def test_what_is_not_speech_yields_no_rows(stage: Transcript, library: Library) -> None:
    random = np.random.default_rng(7)
    t = np.arange(6 * SAMPLE_RATE) / SAMPLE_RATE
    chord = sum(np.sin(2 * np.pi * f * t) for f in (261.6, 329.6, 392.0)) * (1 + np.sin(2 * np.pi * 2 * t)) / 6
    signals = {
        "silence": t * 0,
        "noise": random.normal(0, 0.1, len(t)),
        "sine": np.sin(2 * np.pi * 440 * t),
        "chord": chord,
    }
    pcm = {name: (np.clip(signal, -1, 1) * 30_000).astype(np.int16) for name, signal in signals.items()}
    products = together(stage, [library.sound(name, samples) for name, samples in pcm.items()])
    assert [product.table.num_rows for product in products] == [0, 0, 0, 0]

    # Even if voice activity were fooled, the recogniser does not believe its own inventions.
    forced: list[Unit[Payload]] = [Unit(name, Stretch(samples, samples)) for name, samples in pcm.items()]
    for found in stage.infer(forced).values():
        assert isinstance(found, Answered)
        assert found.answer.words == ()
        assert found.answer.rejected


def test_a_failing_unit_is_answered_by_name_and_its_neighbours_are_not_lost(stage: Transcript) -> None:
    speech = say(SECOND, "en-us")
    long = silence(31)
    answers = stage.infer(
        [
            Unit("empty", Stretch(silence(0), speech)),
            Unit("good", Stretch(speech, speech)),
            Unit("long", Stretch(long, long)),
        ]
    )
    assert isinstance(answers["good"], Answered)
    assert "lazy dog" in answers["good"].answer.text
    for bad in ("empty", "long"):
        failure = answers[bad]
        assert isinstance(failure, Failure)
        assert failure.error_class == "model_failed"


def test_document_is_one_row_per_paragraph(stage: Transcript, library: Library) -> None:
    paragraphs = ["Der Hund läuft durch den großen Garten.", "   ", "Er sucht seinen Ball unter dem Baum."]
    product = together(stage, [library.text("letter", [{"text": text} for text in paragraphs])])[0]
    rows = product.table.to_pylist()
    assert [row["text"] for row in rows] == [paragraphs[0], paragraphs[2]]
    assert {(row["timing"], row["model"], row["language"], row["confidence"]) for row in rows} == {
        ("none", "document", "de", 1.0)
    }
    assert {(row["start_s"], row["end_s"]) for row in rows} == {(0.0, 0.0)}


def test_subtitles_keep_the_times_of_their_cues(stage: Transcript, library: Library) -> None:
    cues = [
        {"text": "Where have you been all this time?", "start_s": 1.5, "end_s": 3.0},
        {"text": "I was waiting for you at the station.", "start_s": 3.25, "end_s": 5.0},
    ]
    rows = together(stage, [library.text("film", cues)])[0].table.to_pylist()
    assert [(row["start_s"], row["end_s"], row["text"]) for row in rows] == [
        (cue["start_s"], cue["end_s"], cue["text"]) for cue in cues
    ]
    assert {(row["timing"], row["language"]) for row in rows} == {("cue", "en")}


def test_empty_document_has_no_rows(stage: Transcript, library: Library) -> None:
    assert together(stage, [library.text("blank", [])])[0].table.num_rows == 0


@pytest.mark.parametrize("kind", ["image", "video"])
def test_media_without_sound_is_not_applicable(stage: Transcript, library: Library, kind: str) -> None:
    with pytest.raises(NotApplicable):
        stage.prepare(library.add(f"mute-{kind}", kind))


def test_preview_is_a_small_picture_of_the_waveform(stage: Transcript, library: Library) -> None:
    speech = np.concatenate([silence(0.5), say(ENGLISH, "en-us"), silence(40)])
    product = together(stage, [library.sound("shown", speech, preview=True)])[0]
    picture = product.previews["waveform.png"]
    assert len(picture) <= 25_000
    with Image.open(io.BytesIO(picture)) as image:
        assert image.width == 960
        assert len(image.getcolors() or ()) > 3


def test_version_covers_every_model_of_the_profile(models: ModelRegistry, tmp_path: Path) -> None:
    assert [spec.task for spec in Transcript(models.settings, models).specs()] == ["asr", "asr", "vad"]
    settings = Settings(home=tmp_path, profile="gpu")
    assert [spec.task for spec in Transcript(settings, ModelRegistry(settings)).specs()] == [
        "asr",
        "vad",
        "alignment",
        "diarization",
    ]


def words(*texts: str, pause_s: float = 0.05) -> Iterator[Word]:
    for index, text in enumerate(texts):
        yield Word(f" {text}", index * (0.3 + pause_s), index * (0.3 + pause_s) + 0.3, 0.9)


def test_segments_end_with_sentences_and_pauses_but_not_with_abbreviations() -> None:
    said = list(words("Mr.", "Smith", "came", "home.", "He", "sat", "down"))
    assert [len(part) for part in sentences(said)] == [4, 3]
    assert [len(part) for part in sentences(list(words("one", "two", "three", pause_s=1.0)))] == [1, 1, 1]
    assert list(sentences([])) == []


def test_speaker_of_a_segment_is_who_talks_longest_in_it() -> None:
    turns = [Turn(0, 2, "A"), Turn(2, 6, "B"), Turn(6, 7, "A")]
    assert speaker_of(1, 4, turns) == "B"
    assert speaker_of(0, 2.5, turns) == "A"
    assert speaker_of(8, 9, turns) is None
    assert speaker_of(0, 1, []) is None


@given(st.lists(st.tuples(st.integers(0, 5 * SAMPLE_RATE), st.integers(1, 29 * SAMPLE_RATE)), max_size=20))
def test_merging_keeps_all_speech_within_windows_the_model_can_take(steps: list[tuple[int, int]]) -> None:
    spans, at = [], 0
    for gap, length in steps:
        spans.append(Span(at + gap, at + gap + length))
        at = spans[-1].end
    merged = merge(spans, 30, 4)
    assert all(m.end - m.start <= 30 * SAMPLE_RATE for m in merged)
    assert all(a.end <= b.start for a, b in pairwise(merged))
    assert all(any(m.start <= s.start and s.end <= m.end for m in merged) for s in spans)
    assert {m.start for m in merged} <= {s.start for s in spans}


def test_prepared_units_are_stable_and_within_the_window(stage: Transcript, library: Library) -> None:
    long = np.concatenate([say(ENGLISH, "en-us")] * 9)
    inputs = library.sound("long", long)
    first, again = stage.prepare(inputs), stage.prepare(inputs)
    assert [unit.id for unit in first.units] == [unit.id for unit in again.units]
    assert len(first.units) >= 2
    for prepared in (first, again):
        assert_units(prepared)


def assert_units(prepared: Prepared[Payload]) -> None:
    for unit in prepared.units:
        assert isinstance(unit.payload, Stretch)
        assert 0 < len(unit.payload.samples) <= 30 * SAMPLE_RATE
        assert unit.payload.samples.dtype == np.int16


def test_table_without_sound_rows_reads_as_silence(stage: Transcript, library: Library) -> None:
    inputs = library.add("hollow", "video", has_audio=True)
    library.store.write("audio", "hollow", pa.Table.from_pylist([], schema=schemas.AUDIO))
    product = together(stage, [inputs])[0]
    assert product.table.num_rows == 0
    assert product.facts["speech_s"] == 0


def tiny_wav2vec2(folder: Path) -> Path:
    """An untrained CTC model of the real architecture, a thousandth of its size, as a hub snapshot would lie there."""
    import json

    from transformers import (
        Wav2Vec2Config,
        Wav2Vec2CTCTokenizer,
        Wav2Vec2FeatureExtractor,
        Wav2Vec2ForCTC,
        Wav2Vec2Processor,
    )

    folder.mkdir()
    vocabulary = folder / "vocab.json"
    letters = ["<pad>", "<s>", "</s>", "<unk>", "|", *"ABCDEFGHIJKLMNOPQRSTUVWXYZ'"]
    vocabulary.write_text(json.dumps({letter: i for i, letter in enumerate(letters)}))
    Wav2Vec2Processor(Wav2Vec2FeatureExtractor(), Wav2Vec2CTCTokenizer(str(vocabulary))).save_pretrained(folder)
    config = Wav2Vec2Config(
        vocab_size=len(letters),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        conv_dim=(16,) * 7,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2,
    )
    Wav2Vec2ForCTC(config).save_pretrained(folder)
    return folder


def test_configured_alignment_model_gives_the_word_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nltk

    punkt = tmp_path / "nltk/tokenizers/punkt_tab/english"
    punkt.mkdir(parents=True)
    for name in ("abbrev_types.txt", "collocations.tab", "sent_starters.txt", "ortho_context.tab"):
        (punkt / name).write_text("")
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path / "nltk")])
    spec = ModelSpec(
        task="alignment",
        name="tiny",
        adapter="alignment",
        source=f"hf:{tiny_wav2vec2(tmp_path / 'model')}@{'0' * 40}",
        parameters={"language": "en"},
        licence="none",
    )
    aligner = WordAligner(spec, tmp_path / "cache")
    speech = say(SECOND, "en-us")
    duration_s = len(speech) / SAMPLE_RATE
    said = Recognised("en", tuple(Word(f" {text}", 0.0, 0.1, 0.9) for text in SECOND.split()))
    aligned = aligner.align(speech, said)
    assert aligned.timing == "aligned"
    assert aligned.text == said.text
    edges = [edge for word in aligned.words for edge in (word.start_s, word.end_s)]
    assert edges == sorted(edges)
    assert 0 <= edges[0] < edges[-1] <= duration_s
    assert aligner.align(speech, Recognised("en")) == Recognised("en")
    monkeypatch.setattr(nltk.data, "path", [])
    with pytest.raises(ModelUnavailable, match="punkt_tab"):
        WordAligner(spec, tmp_path / "cache")


def test_unsure_stretches_are_heard_again_and_rows_name_who_answered(
    models: ModelRegistry, library: Library, tmp_path: Path
) -> None:
    """Given a threshold all reach, then the short windows answer; given one that nothing reaches, the full ones do."""
    speech = library.sound("speech", say(SECOND, "en-us"))
    home = tmp_path / "home"
    home.mkdir()
    (home / "models").symlink_to(models.cache)
    path = home / "models.toml"
    for threshold, name in (("0.0", "whisper-base-short"), ("2.0", "whisper-base")):
        path.write_text(CATALOGUE.read_text().replace("min_confidence = [0.67]", f"min_confidence = [{threshold}]"))
        registry = ModelRegistry(Settings(home=home), path)
        heard_by = Transcript(registry.settings, registry)
        (product,) = together(heard_by, [speech])
        assert "over the lazy dog" in text_of(product)
        assert {row.partition("@")[0] for row in product.table["model"].to_pylist()} == {name}
        assert [answered.partition("@")[0] for answered in product.models or ()] == [name, "silero-vad-v6"]
    assert {name.partition("@")[0]: count for name, count in registry.loads.items()} == {
        "silero-vad-v6": 1,
        "network": 1,
        "whisper-base-short": 1,
        "whisper-base": 1,
    }, "both ways to ask hold the same weights once"


@pytest.mark.parametrize(("count", "sizes"), [(1, [5]), (2, [3, 2]), (4, [2, 2, 1]), (8, [1] * 5)])
def test_stretches_are_shared_out_among_workers(count: int, sizes: list[int]) -> None:
    """Given stretches and workers, then each is in one part, in order, and no worker gets two parts."""
    parts = [list(part) for part in _parts("abcde", count)]
    assert "".join(key for part in parts for key in part) == "abcde"
    assert [len(part) for part in parts] == sizes
