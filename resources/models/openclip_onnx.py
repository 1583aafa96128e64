"""Towers of the checkpoint that is built offline, computed by ONNX Runtime on a CPU: neither torch nor open_clip."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image

from resources.models.openclip_offline import CONFIG, IDS, IMAGE_ONNX, PIXELS, TEXT_CONFIG, TEXT_ONNX, TOKENIZER
from resources.models.towers import Picture, Vectors, rgb

T = TypeVar("T")
PICTURES, TEXTS = 2, 8
"""Most that a thread computes at once: more are no faster, take more memory, and do not share out as well."""
_WHITE = np.float32(255)


class OnnxTowers:
    """Both towers, each picture and text computed in one of `threads` threads."""

    def __init__(self, folder: Path, threads: int) -> None:
        config = json.loads((folder / CONFIG).read_text())
        self._image = _session(folder / IMAGE_ONNX)
        self._text = _session(folder / TEXT_ONNX)
        self._preparation = Preparation.of(config)
        self.context_length: int = config["model_cfg"]["text_cfg"]["context_length"]
        self._tokens = Tokens(folder, self.context_length)
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, "openclip")

    def embed(self, pictures: Sequence[Picture]) -> tuple[Vectors, Vectors]:
        """`joint` float32 [n, d] and `visual` float32 [n, v] of one or more pictures."""
        found = list(self._pool.map(self._embed, self._parts(pictures, PICTURES)))
        return np.concatenate([joint for joint, _ in found]), np.concatenate([visual for _, visual in found])

    def encode(self, texts: Sequence[str]) -> Vectors:
        """Joint vectors float32 [n, d] of one or more texts."""
        return np.concatenate(list(self._pool.map(self._encode, self._parts(texts, TEXTS))))

    def lengths(self, words: Sequence[str]) -> list[int]:
        """Tokens of each word, without start and end of text."""
        return self._tokens.lengths(words)

    def _parts(self, items: Sequence[T], most: int) -> list[Sequence[T]]:
        size = min(most, -(-len(items) // self._threads))
        return [items[start : start + size] for start in range(0, len(items), size)]

    def _embed(self, pictures: Sequence[Picture]) -> tuple[Vectors, Vectors]:
        pixels = np.stack([self._preparation.pixels(rgb(picture)) for picture in pictures])
        joint, visual = self._image.run(None, {PIXELS: pixels})
        return joint, visual

    def _encode(self, texts: Sequence[str]) -> Vectors:
        (joint,) = self._text.run(None, {IDS: self._tokens.ids(texts)})
        return joint  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True)
class Preparation:
    """How a picture becomes pixels: the very values that torchvision's transforms give for the same configuration."""

    side: int
    values: Vectors
    """float32 [3, 256]: what each of a channel's values becomes."""

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Self:
        """As a checkpoint's configuration says."""
        given = config["preprocess_cfg"]
        mean, std = (np.array(given[name], np.float32)[:, None] for name in ("mean", "std"))
        values = (np.arange(256, dtype=np.float32) / _WHITE - mean) / std
        return cls(config["model_cfg"]["vision_cfg"]["image_size"], values)

    def pixels(self, image: Image.Image) -> Vectors:
        """float32 [3, side, side] of an RGB image: its shorter side resized to `side`, and the middle of the longer."""
        side, short = self.side, min(image.size)
        resized = image.resize((side * image.width // short, side * image.height // short), Image.Resampling.BICUBIC)
        left, top = round((resized.width - side) / 2), round((resized.height - side) / 2)
        square = np.asarray(resized.crop((left, top, left + side, top + side)))
        pixels = np.empty((3, side, side), np.float32)
        for channel, values in enumerate(self.values):
            values.take(square[:, :, channel], out=pixels[channel], mode="clip")  # the other modes copy `out`
        return pixels


class Tokens:
    """The token IDs that open_clip's own tokenizer gives, without what it imports."""

    def __init__(self, folder: Path, context_length: int) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._padding: int = json.loads((folder / TEXT_CONFIG).read_text())["pad_token_id"]
        self._context_length = context_length

    def ids(self, texts: Sequence[str]) -> npt.NDArray[np.int64]:
        """int64 [n, t] of one or more texts, t being what the longest takes; one beyond the context is cut."""
        rows = [self._row(text) for text in texts]
        ids = np.full((len(rows), max(map(len, rows))), self._padding, np.int64)
        for row, found in zip(ids, rows, strict=True):
            row[: len(found)] = found
        return ids

    def lengths(self, words: Sequence[str]) -> list[int]:
        """Tokens of each word, without start and end of text."""
        return [len(self._tokenizer.encode(word, add_special_tokens=False).ids) for word in words]

    def _row(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(_cleaned(text)).ids
        return ids if len(ids) <= self._context_length else [*ids[: self._context_length - 1], ids[-1]]


def _cleaned(text: str) -> str:
    """`text` as open_clip hands it to a tokenizer: mended, without HTML entities, one blank between words."""
    import ftfy

    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split())


def _session(path: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
