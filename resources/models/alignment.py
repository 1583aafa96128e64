"""Word times by forced alignment with wav2vec2, as WhisperX does it; for languages a model is configured for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from resources.compute import devices
from resources.errors import ModelUnavailable
from resources.models.registry import ModelSpec
from resources.models.weights import locate
from resources.models.whisper import FULL_SCALE, SAMPLE_RATE, Recognised, Word

SPACELESS = ("ja", "zh")


class AlignmentParameters(BaseModel):
    """Parameters of an `alignment` entry of models.toml."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    language: str = Field(description="language the model was fine-tuned on, ISO 639-1")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: cuda where there is a GPU")


class WordAligner:
    """A CTC wav2vec2 model of one language (https://arxiv.org/abs/2006.11477) behind `whisperx.align`."""

    def __init__(self, spec: ModelSpec, cache: Path) -> None:
        """Raises ModelUnavailable: weights missing, or NLTK's sentence data, which whisperx needs."""
        spec.require("fp32")
        self.parameters = AlignmentParameters(**spec.parameters)
        weights = locate(spec, cache)
        if "config.json" not in weights:
            raise ModelUnavailable(f"Model {spec.name} has no config.json.", "Name a wav2vec2 CTC checkpoint.")
        try:
            import nltk  # type: ignore[import-untyped]
            from whisperx.alignment import align, load_align_model
        except ImportError as error:
            raise ModelUnavailable("Alignment needs whisperx.", "Install it: pip install whisperx") from error
        try:
            nltk.data.find("tokenizers/punkt_tab")
        except LookupError as error:
            raise ModelUnavailable(
                "Alignment needs NLTK's punkt_tab data.", "Run once: python -m nltk.downloader punkt_tab"
            ) from error
        self.device = devices.for_torch(self.parameters.device)
        self._model, self._metadata = load_align_model(
            self.parameters.language,
            self.device,
            model_name=str(weights["config.json"].parent),
            model_cache_only=True,
        )
        self._align = align

    def align(self, samples: npt.NDArray[np.int16], recognised: Recognised) -> Recognised:
        """`recognised` with aligned word times; unchanged where the text cannot be aligned to the samples.

        `samples` are int16 [n], 16 kHz mono, those the text was recognised in.
        """
        if not recognised.words:
            return recognised
        audio = samples.astype(np.float32) / FULL_SCALE
        duration_s = len(samples) / SAMPLE_RATE
        segment = {"start": 0.0, "end": duration_s, "text": recognised.text}
        found = self._align([segment], self._model, self._metadata, audio, self.device)["word_segments"]
        if not found or any("start" not in word or "end" not in word for word in found):
            return recognised
        space = "" if recognised.language in SPACELESS else " "
        words = []
        for word in found:
            start = min(max(0.0, float(word["start"])), duration_s)
            end = min(max(start, float(word["end"])), duration_s)
            words.append(Word(space + word["word"], start, end, min(1.0, max(0.0, float(word.get("score", 0.0))))))
        return replace(recognised, words=tuple(words), timing="aligned")
