"""What an open_clip checkpoint answers with: an image tower and a text tower, whichever library computes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

Vectors: TypeAlias = npt.NDArray[np.float32]
Picture: TypeAlias = Image.Image | npt.NDArray[np.uint8]


class Towers(Protocol):
    """Both towers of one checkpoint. Methods may be called by several threads; vectors are not yet unit length."""

    context_length: int
    """Tokens of the longest text, start and end included."""

    def embed(self, pictures: Sequence[Picture]) -> tuple[Vectors, Vectors]:
        """`joint` float32 [n, d] and `visual` float32 [n, v] of one or more pictures."""
        ...

    def encode(self, texts: Sequence[str]) -> Vectors:
        """Joint vectors float32 [n, d] of one or more texts; those of like length should lie beside each other."""
        ...

    def lengths(self, words: Sequence[str]) -> list[int]:
        """Tokens of each word, without start and end of text."""
        ...


def rgb(picture: Picture) -> Image.Image:
    """A picture, PIL or uint8 [height, width, 3], as PIL in RGB."""
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    return image if image.mode == "RGB" else image.convert("RGB")  # which copies one that is RGB already
