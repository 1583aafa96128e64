"""Speech recognition: Whisper on CTranslate2, in batches that may mix languages and media items."""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache as memoised
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from resources.compute import process
from resources.errors import ModelFailed, ModelUnavailable
from resources.models.registry import ModelSpec
from resources.models.weights import locate

SAMPLE_RATE = 16_000
WINDOW_S = 30
FRAMES_PER_S = 100
FULL_SCALE = 32_768
WORKERS = 4
"""Batches that a CPU computes at once, at most: several, each on its share of the cores, beat one on all of them."""
PREPENDED = "\"'“¿([{-"
APPENDED = "\"'.。,，!！?？:：”)]}、"
ISO_639_1 = {"jw": "jv"}  # the one code of Whisper that is not the language's current one


class WhisperParameters(BaseModel):
    """Parameters of an `asr` entry of models.toml."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: cuda where there is a GPU")
    languages: tuple[str, ...] = Field((), description="candidate languages, ISO 639-1; empty: all the model knows")
    beam_size: int = Field(5, ge=1, description="beams; 1 is greedy search")
    length_penalty: float = Field(1.0, gt=0, description="exponent of the length in the beam score")
    max_no_speech: float = Field(0.6, ge=0, le=1, description="no-speech probability above which doubt rejects")
    doubtful_logprob: float = Field(-1.0, le=0, description="mean token log-probability below which text is in doubt")
    min_logprob: float = Field(-1.5, le=0, description="mean token log-probability below which text is rejected")
    min_confidence: float = Field(0.3, ge=0, le=1, description="mean token probability below which text is rejected")
    max_compression: float = Field(2.4, gt=1, description="zlib compression ratio above which text is repetitive")
    retry_ngram: int = Field(3, ge=1, description="n-grams that may not repeat when doubtful text is decoded again")
    chunk_s: float = Field(30.0, gt=1, le=WINDOW_S, description="longest stretch given to the model, seconds")
    window_step_s: float | None = Field(
        None, gt=0, le=WINDOW_S, description="windows end with the speech, rounded up to this; default: always 30 s"
    )
    window_margin_s: float = Field(1.0, ge=0, description="quiet kept at the end of such a window, seconds")
    max_pause_s: float = Field(4.0, ge=0, description="pauses up to this are kept inside a stretch, seconds")


@dataclass(frozen=True, slots=True)
class Stretch:
    """Speech to recognise: `samples` int16 [n], 16 kHz mono, n at most 30 s; `probe` tells its language.

    All stretches of one media item share one probe (the same samples), so that they share one language.
    """

    samples: npt.NDArray[np.int16]
    probe: npt.NDArray[np.int16]


@dataclass(frozen=True, slots=True)
class Word:
    """A word with its leading space as the model wrote it; seconds from the start of the stretch.

    `confidence` is the mean probability (0-1) of its `tokens` tokens.
    """

    text: str
    start_s: float
    end_s: float
    confidence: float
    tokens: int = 1


@dataclass(frozen=True, slots=True)
class Recognised:
    """What was said in one stretch.

    `words` is empty and `rejected` says why (no_speech, improbable, repetitive) where the text was not believed.
    `timing` is whisper (cross-attention) or aligned (forced alignment). `confidence` is the geometric mean of the
    tokens' probabilities as the model spoke them, 0-1; 0 where the text was not believed.
    """

    language: str
    words: tuple[Word, ...] = ()
    rejected: str = ""
    timing: str = "whisper"
    confidence: float = 0.0

    @property
    def text(self) -> str:
        """The text of all words."""
        return "".join(word.text for word in self.words).strip()


@dataclass(frozen=True, slots=True)
class _Hypothesis:
    tokens: list[int]
    logprob: float
    no_speech: float
    compression: float


@dataclass(frozen=True, slots=True)
class WhisperNetwork:
    """A loaded checkpoint (faster_whisper.WhisperModel), where it runs (cuda or cpu), and how many calls at once."""

    model: Any
    device: str
    workers: int


def load_network(spec: ModelSpec, cache: Path) -> WhisperNetwork:
    """Verified weights on cuda where present, else on the CPU in int8. Raises ModelUnavailable."""
    spec.require("fp32", "fp16", "bf16", "int8")
    wanted = WhisperParameters(**spec.parameters).device
    weights = locate(spec, cache)
    if "model.bin" not in weights:
        raise ModelUnavailable(f"Model {spec.name} has no model.bin.", "Name a CTranslate2 Whisper checkpoint.")
    try:
        import ctranslate2
        from faster_whisper import WhisperModel
    except ImportError as error:
        raise ModelUnavailable("Speech recognition needs faster-whisper.", "pip install whisperx") from error
    cuda = wanted != "cpu" and ctranslate2.get_cuda_device_count() > 0
    if wanted == "cuda" and not cuda:
        raise ModelUnavailable(f"Model {spec.name} wants a GPU, there is none.", 'Set its device to "auto".')
    device = "cuda" if cuda else "cpu"
    cpus = process.usable_cpus()  # CTranslate2's own default of four threads oversubscribes small machines
    workers = 1 if cuda else min(cpus, WORKERS)
    model = WhisperModel(
        str(weights["model.bin"].parent),
        device=device,
        compute_type=_compute_type(spec.precision, cuda),
        cpu_threads=cpus // workers,
        num_workers=workers,
        local_files_only=True,
    )
    return WhisperNetwork(model, device, workers)


class WhisperRecogniser:
    """Whisper (https://arxiv.org/abs/2212.04356) through faster-whisper, the engine under WhisperX.

    Answers depend on the stretch and its probe alone, never on what else is in the batch or came before. Whisper
    was trained on windows of 30 s; with `window_step_s` it gets shorter ones, which cost what they last.
    """

    def __init__(self, spec: ModelSpec, network: WhisperNetwork) -> None:
        """Asks `network`, which others may hold too, as the parameters of `spec` say."""
        self.parameters = WhisperParameters(**spec.parameters)
        self.device = network.device
        self._model = network.model
        self._workers = network.workers
        self._tokenizer = memoised(self._make_tokenizer)

    def transcribe(self, stretches: Mapping[str, Stretch]) -> dict[str, Recognised]:
        """Words of each stretch by its key, all stretches in one batch.

        Raises ModelFailed when a stretch is empty or longer than 30 s.
        """
        if not stretches:
            return {}
        keys = list(stretches)
        for key in keys:
            if not 0 < len(stretches[key].samples) <= WINDOW_S * SAMPLE_RATE:
                raise ModelFailed(f"A stretch of speech has {len(stretches[key].samples)} samples.", "Report this.")
        languages: dict[bytes, str] = {}
        batches = [
            (frames, part)
            for frames, members in self._windows(stretches).items()
            for part in _parts(members, self._workers)
        ]

        batches.sort(key=lambda batch: -batch[0] * len(batch[1]))  # the costliest first, so that all end together

        def transcribed(batch: tuple[int, Sequence[str]]) -> dict[str, Recognised]:
            frames, part = batch
            return self._transcribe({key: stretches[key] for key in part}, frames, languages)

        with ThreadPoolExecutor(self._workers, "whisper") as pool:
            return {key: answer for answers in pool.map(transcribed, batches) for key, answer in answers.items()}

    def _windows(self, stretches: Mapping[str, Stretch]) -> dict[int, list[str]]:
        """Keys of the stretches by the length of their window, frames."""
        grouped: dict[int, list[str]] = defaultdict(list)
        for key, stretch in stretches.items():
            grouped[self._window(stretch.samples)].append(key)
        return grouped

    def _window(self, samples: npt.NDArray[np.int16]) -> int:
        step_s, longest = self.parameters.window_step_s, WINDOW_S * FRAMES_PER_S
        if step_s is None:
            return longest
        steps = math.ceil((len(samples) / SAMPLE_RATE + self.parameters.window_margin_s) / step_s)
        return min(longest, round(steps * step_s * FRAMES_PER_S))

    def _transcribe(
        self, stretches: Mapping[str, Stretch], window: int, languages: dict[bytes, str]
    ) -> dict[str, Recognised]:
        """Words of stretches that share a window of `window` frames; `languages` by probe is filled on the way."""
        keys = list(stretches)
        encoded = self._encode([stretches[key].samples for key in keys], window)
        self._tell_languages([stretches[key] for key in keys], encoded, languages)
        spoken = [languages[_fingerprint(stretches[key].probe)] for key in keys]
        hypotheses = self._decode(encoded, spoken)
        reasons = [self._doubt(h, final=True) for h in hypotheses]
        frames = [-(-len(stretches[key].samples) * FRAMES_PER_S // SAMPLE_RATE) for key in keys]
        believed = [row for row, reason in enumerate(reasons) if not reason]
        words = self._align(encoded, spoken, hypotheses, frames, believed)
        return {
            key: self._answer(spoken[row], words.get(row, ()), reasons[row], hypotheses[row].logprob)
            for row, key in enumerate(keys)
        }

    def _answer(self, language: str, words: tuple[Word, ...], reason: str, logprob: float) -> Recognised:
        code = ISO_639_1.get(language, language)
        if not reason and words and mean_confidence(words) < self.parameters.min_confidence:
            reason = "improbable"
        if reason:
            return Recognised(code, rejected=reason)
        return Recognised(code, words, confidence=min(1.0, math.exp(logprob)))

    def _encode(self, rows: Sequence[npt.NDArray[np.int16]], window: int) -> npt.NDArray[Any]:
        """Encoder output [rows, window / 2, width] of log-mel spectrograms padded to `window` frames."""
        import ctranslate2
        from faster_whisper.audio import pad_or_trim

        extract = self._model.feature_extractor
        features = [pad_or_trim(extract(row.astype(np.float32) / FULL_SCALE)[..., :-1], window) for row in rows]
        batch = ctranslate2.StorageView.from_array(np.ascontiguousarray(np.stack(features)))
        # On the host, so that rows can be regrouped by language; a few megabytes per row.
        return np.array(self._model.model.encode(batch, to_cpu=True))

    def _tell_languages(self, stretches: Sequence[Stretch], encoded: npt.NDArray[Any], known: dict[bytes, str]) -> None:
        """Languages of the probes not `known` yet; a probe that is itself a stretch is not encoded again."""
        probes = {key: stretch.probe for stretch in stretches if (key := _fingerprint(stretch.probe)) not in known}
        if not self._model.model.is_multilingual:
            known.update(dict.fromkeys(probes, "en"))
            return
        rows = {_fingerprint(stretch.samples): row for row, stretch in enumerate(stretches)}
        windows: dict[int, list[bytes]] = defaultdict(list)
        for key, probe in probes.items():
            if key not in rows:
                windows[self._window(probe)].append(key)
        if inside := [key for key in probes if key in rows]:
            known.update(self._languages(inside, encoded[[rows[key] for key in inside]]))
        for window, keys in windows.items():
            known.update(self._languages(keys, self._encode([probes[key] for key in keys], window)))

    def _languages(self, keys: Sequence[bytes], encoded: npt.NDArray[Any]) -> dict[bytes, str]:
        found = self._model.model.detect_language(_storage(encoded))
        return {key: self._best_language(pairs) for key, pairs in zip(keys, found, strict=True)}

    def _best_language(self, pairs: Sequence[tuple[str, float]]) -> str:
        codes = [token[2:-2] for token, _ in pairs]
        wanted = self.parameters.languages
        return next((code for code in codes if not wanted or ISO_639_1.get(code, code) in wanted), codes[0])

    def _decode(self, encoded: npt.NDArray[Any], languages: Sequence[str]) -> list[_Hypothesis]:
        """Best hypothesis per row; rows in doubt are decoded again without repeats, and the likelier sound one kept."""
        hypotheses = self._generate(encoded, languages, ngram=0)
        doubtful = [row for row, h in enumerate(hypotheses) if self._doubt(h, final=False)]
        if doubtful:
            again = self._generate(encoded[doubtful], [languages[row] for row in doubtful], self.parameters.retry_ngram)
            for row, second in zip(doubtful, again, strict=True):
                hypotheses[row] = self._better(hypotheses[row], second)
        return hypotheses

    def _better(self, first: _Hypothesis, second: _Hypothesis) -> _Hypothesis:
        repetitive = first.compression > self.parameters.max_compression
        return second if repetitive or second.logprob > first.logprob else first

    def _generate(self, encoded: npt.NDArray[Any], languages: Sequence[str], ngram: int) -> list[_Hypothesis]:
        from faster_whisper.transcribe import get_compression_ratio, get_suppressed_tokens

        tokenizers = [self._tokenizer(language) for language in languages]
        results = self._model.model.generate(
            _storage(encoded),
            [[*tokenizer.sot_sequence, tokenizer.no_timestamps] for tokenizer in tokenizers],
            beam_size=self.parameters.beam_size,
            length_penalty=self.parameters.length_penalty,
            no_repeat_ngram_size=ngram,
            max_length=self._model.max_length,
            suppress_tokens=list(get_suppressed_tokens(tokenizers[0], [-1])),
            return_scores=True,
            return_no_speech_prob=True,
        )
        hypotheses = []
        for tokenizer, result in zip(tokenizers, results, strict=True):
            tokens = [token for token in result.sequences_ids[0] if token < tokenizer.eot]
            total = result.scores[0] * len(result.sequences_ids[0]) ** self.parameters.length_penalty
            ratio = get_compression_ratio(tokenizer.decode(tokens).strip()) if tokens else 0.0
            mean = total / (len(result.sequences_ids[0]) + 1)
            hypotheses.append(_Hypothesis(tokens, mean, result.no_speech_prob, ratio))
        return hypotheses

    def _doubt(self, hypothesis: _Hypothesis, final: bool) -> str:
        """Why the text is not to be believed, or empty. The rules of the Whisper paper, section 4.5."""
        p = self.parameters
        if hypothesis.compression > p.max_compression:
            return "repetitive"
        if hypothesis.logprob < (p.min_logprob if final else p.doubtful_logprob):
            return "improbable"
        if hypothesis.no_speech > p.max_no_speech and hypothesis.logprob < p.doubtful_logprob:
            return "no_speech"
        return ""

    def _align(
        self,
        encoded: npt.NDArray[Any],
        languages: Sequence[str],
        hypotheses: Sequence[_Hypothesis],
        frames: Sequence[int],
        rows: Sequence[int],
    ) -> dict[int, tuple[Word, ...]]:
        """Word times from the cross-attention, one call per language, because its prompt names one."""
        from faster_whisper.transcribe import merge_punctuations

        groups: dict[str, list[int]] = defaultdict(list)
        for row in rows:
            if hypotheses[row].tokens:
                groups[languages[row]].append(row)
        words: dict[int, tuple[Word, ...]] = {}
        for language, members in groups.items():
            found = self._model.find_alignment(
                self._tokenizer(language),
                [hypotheses[row].tokens for row in members],
                _storage(encoded[members]),
                [frames[row] for row in members],
            )
            for row, alignment in zip(members, found, strict=True):
                merge_punctuations(alignment, PREPENDED, APPENDED)
                words[row] = _words(alignment, frames[row] / FRAMES_PER_S)
        return words

    def _make_tokenizer(self, language: str) -> Any:
        from faster_whisper.tokenizer import Tokenizer

        model = self._model
        return Tokenizer(model.hf_tokenizer, model.model.is_multilingual, task="transcribe", language=language)


def mean_confidence(words: Sequence[Word]) -> float:
    """Mean token probability of at least one word, 0-1."""
    return sum(word.confidence * word.tokens for word in words) / sum(word.tokens for word in words)


def _words(alignment: Sequence[Mapping[str, Any]], duration_s: float) -> tuple[Word, ...]:
    words = []
    for entry in alignment:
        if entry["word"].strip():
            start, end = (min(max(float(entry[edge]), 0.0), duration_s) for edge in ("start", "end"))
            probability = min(1.0, max(0.0, float(entry["probability"])))
            words.append(Word(entry["word"], start, max(start, end), probability, len(entry["tokens"])))
    return tuple(words)


def _storage(rows: npt.NDArray[Any]) -> Any:
    import ctranslate2

    return ctranslate2.StorageView.from_array(np.ascontiguousarray(rows))


def _fingerprint(samples: npt.NDArray[np.int16]) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(samples).data, digest_size=16).digest()


def _parts(keys: Sequence[str], count: int) -> Iterator[Sequence[str]]:
    """`keys` in at most `count` runs of about the same length: stretches of one recording share their probe."""
    size = -(-len(keys) // count)
    return (keys[start : start + size] for start in range(0, len(keys), size))


def _compute_type(precision: str, cuda: bool) -> str:
    """CTranslate2's name of a precision; a CPU without half precision computes in int8."""
    if cuda:
        return {"int8": "int8_float16", "fp16": "float16", "bf16": "bfloat16"}.get(precision, "float32")
    return "float32" if precision == "fp32" else "int8"
