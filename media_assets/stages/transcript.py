"""transcript: what was said, with times, words and language; for documents and subtitles, what is written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from media_assets import schemas
from media_assets.engine.contract import Inputs, Prepared, Product, Stage, Unit
from media_assets.stages.support.previews.waveform import Envelope, envelope, waveform
from media_assets.stages.support.routing import Answered, Routed
from media_assets.stages.support.tracks import read_pcm
from resources.errors import Failure, ModelFailed, NotApplicable
from resources.models.alignment import AlignmentParameters, WordAligner
from resources.models.diarization import Diarizer, Turn, speaker_of
from resources.models.registry import ModelRegistry, ModelSpec
from resources.models.vad import SAMPLE_RATE, Span, SpeechDetector, merge
from resources.models.whisper import (
    FULL_SCALE,
    WINDOW_S,
    Recognised,
    Stretch,
    WhisperParameters,
    WhisperRecogniser,
    Word,
    load_network,
    mean_confidence,
)
from resources.settings import Settings

DOCUMENT = "document"  # the `model` of rows no model made
LANGUAGE_SAMPLE = 20_000  # characters of a document its language is told from
SENTENCE_END = tuple(".!?。！？…")
CLAUSE_END = tuple(",;:，、；：") + SENTENCE_END
MIN_WORDS = 3  # below, a full stop is likelier an abbreviation ("Mr.") than the end of a sentence
SENTENCE_PAUSE_S = 0.3
PAUSE_S = 0.8
LONG_SEGMENT_S = 15.0


@dataclass(frozen=True, slots=True)
class Recording:
    """A whole recording for diarization: int16 [samples], 16 kHz mono."""

    samples: npt.NDArray[np.int16]


Payload: TypeAlias = Stretch | Recording
Answer: TypeAlias = Answered[Recognised] | tuple[Turn, ...]


@dataclass(frozen=True, slots=True)
class _Document:
    rows: Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class _Audio:
    """What assembly needs of the audio: where the stretches are, and its picture."""

    stretches: Mapping[str, Span]
    duration_s: float
    shape: Envelope | None


class Transcript(Stage[Payload, Answer]):
    """WhisperX's recipe in batches that span media items: voice activity, merged stretches of up to 30 s,
    Whisper, word times.

    Why stretches and not items: Whisper always computes 30 s windows, so short clips share a batch, and an
    hour of speech is spread over several. All stretches of an item share one language, told from the first.
    Text the model itself doubts (repetitive, improbable, no speech) is dropped and counted, never invented.
    Word times come from forced alignment where an alignment model of the language is configured, else from
    Whisper's cross-attention; `timing` says which.
    """

    name = "transcript"
    inputs = ("media", "audio")
    code_version = "1"
    tasks = ("asr", "vad")
    routed = ("asr",)
    micro_batch = 8
    description = "Speech as text with segments, words, times, confidence and language; text of documents as it is."

    def __init__(self, settings: Settings, models: ModelRegistry) -> None:
        super().__init__(settings, models)
        self._recognisers = Routed(models, "asr", self._recogniser)

    def specs(self) -> tuple[ModelSpec, ...]:
        """Recogniser and voice activity, and alignment and diarization models where the profile has them."""
        return (*super().specs(), *self.models.candidates("alignment"), *self.models.candidates("diarization")[:1])

    def load(self) -> None:
        """Load every model of the profile's speech tasks. Raises ModelUnavailable with what to install."""
        self._recognisers.load()
        self._detector()
        self._aligners()
        self._diarizer()

    def prepare(self, inputs: Inputs) -> Prepared[Payload]:
        """One unit per stretch of speech, at most 30 s each. Raises NotApplicable for items that cannot speak."""
        media = inputs.media()
        if media["kind"] == "text":
            return Prepared(carry=_Document(inputs.table("media", "text").to_pylist()))
        if not media["has_audio"]:
            raise NotApplicable(f"There is no sound in {media['kind']} files without an audio stream.")
        pcm = read_pcm(inputs.table("audio"))
        parameters = WhisperParameters(**self.models.spec("asr").parameters)
        spans = merge(self._detector().speech(pcm), parameters.chunk_s, parameters.max_pause_s)
        samples = [_int16(pcm[span.start : span.end]) for span in spans]
        units: list[Unit[Payload]] = [
            Unit(f"speech-{index:05}", Stretch(stretch, samples[0])) for index, stretch in enumerate(samples)
        ]
        stretches = {unit.id: span for unit, span in zip(units, spans, strict=True)}
        if units and self.models.candidates("diarization"):
            units.append(Unit("speakers", Recording(_int16(pcm))))
        shape = envelope(pcm) if inputs.wants_preview else None
        return Prepared(units, _Audio(stretches, len(pcm) / SAMPLE_RATE, shape))

    def infer(self, units: Sequence[Unit[Payload]]) -> Mapping[str, Answer | Failure]:
        """Recognised words of each stretch, and turns of each recording, by unit ID."""
        answers: dict[str, Answer | Failure] = {}
        stretches: dict[str, Stretch] = {}
        for unit in units:
            if isinstance(unit.payload, Recording):
                answers[unit.id] = self._turns(unit.payload)
            elif not 0 < len(unit.payload.samples) <= WINDOW_S * SAMPLE_RATE or not len(unit.payload.probe):
                answers[unit.id] = Failure.of(ModelFailed(f"A stretch of {len(unit.payload.samples)} samples."))
            else:
                stretches[unit.id] = unit.payload
        aligners = self._aligners()
        asked = self._recognisers.ask(
            stretches, _recognise, lambda answer: answer.confidence, lambda answer: sum(map(str.isalnum, answer.text))
        )
        for key, found in asked.items():
            aligner = aligners.get(found.answer.language)
            aligned = aligner.align(stretches[key].samples, found.answer) if aligner else found.answer
            answers[key] = Answered(found.by, aligned)
        return answers

    def assemble(self, inputs: Inputs, carry: Any, outputs: Mapping[str, Answer]) -> Product:
        """Segments in order of time, or the paragraphs and cues of a document."""
        if isinstance(carry, _Document):
            return self._document(inputs, carry)
        audio: _Audio = carry
        turns = next((answer for answer in outputs.values() if isinstance(answer, tuple)), ())
        heard = [(audio.stretches[key], outputs[key]) for key in sorted(audio.stretches)]
        recognised = [(span, found) for span, found in heard if isinstance(found, Answered)]
        rows = list(_rows(recognised, audio.duration_s, turns))
        stamp = {"media_id": inputs.media_id, "version": inputs.version}
        table = schemas.table(self.schema, [{**row, **stamp, "segment": i} for i, row in enumerate(rows)])
        facts: dict[str, int | float | str] = {
            "segments": len(rows),
            "words": sum(len(row["words"]) for row in rows),
            "speech_s": round(sum(span.end - span.start for span, _ in heard) / SAMPLE_RATE, 3),
            "stretches": len(heard),
            "rejected_stretches": sum(bool(found.answer.rejected) for _, found in recognised),
            "language": recognised[0][1].answer.language if recognised else "",
        }
        previews = {}
        if audio.shape is not None:
            words = [(word["start_s"], word["end_s"], word["word"]) for row in rows for word in row["words"]]
            spans = [(span.start / SAMPLE_RATE, span.end / SAMPLE_RATE) for span, _ in heard]
            previews["waveform.png"] = waveform(audio.shape, audio.duration_s, spans, words)
        answered = dict.fromkeys(found.by.identity for _, found in recognised)
        others = [spec.identity for spec in self.specs() if spec.task != "asr"]
        return Product(table, facts=facts, previews=previews, models=(*answered, *others))

    def _document(self, inputs: Inputs, document: _Document) -> Product:
        texts = sorted((row for row in document.rows if row["text"].strip()), key=lambda row: row["segment"])
        language = _written_language("\n".join(row["text"] for row in texts))
        rows = [_written(row, index, language) for index, row in enumerate(texts)]
        stamp = {"media_id": inputs.media_id, "model": DOCUMENT, "version": inputs.version}
        table = schemas.table(self.schema, [{**row, **stamp} for row in rows])
        return Product(table, facts={"segments": len(rows), "language": language})

    def _turns(self, recording: Recording) -> Answer | Failure:
        diarizer = self._diarizer()
        if diarizer is None:
            return Failure.of(ModelFailed("No diarization model is configured in this profile."))
        return tuple(diarizer.turns(_float32(recording.samples)))

    def _recogniser(self, spec: ModelSpec) -> WhisperRecogniser:
        network = self.models.shared(spec, partial(load_network, spec, self.models.cache))
        return WhisperRecogniser(spec, network)

    def _detector(self) -> SpeechDetector:
        spec = self.models.spec("vad")
        return self.models.loaded(spec, partial(SpeechDetector, spec, self.models.cache))

    def _aligners(self) -> dict[str, WordAligner]:
        return {
            AlignmentParameters(**spec.parameters).language: self.models.loaded(
                spec, partial(WordAligner, spec, self.models.cache)
            )
            for spec in self.models.candidates("alignment")
        }

    def _diarizer(self) -> Diarizer | None:
        for spec in self.models.candidates("diarization"):
            return self.models.loaded(spec, partial(Diarizer, spec, self.models.cache))
        return None


def _recognise(
    _spec: ModelSpec, recogniser: WhisperRecogniser, stretches: Mapping[str, Stretch]
) -> Mapping[str, Recognised]:
    return recogniser.transcribe(stretches)


def sentences(words: Sequence[Word]) -> Iterator[list[Word]]:
    """`words` in order, split where a sentence ends, after a pause, or at a clause once a segment is long."""
    current: list[Word] = []
    for index, word in enumerate(words):
        current.append(word)
        if index + 1 == len(words) or _ends(current, words[index + 1]):
            yield current
            current = []


def _ends(segment: Sequence[Word], following: Word) -> bool:
    last = segment[-1]
    pause_s = following.start_s - last.end_s
    if pause_s >= PAUSE_S:
        return True
    if last.text.endswith(SENTENCE_END):
        return len(segment) >= MIN_WORDS or pause_s >= SENTENCE_PAUSE_S
    return last.end_s - segment[0].start_s >= LONG_SEGMENT_S and last.text.endswith(CLAUSE_END)


def _rows(
    recognised: Sequence[tuple[Span, Answered[Recognised]]], duration_s: float, turns: Sequence[Turn]
) -> Iterator[dict[str, Any]]:
    """Segments of all stretches in the time of the media, never before the one they follow."""
    floor_s = 0.0
    for span, found in recognised:
        answer = found.answer
        for segment in sentences(answer.words):
            words = [_placed(word, span, floor_s, duration_s) for word in segment]
            start_s, floor_s = words[0]["start_s"], max(word["end_s"] for word in words)
            yield {
                "start_s": start_s,
                "end_s": floor_s,
                "text": "".join(word.text for word in segment).strip(),
                "language": answer.language,
                "confidence": mean_confidence(segment),
                "speaker": speaker_of(start_s, floor_s, turns),
                "words": words,
                "timing": answer.timing,
                "model": found.by.identity,
            }


def _placed(word: Word, span: Span, floor_s: float, duration_s: float) -> dict[str, Any]:
    limit_s = min(duration_s, span.end / SAMPLE_RATE)
    start_s = min(max(floor_s, span.start / SAMPLE_RATE + word.start_s), limit_s)
    end_s = min(max(start_s, span.start / SAMPLE_RATE + word.end_s), limit_s)
    return {"word": word.text.strip(), "start_s": start_s, "end_s": end_s, "confidence": word.confidence}


def _written(row: Mapping[str, Any], index: int, language: str) -> dict[str, Any]:
    cue = row["start_s"] is not None
    start_s = float(row["start_s"]) if cue else 0.0
    end_s = float(row["end_s"]) if cue and row["end_s"] is not None else start_s
    return {
        "segment": index,
        "start_s": start_s,
        "end_s": max(start_s, end_s),
        "text": row["text"].strip(),
        "language": language,
        "confidence": 1.0,
        "words": [],
        "timing": "cue" if cue else "none",
    }


def _written_language(text: str) -> str:
    if not text.strip():
        return "und"
    import py3langid  # type: ignore[import-untyped]

    return str(py3langid.classify(text[:LANGUAGE_SAMPLE])[0])


def _float32(samples: npt.NDArray[np.int16]) -> npt.NDArray[np.float32]:
    return np.divide(samples, np.float32(FULL_SCALE), dtype=np.float32)


def _int16(pcm: npt.NDArray[np.float32]) -> npt.NDArray[np.int16]:
    """The samples as they were stored: half the memory of float32, and nothing lost."""
    return np.clip(np.rint(pcm * FULL_SCALE), -FULL_SCALE, FULL_SCALE - 1).astype(np.int16)
