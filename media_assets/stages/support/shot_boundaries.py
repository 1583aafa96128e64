"""From per-frame transition scores to the shots of a video: pure functions, no model, no I/O.

TransNet V2 (Souček and Lokoč, 2020) gives two scores per frame: `single` peaks on the last frame of a shot
before a cut, or in the middle of a gradual transition; `many` is high on every frame of a transition.
The rules that turn them into boundaries:

- A transition is a run of frames in which either score is above its threshold, `single` somewhere among them.
- It is gradual where `many` is above its threshold on `gradual_frames` frames or more, else it is a cut. A gradual
  one needs of `single` only `weak_threshold`: its peak is spread out where the transition is slow.
- A cut falls after the frame `single` peaks on; where the picture changes far more one or two frames away, there.
- A gradual transition falls after the frame `single` peaks on. A fade out to black followed by a fade in is one
  transition, and falls at its darkest point: the middle of the black. Black of more than `dark_frames` frames is
  a shot of its own. Fades through white, and black at the start or end of a video, get no such treatment.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating]
Kind = Literal["start", "cut", "gradual"]

LUMA_WEIGHTS = np.array([0.299, 0.587, 0.114], np.float32)
"""ITU-R BT.601 weights of red, green and blue."""
CUT_SLACK = 2
"""Frames to either side of a cut's frame in which the largest change of picture is looked for."""
CUT_DOMINANCE = 4.0
"""How many times larger than at the model's frame a change must be to move the cut."""
DARKNESS_TIE = 1.0
"""Frames within this much luma (0-255) of the darkest count as equally dark."""


@dataclass(frozen=True, slots=True)
class Rules:
    """Thresholds of the rules above; scores are 0-1, luma 0-255, the rest frames."""

    threshold: float = 0.5
    weak_threshold: float = 0.2
    many_threshold: float = 0.5
    extent_threshold: float = 0.2
    gradual_frames: int = 5
    dark_luma: float = 24.0
    dark_frames: int = 75


@dataclass(frozen=True, slots=True)
class Boundary:
    """A transition: `frame` is the first frame of the new shot, `first`-`last` (inclusive) its extent."""

    frame: int
    first: int
    last: int
    confidence: float
    kind: Kind


@dataclass(frozen=True, slots=True)
class Shot:
    """Frames `start`-`end` (inclusive) and the boundary they begin with."""

    start: int
    end: int
    opening: Boundary


def luma(track: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Mean luma (0-255) of each frame of uint8 [n, height, width, 3] RGB; float32 [n]."""
    return np.asarray(track.mean(axis=(1, 2), dtype=np.float32) @ LUMA_WEIGHTS, np.float32)


def change(track: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Mean absolute difference (0-255) of each frame to the one before, uint8 [n, ...]; float32 [n], 0 first."""
    differences = np.zeros(len(track), np.float32)
    for at in range(1, len(track)):
        differences[at] = distance(track[at], track[at - 1])
    return differences


def distance(one: npt.NDArray[np.uint8], other: npt.NDArray[np.uint8]) -> float:
    """Mean absolute difference (0-255) of two pictures, or of a stack of pictures to one."""
    return float(np.abs(one.astype(np.int16) - other).mean())


def boundaries(
    single: Floats,
    many: Floats,
    luma: Floats | None = None,
    change: Floats | None = None,
    rules: Rules | None = None,
) -> list[Boundary]:
    """Boundaries of a video of n frames in order, each `frame` in 1..n-1 and no two alike.

    `single` and `many` are float [n] in 0-1. `luma` (float [n], see `luma`) lets fades through black be seen
    as one transition; `change` (float [n], see `change`) corrects cuts by a frame or two. Raises ValueError
    where lengths differ.
    """
    rules = rules or Rules()
    for other in (many, luma, change):
        if other is not None and len(other) != len(single):
            raise ValueError(f"{len(other)} values for {len(single)} frames")
    found = [_transition(single, many, run, change, rules) for run in _transitions(single, many, rules)]
    if luma is not None:
        found = _through_black(found, luma, rules)
    return list(_increasing(found, len(single)))


def shots(found: Sequence[Boundary], frames: int) -> list[Shot]:
    """The shots of a video of `frames` frames: they cover it without gap or overlap; none without frames."""
    if frames == 0:
        return []
    openings = [Boundary(0, 0, 0, 1.0, "start"), *found]
    ends = [boundary.frame - 1 for boundary in found] + [frames - 1]
    return [Shot(opening.frame, end, opening) for opening, end in zip(openings, ends, strict=True)]


def _transitions(single: Floats, many: Floats, rules: Rules) -> Iterator[range]:
    for run in _runs((single > rules.threshold) | (many > rules.many_threshold)):
        needed = rules.weak_threshold if _is_gradual(many, run, rules) else rules.threshold
        if single[run.start : run.stop].max() > needed:
            yield run


def _is_gradual(many: Floats, run: range, rules: Rules) -> bool:
    return int(np.count_nonzero(many[run.start : run.stop] > rules.many_threshold)) >= rules.gradual_frames


def _runs(mask: npt.NDArray[np.bool_]) -> list[range]:
    """Maximal runs of True."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], mask, [False])).astype(np.int8)))
    return [range(int(start), int(stop)) for start, stop in zip(edges[::2], edges[1::2], strict=True)]


def _transition(single: Floats, many: Floats, run: range, change: Floats | None, rules: Rules) -> Boundary:
    peak = run.start + int(np.argmax(single[run.start : run.stop]))
    confidence = float(single[peak])
    if not _is_gradual(many, run, rules):
        frame = _largest_change(peak + 1, change)
        return Boundary(frame, frame, frame, confidence, "cut")
    first, last = _extent(many, run, rules.extent_threshold)
    return Boundary(peak + 1, first, last, confidence, "gradual")


def _largest_change(frame: int, change: Floats | None) -> int:
    if change is None or frame >= len(change):
        return frame
    start = max(1, frame - CUT_SLACK)
    best = start + int(np.argmax(change[start : frame + CUT_SLACK + 1]))
    return best if change[best] > CUT_DOMINANCE * change[frame] else frame


def _extent(many: Floats, run: range, threshold: float) -> tuple[int, int]:
    """The run with the slopes at its sides, as far as `many` stays above the lower threshold."""
    first, last = run.start, run.stop - 1
    while first > 0 and many[first - 1] > threshold:
        first -= 1
    while last + 1 < len(many) and many[last + 1] > threshold:
        last += 1
    return first, last


def _through_black(found: Sequence[Boundary], luma: Floats, rules: Rules) -> list[Boundary]:
    """`found` with each fade out to black and the fade in after it made one, falling where it is darkest."""
    joined: list[Boundary] = []
    for boundary in found:
        if joined and _is_black_between(joined[-1], boundary, luma, rules):
            out = joined.pop()
            boundary = replace(
                out, last=max(out.last, boundary.last), confidence=max(out.confidence, boundary.confidence)
            )
        joined.append(boundary)
    return [_at_darkest(boundary, luma, rules) for boundary in joined]


def _is_black_between(out: Boundary, back: Boundary, luma: Floats, rules: Rules) -> bool:
    if out.kind != "gradual" or back.kind != "gradual" or back.first - out.last > rules.dark_frames:
        return False
    first, last = sorted((out.last, back.first))
    return bool(luma[first : last + 1].max() <= rules.dark_luma < min(luma[out.first], luma[back.last]))


def _at_darkest(boundary: Boundary, luma: Floats, rules: Rules) -> Boundary:
    """A gradual transition from light through black to light, moved to the middle of the black."""
    if boundary.kind != "gradual":
        return boundary
    within = luma[boundary.first : boundary.last + 1]
    darkest = within.min()
    if not darkest <= rules.dark_luma < min(within[0], within[-1]):
        return boundary
    black = np.flatnonzero(within <= darkest + DARKNESS_TIE)
    return replace(boundary, frame=boundary.first + int(black[len(black) // 2]))


def _increasing(found: Sequence[Boundary], frames: int) -> Iterator[Boundary]:
    """Boundaries inside the video, the first of any that fall on the same frame or before an earlier one."""
    previous = 0
    for boundary in found:
        if previous < boundary.frame < frames:
            previous = boundary.frame
            yield boundary
