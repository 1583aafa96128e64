"""shots: where one shot ends and the next begins, hard cuts and gradual transitions told apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from media_assets import schemas
from media_assets.engine.contract import Inputs, Prepared, Product, Stage, Unit
from media_assets.stages.support.previews.shot_strip import shot_strip
from media_assets.stages.support.shot_boundaries import Rules, Shot, boundaries, change, distance, luma, shots
from media_assets.stages.support.tracks import read_track
from resources.errors import Failure, NotApplicable
from resources.models.registry import ModelSpec
from resources.models.transnet import STRIDE, Scores, TransNet, windows

Frames = npt.NDArray[np.uint8]
STILL_DISTANCE = "still_distance"


@dataclass(frozen=True, slots=True)
class _Video:
    """What assembly needs of a video: float64 [n] seconds, float32 [n] luma and change, its end in seconds."""

    times: npt.NDArray[np.float64]
    luma: npt.NDArray[np.float32]
    change: npt.NDArray[np.float32]
    end_s: float
    windows: int
    spared: int


class Shots(Stage[Frames, Scores]):
    """TransNet V2 over the 48x27 track.

    A unit is a window of 100 frames (50 with context), so windows of many videos share a micro-batch. Windows
    in which the picture stands still hold no transition and are spared the model. The rules that turn scores
    into shots stand in `shot_boundaries`; their thresholds are parameters of the model.
    """

    name = "shots"
    inputs = ("media", "frames")
    code_version = "1"
    tasks = ("shots",)
    micro_batch = 4
    description = "Shots of a video: first and last frame, times, and whether they start by a cut or gradually."

    @property
    def spec(self) -> ModelSpec:
        """The champion model."""
        return self.models.spec("shots")

    def load(self) -> None:
        """Load TransNet V2."""
        self._model()

    def prepare(self, inputs: Inputs) -> Prepared[Frames]:
        """Windows of the track. Raises NotApplicable for anything but video with frames."""
        media = inputs.media()
        if media["kind"] != "video":
            raise NotApplicable(f"{media['kind']} has no shots")
        track, times = read_track(inputs.table("frames", "track"))
        if len(track) == 0:
            raise NotApplicable("the video has no frames")
        still = float(self.spec.parameters[STILL_DISTANCE])
        cut = list(windows(track))
        units = [Unit(str(at), window) for at, window in enumerate(cut) if not _stands_still(window, still)]
        video = _Video(
            times, luma(track), change(track), _end(times, media["duration_s"]), len(cut), len(cut) - len(units)
        )
        return Prepared(units, video)

    def infer(self, units: Sequence[Unit[Frames]]) -> Mapping[str, Scores | Failure]:
        """Scores of windows of any videos."""
        answers = self._model().score([unit.payload for unit in units])
        return {unit.id: scores for unit, scores in zip(units, answers, strict=True)}

    def assemble(self, inputs: Inputs, carry: _Video, outputs: Mapping[str, Scores]) -> Product:
        """One row per shot; the shots cover the video without gap or overlap."""
        single, many = _scores(len(carry.times), outputs)
        found = shots(boundaries(single, many, carry.luma, carry.change, _rules(self.spec)), len(carry.times))
        starts = [float(carry.times[shot.start]) for shot in found]
        ends = [*starts[1:], carry.end_s]
        rows = [
            self._row(inputs, at, shot, span)
            for at, (shot, span) in enumerate(zip(found, zip(starts, ends, strict=True), strict=True))
        ]
        kinds = [shot.opening.kind for shot in found]
        facts = {
            "shots": len(found),
            "cuts": kinds.count("cut"),
            "gradual": kinds.count("gradual"),
            "frames": len(carry.times),
            "windows": carry.windows,
            "windows_spared": carry.spared,
        }
        return Product(schemas.table(self.schema, rows), facts=facts, previews=_previews(inputs, rows))

    def _row(self, inputs: Inputs, at: int, shot: Shot, span: tuple[float, float]) -> dict[str, object]:
        return {
            "media_id": inputs.media_id,
            "shot": at,
            "start_frame": shot.start,
            "end_frame": shot.end,
            "start_s": span[0],
            "end_s": span[1],
            "confidence": shot.opening.confidence,
            "transition": shot.opening.kind,
            "transition_start_frame": shot.opening.first,
            "transition_end_frame": shot.opening.last,
            "model": self.spec.identity,
            "version": inputs.version,
        }

    def _model(self) -> TransNet:
        return self.models.loaded(self.spec, lambda: TransNet(self.spec, self.models.cache))


def _rules(spec: ModelSpec) -> Rules:
    return Rules(**{field.name: spec.parameters[field.name] for field in fields(Rules)})


def _stands_still(window: Frames, still: float) -> bool:
    """Whether every frame is like the first: a drift adds up, so a slow fade is told from a still."""
    return all(distance(frame, window[0]) <= still for frame in window[1:])


def _scores(frames: int, outputs: Mapping[str, Scores]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """The windows' answers laid over the frames; a spared window answers 0."""
    single, many = np.zeros(frames, np.float32), np.zeros(frames, np.float32)
    for unit, scores in outputs.items():
        start = int(unit) * STRIDE
        count = min(STRIDE, frames - start)
        single[start : start + count] = scores.single[:count]
        many[start : start + count] = scores.many[:count]
    return single, many


def _end(times: npt.NDArray[np.float64], duration_s: float | None) -> float:
    """End of the last frame: one usual frame interval after its start, within the container's duration."""
    last = float(times[-1])
    interval = float(np.median(np.diff(times))) if len(times) > 1 else 0.0
    end = last + max(interval, 0.0)
    return end if duration_s is None else max(last, min(end, duration_s))


def _previews(inputs: Inputs, rows: Sequence[Mapping[str, Any]]) -> dict[str, bytes]:
    if not inputs.wants_preview:
        return {}
    stills: pa.Table = inputs.table("frames")
    return {"shots": shot_strip(rows, stills.to_pylist())} if stills.num_rows else {}
