"""Golden sets: a folder of media with a manifest of what is true about them. The format: docs/evals.md."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self
from urllib.parse import unquote, urlparse

from resources.errors import MediaError
from resources.settings import Settings

MANIFEST = "manifest.json"
SAMPLES = Path(__file__).parent.parent / "samples"
TEXT_COLUMNS = ("test_case", "text", "comment")
"""Columns of a truth table that may hold the text, by preference."""
POSITIVE = {"label_gold": "hateful", "is_toxic": "toxic"}
"""Columns of a truth table that say whether a text is harmful, and the value (case-folded) that says yes."""

Item = tuple[str, str, str | None]
"""A registered media item: media ID, URI, SHA-256 where it is known."""


class GoldenSetError(MediaError):
    """The golden set cannot be used."""

    code, http_status = "golden_invalid", 422
    remedy = "docs/evals.md describes the format."


@dataclass(frozen=True, slots=True)
class Range:
    """Frames `first` to `last`, inclusive."""

    first: int
    last: int


@dataclass(frozen=True, slots=True)
class ScreenText:
    """Lines shown in a video; `frames` says when, None for an unknown time."""

    lines: tuple[str, ...]
    frames: Range | None


@dataclass(frozen=True, slots=True)
class Speech:
    """What is said. An empty transcript with `speech` False marks a clip in which nothing is said."""

    transcript: str
    language: str
    speech: bool


@dataclass(frozen=True, slots=True)
class Cuts:
    """Shot boundaries of a video: 0-based frames; a cut is the first frame of the new shot."""

    hard: tuple[int, ...]
    gradual: tuple[Range, ...]
    ambiguous: tuple[Range, ...]


@dataclass(frozen=True, slots=True)
class Print:
    """Text in a picture, in reading order, and what makes it easy or hard."""

    lines: tuple[str, ...]
    languages: tuple[str, ...]
    scene: bool
    partial: bool
    rotated: bool


@dataclass(frozen=True, slots=True)
class Subject:
    """What a picture shows: a class label, or captions, which serve as search queries."""

    label: str
    doubtful: bool
    captions: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Moderation:
    """Findings a moderator expects, in the golden set's own words; none for an innocent picture."""

    expected: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Copies:
    """The duplicate group a file belongs to; None for a file known to have no duplicate in the set."""

    group: str | None


@dataclass(frozen=True, slots=True)
class LabelledText:
    """One row of a truth table: a text, and whether it is harmful."""

    text: str
    harmful: bool


@dataclass(frozen=True, slots=True)
class GoldenItem:
    """One file of a golden set and what is known about it; None where nothing is."""

    file: str
    kind: str
    sha256: str
    speech: Speech | None = None
    cuts: Cuts | None = None
    screen_text: tuple[ScreenText, ...] = ()
    print: Print | None = None
    subject: Subject | None = None
    moderation: Moderation | None = None
    copies: Copies | None = None
    truth_column: str | None = None


@dataclass(frozen=True)
class Golden:
    """A golden set. `digest` (SHA-256, hex) identifies its manifest."""

    name: str
    root: Path
    digest: str
    items: tuple[GoldenItem, ...]

    @classmethod
    def load(cls, folder: Path | str) -> Self:
        """The golden set in `folder`. Raises GoldenSetError."""
        root = Path(folder).absolute()
        try:
            content = (root / MANIFEST).read_bytes()
            document = json.loads(content)
        except OSError as error:
            raise GoldenSetError(f"No golden set in {root}: {MANIFEST} cannot be read ({error.strerror}).") from error
        except ValueError as error:
            raise GoldenSetError(f"{root / MANIFEST} is not JSON: {error}.") from error
        if not isinstance(document, list):
            raise GoldenSetError(f"{root / MANIFEST} is not a list of files.")
        items = tuple(_item(entry, number) for number, entry in enumerate(document))
        return cls(root.name, root, hashlib.sha256(content).hexdigest(), items)

    @property
    def media_folder(self) -> Path:
        """The deepest folder that holds all media: what to give to `media-assets run`."""
        parents = [Path(item.file).parent.parts for item in self.items]
        shared: list[str] = []
        for level in zip(*parents, strict=False):
            if len(set(level)) > 1:
                break
            shared.append(level[0])
        return self.root.joinpath(*shared)

    def labelled_texts(self, item: GoldenItem) -> list[LabelledText]:
        """Rows of a truth table. Raises GoldenSetError."""
        try:
            with (self.root / item.file).open(encoding="utf-8", newline="") as stream:
                rows = list(csv.DictReader(stream))
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise GoldenSetError(f"The truth table {item.file} cannot be read: {type(error).__name__}.") from error
        column = item.truth_column or ""
        text = next((name for name in TEXT_COLUMNS if rows and name in rows[0]), None)
        if not rows or text is None or column not in rows[0]:
            raise GoldenSetError(f"The truth table {item.file} needs rows with a text column and {column}.")
        return [LabelledText(row[text] or "", (row[column] or "").casefold() == POSITIVE[column]) for row in rows]

    def match(self, library: Iterable[Item]) -> dict[str, str]:
        """Media ID of each golden file that is registered: by its path, else by its content.

        Copies of one file are matched to different media items as long as there are enough of them.
        """
        items = list(library)
        by_path = {path: media_id for media_id, uri, _ in items if (path := local_path(uri)) is not None}
        found = {
            item.file: media_id
            for item in self.items
            if (media_id := by_path.get((self.root / item.file).resolve())) is not None
        }
        by_content: dict[str, list[str]] = {}
        for media_id, _, sha256 in items:
            if sha256:
                by_content.setdefault(sha256, []).append(media_id)
        taken = set(found.values())
        for item in self.items:
            if item.file not in found and (candidates := by_content.get(self._sha256(item))):
                chosen = next((media_id for media_id in candidates if media_id not in taken), candidates[0])
                found[item.file] = chosen
                taken.add(chosen)
        return found

    def _sha256(self, item: GoldenItem) -> str:
        if item.sha256:
            return item.sha256
        try:
            with (self.root / item.file).open("rb") as stream:
                return hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError:
            return ""


def golden_of(settings: Settings) -> Golden:
    """The golden set of the settings (`golden`, MEDIA_GOLDEN), else the shipped samples. Raises GoldenSetError."""
    return Golden.load(settings.golden or SAMPLES)


def local_path(uri: str) -> Path | None:
    """The file behind a path or file URL, with links resolved; None for a remote URL."""
    parsed = urlparse(uri)
    if parsed.scheme == "file":
        return Path(unquote(parsed.path)).resolve()
    return None if "://" in uri else Path(uri).resolve()


def _item(entry: Any, number: int) -> GoldenItem:
    if not isinstance(entry, Mapping) or not isinstance(entry.get("file"), str):
        raise GoldenSetError(f"Entry {number} of the manifest names no file.")
    truth = entry.get("ground_truth") or {}
    try:
        return GoldenItem(
            file=entry["file"],
            kind=str(entry.get("kind", "")),
            sha256=str(entry.get("sha256", "")),
            speech=_speech(truth),
            cuts=_cuts(truth) if "hard_cuts" in truth else None,
            screen_text=tuple(_screen_texts(truth.get("on_screen_text", ()))),
            print=_print(truth) if "text_lines" in truth and entry.get("kind") != "text" else None,
            subject=_subject(truth),
            moderation=_moderation(truth),
            copies=Copies(truth["group"]) if "group" in truth else None,
            truth_column=_truth_column(truth),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise GoldenSetError(f"The ground truth of {entry['file']} is not understood: {error!r}.") from error


def _speech(truth: Mapping[str, Any]) -> Speech | None:
    """`transcript` of a recording, or `speech` of a video: an object with transcript or segments, or False."""
    said = truth.get("speech")
    if isinstance(said, Mapping):
        segments = " ".join(segment["text"] for segment in said.get("segments", ()))
        return Speech(said.get("transcript") or segments, said.get("language", ""), True)
    if said is False:
        return Speech("", "", False)
    if "transcript" in truth:
        return Speech(truth["transcript"], truth.get("language", ""), bool(truth["transcript"]))
    return None


def _cuts(truth: Mapping[str, Any]) -> Cuts:
    gradual = tuple(_range(transition) for transition in truth.get("gradual", ()))
    return Cuts(tuple(truth["hard_cuts"]), gradual, tuple(_range(entry) for entry in truth.get("ambiguous", ())))


def _range(entry: Any) -> Range:
    """[first, last], one frame, {"around": [first, last]}, or an object of frame lists such as `black_at`."""
    if isinstance(entry, int):
        return Range(entry, entry)
    if isinstance(entry, Mapping):
        if "around" in entry:
            return _range(entry["around"])
        frames = [frame for value in entry.values() if isinstance(value, Sequence | int) for frame in _frames(value)]
        return Range(min(frames), max(frames))
    first, last = entry
    return Range(int(first), int(last))


def _frames(value: object) -> list[int]:
    if isinstance(value, int):
        return [value]
    return [frame for frame in value if isinstance(frame, int)] if isinstance(value, list | tuple) else []


def _screen_texts(entries: Sequence[Any]) -> Iterable[ScreenText]:
    """Texts of a list of strings and of {text, frames} objects; a list of single letters is a remark, not a text."""
    if entries and all(isinstance(entry, str) and len(entry) <= 1 for entry in entries):
        return
    for entry in entries:
        if isinstance(entry, str):
            yield ScreenText((entry,), None)
        else:
            text = entry["text"]
            frames = _range(entry["frames"]) if "frames" in entry else None
            yield ScreenText((text,) if isinstance(text, str) else tuple(text), frames)


def _print(truth: Mapping[str, Any]) -> Print:
    return Print(
        lines=tuple(line for line in truth["text_lines"] if line),
        languages=tuple(truth.get("languages", ())),
        scene=bool(truth.get("scene_word")),
        partial=bool(truth.get("partial")),
        rotated="rotation" in truth,
    )


def _subject(truth: Mapping[str, Any]) -> Subject | None:
    captions = [truth["caption"]] if "caption" in truth else list(truth.get("captions", ()))
    if "label" not in truth and not captions:
        return None
    return Subject(truth.get("label", ""), "label_doubt" in truth, tuple(captions))


def _moderation(truth: Mapping[str, Any]) -> Moderation | None:
    expected = truth.get("expected")
    if not isinstance(expected, list):
        return None
    flags = [name for name in ("sexual", "gore") if truth.get(name)]
    return Moderation((*expected, *flags))


def _truth_column(truth: Mapping[str, Any]) -> str | None:
    column = truth.get("column")
    if column is not None and column not in POSITIVE:
        raise ValueError(f"column {column}; known are {', '.join(POSITIVE)}")
    return column
