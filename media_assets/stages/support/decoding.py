"""The decode group's shared work: one source and one decode pass per item, whichever stage asks first."""

from __future__ import annotations

from media_assets.engine.contract import Inputs
from resources.decoding.answers import Decoded
from resources.decoding.client import decoder
from resources.decoding.sources import Source, localize
from resources.ingest.discovery import confinement
from resources.settings import Settings

PARTS = frozenset({"frames", "audio"})
DECODED = "decoded"
"""The memo of the stages that read the file itself."""


def source(inputs: Inputs, settings: Settings) -> Source:
    """The item's file or object; a copy of an object is made once per item and removed with the item."""
    item, limits = inputs.item, settings.limits
    keep = bool(inputs.selected & PARTS)
    within = confinement(item.uri, settings.ingestion)
    return inputs.once("source", lambda: localize(item.uri, limits.max_bytes, settings.s3, item.etag, keep, within))


def decoded(inputs: Inputs, settings: Settings, part: str) -> Decoded:
    """The item's decode pass, of the parts selected in this run and `part` in any case.

    Raises MediaError where the file as a whole cannot be decoded.
    """
    media = inputs.media()
    present = {"image": {"frames"}, "audio": {"audio"}}.get(media["kind"], PARTS if media["has_audio"] else {"frames"})
    wanted = frozenset((inputs.selected & PARTS | {part}) & present)
    return inputs.once(
        ("decode", wanted),
        lambda: decoder(settings).decode(
            source(inputs, settings), media["kind"], media["bytes"], media["duration_s"], wanted
        ),
    )
