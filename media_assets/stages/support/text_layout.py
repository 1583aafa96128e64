"""Order and identity of text lines: reading order on a page, and the same line over consecutive stills."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from rapidfuzz.distance import Levenshtein

Quad = npt.NDArray[np.float32]
Box = tuple[float, float, float, float]
"""Left, top, right, bottom; y grows downwards."""

COLUMN_LINES = 3
"""Lines that must stand on each side of a gutter before it counts as one."""
GUTTER_HEIGHTS = 0.8
"""Least width of a gutter, in median line heights."""
SAME_ROW = 0.5
"""Vertical overlap, as a fraction of the lower box's height, that puts two boxes into one row."""
_DIGIT = re.compile(r"\d")
_LOOKALIKES = str.maketrans(
    {
        "o": "0",
        "q": "0",
        "l": "1",
        "i": "1",
        "|": "1",
        "!": "1",
        "s": "5",
        "$": "5",
        "b": "8",
        "@": "0",
        "©": "0",
        "®": "0",
    }
)


@dataclass(frozen=True, slots=True)
class TextLine:
    """A line of text as read on one still.

    `quad` is float32 [4, 2] in fractions of width and height, clockwise from the top left; the span is
    that of the still, seconds. `model` is the identity of the one that read it.
    """

    text: str
    confidence: float
    quad: Quad
    frame: int
    start_s: float
    end_s: float
    model: str = ""


@dataclass(frozen=True, slots=True)
class TextSpan:
    """The same line over consecutive stills: its best reading, its span, and on how many stills it was seen."""

    best: TextLine
    start_s: float
    end_s: float
    frames_seen: int


def clockwise(quad: Quad) -> Quad:
    """The corners of a convex quad [4, 2], clockwise (y down) from the one nearest to the top left."""
    centre = quad.mean(axis=0)
    angles = np.arctan2(quad[:, 1] - centre[1], quad[:, 0] - centre[0])
    ordered = quad[np.argsort(angles, kind="stable")]
    first = int(np.argmin(ordered.sum(axis=1)))
    return np.asarray(np.roll(ordered, -first, axis=0), np.float32)


def turned(quad: Quad, quarter_turns: int, width: float, height: float) -> Quad:
    """`quad`, in a picture of `width` x `height`, after `numpy.rot90(picture, quarter_turns)`."""
    x, y = quad[:, 0], quad[:, 1]
    corners = ((x, y), (y, width - x), (width - x, height - y), (height - y, x))[quarter_turns % 4]
    return clockwise(np.stack(corners, axis=1))


def bounds(quad: Quad) -> Box:
    """The upright box around a quad."""
    (left, top), (right, bottom) = quad.min(axis=0), quad.max(axis=0)
    return float(left), float(top), float(right), float(bottom)


def reading_order(boxes: Sequence[Box]) -> list[int]:
    """Indices of `boxes` in the order a person reads them: top to bottom, left to right, column by column.

    Recursive X-Y cut (Nagy and Seth, 1984): the page is split at its widest empty band. A vertical band
    is a gutter only with `COLUMN_LINES` lines on both sides, so that a short table is read by rows.
    Boxes share one unit in which x and y are comparable, such as pixels.
    """
    return _cut(boxes, sorted(range(len(boxes)), key=lambda i: (boxes[i][1], boxes[i][0], boxes[i][3], boxes[i][2])))


def _cut(boxes: Sequence[Box], members: list[int]) -> list[int]:
    if len(members) < 2:
        return members
    height = float(np.median([boxes[i][3] - boxes[i][1] for i in members]))
    across, x = _widest_gap([(boxes[i][0], boxes[i][2]) for i in members])
    down, y = _widest_gap([(boxes[i][1], boxes[i][3]) for i in members])
    left = [i for i in members if boxes[i][2] <= x]
    is_gutter = across >= GUTTER_HEIGHTS * height and COLUMN_LINES <= len(left) <= len(members) - COLUMN_LINES
    if is_gutter and across >= down:
        right = [i for i in members if boxes[i][2] > x]
        return _cut(boxes, left) + _cut(boxes, right)
    if down > 0:
        upper = [i for i in members if boxes[i][3] <= y]
        lower = [i for i in members if boxes[i][3] > y]
        return _cut(boxes, upper) + _cut(boxes, lower)
    return _rows(boxes, members)


def _widest_gap(intervals: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Width and start of the widest stretch that no interval covers between the first and the last."""
    ordered = sorted(intervals)
    reach = ordered[0][1]
    width, at = 0.0, reach
    for low, high in ordered[1:]:
        if low - reach > width:
            width, at = low - reach, reach
        reach = max(reach, high)
    return width, at


def _rows(boxes: Sequence[Box], members: list[int]) -> list[int]:
    """Members whose rows touch: grouped into rows by vertical overlap, neighbour to neighbour."""
    rows: list[list[int]] = []
    for i in sorted(members, key=lambda i: (boxes[i][1] + boxes[i][3], boxes[i])):
        if rows and any(_share_row(boxes[j], boxes[i]) for j in rows[-1]):
            rows[-1].append(i)
        else:
            rows.append([i])
    return [i for row in rows for i in sorted(row, key=lambda i: (boxes[i][0], boxes[i]))]


def _share_row(a: Box, b: Box) -> bool:
    overlap = min(a[3], b[3]) - max(a[1], b[1])
    return overlap > SAME_ROW * min(a[3] - a[1], b[3] - b[1])


def same_text(a: str, b: str) -> bool:
    """Whether two readings are the same text up to recognition flicker.

    Case, spacing, punctuation and lookalikes (0/O/©, 1/l, 5/S) are ignored, and one wrong character in a
    text of four to nine, two in a longer one, are forgiven. Where a digit was read, all digits must agree:
    a clock or a counter must not freeze.
    """
    folded_a, folded_b = _folded(a), _folded(b)
    shorter = min(len(folded_a), len(folded_b))
    if shorter == 0:
        return a.strip() == b.strip()
    if (_DIGIT.search(a) or _DIGIT.search(b)) and _DIGIT.findall(folded_a) != _DIGIT.findall(folded_b):
        return False
    allowed = 0 if shorter < 4 else 1 if shorter < 10 else 2
    return Levenshtein.distance(folded_a, folded_b, score_cutoff=allowed) <= allowed


def _folded(text: str) -> str:
    plain = unicodedata.normalize("NFKC", text).casefold().translate(_LOOKALIKES)
    return "".join(c for c in plain if c.isalnum())


def merge_over_time(stills: Sequence[Sequence[TextLine]], gap: int = 1) -> list[TextSpan]:
    """The lines of consecutive stills, each distinct text once per unbroken stretch of showing.

    `stills` holds the lines of each still in time order, in reading order. A text may be missing on up to
    `gap` stills (a missed reading) without breaking its stretch. The reading with the highest confidence
    is kept. Returned in order of first appearance, then reading order.
    """
    finished: list[_Track] = []
    open_tracks: list[_Track] = []
    for at, lines in enumerate(stills):
        open_tracks = [track for track in open_tracks if at - track.last_still <= gap + 1]
        free = list(open_tracks)
        for line in lines:
            track = _matching(line, free)
            if track is None:
                track = _Track(line, line.start_s, line.end_s, 1, at)
                finished.append(track)
                open_tracks.append(track)
            else:
                free.remove(track)
                track.add(line, at)
    return [track.span() for track in finished]


@dataclass(slots=True, eq=False)
class _Track:
    best: TextLine
    start_s: float
    end_s: float
    frames_seen: int
    last_still: int

    def add(self, line: TextLine, still: int) -> None:
        self.end_s = max(self.end_s, line.end_s)
        self.frames_seen += 1
        self.last_still = still
        if line.confidence > self.best.confidence:
            self.best = line

    def span(self) -> TextSpan:
        return TextSpan(replace(self.best), self.start_s, self.end_s, self.frames_seen)


def _matching(line: TextLine, tracks: Sequence[_Track]) -> _Track | None:
    """The track of the same text nearest to `line`, so that a word shown twice keeps two tracks."""
    centre = line.quad.mean(axis=0)
    same = [track for track in tracks if same_text(track.best.text, line.text)]
    return min(same, key=lambda t: float(np.abs(t.best.quad.mean(axis=0) - centre).sum()), default=None)
