"""Explicit Arrow schemas of every per-media table: the contract of the DuckDB views and of the checks.

Every table carries `media_id`; spans are seconds from the start of the media (`start_s` <= `end_s`),
images have the span 0-0. Rows made by a model carry its `model` (name@digest prefix). `version` is the
outcome version of the row's table.
"""

from __future__ import annotations

from functools import lru_cache

import pyarrow as pa


def _field(name: str, kind: pa.DataType, doc: str, nullable: bool = True) -> pa.Field:
    return pa.field(name, kind, nullable=nullable, metadata={"doc": doc})


def _list(kind: pa.DataType) -> pa.ListType:
    return pa.list_(pa.field("element", kind))  # as Parquet names it, so that a table equals what is read of its file


_ID = _field("media_id", pa.string(), "the media item", nullable=False)
_START = _field("start_s", pa.float64(), "start of the span, seconds", nullable=False)
_END = _field("end_s", pa.float64(), "end of the span, seconds", nullable=False)
_MODEL = _field("model", pa.string(), "model that produced the row: name@first 12 of its digest", nullable=False)
_VERSION = _field("version", pa.string(), "version of the table the row belongs to", nullable=False)

MEDIA = pa.schema(
    [
        _ID,
        _field("uri", pa.string(), "path or URL as given", nullable=False),
        _field("sha256", pa.string(), "SHA-256 of the bytes", nullable=False),
        _field("kind", pa.string(), "video, audio, image or text", nullable=False),
        _field("mime", pa.string(), "media type by content, not by extension", nullable=False),
        _field("bytes", pa.int64(), "size of the file, bytes", nullable=False),
        _field("duration_s", pa.float64(), "container duration, seconds; null for images, text and unknown"),
        _field("width", pa.int32(), "display width after rotation, pixels"),
        _field("height", pa.int32(), "display height after rotation, pixels"),
        _field("fps", pa.float64(), "average frames per second of the first video stream"),
        _field("rotation", pa.int32(), "clockwise rotation applied on decode, degrees"),
        _field("has_audio", pa.bool_(), "whether there is an audio stream", nullable=False),
        _field("video_codec", pa.string(), "codec of the first video stream"),
        _field("audio_codec", pa.string(), "codec of the first audio stream"),
        _field("start_offset_s", pa.float64(), "presentation time of the first frame or sample, seconds"),
        _field("duplicate_of", pa.string(), "earlier media item with the same bytes"),
        _VERSION,
    ]
)

MEDIA_TEXT = pa.schema(
    [
        _ID,
        _field("segment", pa.int32(), "index of the paragraph or cue, in order", False),
        _field("start_s", pa.float64(), "start of a subtitle cue, seconds; null for plain text"),
        _field("end_s", pa.float64(), "end of a subtitle cue, seconds; null for plain text"),
        _field("text", pa.string(), "the paragraph or cue, Unicode NFC", False),
        _VERSION,
    ]
)

FRAMES = pa.schema(
    [
        _ID,
        _field(
            "frame", pa.int32(), "0-based index in the first video stream, presentation order; 0 for an image", False
        ),
        _field("pts", pa.int64(), "presentation timestamp in units of the time base"),
        _field("time_base", pa.string(), "time base as numerator/denominator, seconds"),
        _START,
        _field("end_s", pa.float64(), "start of the next still, or end of the media, seconds", False),
        _field("width", pa.int32(), "pixels of the still", False),
        _field("height", pa.int32(), "pixels of the still", False),
        _field("reason", pa.string(), "interval, change or image", False),
        _field("phash", pa.binary(8), "64-bit perceptual hash (DCT) of the still", False),
        _field("repeat_of", pa.int32(), "frame of an earlier still with practically the same picture"),
        _field("image", pa.binary(), "encoded RGB picture (JPEG or PNG), upright", False),
        _VERSION,
    ]
)

FRAMES_TRACK = pa.schema(
    [
        _ID,
        _field("first_frame", pa.int32(), "index of the chunk's first frame", False),
        _field("frames", pa.int32(), "frames in the chunk", False),
        _field("start_s", _list(pa.float64()), "presentation time of each frame, seconds", False),
        _field("rgb", pa.binary(), "zstd of uint8 [frames, 27, 48, 3], RGB, row-major", False),
        _VERSION,
    ]
)

AUDIO = pa.schema(
    [
        _ID,
        _field("chunk", pa.int32(), "index of the chunk, in order", False),
        _START,
        _END,
        _field("samples", pa.int64(), "samples in the chunk, 16 kHz mono", False),
        _field("rms", pa.float64(), "root mean square of the samples, full scale 1", False),
        _field("peak", pa.float64(), "largest absolute sample, full scale 1", False),
        _field("flac", pa.binary(), "the chunk as FLAC, 16-bit, 16 kHz, mono", False),
        _VERSION,
    ]
)

SHOTS = pa.schema(
    [
        _ID,
        _field("shot", pa.int32(), "index of the shot, in order", False),
        _field("start_frame", pa.int32(), "first frame, 0-based in the first video stream", False),
        _field("end_frame", pa.int32(), "last frame, inclusive", False),
        _START,
        _END,
        _field("confidence", pa.float64(), "score of the transition that starts the shot; 1 for the first", False),
        _field("transition", pa.string(), "how the shot starts: start, cut or gradual", False),
        _field("transition_start_frame", pa.int32(), "first frame of that transition", False),
        _field("transition_end_frame", pa.int32(), "last frame of that transition, inclusive", False),
        _MODEL,
        _VERSION,
    ]
)

WORD = pa.struct(
    [
        pa.field("word", pa.string()),
        pa.field("start_s", pa.float64()),
        pa.field("end_s", pa.float64()),
        pa.field("confidence", pa.float64()),
    ]
)

TRANSCRIPT = pa.schema(
    [
        _ID,
        _field("segment", pa.int32(), "index of the segment, in order", False),
        _START,
        _END,
        _field("text", pa.string(), "what was said, or the text of a document or subtitle cue", False),
        _field("language", pa.string(), "ISO 639-1 code", False),
        _field("confidence", pa.float64(), "mean token probability, 0-1; 1 for documents", False),
        _field("speaker", pa.string(), "speaker label where diarization ran"),
        _field("words", _list(WORD), "words with times and probabilities", False),
        _field("timing", pa.string(), "how word times were made: aligned, whisper, cue or none", False),
        _MODEL,
        _VERSION,
    ]
)

POINT = pa.struct([pa.field("x", pa.float64()), pa.field("y", pa.float64())])

OCR_TEXT = pa.schema(
    [
        _ID,
        _field("line", pa.int32(), "reading order within the media item", False),
        _START,
        _END,
        _field("text", pa.string(), "the line of text", False),
        _field("confidence", pa.float64(), "recognition confidence, 0-1", False),
        _field(
            "polygon",
            _list(POINT),
            "four corners, clockwise from top left, in fractions of width and height, origin top left",
            False,
        ),
        _field("frame", pa.int32(), "still on which it was read best", False),
        _field("frames_seen", pa.int32(), "stills on which it was read", False),
        _MODEL,
        _VERSION,
    ]
)

VECTOR = _list(pa.float32())

EMBEDDINGS = pa.schema(
    [
        _ID,
        _field("unit", pa.string(), "image, frame, shot, transcript or ocr_text", False),
        _field("ordinal", pa.int32(), "frame, shot, segment or line number of the unit", False),
        _START,
        _END,
        _field("space", pa.string(), "joint (text and picture, for search) or visual (for near-duplicates)", False),
        _field("vector", VECTOR, "unit-normalised float32 vector", False),
        _MODEL,
        _VERSION,
    ]
)

MODERATION_SCORES = pa.schema(
    [
        _ID,
        _field("modality", pa.string(), "image, speech, ocr or text", False),
        _START,
        _END,
        _field("label", pa.string(), "label of the project's taxonomy", False),
        _field("score", pa.float64(), "raw score of the model, 0-1; null: not asked, for `screened_by` was sure"),
        _field("source", pa.string(), "frame number, segment or line the score is about", False),
        _field("model", pa.string(), "model whose score it is, or would be: name@first 12 of its digest", False),
        _field("screening", pa.string(), "of a screened model: asked, second_look (asked as a sample) or skipped"),
        _field("screened_by", pa.string(), "model that looked first"),
        _field("screen_score", pa.float64(), "strongest score of that model, 0-1; null: it does not know the language"),
        _VERSION,
    ]
)

MODERATION_LABELS = pa.schema(
    [
        _ID,
        _START,
        _END,
        _field("label", pa.string(), "label of the project's taxonomy", False),
        _field("severity", pa.string(), "none, low, medium or high", False),
        _field("action", pa.string(), "allow, review or block", False),
        _field("rule", pa.string(), "policy rule that decided", False),
        _field("score", pa.float64(), "strongest score in the span", False),
        _field("modality", pa.string(), "modality of that score", False),
        _field("model", pa.string(), "model of that score", False),
        _field("policy_version", pa.string(), "digest prefix of the policy", False),
        _VERSION,
    ]
)

NEAR_DUPLICATES = pa.schema(
    [
        _field("group_id", pa.string(), "smallest media ID of the group", False),
        _field("media_id", pa.string(), "member of the group", False),
        _field("other_id", pa.string(), "the member it matches", False),
        _field("method", pa.string(), "exact, perceptual or semantic", False),
        _field("distance", pa.float64(), "0 for exact; Hamming bits / 64 or cosine distance otherwise", False),
        _field("evidence", pa.string(), "what matched, in words", False),
    ]
)

PER_MEDIA: dict[str, pa.Schema] = {
    "media": MEDIA,
    "frames": FRAMES,
    "audio": AUDIO,
    "shots": SHOTS,
    "transcript": TRANSCRIPT,
    "ocr_text": OCR_TEXT,
    "embeddings": EMBEDDINGS,
    "moderation_scores": MODERATION_SCORES,
    "moderation_labels": MODERATION_LABELS,
}
"""Schema of each per-media asset, by asset name."""

SIDES: dict[str, dict[str, pa.Schema]] = {"media": {"text": MEDIA_TEXT}, "frames": {"track": FRAMES_TRACK}}
"""Schema of each side table, by asset and side name."""


def table(schema: pa.Schema, rows: list[dict[str, object]]) -> pa.Table:
    """`rows` as a table of exactly `schema`; a missing required field or an unknown one raises ValueError."""
    names, required, kind = _rows_of(schema)
    for row in rows:
        if unknown := row.keys() - names:
            raise ValueError(f"unknown fields {sorted(unknown)}")
        if missing := {name for name in required if row.get(name) is None}:
            raise ValueError(f"missing fields {sorted(missing)}")
    # All columns in one conversion: `Table.from_pylist` makes one for each, which costs a table of one row most.
    return pa.Table.from_arrays(pa.array(rows, kind).flatten(), schema=schema)


@lru_cache(64)
def _rows_of(schema: pa.Schema) -> tuple[frozenset[str], frozenset[str], pa.StructType]:
    """Fields that rows of a schema may have, those they must have, and the type of a row."""
    required = frozenset(field.name for field in schema if not field.nullable)
    return frozenset(schema.names), required, pa.struct(list(schema))
