"""Text recogniser: RapidOCR's PP-OCR network (ONNX), Chinese and Latin script; a candidate beside EasyOCR."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from resources.errors import ModelUnavailable
from resources.models.easyocr_reader import Reading, Region
from resources.models.registry import ModelSpec
from resources.models.weights import locate

Picture = npt.NDArray[np.uint8]
Quad = npt.NDArray[np.float32]
WEIGHTS = "PP-OCRv6_rec_small.onnx"
HEIGHT = 48
"""Height at which the network sees a line, pixels."""


class RapidTextReader:
    """PP-OCR text recognition (SVTR; Du et al., 2022) with the weights that ship in RapidOCR's wheel.

    Every line is a call of its own, as wide as the line: the cost of the network grows with the width, and lines
    padded to the widest of a batch cost more than the batch saves. `threads` lines are read at once, each on one core.
    """

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
                "Rec.rec_img_shape": [3, HEIGHT, int(spec.parameters["min_width"])],
                "EngineConfig.onnxruntime.intra_op_num_threads": 1,
            }
        )
        self._threads = ThreadPoolExecutor(int(spec.parameters["threads"]), "ocr-lines")

    def read(self, regions: Sequence[Region]) -> tuple[Reading, ...]:
        """One reading per region, in the order given; none depends on another.

        Each picture is uint8 [height, width, 3] RGB; each quad float32 [4, 2] in its pixels, clockwise from
        the top left *of the text*, at least one pixel wide and high.
        """
        return tuple(self._threads.map(self._read_line, regions))

    def _read_line(self, region: Region) -> Reading:
        found = self._engine(np.ascontiguousarray(_upright(*region)[:, :, ::-1]))
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
