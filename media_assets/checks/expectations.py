"""Expectations on every table: Great Expectations suites over derived figures, with counts and the worst rows.

What an expectation needs from several columns or rows (how far a span runs past its media, how far a vector is from
unit length, the gap between shots) is computed first as a plain column, so each expectation is a range, a set or a
pattern on one column, and the worst rows are those farthest out.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from media_assets import schemas
from media_assets.checks.check_report import CheckReport, ExpectationReport, WorstRow
from resources.errors import printable
from resources.files.blobs import lean

WORST_ROWS = 10
SPAN_TOLERANCE_S = 0.5  # containers round their duration, and the last packet may reach past it
TIME_TOLERANCE_S = 1e-6
NORM_TOLERANCE = 1e-3
POLYGON_TOLERANCE = 0.01
KINDS = ("video", "audio", "image", "text")
REASONS = ("interval", "change", "image")
TRANSITIONS = ("start", "cut", "gradual")
TIMINGS = ("aligned", "whisper", "cue", "none")
UNITS = ("image", "frame", "shot", "transcript", "ocr_text")
SPACES = ("joint", "visual")
MODALITIES = ("image", "speech", "ocr", "text")
VERDICTS = ("asked", "second_look", "skipped")
NO_MODALITY = "none"  # of a decision about an item without scores
SEVERITIES = ("none", "low", "medium", "high")
ACTIONS = ("allow", "review", "block")
METHODS = ("exact", "perceptual", "semantic")
LANGUAGE = r"^[a-z]{2,3}$"
SHA256 = r"^[0-9a-f]{64}$"

Frame = pd.DataFrame


@dataclass(frozen=True, slots=True)
class Expectation:
    """One rule on one column: a range, a set of values, or a pattern; null is allowed only where `nullable`."""

    name: str
    column: str
    low: float | None = None
    high: float | None = None
    allowed: tuple[str, ...] | None = None
    pattern: str | None = None
    nullable: bool = False


_NULLS = Expectation("no nulls", "nulls", high=0)
"""Of how many columns that must have a value a row has none."""


def prepare() -> None:
    """Import Great Expectations now, which takes seconds; `validate` would at its first table with rows."""
    _gx()


def validate(asset: str, table: pa.Table, media: pa.Table) -> CheckReport:
    """Check the rows of many items of one asset, here and now; not thread-safe. Steps ask `checker.checker()`.

    Args:
        asset: a per-media asset, or `near_duplicates`.
        table: its rows, of its schema; the blobs `frames.image` and `audio.flac` may be absent.
        media: rows of `media` of the same items, for durations (`media` itself needs none other than `table`).

    Rows of one item must stand together in the order stored. A table of another schema fails `schema` alone, since
    nothing else could be computed on it.
    """
    mismatches = _schema_mismatches(asset, table)
    if mismatches:
        worst = tuple(WorstRow("", "schema", printable(text), 0.0) for text in mismatches[:WORST_ROWS])
        report = ExpectationReport("schema", "", False, len(table.column_names), len(mismatches), worst)
        return CheckReport(asset, False, table.num_rows, 0, (report,))
    schema_report = ExpectationReport("schema", "", True, len(table.column_names), 0)
    suite = _SUITES[asset]
    frame = suite.frame(table, media)
    reports = (schema_report, *_run(asset, frame, suite.expectations))
    failing = sorted({row.media_id for report in reports for row in report.worst if row.media_id})
    return CheckReport(
        asset=asset,
        passed=all(report.passed for report in reports),
        rows=table.num_rows,
        items=int(frame["media_id"].nunique()),
        expectations=reports,
        failing_items=tuple(failing),
        figures=_figures(table, suite.distribution),
    )


def _schema_mismatches(asset: str, table: pa.Table) -> list[str]:
    full = schemas.NEAR_DUPLICATES if asset == "near_duplicates" else schemas.PER_MEDIA[asset]
    required = lean(asset, full)
    found = {entry.name: entry.type for entry in table.schema}
    missing = [f"column {entry.name} is missing" for entry in required if entry.name not in found]
    unknown = [f"column {name} is unknown" for name in found if name not in full.names]
    wrong = [
        f"column {entry.name} is {found[entry.name]}, not {entry.type}"
        for entry in full
        if entry.name in found and found[entry.name] != entry.type
    ]
    nulls = [
        f"column {entry.name} has {table[entry.name].null_count} nulls"
        for entry in required
        if entry.name in found and not entry.nullable and table[entry.name].null_count
    ]
    return [*missing, *unknown, *wrong, *nulls]


def _figures(table: pa.Table, column: str | None) -> dict[str, float]:
    """Quantiles and mean of the confidences."""
    if column is None or table[column].null_count == table.num_rows:
        return {}
    values = table[column].drop_null().to_numpy().astype(float)
    quantiles = np.nanquantile(values, (0.05, 0.25, 0.5, 0.75, 0.95))
    named = dict(zip(("p05", "p25", "p50", "p75", "p95"), quantiles.tolist(), strict=True))
    return {f"{column}_{name}": value for name, value in named.items()} | {f"{column}_mean": float(np.nanmean(values))}


@cache
def _gx() -> tuple[Any, Any]:
    """Great Expectations, and one batch definition for data frames."""
    import great_expectations as gx

    logging.getLogger("great_expectations").setLevel(logging.WARNING)
    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = {"globally": False, "metric_calculations": False}
    asset = context.data_sources.add_pandas("tables").add_dataframe_asset("table")
    return gx, asset.add_batch_definition_whole_dataframe("rows")


def _run(asset: str, frame: Frame, expectations: Sequence[Expectation]) -> list[ExpectationReport]:
    """Validate `frame` with Great Expectations; an empty one breaks nothing.

    Each expectation of the library costs milliseconds whatever the rows, so nulls are looked for in all columns at
    once; and whether one holds takes half the time of telling the rows that break it, so only those that do not hold
    are asked for rows, and with a null anywhere all that forbid it.
    """
    if frame.empty:
        return [ExpectationReport(entry.name, entry.column, True, 0, 0) for entry in expectations]
    gx, definition = _gx()
    required = [entry.column for entry in expectations if not entry.nullable]
    rows = definition.get_batch({"dataframe": frame.assign(**{_NULLS.column: frame[required].isna().sum(axis=1)})})
    asked = [made for entry in (_NULLS, *expectations) for made in _ruled(gx, entry)]
    failed = {name for name, result in _results(gx, rows, asset, asked, "BOOLEAN_ONLY") if not result.success}
    doubted = [
        entry for entry in expectations if entry.name in failed or (_NULLS.name in failed and not entry.nullable)
    ]
    asked = [made for entry in doubted for made in (*_not_null(gx, entry), *_ruled(gx, entry))]
    broken: dict[str, set[int]] = {entry.name: set() for entry in expectations}
    for name, result in _results(gx, rows, asset, asked, "COMPLETE"):
        broken[name].update(result.result.get("unexpected_index_list") or ())
    return [_expectation_report(frame, entry, sorted(broken[entry.name])) for entry in expectations]


def _results(gx: Any, rows: Any, asset: str, asked: Sequence[Any], told: str) -> Iterator[tuple[str, Any]]:
    """Name and result of each expectation of Great Expectations; raises RuntimeError where one cannot be computed."""
    if not asked:
        return
    suite = gx.ExpectationSuite(name=asset)
    for made in asked:
        suite.add_expectation(made)
    for one in rows.validate(suite, result_format={"result_format": told}).results:
        name = one.expectation_config.meta["name"]
        if one.exception_info and one.exception_info.get("raised_exception"):
            raise RuntimeError(f"{name} of {asset} could not be computed: {one.exception_info}")
        yield name, one


def _not_null(gx: Any, entry: Expectation) -> list[Any]:
    """What Great Expectations is asked of an entry's nulls."""
    if entry.nullable:
        return []
    return [gx.expectations.ExpectColumnValuesToNotBeNull(column=entry.column, meta={"name": entry.name})]


def _ruled(gx: Any, entry: Expectation) -> list[Any]:
    """What it is asked of an entry's range, set or pattern, which it does not apply to nulls."""
    kinds = gx.expectations
    asked: list[tuple[Any, dict[str, Any]]] = []
    if entry.low is not None or entry.high is not None:
        asked.append((kinds.ExpectColumnValuesToBeBetween, {"min_value": entry.low, "max_value": entry.high}))
    if entry.allowed is not None:
        asked.append((kinds.ExpectColumnValuesToBeInSet, {"value_set": list(entry.allowed)}))
    if entry.pattern is not None:
        asked.append((kinds.ExpectColumnValuesToMatchRegex, {"regex": entry.pattern}))
    return [_described_once(kind)(column=entry.column, meta={"name": entry.name}, **how) for kind, how in asked]


@cache
def _described_once(kind: Any) -> Any:
    """A kind of expectation that makes its configuration once: the library asks for it a hundred times a table."""
    from great_expectations.compatibility.pydantic import PrivateAttr

    def configuration(self: Any) -> Any:
        if self._configuration is None:
            self._configuration = kind.configuration.fget(self)
        return self._configuration

    # The library registers expectations by the names of their classes.
    body = {"__module__": __name__, "_configuration": PrivateAttr(None), "configuration": property(configuration)}
    return type(kind)(f"{kind.__name__}Once", (kind,), body)


def _expectation_report(frame: Frame, entry: Expectation, broken: Sequence[int]) -> ExpectationReport:
    rows = frame.loc[list(broken)]
    values = rows[entry.column]
    excess = _excess(values, entry)
    order = np.argsort(-excess, kind="stable")[:WORST_ROWS]
    worst = tuple(
        WorstRow(
            media_id=str(rows["media_id"].iloc[position]),
            row=str(rows["row"].iloc[position]),
            value=printable(str(values.iloc[position]), 80),
            excess=float(excess[position]),
        )
        for position in order
    )
    return ExpectationReport(entry.name, entry.column, not broken, len(frame), len(broken), worst)


def _excess(values: pd.Series[Any], entry: Expectation) -> np.ndarray[Any, np.dtype[np.float64]]:
    """How far each value lies outside the range; infinite for null and NaN, 0 where there is no range."""
    if entry.low is None and entry.high is None:
        return np.zeros(len(values))
    numbers = values.to_numpy(dtype=float, na_value=np.nan)
    below = (entry.low - numbers) if entry.low is not None else np.full(len(numbers), -np.inf)
    above = (numbers - entry.high) if entry.high is not None else np.full(len(numbers), -np.inf)
    return np.nan_to_num(np.maximum(below, above), nan=np.inf)


@dataclass(frozen=True, slots=True)
class _Suite:
    """Expectations of one asset and the figures they look at; `distribution` is the column described in figures."""

    frame: Callable[[pa.Table, pa.Table], Frame]
    expectations: tuple[Expectation, ...]
    distribution: str | None = None


def _keyed(table: pa.Table, row: str | None, columns: Sequence[str] = ()) -> Frame:
    """media_id, `row` (a label of the row within its item), and some columns as they are."""
    frame: Frame = table.select(["media_id", *columns]).to_pandas()
    labels = table[row].to_numpy(zero_copy_only=False) if row else np.arange(len(frame))
    prefix = row or "row"
    frame["row"] = [f"{prefix} {label}" for label in labels]
    return frame


def _spanned(table: pa.Table, media: pa.Table, row: str | None, columns: Sequence[str] = ()) -> Frame:
    """`_keyed` with start_s, and figures on the span: its length, how far it overruns the media, the step in time."""
    frame = _keyed(table, row, ["start_s", "end_s", *columns])
    known = (
        media.select(["media_id", "duration_s", "kind"]).to_pandas().drop_duplicates("media_id").set_index("media_id")
    )
    frame["known_media"] = frame["media_id"].isin(known.index).astype(float)
    kind = frame["media_id"].map(known["kind"])
    duration = frame["media_id"].map(known["duration_s"]).astype(float)
    # An image has the span 0-0; a medium of unknown duration has no end to overrun.
    duration = duration.where(kind != "image", 0.0)
    frame["span_length_s"] = frame["end_s"] - frame["start_s"]
    frame["span_overrun_s"] = (frame["end_s"] - duration).where(duration.notna(), 0.0)
    frame["start_step_s"] = frame.groupby("media_id", sort=False)["start_s"].diff().fillna(0.0)
    return frame


_SPAN = (
    Expectation("media known", "known_media", low=1),
    Expectation("start not negative", "start_s", low=0),
    Expectation("start before end", "span_length_s", low=0),
    Expectation("span inside the media", "span_overrun_s", high=SPAN_TOLERANCE_S),
)
_MONOTONE = Expectation("times monotone", "start_step_s", low=-TIME_TOLERANCE_S)
_TEXT = Expectation("text present", "text_length", low=1)
_CONFIDENCE = Expectation("confidence between 0 and 1", "confidence", low=0, high=1)
_SCORE = Expectation("score between 0 and 1", "score", low=0, high=1)
_MODEL = Expectation("model named", "model", pattern=r"^\S")


def _text_length(table: pa.Table) -> Any:
    return pc.utf8_length(pc.utf8_trim_whitespace(table["text"])).to_numpy()


def _rank(frame: Frame, by: str) -> Any:
    """How far the numbering of each item's rows is from 0, 1, 2 …"""
    return (frame[by] - frame.groupby("media_id", sort=False).cumcount()).abs()


def _media_frame(table: pa.Table, _media: pa.Table) -> Frame:
    columns = ["sha256", "kind", "mime", "bytes", "duration_s", "width", "height", "fps", "rotation"]
    frame = _keyed(table, None, columns)
    frame["repeats"] = frame["media_id"].duplicated().astype(float)
    visual = frame["kind"].isin(["image", "video"])
    timed = frame["kind"].isin(["audio", "video"])
    frame["side"] = frame[["width", "height"]].min(axis=1, skipna=False).where(visual, 1.0).astype(float)
    frame["length_s"] = frame["duration_s"].where(timed, 0.0).fillna(0.0).astype(float)
    frame["rotation_rest"] = (frame["rotation"].fillna(0).astype(float) % 90).abs()
    return frame


def _frames_frame(table: pa.Table, media: pa.Table) -> Frame:
    frame = _spanned(table, media, "frame", ["frame", "width", "height", "reason", "repeat_of"])
    frame["side"] = frame[["width", "height"]].min(axis=1)
    frame["frame_step"] = frame.groupby("media_id", sort=False)["frame"].diff().fillna(1.0)
    frame["repeat_lead"] = (frame["frame"] - frame["repeat_of"].astype(float)).fillna(1.0)
    return frame


def _audio_frame(table: pa.Table, media: pa.Table) -> Frame:
    frame = _spanned(table, media, "chunk", ["chunk", "samples", "rms", "peak"])
    frame["numbering"] = _rank(frame, "chunk")
    # 16 kHz: the samples say how long the chunk is.
    frame["length_error_s"] = (frame["span_length_s"] - frame["samples"] / 16_000).abs()
    frame["rms_over_peak"] = frame["rms"] - frame["peak"]
    return frame


def _shots_frame(table: pa.Table, media: pa.Table) -> Frame:
    columns = ["shot", "start_frame", "end_frame", "confidence", "transition", "model"]
    frame = _spanned(table, media, "shot", columns)
    frame["numbering"] = _rank(frame, "shot")
    frame["frames"] = frame["end_frame"] - frame["start_frame"] + 1
    by_item = frame.groupby("media_id", sort=False)
    # Shots tile the video: each starts one frame after the last, the first at frame 0.
    frame["tiling_gap_frames"] = (frame["start_frame"] - by_item["end_frame"].shift().fillna(-1) - 1).abs()
    return frame


def _transcript_frame(table: pa.Table, media: pa.Table) -> Frame:
    frame = _spanned(table, media, "segment", ["segment", "language", "confidence", "timing", "model"])
    frame["numbering"] = _rank(frame, "segment")
    frame["text_length"] = _text_length(table)
    overrun, disorder, confidence = _word_figures(table)
    frame["word_overrun_s"], frame["word_disorder_s"], frame["word_confidence_error"] = overrun, disorder, confidence
    return frame


def _word_figures(table: pa.Table) -> tuple[Any, Any, Any]:
    """Per segment: how far words run out of it, how far they go back in time, how far confidences leave 0-1."""
    count = table.num_rows
    overrun, disorder, confidence_error = np.zeros(count), np.zeros(count), np.zeros(count)
    words = table["words"].combine_chunks()
    parents = pc.list_parent_indices(words).to_numpy()
    if not len(parents):
        return overrun, disorder, confidence_error
    flat = words.flatten()
    start, end, confidence = (_numbers(pc.struct_field(flat, name)) for name in ("start_s", "end_s", "confidence"))
    starts, ends = table["start_s"].to_numpy()[parents], table["end_s"].to_numpy()[parents]
    _worst_of(overrun, parents, np.fmax(starts - start, end - ends))
    _worst_of(disorder, parents, start - end)
    same = parents[1:] == parents[:-1]
    _worst_of(disorder, parents[1:][same], (start[:-1] - start[1:])[same])
    _worst_of(confidence_error, parents, np.fmax(-confidence, confidence - 1))
    return overrun, disorder, confidence_error


def _worst_of(target: Any, parents: Any, values: Any) -> None:
    np.maximum.at(target, parents, np.nan_to_num(values, nan=0.0))


def _numbers(array: pa.Array) -> Any:
    return array.to_numpy(zero_copy_only=False).astype(float)


def _ocr_frame(table: pa.Table, media: pa.Table) -> Frame:
    frame = _spanned(table, media, "line", ["line", "confidence", "frames_seen", "model"])
    frame["numbering"] = _rank(frame, "line")
    frame["text_length"] = _text_length(table)
    polygons = table["polygon"].combine_chunks()
    frame["corners"] = pc.list_value_length(polygons).to_numpy(zero_copy_only=False)
    error = np.zeros(table.num_rows)
    parents = pc.list_parent_indices(polygons).to_numpy()
    flat = polygons.flatten()
    for axis in ("x", "y"):
        values = np.nan_to_num(_numbers(pc.struct_field(flat, axis)), nan=np.inf)
        _worst_of(error, parents, np.maximum(-values, values - 1))
    frame["polygon_overrun"] = error
    return frame


def _embeddings_frame(table: pa.Table, media: pa.Table) -> Frame:
    frame = _spanned(table, media, "ordinal", ["unit", "space", "model"])
    frame["row"] = [
        f"{unit} {label.removeprefix('ordinal ')}" for unit, label in zip(frame["unit"], frame["row"], strict=True)
    ]
    column = table["vector"].combine_chunks()
    widths = np.diff(column.offsets.to_numpy())
    squares = np.zeros(table.num_rows)
    np.add.at(squares, pc.list_parent_indices(column).to_numpy(), _numbers(column.flatten()) ** 2)
    frame["norm_error"] = np.abs(np.sqrt(squares) - 1)
    usual = pd.Series(widths).groupby([frame["model"], frame["space"]]).transform(lambda group: group.mode().iloc[0])
    frame["dimension_error"] = np.abs(widths - usual.to_numpy())
    return frame


def _scores_frame(table: pa.Table, media: pa.Table) -> Frame:
    columns = ["modality", "label", "score", "model", "screening", "screen_score"]
    frame = _spanned(table, media, "source", columns)
    frame["row"] = [f"{label} of {row}" for label, row in zip(frame["label"], frame["row"], strict=True)]
    frame["unexplained"] = (frame["score"].isna() != (frame["screening"] == "skipped")).astype(float)
    return frame


def _labels_frame(table: pa.Table, media: pa.Table) -> Frame:
    columns = ["severity", "action", "rule", "score", "modality", "model", "policy_version"]
    return _spanned(table, media, "label", columns)


def _duplicates_frame(table: pa.Table, media: pa.Table) -> Frame:
    frame = _keyed(table, "other_id", ["other_id", "method", "distance"])
    known = set(media["media_id"].to_pylist())
    frame["known_media"] = (frame["media_id"].isin(known) & frame["other_id"].isin(known)).astype(float)
    frame["self_pair"] = (frame["media_id"] == frame["other_id"]).astype(float)
    frame["exact_distance"] = frame["distance"].where(frame["method"] == "exact", 0.0)
    return frame


def _numbered(column: str) -> Expectation:
    return Expectation(f"{column} numbered from 0", "numbering", high=0)


_SUITES: dict[str, _Suite] = {
    "media": _Suite(
        _media_frame,
        (
            Expectation("one row per item", "repeats", high=0),
            Expectation("SHA-256 well formed", "sha256", pattern=SHA256),
            Expectation("kind allowed", "kind", allowed=KINDS),
            Expectation("mime well formed", "mime", pattern=r"^[a-z]+/[\w.+-]+$"),
            Expectation("bytes positive", "bytes", low=1),
            Expectation("duration not negative", "length_s", low=0),
            Expectation("picture has a size", "side", low=1),
            Expectation("rotation by quarter turns", "rotation_rest", high=0),
            Expectation("frame rate plausible", "fps", low=0.01, high=1000, nullable=True),
        ),
    ),
    "frames": _Suite(
        _frames_frame,
        (
            *_SPAN,
            _MONOTONE,
            Expectation("frame not negative", "frame", low=0),
            Expectation("frames ascend", "frame_step", low=1),
            Expectation("still has a size", "side", low=1),
            Expectation("reason allowed", "reason", allowed=REASONS),
            Expectation("repeats an earlier still", "repeat_lead", low=1),
        ),
    ),
    "audio": _Suite(
        _audio_frame,
        (
            *_SPAN,
            _MONOTONE,
            _numbered("chunk"),
            Expectation("length matches samples", "length_error_s", high=0.01),
            Expectation("rms between 0 and 1", "rms", low=0, high=1),
            Expectation("peak between 0 and 1", "peak", low=0, high=1),
            Expectation("rms below peak", "rms_over_peak", high=1e-6),
        ),
    ),
    "shots": _Suite(
        _shots_frame,
        (
            *_SPAN,
            _MONOTONE,
            _CONFIDENCE,
            _MODEL,
            _numbered("shot"),
            Expectation("shot has frames", "frames", low=1),
            Expectation("shots tile the video", "tiling_gap_frames", high=0),
            Expectation("transition allowed", "transition", allowed=TRANSITIONS),
        ),
        "confidence",
    ),
    "transcript": _Suite(
        _transcript_frame,
        (
            *_SPAN,
            _MONOTONE,
            _CONFIDENCE,
            _MODEL,
            _TEXT,
            _numbered("segment"),
            Expectation("language present", "language", pattern=LANGUAGE),
            Expectation("timing allowed", "timing", allowed=TIMINGS),
            Expectation("words inside the segment", "word_overrun_s", high=SPAN_TOLERANCE_S),
            Expectation("words in order", "word_disorder_s", high=TIME_TOLERANCE_S),
            Expectation("word confidence between 0 and 1", "word_confidence_error", high=0),
        ),
        "confidence",
    ),
    "ocr_text": _Suite(
        _ocr_frame,
        (
            *_SPAN,
            _CONFIDENCE,
            _MODEL,
            _TEXT,
            _numbered("line"),
            Expectation("polygon has four corners", "corners", low=4, high=4),
            Expectation("polygon inside the picture", "polygon_overrun", high=POLYGON_TOLERANCE),
            Expectation("seen on a still", "frames_seen", low=1),
        ),
        "confidence",
    ),
    "embeddings": _Suite(
        _embeddings_frame,
        (
            *_SPAN,
            _MODEL,
            Expectation("unit allowed", "unit", allowed=UNITS),
            Expectation("space allowed", "space", allowed=SPACES),
            Expectation("unit norm", "norm_error", high=NORM_TOLERANCE),
            Expectation("one dimension per model", "dimension_error", high=0),
        ),
    ),
    "moderation_scores": _Suite(
        _scores_frame,
        (
            *_SPAN,
            replace(_SCORE, nullable=True),
            Expectation("score missing only where skipped", "unexplained", high=0),
            Expectation("screening allowed", "screening", allowed=VERDICTS, nullable=True),
            Expectation("screen score between 0 and 1", "screen_score", low=0, high=1, nullable=True),
            _MODEL,
            Expectation("modality allowed", "modality", allowed=MODALITIES),
            Expectation("label present", "label", pattern=r"^\S"),
        ),
        "score",
    ),
    "moderation_labels": _Suite(
        _labels_frame,
        (
            *_SPAN,
            _SCORE,
            Expectation("modality allowed", "modality", allowed=(*MODALITIES, NO_MODALITY)),
            Expectation("severity allowed", "severity", allowed=SEVERITIES),
            Expectation("action allowed", "action", allowed=ACTIONS),
            Expectation("rule named", "rule", pattern=r"^\S"),
            Expectation("policy named", "policy_version", pattern=r"^\S"),
        ),
        "score",
    ),
    "near_duplicates": _Suite(
        _duplicates_frame,
        (
            Expectation("media known", "known_media", low=1),
            Expectation("not its own duplicate", "self_pair", high=0),
            Expectation("method allowed", "method", allowed=METHODS),
            Expectation("distance between 0 and 1", "distance", low=0, high=1),
            Expectation("exact is distance 0", "exact_distance", low=0, high=0),
        ),
        "distance",
    ),
}
