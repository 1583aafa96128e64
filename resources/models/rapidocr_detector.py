"""Text detector: RapidOCR's PP-OCR differentiable-binarisation network (ONNX), boxes only."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from resources.compute.heartbeat import beat
from resources.errors import ModelUnavailable
from resources.models.registry import ModelSpec
from resources.models.weights import locate

Picture = npt.NDArray[np.uint8]
WEIGHTS = "PP-OCRv6_det_small.onnx"
_NO_RESIZE = 100_000


@dataclass(frozen=True, slots=True)
class TextRegion:
    """One line of text the detector sees.

    `quad` is float32 [4, 2], pixels of the picture given, (x, y) from the top left, clockwise from the
    corner at the top left; `score` is the mean text probability inside it, 0-1.
    """

    quad: npt.NDArray[np.float32]
    score: float


class RapidTextDetector:
    """DB text detection (Liao et al., 2020) with the PP-OCR weights that ship in RapidOCR's wheel.

    Thread-safe: ONNX Runtime sessions are, and nothing else is kept between calls.
    """

    def __init__(self, spec: ModelSpec, cache: Path) -> None:
        """Load the network. Raises ModelUnavailable."""
        spec.require("fp32")
        weights = locate(spec, cache)[WEIGHTS]
        try:
            from rapidocr import RapidOCR
        except ImportError as error:
            raise ModelUnavailable("The text detector needs rapidocr.", "Install it: pip install rapidocr") from error
        parameters = spec.parameters
        self._engine: Any = RapidOCR(
            params={
                "Global.log_level": "error",
                "Global.use_cls": False,
                "Global.use_rec": False,
                "Global.max_side_len": _NO_RESIZE,
                "Det.model_path": str(weights),
                "Det.limit_type": "max",
                "Det.limit_side_len": _NO_RESIZE,
                "Det.thresh": float(parameters["pixel_threshold"]),
                "Det.box_thresh": float(parameters["box_threshold"]),
                "Det.unclip_ratio": float(parameters["unclip_ratio"]),
                "EngineConfig.onnxruntime.intra_op_num_threads": int(parameters["threads"]),
            }
        )

    def detect(self, picture: Picture, side: int) -> tuple[TextRegion, ...]:
        """Text lines of `picture`, uint8 [height, width, 3] RGB, seen at a longest side of `side` pixels.

        Larger pictures are scaled down to `side`, smaller ones are taken as they are.
        """
        beat()
        height, width = picture.shape[:2]
        scale = min(1.0, side / max(height, width))
        found = self._engine(_resized(picture, scale)[:, :, ::-1])
        if found.boxes is None:
            return ()
        limit = np.array([width, height], np.float32)
        quads = np.clip(np.asarray(found.boxes, np.float32) / scale, 0, limit)
        return tuple(TextRegion(quad, float(score)) for quad, score in zip(quads, found.scores, strict=True))


def load(spec: ModelSpec, cache: Path) -> RapidTextDetector:
    """The detector `spec` declares. Raises ModelUnavailable."""
    return RapidTextDetector(spec, cache)


def _resized(picture: Picture, scale: float) -> Picture:
    if scale == 1.0:
        return picture
    import cv2

    height, width = picture.shape[:2]
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.asarray(cv2.resize(picture, size, interpolation=cv2.INTER_AREA), np.uint8)
