"""What work costs: expected seconds per asset and item, from past outcomes, else a guess."""

from __future__ import annotations

import mimetypes
from collections import defaultdict
from collections.abc import Mapping, Sequence
from types import MappingProxyType

SAMPLE = 20_000
"""How many of the newest outcomes are asked."""
MEGABYTE = 1e6
# Seconds of one group for one item on two CPU cores, until outcomes of this library say better.
GUESSED_SECONDS = MappingProxyType({"video": 20.0, "audio": 10.0, "image": 1.0, "text": 0.5, "other": 2.0})
TIMED = ("video", "audio")  # their cost follows their size
# Of one asset of one item, or of a megabyte of those whose cost follows their size, as measured on the samples.
GUESSED_BY_ASSET: Mapping[tuple[str, str], float] = MappingProxyType(
    {
        ("video", "frames"): 4.0,
        ("video", "audio"): 3.5,
        ("video", "shots"): 19.0,
        ("video", "ocr_text"): 19.0,
        ("video", "transcript"): 19.0,
        ("video", "embeddings"): 1.0,
        ("video", "moderation_scores"): 1.3,
        ("audio", "media"): 8.0,
        ("audio", "audio"): 3.0,
        ("audio", "transcript"): 30.0,
        ("image", "frames"): 0.1,
        ("image", "ocr_text"): 0.9,
        ("text", "media"): 0.2,
    }
)
LEAST_GUESS_S = 0.02


def kind_of(uri: str) -> str:
    """`video`, `audio`, `image`, `text` or `other`, by the name alone: enough to pack, never trusted further."""
    kind = (mimetypes.guess_type(uri, strict=False)[0] or "").split("/", 1)[0]
    return kind if kind in GUESSED_SECONDS else "other"


class Costs:
    """Expected seconds per asset, from past outcomes: by megabyte for video and audio, by item for the rest.

    `past` has (asset, uri, seconds, bytes) of finished outcomes.
    """

    def __init__(self, past: Sequence[tuple[str, str, float, int]]) -> None:
        totals: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
        for asset, uri, seconds, size in past:
            total = totals[asset, kind_of(uri)]
            total[0] += seconds
            total[1] += 1
            total[2] += size / MEGABYTE
        self._totals = dict(totals)

    def seconds(self, assets: Sequence[str], uri: str, size: int | None) -> tuple[float, bool]:
        """Expected seconds of these assets of one upload, and whether some of it is a guess."""
        kind = kind_of(uri)
        known = [total for asset in assets if (total := self._totals.get((asset, kind))) is not None]
        if not known:
            return GUESSED_SECONDS[kind], True
        if kind in TIMED and size is not None and all(total[2] > 0 for total in known):
            return sum(total[0] / total[2] for total in known) * size / MEGABYTE, False
        return sum(total[0] / total[1] for total in known), False

    def of_asset(self, asset: str, uri: str, size: int | None) -> float:
        """Expected seconds of one asset of one upload, a guess where there is no past."""
        kind = kind_of(uri)
        if (asset, kind) in self._totals:
            return max(self.seconds([asset], uri, size)[0], 1e-3)
        weight = (size or MEGABYTE) / MEGABYTE if kind in TIMED else 1.0
        return max(GUESSED_BY_ASSET.get((kind, asset), 0.0) * weight, LEAST_GUESS_S)
