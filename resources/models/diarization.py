"""Speaker diarization: who speaks when, with pyannote through WhisperX; only where its model is configured."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from resources.compute import devices
from resources.errors import ModelUnavailable
from resources.models.registry import ModelSpec
from resources.models.weights import locate


class DiarizationParameters(BaseModel):
    """Parameters of a `diarization` entry of models.toml."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: cuda where there is a GPU")
    min_speakers: int | None = Field(None, ge=1, description="fewest speakers to look for")
    max_speakers: int | None = Field(None, ge=1, description="most speakers to look for")


@dataclass(frozen=True, slots=True)
class Turn:
    """One speaker talking without interruption; seconds from the start of the audio."""

    start_s: float
    end_s: float
    speaker: str


class Diarizer:
    """A pyannote pipeline (https://github.com/pyannote/pyannote-audio) from a verified local folder."""

    def __init__(self, spec: ModelSpec, cache: Path) -> None:
        """Raises ModelUnavailable: weights or packages missing; for unusable weights, what the library raises."""
        spec.require("fp32")
        self.parameters = DiarizationParameters(**spec.parameters)
        weights = locate(spec, cache)
        if "config.yaml" not in weights:
            raise ModelUnavailable(f"Model {spec.name} has no config.yaml.", "Name a pyannote pipeline.")
        try:
            from whisperx.diarize import DiarizationPipeline
        except ImportError as error:
            raise ModelUnavailable("Diarization needs whisperx.", "Install it: pip install whisperx") from error
        device = devices.for_torch(self.parameters.device)
        self._pipeline = DiarizationPipeline(str(weights["config.yaml"].parent), device=device)

    def turns(self, pcm: npt.NDArray[np.float32]) -> list[Turn]:
        """Turns in order of start; `pcm` is float32 [samples], 16 kHz mono, the whole recording."""
        frame = self._pipeline(
            pcm, min_speakers=self.parameters.min_speakers, max_speakers=self.parameters.max_speakers
        )
        rows = frame[["start", "end", "speaker"]].itertuples(index=False, name=None)
        return sorted((Turn(float(s), float(e), str(who)) for s, e, who in rows), key=lambda turn: turn.start_s)


def speaker_of(start_s: float, end_s: float, turns: Sequence[Turn]) -> str | None:
    """The speaker who talks longest between `start_s` and `end_s`; None where nobody does."""
    shares: dict[str, float] = defaultdict(float)
    for turn in turns:
        shares[turn.speaker] += max(0.0, min(end_s, turn.end_s) - max(start_s, turn.start_s))
    best = max(shares, key=lambda who: shares[who], default=None)
    return best if best is not None and shares[best] > 0 else None
