"""Text recogniser: RapidOCR's PP-OCR network (ONNX), Chinese and Latin script; a candidate beside EasyOCR."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from resources.errors import ModelUnavailable
from resources.models.easyocr_reader import Reading
from resources.models.registry import ModelSpec
from resources.models.weights import locate

Picture = npt.NDArray[np.uint8]
Quad = npt.NDArray[np.float32]
WEIGHTS = "PP-OCRv6_rec_small.onnx"


class RapidTextReader:
    """PP-OCR text recognition (SVTR; Du et al., 2022) with the weights that ship in RapidOCR's wheel."""

    def __init__(self, spec: ModelSpec, cache: Path) -> None:
        """Load the network. Raises ModelUnavailable."""
        spec.require("fp32")
        weights = locate(spec, cache)[WEIGHTS]
        try:
            from rapidocr import RapidOCR
        except ImportError as error:
            raise ModelUnavailable(
                "This text recogniser needs rapidocr.", "Install it: pip install rapidocr"
            ) from error
        self._engine: Any = RapidOCR(
            params={
                "Global.log_level": "error",
                "Global.use_det": False,
                "Global.use_cls": False,
                "Global.use_preprocess_img": False,
                "Rec.model_path": str(weights),
                "EngineConfig.onnxruntime.intra_op_num_threads": int(spec.parameters["threads"]),
            }
        )

    def read(self, picture: Picture, quads: Sequence[Quad]) -> tuple[Reading, ...]:
        """One reading per quad, in the order given.

        `picture` is uint8 [height, width, 3] RGB; each quad float32 [4, 2] in its pixels, clockwise from
        the top left *of the text*, at least one pixel wide and high.
        """
        bgr = np.ascontiguousarray(picture[:, :, ::-1])
        return tuple(self._read_line(_upright(bgr, quad)) for quad in quads)

    def _read_line(self, crop: Picture) -> Reading:
        found = self._engine(crop)
        if not found.txts:
            return Reading("", 0.0)
        return Reading(str(found.txts[0]), float(found.scores[0]))


def _upright(picture: Picture, quad: Quad) -> Picture:
    """The quad's pixels as an upright rectangle. RapidOCR's own cut also turns tall ones, which hides the way up."""
    import cv2

    sides = np.linalg.norm(quad - np.roll(quad, -1, axis=0), axis=1)
    width, height = max(1, round(max(sides[0], sides[2]))), max(1, round(max(sides[1], sides[3])))
    target = np.array([[0, 0], [width, 0], [width, height], [0, height]], np.float32)
    matrix = cv2.getPerspectiveTransform(np.asarray(quad, np.float32), target)
    cut = cv2.warpPerspective(picture, matrix, (width, height), flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE)
    return np.asarray(cut, np.uint8)


def load(spec: ModelSpec, cache: Path) -> RapidTextReader:
    """The recogniser `spec` declares. Raises ModelUnavailable."""
    return RapidTextReader(spec, cache)
