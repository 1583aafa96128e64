"""Voice activity: where in 16 kHz audio somebody speaks (Silero VAD v6, as faster-whisper ships it)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from resources.compute.heartbeat import beat
from resources.errors import ModelUnavailable
from resources.models.registry import ModelSpec
from resources.models.weights import locate

SAMPLE_RATE = 16_000
BLOCK_S = 600  # hours of audio are scanned block by block, which bounds memory


class VadParameters(BaseModel):
    """Parameters of a `vad` entry of models.toml."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    threshold: float = Field(0.5, gt=0, lt=1, description="speech probability of a 32 ms window that starts speech")
    min_speech_s: float = Field(0.1, ge=0, description="shorter speech is dropped, seconds")
    min_silence_s: float = Field(0.5, ge=0, description="pause that ends a stretch of speech, seconds")
    pad_s: float = Field(0.2, ge=0, description="audio kept before and after speech, seconds")
    max_speech_s: float = Field(29.0, gt=1, le=30, description="longer speech is cut at its last pause, seconds")


@dataclass(frozen=True, slots=True, order=True)
class Span:
    """Samples `start` (inclusive) to `end` (exclusive) of 16 kHz audio."""

    start: int
    end: int


class SpeechDetector:
    """Silero VAD (https://github.com/snakers4/silero-vad) on ONNX Runtime; safe to call from several threads."""

    def __init__(self, spec: ModelSpec, cache: Path) -> None:
        """Raises ModelUnavailable: faster-whisper missing, or its VAD asset not the pinned one."""
        spec.require("fp32")
        locate(spec, cache)
        self.parameters = VadParameters(**spec.parameters)
        try:
            from faster_whisper.vad import VadOptions, get_speech_timestamps
        except ImportError as error:
            raise ModelUnavailable(
                "Voice activity needs faster-whisper.", "Install it: pip install whisperx"
            ) from error
        self._detect = get_speech_timestamps
        self._options = VadOptions(
            threshold=self.parameters.threshold,
            min_speech_duration_ms=round(self.parameters.min_speech_s * 1000),
            min_silence_duration_ms=round(self.parameters.min_silence_s * 1000),
            speech_pad_ms=round(self.parameters.pad_s * 1000),
            max_speech_duration_s=self.parameters.max_speech_s,
        )

    def speech(self, pcm: npt.NDArray[np.float32]) -> list[Span]:
        """Stretches of speech in `pcm` (float32 [samples], -1..1, 16 kHz mono), in order, disjoint."""
        spans: list[Span] = []
        for start in range(0, len(pcm), BLOCK_S * SAMPLE_RATE):
            beat()
            block = pcm[start : start + BLOCK_S * SAMPLE_RATE]
            spans += [
                Span(start + found["start"], start + found["end"]) for found in self._detect(block, self._options)
            ]
        return spans


def merge(spans: Sequence[Span], longest_s: float, gap_s: float) -> list[Span]:
    """Neighbouring spans joined, pause included, while the whole lasts at most `longest_s` and the pause `gap_s`.

    The cut-and-merge of WhisperX (https://arxiv.org/abs/2303.00747): fuller windows cost the recogniser less.
    """
    merged: list[Span] = []
    for span in spans:
        last = merged[-1] if merged else None
        if (
            last is not None
            and span.end - last.start <= longest_s * SAMPLE_RATE
            and span.start - last.end <= gap_s * SAMPLE_RATE
        ):
            merged[-1] = Span(last.start, span.end)
        else:
            merged.append(span)
    return merged
