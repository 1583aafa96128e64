"""The `frames` stage: stills at a steady rate and wherever the picture changes, and the 48x27 track."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from media_assets import schemas
from media_assets.engine.contract import Inputs, Prepared, Product, Stage
from media_assets.stages.support.decoding import DECODED, decoded
from media_assets.stages.support.previews.contact_sheet import contact_sheet
from resources.decoding.answers import FramesPart
from resources.errors import MediaError, NotApplicable


@dataclass(frozen=True, slots=True)
class _Carry:
    part: FramesPart
    end_s: float
    seconds: float


class Frames(Stage[None, None]):
    """Stills with exact timestamps, perceptual hashes and repeats, and every frame at 48x27 as side table.

    Frames are counted from 0 in presentation order of the first video stream. `start_s` counts from the
    media's own zero. The one still of an image spans 0-0 and has no track.
    """

    name = "frames"
    memo = DECODED
    inputs = ("media",)
    code_version = "1"
    description = "Stills at a steady rate and at every change, and the 48x27 track of all frames."

    def parameters(self) -> Mapping[str, object]:
        """What selects and sizes stills."""
        keys = {"still_interval_s", "still_change", "still_max_side", "image_max_side"}
        return self.settings.decoding.model_dump(include=keys)

    def prepare(self, inputs: Inputs) -> Prepared[None]:
        """Decode. Raises NotApplicable for audio and text, MediaError where the picture cannot be decoded."""
        media = inputs.media()
        if media["kind"] not in ("video", "image"):
            raise NotApplicable(f"{media['kind']} has no picture")
        started = time.monotonic()
        part = decoded(inputs, self.settings, self.name).frames
        if isinstance(part, MediaError):
            raise part
        decoded_s = part.facts.end_s if part.facts else 0.0
        last_s = part.stills[-1].facts.start_s
        stated_s = media["duration_s"]
        end_s = stated_s if stated_s is not None and stated_s >= last_s else max(decoded_s, last_s)
        return Prepared(carry=_Carry(part, end_s, time.monotonic() - started))

    def assemble(self, inputs: Inputs, carry: Any, outputs: Mapping[str, None]) -> Product:  # noqa: ARG002
        """One row per still; the side table `track` in chunks."""
        part: FramesPart = carry.part
        facts: dict[str, int | float | str] = {
            "stills": len(part.stills),
            "repeats": sum(still.facts.repeat_of is not None for still in part.stills),
            "frames_decoded": part.facts.frames_decoded if part.facts else 0,
            "decode_errors": part.facts.decode_errors if part.facts else 0,
            "seconds": round(carry.seconds, 3),
        }
        # The decoder made an image's thumbnail of its pixels; to decode the still again takes longer than all else.
        cells = [part.thumbnail] if part.thumbnail else [still.image for still in part.stills]
        sheet = {"contact_sheet": contact_sheet(cells)} if inputs.wants_preview else {}
        return Product(_stills_table(inputs, part, carry.end_s), {"track": _track_table(inputs, part)}, facts, sheet)


def _stills_table(inputs: Inputs, part: FramesPart, end_s: float) -> pa.Table:
    ends = [still.facts.start_s for still in part.stills[1:]] + [end_s]
    rows: list[dict[str, object]] = [
        {
            **still.facts.model_dump(exclude={"phash"}),
            "phash": bytes.fromhex(still.facts.phash),
            "media_id": inputs.media_id,
            "end_s": 0.0 if still.facts.reason == "image" else until_s,
            "image": still.image,
            "version": inputs.version,
        }
        for still, until_s in zip(part.stills, ends, strict=True)
    ]
    return schemas.table(schemas.FRAMES, rows)


def _track_table(inputs: Inputs, part: FramesPart) -> pa.Table:
    rows: list[dict[str, object]] = [
        {
            "media_id": inputs.media_id,
            "first_frame": chunk.first_frame,
            "frames": len(chunk.start_s),
            "start_s": list(chunk.start_s),
            "rgb": chunk.rgb,
            "version": inputs.version,
        }
        for chunk in part.track
    ]
    return schemas.table(schemas.FRAMES_TRACK, rows)
