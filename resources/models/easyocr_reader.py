"""Text recogniser: EasyOCR's CRNN reads lines of text inside given quadrilaterals."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from resources.compute import devices
from resources.errors import ModelUnavailable
from resources.models.registry import ModelSpec
from resources.models.weights import locate

Picture = npt.NDArray[np.uint8]
Quad = npt.NDArray[np.float32]
Region = tuple[Picture, Quad]
"""A picture, and where on it one line of text stands."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What one line says: its text (may be empty) and the recogniser's confidence, 0-1."""

    text: str
    confidence: float


class EasyOcrReader:
    """The recognition half of EasyOCR (CRNN with CTC; Shi et al., 2015; github.com/JaidedAI/EasyOCR).

    EasyOCR's own detector, CRAFT, takes nine tenths of its time on a CPU and is not loaded; quads come
    from elsewhere. One thread at a time.
    """

    def __init__(self, spec: ModelSpec, cache: Path) -> None:
        """Load the network. Raises ModelUnavailable."""
        device = devices.for_torch(spec.parameters["device"])
        # It quantizes on the CPU alone; elsewhere int8 would silently be fp32.
        spec.require(*(("fp32", "int8") if device == "cpu" else ("fp32",)))
        weights = locate(spec, cache)
        try:
            import easyocr
        except ImportError as error:
            raise ModelUnavailable("The text recogniser needs easyocr.", "Install it: pip install easyocr") from error
        parameters = spec.parameters
        warnings.filterwarnings("ignore", message=".*pin_memory.*")
        self._batch = int(parameters["batch_size"])
        self._contrast = float(parameters["contrast_threshold"])
        try:
            self._reader: Any = easyocr.Reader(
                list(parameters["languages"]),
                gpu=False if device == "cpu" else device,
                model_storage_directory=str(next(iter(weights.values())).parent),
                user_network_directory=str(cache / "easyocr"),
                download_enabled=False,
                detector=False,
                quantize=spec.precision == "int8",
                verbose=False,
            )
        except (FileNotFoundError, ValueError) as error:
            raise ModelUnavailable(
                f"EasyOCR cannot load {spec.name} for {', '.join(parameters['languages'])} ({type(error).__name__}).",
                "Give the weights of these languages in models.toml.",
            ) from error

    def read(self, regions: Sequence[Region]) -> tuple[Reading, ...]:
        """One reading per region, in the order given.

        Each picture is uint8 [height, width, 3] RGB; each quad float32 [4, 2] in its pixels, clockwise from
        the top left *of the text*, at least one pixel wide and high.
        """
        pages = (list(page) for _, page in groupby(regions, lambda region: id(region[0])))
        return tuple(reading for page in pages for reading in self._read_page(page[0][0], [quad for _, quad in page]))

    def _read_page(self, picture: Picture, quads: Sequence[Quad]) -> Iterator[Reading]:
        import cv2

        grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
        boxes = [[(float(x), float(y)) for x, y in quad] for quad in quads]
        found = self._reader.recognize(
            grey,
            horizontal_list=[],
            free_list=boxes,
            batch_size=self._batch,
            contrast_ths=self._contrast,
            reformat=False,
        )
        # EasyOCR sorts its answers, but hands each box back unchanged: that is the key.
        answers = {tuple(box): Reading(str(text), float(confidence)) for box, text, confidence in found}
        return (answers.get(tuple(box), Reading("", 0.0)) for box in boxes)


def load(spec: ModelSpec, cache: Path) -> EasyOcrReader:
    """The recogniser `spec` declares. Raises ModelUnavailable."""
    return EasyOcrReader(spec, cache)
