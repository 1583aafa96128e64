"""Towers of any open_clip checkpoint, computed by open_clip and torch on a CPU or a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import TYPE_CHECKING, Any

import numpy as np

from resources.models.openclip_offline import (
    CONFIG,
    IMAGE_TOWER,
    both_spaces,
    fold_normalisations,
    local_towers,
    trimmed,
)
from resources.models.towers import Picture, Vectors, rgb

if TYPE_CHECKING:
    from torch import Tensor

IMAGE_BATCH = 16
TEXT_BATCH = 32
DECODE_THREADS = 2


class TorchTowers:
    """Both towers on `device`, which is `cpu` or `cuda`; half precision is for a GPU, a CPU computes in fp32."""

    def __init__(self, folder: Path, device: str, precision: str, threads: int | None) -> None:
        import open_clip
        import torch

        self._device = device
        # Half precision on a CPU is slower than full, where it works at all.
        precision = precision if device == "cuda" else "fp32"
        name = f"local-dir:{folder}"
        self._model: Any
        self._model, _, self._preprocess = open_clip.create_model_and_transforms(
            name, precision=precision, device=device, **local_towers(folder)
        )
        self._model.eval()
        if device == "cpu" and IMAGE_TOWER in (folder / CONFIG).read_text():
            fold_normalisations(self._model.visual.trunk)
        self._model.visual.to(memory_format=torch.channels_last)
        self._parts = (threads or torch.get_num_threads()) if device == "cpu" else 1
        self._pool = _single_threaded(self._parts if device == "cpu" else DECODE_THREADS)
        self._dtype = open_clip.get_input_dtype(precision)
        self._tokenizer: Any = open_clip.get_tokenizer(name)
        self.context_length: int = self._tokenizer.context_length
        text_config = getattr(getattr(self._model, "text", None), "config", None)
        self._padding: int | None = getattr(text_config, "pad_token_id", None)

    def embed(self, pictures: Sequence[Picture]) -> tuple[Vectors, Vectors]:
        """`joint` float32 [n, d] and `visual` float32 [n, v] of one or more pictures."""
        size = min(IMAGE_BATCH, -(-len(pictures) // self._parts))
        parts = [pictures[start : start + size] for start in range(0, len(pictures), size)]
        if self._device == "cpu":
            found = list(self._pool.map(self._embed, parts))
        else:
            found = [self._embed(part, self._pool.map) for part in parts]
        return np.concatenate([joint for joint, _ in found]), np.concatenate([visual for _, visual in found])

    def encode(self, texts: Sequence[str]) -> Vectors:
        """Joint vectors float32 [n, d] of one or more texts."""
        import torch

        with torch.inference_mode():
            batches = (texts[start : start + TEXT_BATCH] for start in range(0, len(texts), TEXT_BATCH))
            return np.concatenate([self._encode(batch) for batch in batches])

    def lengths(self, words: Sequence[str]) -> list[int]:
        """Tokens of each word, without start and end of text."""
        inner = getattr(self._tokenizer, "tokenizer", None)
        if inner is None:
            return [len(self._tokenizer.encode(word)) for word in words]
        return [len(ids) for ids in inner(list(words), add_special_tokens=False).input_ids] if words else []

    def _encode(self, texts: Sequence[str]) -> Vectors:
        tokens = self._tokenizer(list(texts))
        if self._padding is not None:
            tokens = trimmed(tokens, self._padding)
        return _array(self._model.encode_text(tokens.to(self._device)))

    def _embed(
        self,
        pictures: Sequence[Picture],
        mapped: Callable[[Callable[[Picture], Tensor], Sequence[Picture]], Iterable[Tensor]] = map,
    ) -> tuple[Vectors, Vectors]:
        """Joint and visual vectors of one batch, its pictures prepared by `mapped`."""
        import torch

        with torch.inference_mode():
            pixels = torch.stack(list(mapped(self._prepared, pictures))).to(self._device, self._dtype)
            joint, visual = self._both(pixels.contiguous(memory_format=torch.channels_last))
            return _array(joint), _array(visual)

    def _both(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        if hasattr(self._model.visual, "trunk"):
            return both_spaces(self._model.visual, pixels)
        joint = self._model.encode_image(pixels)
        return joint, joint

    def _prepared(self, picture: Picture) -> Tensor:
        prepared: Tensor = self._preprocess(rgb(picture))
        return prepared


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


def _array(features: Tensor) -> Vectors:
    found: Vectors = features.float().cpu().numpy()
    return found
