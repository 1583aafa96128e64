"""Pictures and texts as vectors of one space: any open_clip checkpoint, local, from a hub or built offline."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from resources.compute import devices
from resources.compute.process import usable_cpus
from resources.errors import ModelUnavailable
from resources.models.openclip_offline import (
    CHECKPOINT,
    CONFIG,
    IMAGE_TOWER,
    IMAGE_WEIGHTS,
    ONNX,
    offline_checkpoint,
    register_image_tower,
)
from resources.models.registry import ModelSpec
from resources.models.towers import Picture, Towers, Vectors
from resources.models.weights import locate

SPECIAL_TOKENS = 2
"""Start and end of text, which every tokenizer adds."""


class OpenClip:
    """An open_clip model (Ilharco et al., 2021; github.com/mlfoundations/open_clip, MIT).

    Pictures are prepared as the checkpoint says. Answers do not depend on what else is in the batch, but for
    rounding (about 1e-6). Two spaces: `joint`, shared by pictures and texts, and `visual`, the image tower's pooled
    features before they are mapped to texts, which tells crops and copies of one picture from like pictures.
    An image tower that is no timm model has no such features to offer; there `visual` equals `joint`.

    The checkpoint that is built offline answers on a CPU through ONNX Runtime, without torch; every other checkpoint,
    and every GPU, through open_clip. On a CPU a batch is cut into parts, each computed in one thread: small
    convolutions shared by several threads spend more time waiting for each other than computing.
    """

    def __init__(self, spec: ModelSpec, cache: Path, threads: int | None = None) -> None:
        """Load the checkpoint, building it first where the profile is offline. Raises ModelUnavailable.

        `threads` compute at once on a CPU; by default one per core, or as many as torch uses where it computes.
        """
        spec.require("fp32", "fp16", "bf16")
        weights = locate(spec, cache)
        try:
            self._towers = _towers(spec, weights, cache, threads)
        except ImportError as error:
            raise ModelUnavailable(
                f"Model {spec.name} ({spec.task}) needs package {error.name}.", f"Install it: pip install {error.name}"
            ) from error

    def embed_images(self, pictures: Sequence[Picture]) -> tuple[Vectors, Vectors]:
        """`joint` float32 [n, d] and `visual` float32 [n, v] of RGB pictures, unit length, from one forward pass.

        A picture is a PIL image or uint8 [height, width, 3].
        """
        if not pictures:
            return _none(), _none()
        joint, visual = self._towers.embed(pictures)
        return normalised(joint), normalised(visual)

    def encode_images(self, pictures: Sequence[Picture]) -> Vectors:
        """Joint vectors of pictures, float32 [n, d], unit length."""
        return self.embed_images(pictures)[0]

    def encode_visual(self, pictures: Sequence[Picture]) -> Vectors:
        """Visual vectors of pictures, float32 [n, v], unit length."""
        return self.embed_images(pictures)[1]

    def encode_texts(self, texts: Sequence[str]) -> Vectors:
        """Joint vectors of texts, float32 [n, d], unit length.

        A text longer than the model's context is encoded in pieces, and its vector is their mean.
        """
        if not texts:
            return _none()
        pieces = [self.pieces(text) for text in texts]
        vectors = self._encode([piece for parts in pieces for piece in parts])
        ends = np.cumsum([len(parts) for parts in pieces], dtype=int)
        means = [vectors[end - len(parts) : end].mean(axis=0) for parts, end in zip(pieces, ends, strict=True)]
        return normalised(np.stack(means))

    def pieces(self, text: str) -> list[str]:
        """`text` in pieces the model's context holds whole, broken between words where there are any."""
        budget = self._towers.context_length - SPECIAL_TOKENS
        pieces: list[str] = []
        words: list[str] = []
        used = 0
        for word, tokens in self._words(text, budget):
            if words and used + tokens > budget:
                pieces.append(" ".join(words))
                words, used = [], 0
            words.append(word)
            used += tokens
        return [*pieces, " ".join(words)]

    def _words(self, text: str, budget: int) -> Iterator[tuple[str, int]]:
        """Words and their tokens; one beyond the budget (a script without spaces) is halved until it fits."""
        words = text.split()
        for word, tokens in zip(words, self._towers.lengths(words), strict=True):
            if tokens <= budget or len(word) == 1:
                yield word, tokens
            else:
                middle = len(word) // 2
                yield from self._words(f"{word[:middle]} {word[middle:]}", budget)

    def _encode(self, texts: Sequence[str]) -> Vectors:
        order = sorted(range(len(texts)), key=lambda at: len(texts[at]))
        encoded = normalised(self._towers.encode([texts[at] for at in order]))
        vectors = np.empty_like(encoded)
        vectors[order] = encoded
        return vectors


def normalised(vectors: npt.NDArray[np.floating]) -> Vectors:
    """Rows of float [n, d] made unit length, as float32; a zero row stays zero."""
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.asarray(vectors / np.maximum(lengths, np.finfo(np.float32).tiny), np.float32)


def _towers(spec: ModelSpec, weights: Mapping[str, Path], cache: Path, threads: int | None) -> Towers:
    offline, wanted = IMAGE_WEIGHTS in weights, spec.parameters.get("device", "cpu")
    # Where there is no GPU, torch need not be imported to learn it.
    device = "cpu" if offline and wanted == "auto" and not devices.present() else devices.for_torch(wanted)
    if offline and device == "cpu":
        from resources.models.openclip_onnx import OnnxTowers

        folder = offline_checkpoint(weights, spec, cache, unread=(CHECKPOINT,))
        return OnnxTowers(folder, threads or usable_cpus())
    from resources.models.openclip_torch import TorchTowers

    folder = offline_checkpoint(weights, spec, cache, unread=ONNX) if offline else _folder(weights, spec)
    if IMAGE_TOWER in (folder / CONFIG).read_text():
        register_image_tower()
    return TorchTowers(folder, device, spec.precision, threads)


def _folder(weights: Mapping[str, Path], spec: ModelSpec) -> Path:
    """Folder of an open_clip checkpoint: the one with its configuration."""
    if CONFIG not in weights:
        raise ModelUnavailable(
            f"Weights of {spec.name} ({spec.task}) lack {CONFIG}.", f"Name an open_clip checkpoint in {spec.source}."
        )
    return weights[CONFIG].parent


def _none() -> Vectors:
    return np.empty((0, 0), np.float32)
