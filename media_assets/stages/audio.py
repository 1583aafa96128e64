"""The `audio` stage: 16 kHz mono samples, lossless, in chunks of a minute."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from media_assets import schemas
from media_assets.engine.contract import Inputs, Prepared, Product, Stage
from media_assets.stages.support.decoding import DECODED, decoded
from media_assets.stages.support.tracks import SAMPLE_RATE
from resources.decoding.answers import AudioPart
from resources.errors import MediaError, NotApplicable


@dataclass(frozen=True, slots=True)
class _Carry:
    part: AudioPart
    seconds: float


class Audio(Stage[None, None]):
    """The first audio stream as 16 kHz mono FLAC; sample i is at i / 16000 s from the media's own zero.

    A stream that starts late or skips is padded with silence, so that sound and picture stay in step.
    """

    name = "audio"
    memo = DECODED
    inputs = ("media",)
    code_version = "1"
    description = "16 kHz mono audio, lossless, in step with the picture."

    def prepare(self, inputs: Inputs) -> Prepared[None]:
        """Decode. Raises NotApplicable without an audio stream, MediaError where it cannot be decoded."""
        media = inputs.media()
        if media["kind"] not in ("video", "audio"):
            raise NotApplicable(f"{media['kind']} has no sound")
        if not media["has_audio"]:
            raise NotApplicable("no audio stream")
        started = time.monotonic()
        part = decoded(inputs, self.settings, self.name).audio
        if isinstance(part, MediaError):
            raise part
        return Prepared(carry=_Carry(part, time.monotonic() - started))

    def assemble(self, inputs: Inputs, carry: Any, outputs: Mapping[str, None]) -> Product:  # noqa: ARG002
        """One row per chunk."""
        part: AudioPart = carry.part
        rows: list[dict[str, object]] = [
            {
                "media_id": inputs.media_id,
                "chunk": index,
                "start_s": chunk.first_sample / SAMPLE_RATE,
                "end_s": (chunk.first_sample + chunk.samples) / SAMPLE_RATE,
                "samples": chunk.samples,
                "rms": chunk.rms,
                "peak": chunk.peak,
                "flac": chunk.flac,
                "version": inputs.version,
            }
            for index, chunk in enumerate(part.chunks)
        ]
        facts: dict[str, int | float | str] = {
            "audio_s": round(sum(chunk.samples for chunk in part.chunks) / SAMPLE_RATE, 3),
            "chunks": len(part.chunks),
            "decode_errors": part.facts.decode_errors if part.facts else 0,
            "seconds": round(carry.seconds, 3),
        }
        return Product(schemas.table(schemas.AUDIO, rows), facts=facts)
