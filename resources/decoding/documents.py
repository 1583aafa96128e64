"""Text documents and subtitles as paragraphs and cues, Unicode NFC, whatever charset they came in."""

from __future__ import annotations

import csv
import io
import json
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, replace

from resources.decoding.sniff import ALLOWED_CONTROLS, BOMS
from resources.errors import Empty, Undecodable, Unsupported

MAX_SEGMENT_CHARACTERS = 2_000
CHARSET_SAMPLE_BYTES = 256 * 1024
MAX_CELL_CHARACTERS = 1_000_000
_BLANK_LINES = re.compile(r"\n[ \t\f]*\n\s*")
_SRT_TIMES = re.compile(r"\d{1,3}:\d\d:\d\d[,.]\d{1,3}\s*-->\s*\d{1,3}:\d\d:\d\d")
SUBTITLES = {"text/vtt": "vtt", "application/x-subrip": "srt", "text/x-ssa": "ass"}
TABLES = {"text/csv": "", "text/tab-separated-values": "\t"}


@dataclass(frozen=True, slots=True)
class Segment:
    """A paragraph, row or cue; cues have times in seconds, the others None."""

    text: str
    start_s: float | None = None
    end_s: float | None = None


def decode_text(data: bytes) -> str:
    """`data` as NFC text with `\\n` line ends. Raises Unsupported where the bytes are no text, Empty."""
    text = _decoded(data).replace("\r\n", "\n").replace("\r", "\n")
    sample = text[:CHARSET_SAMPLE_BYTES]
    if any(unicodedata.category(c) == "Cc" and c not in ALLOWED_CONTROLS for c in sample):
        raise Unsupported("The file holds binary data in a form that is neither media nor text.")
    text = unicodedata.normalize("NFC", text)
    if not text.strip():
        raise Empty("The document holds no text.")
    if _is_json(text):
        raise Unsupported(
            "The file is JSON data, not a document.", "Leave data files out of the media folder, or export their text."
        )
    return text


def _is_json(text: str) -> bool:
    if text.lstrip()[0] not in "{[":
        return False
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def text_mime(text: str, suffix: str) -> str:
    """Media type of a document: subtitles by content; Markdown and tables, which look like prose, by suffix."""
    head = text[:4096].lstrip("\ufeff \n")
    if head.startswith("WEBVTT"):
        return "text/vtt"
    if head.startswith("[Script Info]"):
        return "text/x-ssa"
    if _SRT_TIMES.search(head):
        return "application/x-subrip"
    named = {".csv": "text/csv", ".tsv": "text/tab-separated-values", ".md": "text/markdown"}
    return named.get(suffix.lower(), "text/plain")


def segments(text: str, mime: str) -> Iterator[Segment]:
    """The document's cues, rows or paragraphs in order, long ones cut at 2,000 characters.

    Raises Undecodable for broken subtitles and tables, Empty where there are none.
    """
    if mime in SUBTITLES:
        whole = _cues(text, SUBTITLES[mime])
    elif mime in TABLES:
        whole = _rows(text, TABLES[mime])
    else:
        whole = (Segment(paragraph.strip()) for paragraph in _BLANK_LINES.split(text))
    for segment in whole:
        for piece in _pieces(segment.text):
            yield replace(segment, text=piece)


def _decoded(data: bytes) -> str:
    for bom, charset in zip(BOMS, ("utf-8-sig", "utf-32", "utf-32", "utf-16", "utf-16"), strict=True):
        if data.startswith(bom):
            return data.decode(charset, "replace")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        from charset_normalizer import from_bytes

        guess = from_bytes(data[:CHARSET_SAMPLE_BYTES]).best()
        if guess is None:
            raise Unsupported("The file is neither media nor text in any known charset.") from None
        return data.decode(guess.encoding, "replace")


def _cues(text: str, form: str) -> Iterator[Segment]:
    import pysubs2

    try:
        subtitles = pysubs2.SSAFile.from_string(text, format_=form)
    except Exception as error:  # noqa: BLE001 - a parser of strangers' text may raise anything
        raise Undecodable(f"The subtitles cannot be read: {type(error).__name__}.") from None
    if not subtitles.events:
        raise Empty("The subtitles hold no cues.")
    for event in sorted((e for e in subtitles.events if not e.is_comment), key=lambda e: (e.start, e.end)):
        if cue := event.plaintext.strip():
            start_s = max(0.0, event.start / 1000)
            yield Segment(cue, start_s, max(start_s, event.end / 1000))


def _rows(text: str, delimiter: str) -> Iterator[Segment]:
    """Rows as their cells joined by commas; without a `delimiter`, the likeliest of the first line is taken."""
    csv.field_size_limit(MAX_CELL_CHARACTERS)
    if not delimiter:
        first = text.lstrip("\n").split("\n", 1)[0]
        delimiter = max(",;\t|", key=first.count)
    try:
        for row in csv.reader(io.StringIO(text), delimiter=delimiter):
            if line := ", ".join(cell.strip() for cell in row if cell.strip()):
                yield Segment(line)
    except csv.Error:
        raise Undecodable("The table cannot be read as CSV.") from None


def _pieces(text: str) -> Iterator[str]:
    while len(text) > MAX_SEGMENT_CHARACTERS:
        cut = _last_break(text)
        yield text[:cut].rstrip()
        text = text[cut:].lstrip()
    if text:
        yield text


def _last_break(text: str) -> int:
    """Where to cut a long paragraph: after the last line, else the last word, else hard at the limit."""
    window = text[:MAX_SEGMENT_CHARACTERS]
    return next((at for at in (window.rfind("\n"), window.rfind(" ")) if at > 0), MAX_SEGMENT_CHARACTERS)
