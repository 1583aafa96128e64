"""`moderation_scores`: what every moderation model says about pictures and text, raw, per label and time span."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image

from media_assets import schemas
from media_assets.engine.contract import Inputs, Prepared, Product, Stage, Unit
from media_assets.moderation.taxonomy import LABELS
from media_assets.stages.support.concepts import PROMPTS_DIGEST, Concepts, Encode, load_concepts
from media_assets.stages.support.screening import Answers, Labels, Screened, Screening
from media_assets.stages.support.screening import strongest as strongest_screening
from resources.errors import Failure, ModelUnavailable, NotApplicable
from resources.models.nudity import ImageScorer, Picture, load_image_scorer
from resources.models.registry import ModelSpec
from resources.models.toxicity import TextScorer, load_text_scorer

IMAGE_TASKS = ("nudity", "nsfw")
TEXT_TASK = "toxicity"
CONCEPT_TASK = "embedding"
MAX_CHARACTERS = 1200
ANY_LANGUAGE = "*"
UNDETERMINED = ("", "und")

Vector = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class StillUnit:
    """A still, encoded (JPEG or PNG)."""

    image: bytes


@dataclass(frozen=True, slots=True)
class TextUnit:
    """A stretch of text no longer than the text model reads well, and its language (ISO 639-1) where it is known."""

    text: str
    language: str = ""


@dataclass(frozen=True, slots=True)
class _Shown:
    """A still to be scored: as it is stored, and as uint8 [height, width, 3] RGB."""

    image: bytes
    picture: Picture


@dataclass(frozen=True, slots=True)
class Subject:
    """What a group of units is about: where it came from, and the spans its scores hold for, seconds.

    `vector` is a still's in the joint space, float32 [d], unit length, if it has one.
    """

    modality: str
    source: str
    spans: tuple[tuple[float, float], ...]
    unit_ids: tuple[str, ...]
    vector: Vector | None = None


class ModerationScores(Stage[StillUnit | TextUnit, Answers]):
    """Scores of pictures (NudeNet, open_nsfw, zero-shot concepts) and of text (speech, on-screen text, documents).

    A still that repeats an earlier one is not scored again: the earlier one's scores hold for its span
    too. Text is scored where the model knows the language; OCR lines carry no language and are always
    scored. Text longer than the model's `max_characters` is scored in pieces and keeps the strongest
    score, for a few words sink in a long text. A NudeNet score of 0 says that nothing was detected above
    its floor of 0.25. Concepts are read off the stills' vectors in `embeddings`, without a model.

    Where a model of models.toml screens a task and was sure, the task's champion is not asked: its labels have
    rows with score null, which say who was sure and how much, and which no policy takes for a 0.
    """

    name = "moderation_scores"
    inputs = ("media", "frames", "transcript", "ocr_text", "embeddings")
    code_version = "2"
    tasks = (*IMAGE_TASKS, TEXT_TASK, CONCEPT_TASK)
    screened = (IMAGE_TASKS, (TEXT_TASK,))
    micro_batch = 16
    description = "Raw moderation scores per model, label and time span, of pictures, speech and text."

    def parameters(self) -> Mapping[str, object]:
        """The concept prompts, as a digest."""
        return {"concepts": PROMPTS_DIGEST[:16]}

    def held(self) -> tuple[ModelSpec, ...]:
        """The classifiers: pictures come with their vectors, so of the embedding model only the prompts' are needed."""
        return tuple(spec for spec in self.specs() if spec.task != CONCEPT_TASK)

    def load(self) -> None:
        """Load the classifiers. Raises ModelUnavailable."""
        for spec in self.held():
            if spec.task == TEXT_TASK:
                self._text_scorer(spec)
            else:
                self._image_scorer(spec)

    def prepare(self, inputs: Inputs) -> Prepared[StillUnit | TextUnit]:
        """A unit per distinct still and per piece of text. Raises NotApplicable where there is neither."""
        subjects: list[Subject] = []
        units: list[Unit[StillUnit | TextUnit]] = []
        for subject, members in (*self._stills(inputs), *self._texts(inputs)):
            subjects.append(subject)
            units.extend(members)
        if not units:
            raise NotApplicable("There is no picture and no text to score.")
        return Prepared(units, subjects)

    def infer(self, units: Sequence[Unit[StillUnit | TextUnit]]) -> Mapping[str, Answers | Failure]:
        """Labels per model; stills go to the image models together, texts to the text models together."""
        stills = {unit.id: unit.payload for unit in units if isinstance(unit.payload, StillUnit)}
        texts = {unit.id: unit.payload for unit in units if isinstance(unit.payload, TextUnit)}
        return {**self._answer_stills(stills), **self.answer_texts(texts)}

    def assemble(self, inputs: Inputs, carry: Any, outputs: Mapping[str, Answers]) -> Product:
        """A row per subject, model, label and span."""
        subjects: list[Subject] = carry
        rows: list[dict[str, object]] = []
        for subject in subjects:
            about = {"media_id": inputs.media_id, "modality": subject.modality, "source": subject.source}
            answers = [outputs[unit_id] for unit_id in subject.unit_ids]
            findings = [*self._findings(answers), *self._concept_findings(subject.vector)]
            rows.extend(
                {**about, **finding, "start_s": start, "end_s": end, "version": inputs.version}
                for finding in findings
                for start, end in subject.spans
            )
        table = schemas.table(schemas.MODERATION_SCORES, rows)
        return Product(table, facts=_facts(inputs, subjects, rows), models=_answered(rows))

    def _findings(self, pieces: Sequence[Answers]) -> Iterator[dict[str, object]]:
        """Model, label, score and screening of each row about one subject, whose units have these answers."""
        found = strongest(piece.labels for piece in pieces)
        for task in pieces[0].screenings:
            spec, screening = self.models.spec(task), strongest_screening([piece.screenings[task] for piece in pieces])
            about = {"model": spec.identity, **_screening_columns(screening)}
            for label in sorted(set(label_map(spec).values())):
                yield {**about, "label": label, "score": found.pop((spec.identity, label), None)}
        for (model, label), score in sorted(found.items()):
            yield {"model": model, "label": label, "score": score}

    def _concept_findings(self, vector: Vector | None) -> Iterator[dict[str, object]]:
        model = self.models.spec(CONCEPT_TASK).identity
        for label, score in sorted(self._concepts().score(vector).items()) if vector is not None else ():
            yield {"model": model, "label": label, "score": score}

    def answer_texts(self, texts: Mapping[str, TextUnit]) -> dict[str, Answers]:
        """Labels per model of each text, by key."""
        screened = Screened[TextUnit](self.models, self._label_texts, lambda text: text.text.encode(), self._reads)
        return screened.ask((TEXT_TASK,), texts)

    def _stills(self, inputs: Inputs) -> Iterator[tuple[Subject, list[Unit[StillUnit | TextUnit]]]]:
        if inputs.media()["kind"] not in ("image", "video"):
            return
        rows = inputs.table("frames", columns=["frame", "start_s", "end_s", "repeat_of", "image"]).to_pylist()
        spans = spans_of_stills(rows)
        vectors = _joint_vectors(inputs.table("embeddings"))
        for row in rows:
            frame = row["frame"]
            if frame not in spans:
                continue
            unit_id = f"still:{frame}"
            subject = Subject("image", str(frame), spans[frame], (unit_id,), vectors.get(frame))
            yield subject, [Unit(unit_id, StillUnit(row["image"]))]

    def _texts(self, inputs: Inputs) -> Iterator[tuple[Subject, list[Unit[StillUnit | TextUnit]]]]:
        spec = self.models.spec(TEXT_TASK)
        known, limit = languages(spec), max_characters(spec)
        spoken = "text" if inputs.media()["kind"] == "text" else "speech"
        for row in inputs.table("transcript").to_pylist():
            if knows_language(known, row["language"]):
                yield from _text_subject(spoken, row["segment"], row, limit)
        for row in inputs.table("ocr_text").to_pylist():
            yield from _text_subject("ocr", row["line"], row, limit)

    def _answer_stills(self, stills: Mapping[str, StillUnit]) -> dict[str, Answers | Failure]:
        shown: dict[str, _Shown] = {}
        broken: dict[str, Failure] = {}
        for unit_id, still in stills.items():
            try:
                shown[unit_id] = _Shown(still.image, _decode(still.image))
            except (OSError, ValueError) as error:
                broken[unit_id] = Failure.of(error)
        screened = Screened[_Shown](self.models, self._label_stills, lambda still: still.image)
        return {**screened.ask(IMAGE_TASKS, shown), **broken}

    def _label_stills(self, spec: ModelSpec, stills: Sequence[_Shown]) -> list[dict[str, float]]:
        labels = label_map(spec)
        found = self._image_scorer(spec).score([still.picture for still in stills])
        return [relabel(classes, labels) for classes in found]

    def _label_texts(self, spec: ModelSpec, texts: Sequence[TextUnit]) -> list[dict[str, float]]:
        """The strongest score of the pieces that the model reads well; units are pieces of the champion."""
        labels = label_map(spec)
        is_champion = spec == self.models.spec(TEXT_TASK)
        limit = max_characters(spec)
        pieces = [[text.text] if is_champion else pieces_of_text(text.text, limit) or [""] for text in texts]
        found = iter(self._text_scorer(spec).score([piece for cut in pieces for piece in cut]))
        scores = [[relabel(next(found), labels) for _ in cut] for cut in pieces]
        return [{label: max(piece[label] for piece in cut) for label in set(labels.values())} for cut in scores]

    def _reads(self, spec: ModelSpec, text: TextUnit) -> bool:
        """Whether `spec` knows the language of a text, or every one the champion knows where the text's is unknown."""
        known = languages(spec)
        wanted = languages(self.models.spec(TEXT_TASK)) if text.language in UNDETERMINED else [text.language]
        return ANY_LANGUAGE in known or set(wanted) <= set(known)

    def _image_scorer(self, spec: ModelSpec) -> ImageScorer:
        return self.models.loaded(spec, lambda: load_image_scorer(spec, self.models.cache))

    def _text_scorer(self, spec: ModelSpec) -> TextScorer:
        return self.models.loaded(spec, lambda: load_text_scorer(spec, self.models.cache))

    def _concepts(self) -> Concepts:
        embedding = self.models.spec(CONCEPT_TASK)
        spec = embedding.model_copy(update={"task": "concepts"})
        return self.models.loaded(spec, lambda: load_concepts(embedding, self.models.cache, self._text_encoder))

    def _text_encoder(self) -> Encode:
        from media_assets.engine.remote import text_encoder

        return text_encoder(self.settings, self.models)


def label_map(spec: ModelSpec) -> Mapping[str, str]:
    """Model class -> taxonomy label, as models.toml maps them. Raises ModelUnavailable on a foreign label."""
    labels: Mapping[str, str] = spec.parameters.get("labels", {})
    if unknown := sorted(set(labels.values()) - LABELS.keys()):
        raise ModelUnavailable(
            f"Model {spec.name} ({spec.task}) maps to unknown labels {', '.join(unknown)}.",
            f"Use labels of the taxonomy: {', '.join(LABELS)}.",
        )
    return labels


def relabel(classes: Mapping[str, float], labels: Mapping[str, str]) -> dict[str, float]:
    """Class scores as label scores, the strongest of its classes each. Raises ModelUnavailable on a class without."""
    if missing := sorted(labels.keys() - classes.keys()):
        raise ModelUnavailable(
            f"The model has no class {', '.join(missing)}; it has {', '.join(sorted(classes))}.",
            "Correct `labels` of its entry in models.toml.",
        )
    scores: dict[str, float] = {}
    for name, label in labels.items():
        scores[label] = max(scores.get(label, 0.0), min(max(classes[name], 0.0), 1.0))
    return scores


def strongest(pieces: Iterable[Mapping[str, Labels]]) -> dict[tuple[str, str], float]:
    """(model, label) -> the strongest score of several units."""
    best: dict[tuple[str, str], float] = {}
    for piece in pieces:
        for model, labels in piece.items():
            for label, score in labels.items():
                best[model, label] = max(best.get((model, label), 0.0), score)
    return best


def _screening_columns(screening: Screening) -> dict[str, object]:
    return {"screening": screening.verdict, "screened_by": screening.by, "screen_score": screening.score}


def _answered(rows: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Identities of the models that scored anything of an item, or looked first."""
    scored = {row["model"] for row in rows if row.get("score") is not None}
    return tuple(sorted(scored | {row["screened_by"] for row in rows if row.get("screened_by")}))


def spans_of_stills(rows: Sequence[Mapping[str, Any]]) -> dict[int, tuple[tuple[float, float], ...]]:
    """Spans in seconds that each distinct still stands for: its own and its repeats', touching ones merged.

    `rows` are of `frames`; a repeat of a repeat belongs to the first.
    """
    origin: dict[int, int] = {}
    grouped: dict[int, list[tuple[float, float]]] = {}
    for row in sorted(rows, key=lambda r: r["frame"]):
        earlier = row["repeat_of"]
        first = origin.get(earlier, row["frame"]) if earlier is not None else row["frame"]
        origin[row["frame"]] = first
        grouped.setdefault(first, []).append((row["start_s"], row["end_s"]))
    return {frame: _merge_touching(spans) for frame, spans in grouped.items()}


def _merge_touching(spans: Sequence[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    merged: list[tuple[float, float]] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return tuple(merged)


def pieces_of_text(text: str, limit: int = MAX_CHARACTERS) -> list[str]:
    """`text` in pieces of at most `limit` characters, broken at white space where there is some; [] if blank."""
    pieces: list[str] = []
    rest = text.strip()
    while len(rest) > limit:
        cut = max(rest.rfind(space, 0, limit + 1) for space in " \n\t")
        cut = cut if cut > 0 else limit
        pieces.append(rest[:cut].rstrip())
        rest = rest[cut:].lstrip()
    return [*pieces, rest] if rest else pieces


def languages(spec: ModelSpec) -> Sequence[str]:
    """Languages that a text model reads (ISO 639-1); ANY_LANGUAGE stands for all."""
    named: Sequence[str] = spec.parameters.get("languages", [ANY_LANGUAGE])
    return named


def max_characters(spec: ModelSpec) -> int:
    """The longest text that a text model reads well, characters."""
    return int(spec.parameters.get("max_characters", MAX_CHARACTERS))


def knows_language(known: Sequence[str], language: str) -> bool:
    """Whether a model for the languages `known` reads `language`; an undetermined one is given the benefit."""
    return ANY_LANGUAGE in known or language in known or language in UNDETERMINED


def _text_subject(
    modality: str, ordinal: int, row: Mapping[str, Any], limit: int
) -> Iterator[tuple[Subject, list[Unit[StillUnit | TextUnit]]]]:
    pieces = pieces_of_text(row["text"], limit)
    units: list[Unit[StillUnit | TextUnit]] = [
        Unit(f"{modality}:{ordinal}:{number}", TextUnit(piece, row.get("language", "")))
        for number, piece in enumerate(pieces)
    ]
    if units:
        span = (row["start_s"], row["end_s"])
        yield Subject(modality, str(ordinal), (span,), tuple(unit.id for unit in units)), units


def _joint_vectors(embeddings: pa.Table) -> dict[int, Vector]:
    columns = embeddings.select(["unit", "ordinal", "space", "vector"]).to_pylist()
    return {
        row["ordinal"]: np.asarray(row["vector"], np.float32)
        for row in columns
        if row["space"] == "joint" and row["unit"] in ("image", "frame")
    }


def _decode(image: bytes) -> Picture:
    with Image.open(io.BytesIO(image)) as picture:
        return np.asarray(picture.convert("RGB"))


def _facts(
    inputs: Inputs, subjects: Sequence[Subject], rows: Sequence[Mapping[str, Any]]
) -> dict[str, int | float | str]:
    stills = sum(subject.modality == "image" for subject in subjects)
    facts: dict[str, int | float | str] = {"stills": stills, "texts": len(subjects) - stills}
    if inputs.media()["kind"] in ("image", "video"):
        facts["stills_spared"] = inputs.table("frames", columns=["frame"]).num_rows - stills
    said = sum(subject.modality in ("speech", "text") for subject in subjects)
    facts["texts_in_other_languages"] = sum(bool(t.strip()) for t in _texts_of(inputs)) - said
    for verdict in ("skipped", "second_look"):
        if found := {(row["modality"], row["source"], row["model"]) for row in rows if row.get("screening") == verdict}:
            facts[f"screening_{verdict}"] = len(found)
    if scored := [row for row in rows if row["score"] is not None]:
        top = max(scored, key=lambda row: row["score"])
        facts["strongest"] = f"{top['label']} {top['score']:.2f}"
    return facts


def _texts_of(inputs: Inputs) -> list[str]:
    texts: list[str] = inputs.table("transcript").column("text").to_pylist()
    return texts
