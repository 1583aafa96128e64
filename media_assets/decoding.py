"""The decode group's shared work: one local copy and one decode pass per item, whichever stage asks first."""

from __future__ import annotations

from media_assets.stage import Inputs
from resources.decoding.client import Decoded, decoder
from resources.decoding.sources import LocalFile, localize
from resources.settings import Settings

PARTS = frozenset({"frames", "audio"})


def local_file(inputs: Inputs, settings: Settings) -> LocalFile:
    """The item's file on this machine; a download is made once per item and removed with the item."""
    return inputs.once("source", lambda: localize(inputs.item.uri, settings.limits.max_bytes))


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
            local_file(inputs, settings), media["kind"], media["bytes"], media["duration_s"], wanted
        ),
    )
