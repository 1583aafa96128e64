"""embeddings: pictures, shots and texts as vectors of one space, for search and for near-duplicates."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

from media_assets import schemas
from media_assets.engine.contract import Inputs, Prepared, Product, Stage, Unit
from media_assets.stages.support.tracks import read_still
from resources.errors import Failure
from resources.models.openclip import OpenClip, normalised
from resources.models.registry import ModelSpec
from resources.models.towers import Vectors

JOINT, VISUAL = "joint", "visual"
TEXT_COST = 0.1
"""A text's share of a picture's time in the model, as measured on a CPU."""
READ_THREADS = 2
"""Threads that read the stills of a micro-batch."""

Row: TypeAlias = dict[str, Any]
Vector: TypeAlias = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Still:
    """A still as `frames` keeps it: encoded, so that the units of a long video stay small."""

    image: bytes


@dataclass(frozen=True, slots=True)
class Embedded:
    """Unit-length float32 vectors of one unit; texts have no `visual` one."""

    joint: Vector
    visual: Vector | None = None


@dataclass(frozen=True, slots=True)
class Showing:
    """A stretch of stills that show the same picture: that of still `picture`, first seen on still `frame`."""

    frame: int
    picture: int
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class Text:
    """A transcript segment or a line of on-screen text; equal texts share `unit_id`."""

    unit: str
    ordinal: int
    start_s: float
    end_s: float
    unit_id: str


@dataclass(frozen=True, slots=True)
class _Item:
    """What assembly needs: the kind, the picture of every still, the stretches, shots and texts."""

    kind: str
    pictures: Mapping[int, int]
    showings: Sequence[Showing]
    shots: Sequence[Row]
    texts: Sequence[Text]


class Embeddings(Stage[Still | str, Embedded]):
    """open_clip vectors of pictures and texts of many items, mixed in one micro-batch.

    Rows in space `joint`, where texts and pictures meet: the image; each stretch of a video that shows one
    picture (`frame`: repeated stills cost no inference, and the row spans the consecutive ones); each shot (the
    mean of its stills' vectors); each transcript segment; each line of on-screen text. Rows in space `visual`,
    where copies of a picture meet: the image, and each shot of a video; not each frame, whose vectors would take
    more room than all else together. Blank texts have no row. An item without pictures and texts has no rows.
    """

    name = "embeddings"
    inputs = ("media", "frames", "shots", "transcript", "ocr_text")
    code_version = "1"
    tasks = ("embedding",)
    micro_batch = 16
    description = "open_clip vectors of frames, shots, images and texts in one space, unit length, with their spans."

    @property
    def spec(self) -> ModelSpec:
        """The champion model."""
        return self.models.spec("embedding")

    def load(self) -> None:
        """Load the open_clip model; the offline checkpoint is built the first time."""
        self._model()

    def samples(self) -> Sequence[Unit[Still | str]]:
        """A grey picture and a text."""
        picture = io.BytesIO()
        Image.new("RGB", (64, 64), "grey").save(picture, "JPEG")
        return (Unit("picture", Still(picture.getvalue())), Unit("text", "a grey picture", TEXT_COST))

    def prepare(self, inputs: Inputs) -> Prepared[Still | str]:
        """One unit per distinct still and per distinct text."""
        stills = inputs.table("frames", columns=["frame", "start_s", "end_s", "repeat_of"]).to_pylist()
        shots = inputs.table("shots", columns=["shot", "start_frame", "end_frame", "start_s", "end_s"]).to_pylist()
        texts, contents = _texts(inputs)
        pictures = _pictures(stills)
        item = _Item(inputs.media()["kind"], pictures, _showings(stills, pictures), shots, texts)
        wanted = set(pictures.values())
        units: list[Unit[Still | str]] = [Unit(unit_id, text, TEXT_COST) for text, unit_id in contents.items()]
        if wanted:
            images = inputs.table("frames", columns=["frame", "image"]).to_pylist()
            units += [Unit(_still_id(row["frame"]), Still(row["image"])) for row in images if row["frame"] in wanted]
        return Prepared(units, item)

    def infer(self, units: Sequence[Unit[Still | str]]) -> Mapping[str, Embedded | Failure]:
        """Vectors of stills and texts, each kind in one go; a still that cannot be read fails alone."""
        return {**self._embed_stills(units), **self._embed_texts(units)}

    def assemble(self, inputs: Inputs, carry: _Item, outputs: Mapping[str, Embedded]) -> Product:
        """The item's rows, by unit, ordinal and space."""
        about = {"media_id": inputs.media_id, "model": self.spec.identity, "version": inputs.version}
        rows = [
            {**about, **row}
            for row in (*_picture_rows(carry, outputs), *_shot_rows(carry, outputs), *_text_rows(carry, outputs))
        ]
        counts = {
            f"{unit}_vectors": sum(row["unit"] == unit and row["space"] == JOINT for row in rows)
            for unit in ("image", "frame", "shot", "transcript", "ocr_text")
        }
        spared: dict[str, int | float | str] = {
            "repeated_stills_spared": len(carry.pictures) - len(set(carry.pictures.values())),
            "repeated_texts_spared": len(carry.texts) - len({text.unit_id for text in carry.texts}),
        }
        return Product(schemas.table(self.schema, rows), facts={**spared, **counts})

    def _embed_stills(self, units: Sequence[Unit[Still | str]]) -> dict[str, Embedded | Failure]:
        stills = {unit.id: unit.payload.image for unit in units if isinstance(unit.payload, Still)}
        with ThreadPoolExecutor(READ_THREADS) as pool:
            read = dict(zip(stills, pool.map(_read, stills.values()), strict=True))
        answers: dict[str, Embedded | Failure] = {key: got for key, got in read.items() if isinstance(got, Failure)}
        pictures = {key: got for key, got in read.items() if not isinstance(got, Failure)}
        if pictures:
            joint, visual = self._model().embed_images(list(pictures.values()))
            for unit_id, one, other in zip(pictures, joint, visual, strict=True):
                answers[unit_id] = Embedded(one, other)
        return answers

    def _embed_texts(self, units: Sequence[Unit[Still | str]]) -> dict[str, Embedded]:
        texts = [(unit.id, unit.payload) for unit in units if isinstance(unit.payload, str)]
        vectors = self._model().encode_texts([text for _, text in texts]) if texts else ()
        return {unit_id: Embedded(vector) for (unit_id, _), vector in zip(texts, vectors, strict=True)}

    def _model(self) -> OpenClip:
        return self.models.loaded(self.spec, lambda: OpenClip(self.spec, self.models.cache))


def _read(image: bytes) -> Image.Image | Failure:
    try:
        return read_still(image)
    except (OSError, ValueError) as error:
        return Failure.of(error)


def _still_id(frame: int) -> str:
    return f"still:{frame}"


def _pictures(stills: Sequence[Row]) -> dict[int, int]:
    """Still -> the still whose picture it shows: itself, or the first in a chain of repeats."""
    origin: dict[int, int] = {}
    for row in sorted(stills, key=lambda row: row["frame"]):
        frame: int = row["frame"]
        origin[frame] = origin.get(row["repeat_of"], frame)
    return origin


def _showings(stills: Sequence[Row], pictures: Mapping[int, int]) -> list[Showing]:
    """Stretches of consecutive stills with the same picture; a picture that returns later has two."""
    found: list[Showing] = []
    for row in sorted(stills, key=lambda row: row["frame"]):
        picture = pictures[row["frame"]]
        if found and found[-1].picture == picture:
            last = found[-1]
            found[-1] = Showing(last.frame, picture, last.start_s, max(last.end_s, row["end_s"]))
        else:
            found.append(Showing(row["frame"], picture, row["start_s"], row["end_s"]))
    return found


def _texts(inputs: Inputs) -> tuple[list[Text], dict[str, str]]:
    """Texts of transcript and on-screen lines, and the unit ID of each distinct one."""
    texts: list[Text] = []
    contents: dict[str, str] = {}
    for unit, column in (("transcript", "segment"), ("ocr_text", "line")):
        for row in inputs.table(unit, columns=[column, "start_s", "end_s", "text"]).to_pylist():
            if words := " ".join(row["text"].split()):
                unit_id = contents.setdefault(words, f"text:{len(contents)}")
                texts.append(Text(unit, row[column], row["start_s"], row["end_s"], unit_id))
    return texts, contents


def _picture_rows(item: _Item, outputs: Mapping[str, Embedded]) -> Iterator[Row]:
    for showing in item.showings:
        vectors = outputs[_still_id(showing.picture)]
        span = (showing.start_s, showing.end_s)
        if item.kind == "image":
            yield from _both_spaces("image", showing.frame, span, vectors)
        else:
            yield _row("frame", showing.frame, span, JOINT, vectors.joint)


def _shot_rows(item: _Item, outputs: Mapping[str, Embedded]) -> Iterator[Row]:
    """A shot's vector is the mean of its stills', each picture counted once; without any, the still before it."""
    frames = sorted(item.pictures)
    for shot in item.shots:
        inside = [frame for frame in frames if shot["start_frame"] <= frame <= shot["end_frame"]]
        before = [frame for frame in frames if frame < shot["start_frame"]]
        chosen = sorted({item.pictures[frame] for frame in inside or before[-1:]})
        if chosen:
            vectors = _mean([outputs[_still_id(frame)] for frame in chosen])
            yield from _both_spaces("shot", shot["shot"], (shot["start_s"], shot["end_s"]), vectors)


def _text_rows(item: _Item, outputs: Mapping[str, Embedded]) -> Iterator[Row]:
    for text in item.texts:
        yield _row(text.unit, text.ordinal, (text.start_s, text.end_s), JOINT, outputs[text.unit_id].joint)


def _both_spaces(unit: str, ordinal: int, span: tuple[float, float], vectors: Embedded) -> Iterator[Row]:
    yield _row(unit, ordinal, span, JOINT, vectors.joint)
    if vectors.visual is not None:
        yield _row(unit, ordinal, span, VISUAL, vectors.visual)


def _row(unit: str, ordinal: int, span: tuple[float, float], space: str, vector: Vector) -> Row:
    return {
        "unit": unit,
        "ordinal": ordinal,
        "start_s": span[0],
        "end_s": span[1],
        "space": space,
        "vector": vector,
    }


def _mean(vectors: Sequence[Embedded]) -> Embedded:
    joint = _mean_direction(np.stack([vector.joint for vector in vectors]))
    visual = [vector.visual for vector in vectors if vector.visual is not None]
    return Embedded(joint, _mean_direction(np.stack(visual)) if visual else None)


def _mean_direction(vectors: Vectors) -> Vector:
    mean: Vector = normalised(vectors.mean(axis=0))
    return mean
