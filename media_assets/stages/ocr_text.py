"""Asset `ocr_text`: the text on stills and images, in reading order, each line once with its time span."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image

from media_assets import schemas
from media_assets.engine.contract import Inputs, Prepared, Product, Stage, Unit
from media_assets.stages.support.previews.ocr_overlay import ocr_overlay
from media_assets.stages.support.routing import Routed
from media_assets.stages.support.text_layout import (
    TextLine,
    TextSpan,
    bounds,
    clockwise,
    merge_over_time,
    reading_order,
    turned,
)
from media_assets.stages.support.tracks import read_still
from resources.errors import NotApplicable
from resources.models.registry import ModelRegistry, ModelSpec
from resources.settings import Settings

Picture = npt.NDArray[np.uint8]
Quad = npt.NDArray[np.float32]

WHOLE_MAX_PIXELS = 150_000
"""An image up to this size without a detected line may be one cropped word, and is read as a whole."""
TINY_SIDE = 48
"""An image lower than this, pixels, is enlarged and framed first: the detector misses words this small."""
ENLARGED_SIDE = 96
"""Height to which a tiny image is enlarged, pixels."""
FRAME = 24
"""Border put around a tiny image, repeating its edge, pixels."""
ROI_MARGIN = 0.06
"""Margin kept around the coarse regions when they are looked at in detail, as a fraction of the longest side."""
CLEAR_SIDE = 22.0
"""Height of a line at the gate, pixels, from which a second look adds nothing."""
LEAST_SIDE = 3.0
"""Regions narrower or lower than this, pixels, hold no letter."""
CELL = 8
"""Side of the cells in which a region is compared with its earlier self: half a letter."""
CELL_ROWS = 2
"""Height of a compared region, in cells."""
SAME_CONTRAST = 0.2
"""Largest change of a cell, as a fraction of the region's contrast, that leaves its text the same."""
LEAST_CONTRAST = 24.0
"""Contrast (0-255) below which changes are compression noise."""
SAME_PLACE = 0.6
"""Intersection over union that makes two regions of consecutive stills the same place."""
PROBES = 6
"""Longest lines that decide which way up a picture is read."""
SHORT = 2
"""Letters up to which a line is short: edges and wheels look like single letters."""
GOOD = 0.5
"""Mean confidence of the probes that needs no second try upside down, unless the reader has its own measure."""
BETTER = 0.1
"""How much more confident another way up must be."""
TALL = 1.5
"""Height over width that makes a region look like a line on its side."""


class Detector(Protocol):
    """Finds text lines, thread-safe; see resources.models.rapidocr_detector."""

    def detect(self, picture: Picture, side: int) -> Sequence[Any]:
        """Regions with `quad` (pixels) and `score`."""


class Reader(Protocol):
    """Reads text lines, one thread at a time; see resources.models.easyocr_reader."""

    def read(self, regions: Sequence[tuple[Picture, Quad]]) -> Sequence[Any]:
        """One answer with `text` and `confidence` per region, a picture and a quad on it, in order."""


@dataclass(frozen=True, slots=True)
class Page:
    """A still and the regions on it that have to be read: encoded picture, float32 [4, 2] quads in pixels."""

    image: pa.Buffer
    quads: tuple[Quad, ...]


class Line(NamedTuple):
    """What one region says, how sure the reader is (0-1), and the reader's name in models.toml."""

    text: str
    confidence: float
    reader: str


@dataclass(frozen=True, slots=True)
class PageText:
    """What a page says: a line per region, and the quarter turns after which it was upright."""

    turn: int
    lines: tuple[Line, ...]


@dataclass(frozen=True, slots=True)
class Sighting:
    """A region on a still, and where its text is read: region `index` of page `unit`."""

    quad: Quad
    unit: str
    index: int
    whole: bool = False


@dataclass(frozen=True, slots=True)
class StillText:
    """The regions of one still; `width` and `height` in pixels."""

    frame: int
    start_s: float
    end_s: float
    width: int
    height: int
    sightings: tuple[Sighting, ...]


@dataclass(frozen=True, slots=True)
class Survey:
    """What `prepare` found out about an item: its stills in time order, and why stills were not sent."""

    stills: tuple[StillText, ...]
    spared: Counter[str]


@dataclass(frozen=True, slots=True)
class _Seen:
    """The still looked at last: grey pixels, regions at gate resolution, regions in detail."""

    grey: Picture | None = None
    coarse: tuple[Quad, ...] = ()
    sightings: tuple[Sighting, ...] = ()


_Answer = tuple[str, float]
"""What a reader says of a region, and how sure it is (0-1)."""
_Place = tuple[str, int]
"""A page and one of its regions."""
_View = tuple[str, int, int]
"""A page, the quarter turns after which it is looked at, and one of its regions."""


@dataclass(frozen=True, slots=True)
class _Sheet:
    """A page's pixels, and the regions on it."""

    picture: Picture
    quads: tuple[Quad, ...]

    def longest(self, count: int) -> list[int]:
        """Up to `count` regions, the longest first."""
        return sorted(range(len(self.quads)), key=lambda i: -_length(self.quads[i]))[:count]

    def turned(self, turn: int) -> Picture:
        """The pixels after `turn` quarter turns."""
        return np.ascontiguousarray(np.rot90(self.picture, turn))

    def quad(self, index: int, turn: int) -> Quad:
        """Where a region lies on the turned page."""
        height, width = self.picture.shape[:2]
        return turned(self.quads[index], turn, width, height)


class OcrText(Stage[Page, PageText]):
    """Text on the picture: detected by a cheap network, read only where it is new.

    Three gates keep stills from the reader: a repeat of an earlier still, a still without text regions, and
    a still whose regions show what they showed before. Detection runs in `prepare`: it decides what the
    units are, it is thread-safe, and its answers do not depend on batching. `infer` reads the remaining
    regions, tries other ways up where the reading is poor, and `assemble` orders and merges lines.
    """

    name: ClassVar[str] = "ocr_text"
    inputs: ClassVar[tuple[str, ...]] = ("media", "frames")
    code_version: ClassVar[str] = "4"
    tasks: ClassVar[tuple[str, ...]] = ("ocr", "ocr_detector")
    routed: ClassVar[tuple[str, ...]] = ("ocr",)
    micro_batch: ClassVar[int] = 8
    description: ClassVar[str] = "Text on stills and images: line, polygon, confidence and time span."

    def __init__(self, settings: Settings, models: ModelRegistry) -> None:
        super().__init__(settings, models)
        self._readers: Routed[Reader] = Routed(models, "ocr", self._adapted)

    def load(self) -> None:
        """Load the detector and the first reader. Raises ModelUnavailable."""
        self._detector()
        self._readers.load()

    def prepare(self, inputs: Inputs) -> Prepared[Page]:
        """Pages with text that was not seen before. Raises NotApplicable for audio and text."""
        kind = inputs.media()["kind"]
        if kind not in ("video", "image"):
            raise NotApplicable(f"{kind} has no picture to read text on")
        surveyor = _Surveyor(self._detector(), self.models.spec("ocr_detector").parameters, kind == "image")
        units = [Unit(unit, page, cost=len(page.quads)) for unit, page in surveyor.walk(inputs.table("frames"))]
        return Prepared(units, surveyor.survey())

    def infer(self, units: Sequence[Unit[Page]]) -> Mapping[str, PageText]:
        """Read every region of every page."""
        return read_pages(self._readers, {unit.id: unit.payload for unit in units})

    def assemble(self, inputs: Inputs, carry: Survey, outputs: Mapping[str, PageText]) -> Product:
        """One row per line and unbroken stretch of showing."""
        lines = [self._lines(still, outputs) for still in carry.stills]
        spans = merge_over_time(lines)
        rows = [_row(inputs, index, span) for index, span in enumerate(spans)]
        facts: dict[str, int | float | str] = {
            "stills": len(carry.stills),
            "stills_read": len(outputs),
            **{f"stills_spared_{gate}": carry.spared[gate] for gate in ("repeat", "no_text", "unchanged")},
            "lines": len(rows),
        }
        return Product(
            schemas.table(self.schema, rows),
            facts=facts,
            previews=_previews(inputs, lines),
            models=self._answered(outputs),
        )

    def _answered(self, outputs: Mapping[str, PageText]) -> tuple[str, ...]:
        """Identities of the detector and of the readers whose reading of a region stands."""
        readers = {line.reader for page in outputs.values() for line in page.lines}
        specs = (*(spec for spec in self.models.asked("ocr") if spec.name in readers), self.models.spec("ocr_detector"))
        return tuple(spec.identity for spec in specs)

    def _detector(self) -> Detector:
        spec = self.models.spec("ocr_detector")
        return self.models.loaded(spec, lambda: self._adapted(spec))  # type: ignore[no-any-return]

    def _adapted(self, spec: ModelSpec) -> Any:
        return import_module(f"resources.models.{spec.adapter}").load(spec, self.models.cache)

    def _lines(self, still: StillText, outputs: Mapping[str, PageText]) -> list[TextLine]:
        """The credible lines of a still, in reading order."""
        readers = {spec.name: spec for spec in self.models.asked("ocr")}
        kept: list[tuple[Sighting, Line]] = []
        for sighting in still.sightings:
            line = outputs[sighting.unit].lines[sighting.index]
            if line.confidence >= _least_confidence(line.text, sighting.whole, readers[line.reader].parameters):
                kept.append((sighting, line))
        boxes = [bounds(turned(s.quad, outputs[s.unit].turn, still.width, still.height)) for s, _ in kept]
        size = np.array([still.width, still.height], np.float32)
        return [
            TextLine(
                " ".join(line.text.split()),
                line.confidence,
                clockwise(sighting.quad) / size,
                still.frame,
                still.start_s,
                still.end_s,
                readers[line.reader].identity,
            )
            for sighting, line in (kept[i] for i in reading_order(boxes))
        ]


def _least_confidence(text: str, whole: bool, parameters: Mapping[str, Any]) -> float:
    """Confidence below which a line is more likely texture than text; above 1 where no letter was read."""
    letters = _letters(text)
    if letters == 0:
        return 2.0
    name = "min_confidence_short" if letters <= SHORT else "min_confidence_whole" if whole else "min_confidence"
    return float(parameters[name])


def _letters(text: str) -> int:
    return sum(c.isalnum() for c in text)


class _Surveyor:
    """Walks through an item's stills in time order and decides which regions must be read."""

    def __init__(self, detector: Detector, parameters: Mapping[str, Any], is_image: bool) -> None:
        self._detector = detector
        self._gate_side = int(parameters["gate_side"])
        self._detail_side = int(parameters["detail_side"])
        self._is_image = is_image
        self._stills: list[StillText] = []
        self._by_frame: dict[int, tuple[Sighting, ...]] = {}
        self._spared: Counter[str] = Counter()

    def walk(self, frames: pa.Table) -> Iterator[tuple[str, Page]]:
        """Pages to read, by unit ID."""
        earlier = _Seen()
        for index in np.argsort(frames["start_s"].to_numpy(), kind="stable"):
            row = {name: frames[name][int(index)] for name in frames.schema.names}
            frame, repeat_of = row["frame"].as_py(), row["repeat_of"].as_py()
            if repeat_of is not None and repeat_of in self._by_frame:
                self._spared["repeat"] += 1
                self._add(row, self._by_frame[repeat_of])
                continue
            image = row["image"].as_buffer()
            picture = np.asarray(read_still({"image": image}))
            if self._is_image and picture.shape[0] < TINY_SIDE:
                yield self._tiny(row, picture)
                continue
            earlier, fresh = self._look(picture, earlier, _unit(frame))
            self._add(row, earlier.sightings)
            if fresh:
                yield _unit(frame), Page(image, fresh)

    def survey(self) -> Survey:
        """All stills seen by `walk`."""
        return Survey(tuple(self._stills), self._spared)

    def _look(self, picture: Picture, earlier: _Seen, unit: str) -> tuple[_Seen, tuple[Quad, ...]]:
        """What is on a still, and the regions that have to be read."""
        grey = np.asarray(picture.mean(axis=2), np.uint8)
        coarse = _quads(self._detector.detect(picture, self._gate_side))
        before = [_unchanged(quad, grey, earlier.grey, earlier.coarse) for quad in coarse]
        if coarse and len(coarse) == len(earlier.coarse) and None not in before:
            self._spared["unchanged"] += 1
            return _Seen(grey, coarse, earlier.sightings), ()
        quads, whole = self._regions(picture, coarse)
        if not quads:
            self._spared["no_text"] += 1
            return _Seen(grey), ()
        sightings: list[Sighting] = []
        fresh: list[Quad] = []
        for quad in quads:
            known = _unchanged(quad, grey, earlier.grey, [sighting.quad for sighting in earlier.sightings])
            if known is None:
                sightings.append(Sighting(quad, unit, len(fresh), whole))
                fresh.append(quad)
            else:
                sightings.append(replace(earlier.sightings[known], quad=quad))
        if not fresh:
            self._spared["unchanged"] += 1
        return _Seen(grey, coarse, tuple(sightings)), tuple(fresh)

    def _regions(self, picture: Picture, coarse: tuple[Quad, ...]) -> tuple[tuple[Quad, ...], bool]:
        """Text regions at full detail, and whether the only one is the whole picture."""
        height, width = picture.shape[:2]
        quads = coarse
        if coarse and max(height, width) > self._gate_side:
            quads = self._detailed(picture, coarse) or coarse
        if not quads and self._is_image and height * width <= WHOLE_MAX_PIXELS:
            return (_everything(width, height),), True
        return quads, False

    def _detailed(self, picture: Picture, coarse: tuple[Quad, ...]) -> tuple[Quad, ...]:
        """Regions at full detail: detection costs by the pixel, so only where a line was too small to see well."""
        height, width = picture.shape[:2]
        side = max(height, width)
        scale = min(1.0, self._detail_side / side)
        seen = self._gate_side / side
        clear = tuple(quad for quad in coarse if _lowest_side(quad) * seen >= CLEAR_SIDE)
        found: list[Quad] = []
        for left, top, right, bottom in _areas(coarse, clear, ROI_MARGIN * side, width, height):
            crop = picture[top:bottom, left:right]
            regions = self._detector.detect(crop, max(1, round(max(crop.shape[:2]) * scale)))
            found += [quad + np.array([left, top], np.float32) for quad in _quads(regions)]
        # An area may reach into a line that was clear already.
        return (*clear, *(quad for quad in found if all(_overlap(quad, known) < SAME_PLACE for known in clear)))

    def _tiny(self, row: Mapping[str, Any], picture: Picture) -> tuple[str, Page]:
        """The page of a tiny image: read enlarged and framed, its regions kept in the image's own pixels."""
        height, width = picture.shape[:2]
        large, scale = _enlarged(picture)
        quads = _quads(self._detector.detect(large, self._gate_side))
        whole = not quads
        quads = quads or (_everything(large.shape[1], large.shape[0]),)
        limit = np.array([width, height], np.float32)
        unit = _unit(row["frame"].as_py())
        sightings = (
            Sighting(np.clip((quad - FRAME) / scale, 0, limit), unit, index, whole) for index, quad in enumerate(quads)
        )
        self._add(row, tuple(sightings))
        return unit, Page(_encoded(large), quads)

    def _add(self, row: Mapping[str, Any], sightings: tuple[Sighting, ...]) -> None:
        frame, start_s, end_s, width, height = (
            row[name].as_py() for name in ("frame", "start_s", "end_s", "width", "height")
        )
        self._by_frame[frame] = sightings
        self._stills.append(StillText(frame, start_s, end_s, width, height, sightings))


def _areas(
    coarse: tuple[Quad, ...], clear: tuple[Quad, ...], margin: float, width: int, height: int
) -> list[tuple[int, int, int, int]]:
    """Boxes (left, top, right, bottom) with a margin around the regions that are not clear; none overlap."""
    boxes: list[tuple[int, int, int, int]] = []
    for quad in coarse:
        if any(quad is known for known in clear):
            continue
        left, top, right, bottom = bounds(quad)
        box = (
            int(max(left - margin, 0)),
            int(max(top - margin, 0)),
            int(min(right + margin, width)),
            int(min(bottom + margin, height)),
        )
        while touching := [other for other in boxes if _touch(box, other)]:
            boxes = [other for other in boxes if other not in touching]
            lefts, tops, rights, bottoms = zip(box, *touching, strict=True)
            box = (min(lefts), min(tops), max(rights), max(bottoms))
        boxes.append(box)
    return boxes


def _touch(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _lowest_side(quad: Quad) -> float:
    sides = np.linalg.norm(quad - np.roll(quad, -1, axis=0), axis=1)
    return float(min((sides[0] + sides[2]) / 2, (sides[1] + sides[3]) / 2))


def _unit(frame: int) -> str:
    return f"still-{frame}"


def _everything(width: int, height: int) -> Quad:
    return np.array([[0, 0], [width, 0], [width, height], [0, height]], np.float32)


def _enlarged(picture: Picture) -> tuple[Picture, float]:
    """A tiny picture at `ENLARGED_SIDE` pixels height inside a border of `FRAME` pixels, and the scale."""
    import cv2

    scale = ENLARGED_SIDE / picture.shape[0]
    large = cv2.resize(picture, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)
    framed = cv2.copyMakeBorder(large, FRAME, FRAME, FRAME, FRAME, cv2.BORDER_REPLICATE)
    return np.asarray(framed, np.uint8), scale


def _encoded(picture: Picture) -> pa.Buffer:
    sink = io.BytesIO()
    Image.fromarray(picture).save(sink, "PNG")
    return pa.py_buffer(sink.getvalue())


def _quads(found: Sequence[Any]) -> tuple[Quad, ...]:
    return tuple(quad for quad in (clockwise(region.quad) for region in found) if _is_legible(quad))


def _is_legible(quad: Quad) -> bool:
    sides = np.linalg.norm(quad - np.roll(quad, -1, axis=0), axis=1)
    return bool(min(sides[0], sides[2]) >= LEAST_SIDE and min(sides[1], sides[3]) >= LEAST_SIDE)


def _unchanged(quad: Quad, grey: Picture, earlier: Picture | None, known: Sequence[Quad]) -> int | None:
    """Index of the region on the still before that shows the same pixels at the same place, or None."""
    if earlier is None or earlier.shape != grey.shape:
        return None
    near = max(range(len(known)), key=lambda index: _overlap(known[index], quad), default=None)
    if near is None or _overlap(known[near], quad) < SAME_PLACE:
        return None
    return near if _same_pixels(earlier, grey, np.concatenate([known[near], quad])) else None


def _overlap(a: Quad, b: Quad) -> float:
    """Intersection over union of the upright boxes around two quads."""
    (al, at, ar, ab), (bl, bt, br, bb) = bounds(a), bounds(b)
    shared = max(0.0, min(ar, br) - max(al, bl)) * max(0.0, min(ab, bb) - max(at, bt))
    return shared / max((ar - al) * (ab - at) + (br - bl) * (bb - bt) - shared, 1e-9)


def _same_pixels(a: Picture, b: Picture, points: Quad) -> bool:
    """Whether no half letter within the box around `points` differs between two grey pictures."""
    import cv2

    left, top, right, bottom = (round(value) for value in bounds(points))
    height, width = max(1, bottom - top), max(1, right - left)
    rows = CELL * CELL_ROWS
    columns = CELL * max(1, round(width / height * CELL_ROWS))
    small = [
        cv2.resize(p[top : top + height, left : left + width], (columns, rows), interpolation=cv2.INTER_AREA)
        for p in (a, b)
    ]
    low, high = np.percentile(small[0], (5, 95))
    change = np.abs(small[0].astype(np.float32) - small[1].astype(np.float32))
    cells = change.reshape(CELL_ROWS, CELL, columns // CELL, CELL).mean(axis=(1, 3))
    return bool(cells.max() <= SAME_CONTRAST * max(high - low, LEAST_CONTRAST))


def read_pages(readers: Routed[Reader], pages: Mapping[str, Page]) -> dict[str, PageText]:
    """The text of every region of each page, each by the first reader of the route that is sure of it.

    Regions of all pages are given to a reader together; what it says about one does not depend on the others.
    """
    sheets = {unit: _Sheet(np.asarray(read_still({"image": page.image})), page.quads) for unit, page in pages.items()}
    turns = dict.fromkeys(pages, 0)

    def read(spec: ModelSpec, reader: Reader, asked: Mapping[_Place, Quad]) -> dict[_Place, _Answer]:
        # Nobody was sure of any line of these pages, so nobody knows their way up yet.
        counts = Counter(unit for unit, _ in asked)
        new = {unit: sheets[unit] for unit in counts if counts[unit] == len(pages[unit].quads)}
        probes = {unit: sheet.longest(PROBES) for unit, sheet in new.items()}
        ways = _way_up(reader, new, probes, spec.parameters.get("upright_confidence", GOOD))
        turns.update((unit, turn) for unit, (turn, _) in ways.items())
        answers = {(unit, index): answer for unit, (_, found) in ways.items() for index, answer in found.items()}
        rest = [(unit, turns[unit], index) for unit, index in asked if (unit, index) not in answers]
        return answers | {(unit, index): answer for (unit, _, index), answer in _read(reader, sheets, rest).items()}

    places = {(unit, index): quad for unit, page in pages.items() for index, quad in enumerate(page.quads)}
    found = readers.ask(places, read, lambda answer: answer[1], lambda answer: _letters(answer[0]))
    return {
        unit: PageText(
            turns[unit],
            tuple(Line(*found[unit, i].answer, found[unit, i].by.name) for i in range(len(page.quads))),
        )
        for unit, page in pages.items()
    }


def _way_up(
    reader: Reader, sheets: Mapping[str, _Sheet], probes: Mapping[str, Sequence[int]], good: float
) -> dict[str, tuple[int, dict[int, _Answer]]]:
    """For each sheet the quarter turns that give the most confident reading, and what its probes say then.

    The probes are read as they stand, then upside down if that is poor; on both sides if most regions are taller
    than wide.
    """
    best = {
        unit: (0, answers) for (unit, _), answers in _probe(reader, sheets, probes, dict.fromkeys(sheets, (0,))).items()
    }
    others = {
        unit: (1, 3) if _lies_on_its_side(sheets[unit].quads) else (2,)
        for unit, (_, answers) in best.items()
        if _score(answers) < good
    }
    for (unit, turn), answers in _probe(reader, sheets, probes, others).items():
        if _score(answers) > _score(best[unit][1]) + BETTER:
            best[unit] = turn, answers
    return best


def _probe(
    reader: Reader,
    sheets: Mapping[str, _Sheet],
    probes: Mapping[str, Sequence[int]],
    turns: Mapping[str, Sequence[int]],
) -> dict[tuple[str, int], dict[int, _Answer]]:
    """What the probes of the sheets in `turns` say after each of these quarter turns, by sheet and turn."""
    views = [(unit, turn, index) for unit, tried in turns.items() for turn in tried for index in probes[unit]]
    found: dict[tuple[str, int], dict[int, _Answer]] = {(unit, turn): {} for unit, turn, _ in views}
    for (unit, turn, index), answer in _read(reader, sheets, views).items():
        found[unit, turn][index] = answer
    return found


def _read(reader: Reader, sheets: Mapping[str, _Sheet], views: Sequence[_View]) -> dict[_View, _Answer]:
    """Text and confidence of each view."""
    pictures = {(unit, turn): sheets[unit].turned(turn) for unit, turn in dict.fromkeys(view[:2] for view in views)}
    regions = [(pictures[unit, turn], sheets[unit].quad(index, turn)) for unit, turn, index in views]
    return {view: (said.text, said.confidence) for view, said in zip(views, reader.read(regions), strict=True)}


def _score(answers: Mapping[int, _Answer]) -> float:
    """Mean confidence, weighted by length."""
    length = sum(len(text) for text, _ in answers.values())
    return sum(len(text) * confidence for text, confidence in answers.values()) / max(length, 1)


def _length(quad: Quad) -> float:
    left, top, right, bottom = bounds(quad)
    return max(right - left, bottom - top)


def _lies_on_its_side(quads: Sequence[Quad]) -> bool:
    """Whether regions taller than wide hold most of the text's length."""
    tall = 0.0
    for quad in quads:
        left, top, right, bottom = bounds(quad)
        tall += _length(quad) if bottom - top > TALL * (right - left) else 0.0
    return tall > sum(_length(quad) for quad in quads) / 2


def _row(inputs: Inputs, index: int, span: TextSpan) -> dict[str, object]:
    corners = np.clip(span.best.quad, 0, 1)
    return {
        "media_id": inputs.media_id,
        "line": index,
        "start_s": span.start_s,
        "end_s": span.end_s,
        "text": span.best.text,
        "confidence": min(1.0, span.best.confidence),
        "polygon": [{"x": float(x), "y": float(y)} for x, y in corners],
        "frame": span.best.frame,
        "frames_seen": span.frames_seen,
        "model": span.best.model,
        "version": inputs.version,
    }


def _previews(inputs: Inputs, lines: Sequence[Sequence[TextLine]]) -> dict[str, bytes]:
    """The still with the most text, its lines outlined and numbered."""
    fullest = max(lines, key=lambda found: sum(len(line.text) for line in found), default=())
    if not inputs.wants_preview or not fullest:
        return {}
    frames = inputs.table("frames")
    at = frames["frame"].to_pylist().index(fullest[0].frame)
    still = read_still({"image": frames["image"][at].as_buffer()})
    return {"ocr_overlay": ocr_overlay(still, [(line.text, line.quad) for line in fullest])}
