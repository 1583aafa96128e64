"""Classifiers of pictures and of texts read with transformers from a local Hugging Face checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from resources.compute import devices
from resources.errors import ModelUnavailable
from resources.models.registry import ModelSpec

Picture = npt.NDArray[np.uint8]
_REFUSALS = (OSError, ValueError, TypeError, KeyError, RuntimeError)
"""What transformers raises on an incomplete checkpoint: a missing file shows as whatever breaks first."""


class TransformersImageClassifier:
    """Any Hugging Face image classifier; preprocessing and classes come from the checkpoint."""

    def __init__(self, spec: ModelSpec, weights: Mapping[str, Path]) -> None:
        import torch
        from transformers import AutoImageProcessor, AutoModelForImageClassification

        folder = _checkpoint_folder(spec, weights)
        self._torch: Any = torch
        self._device = devices.for_torch("auto")
        try:
            self._processor: Any = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
            model: Any = AutoModelForImageClassification.from_pretrained(folder, local_files_only=True)
        except _REFUSALS as error:
            raise _unreadable_checkpoint(spec, error) from error
        self._model = model.to(self._device, dtype=_torch_dtype(spec, self._device)).eval()
        if spec.compile:
            self._model.compile()
        self._activation = _activation(spec)

    def score(self, pictures: Sequence[Picture]) -> list[dict[str, float]]:
        """Class of the checkpoint -> probability."""
        with self._torch.inference_mode():
            pixels = self._processor(images=list(pictures), return_tensors="pt")["pixel_values"]
            logits = self._model(pixel_values=pixels.to(self._device, self._model.dtype)).logits
        return _named_scores(logits, self._activation, self._model.config.id2label)


class TransformersTextClassifier:
    """Any Hugging Face sequence classifier; tokenizer and classes come from the checkpoint."""

    def __init__(self, spec: ModelSpec, weights: Mapping[str, Path]) -> None:
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        folder = _checkpoint_folder(spec, weights)
        self._torch: Any = torch
        self._device = devices.for_torch("auto")
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            model: Any = AutoModelForSequenceClassification.from_pretrained(folder, local_files_only=True)
        except _REFUSALS as error:
            raise _unreadable_checkpoint(spec, error) from error
        self._model = model.to(self._device, dtype=_torch_dtype(spec, self._device)).eval()
        if spec.compile:
            self._model.compile()
        self._activation = _activation(spec)
        self._max_tokens = int(spec.parameters.get("max_tokens", 512))

    def score(self, texts: Sequence[str]) -> list[dict[str, float]]:
        """Class of the checkpoint -> probability; a text is read up to `max_tokens` tokens."""
        if not texts:
            return []
        with self._torch.inference_mode():
            tokens = self._tokenizer(
                list(texts), padding=True, truncation=True, max_length=self._max_tokens, return_tensors="pt"
            )
            logits = self._model(**tokens.to(self._device)).logits
        return _named_scores(logits, self._activation, self._model.config.id2label)


def _checkpoint_folder(spec: ModelSpec, weights: Mapping[str, Path]) -> Path:
    """Folder of a transformers checkpoint. Raises ModelUnavailable where it has no config.json."""
    if "config.json" not in weights:
        raise ModelUnavailable(
            f"Weights of {spec.name} ({spec.task}) have no config.json.", "List every file the checkpoint needs."
        )
    return weights["config.json"].parent


def _unreadable_checkpoint(spec: ModelSpec, error: Exception) -> ModelUnavailable:
    return ModelUnavailable(
        f"transformers cannot load {spec.name} ({spec.task}): {type(error).__name__}.",
        f"Check that {spec.source} holds a complete checkpoint of this kind.",
    )


def _torch_dtype(spec: ModelSpec, device: str) -> Any:
    """The spec's precision as a torch dtype; half precision on a CPU is slower than full and becomes fp32."""
    import torch

    kinds = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    spec.require(*kinds, compiles=True)
    return torch.float32 if device == "cpu" else kinds[spec.precision]


def _activation(spec: ModelSpec) -> str:
    """softmax (classes exclude each other) or sigmoid (each on its own), as the spec says. Raises ModelUnavailable."""
    name = str(spec.parameters.get("activation"))
    if name not in ("softmax", "sigmoid"):
        raise ModelUnavailable(
            f"Model {spec.name} ({spec.task}) has activation {name}.", 'Set activation = "softmax" or "sigmoid".'
        )
    return name


def _named_scores(logits: Any, kind: str, names: Mapping[int, str]) -> list[dict[str, float]]:
    """Logits, float tensor [n, classes], as class -> probability for each row."""
    logits = logits.float()
    probabilities = logits.softmax(-1) if kind == "softmax" else logits.sigmoid()
    return [{names[i]: float(p) for i, p in enumerate(row)} for row in probabilities.cpu().tolist()]
