"""Expectations: sound tables pass, and each kind of damage trips its own expectation and names the worst rows."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest

from media_assets import schemas
from media_assets.checks import expectations
from media_assets.checks.check_report import CheckReport, ExpectationReport
from media_assets.checks.checker import checker
from resources.files.blobs import lean

Row = dict[str, Any]
MODEL, VERSION = "model@123456789abc", "v1"
CLIP, PHOTO = "clip-000000000001", "photo-000000000002"
LIMIT_S = 300.0
SPAN = {"start_s": 0.0, "end_s": 1.0}


def media(media_id: str, **changes: Any) -> Row:
    row = {
        "media_id": media_id,
        "uri": f"/library/{media_id}.mp4",
        "sha256": "ab" * 32,
        "kind": "video",
        "mime": "video/mp4",
        "bytes": 1000,
        "duration_s": 10.0,
        "width": 640,
        "height": 360,
        "fps": 25.0,
        "rotation": 0,
        "has_audio": True,
        "version": VERSION,
    }
    return row | changes


MEDIA = [media(CLIP), media(PHOTO, kind="image", mime="image/png", duration_s=None, fps=None)]


def rows_of(asset: str, clip: str = CLIP) -> list[Row]:
    """Three sound rows of the clip, numbered 0, 1, 2; for `media` the clip and the photo."""
    if asset == "media":
        return [media(clip), media(f"{clip}-photo", kind="image", mime="image/png", duration_s=None, fps=None)]
    base: list[Row] = [
        {"media_id": clip, "start_s": float(n), "end_s": n + 1.0, "model": MODEL, "version": VERSION} for n in range(3)
    ]
    own: dict[str, Callable[[int], Row]] = {
        "frames": lambda n: {
            "frame": n * 25,
            "width": 640,
            "height": 360,
            "reason": "interval",
            "phash": bytes(8),
            "image": b"jpeg",
            "repeat_of": 0 if n else None,
        },
        "audio": lambda n: {"chunk": n, "samples": 16_000, "rms": 0.1, "peak": 0.5, "flac": b"flac"},
        "shots": lambda n: {
            "shot": n,
            "start_frame": n * 25,
            "end_frame": n * 25 + 24,
            "confidence": 0.9,
            "transition": "cut",
            "transition_start_frame": n * 25,
            "transition_end_frame": n * 25,
        },
        "transcript": lambda n: {
            "segment": n,
            "text": "a word",
            "language": "en",
            "confidence": 0.8,
            "timing": "whisper",
            "words": [
                {"word": "a", "start_s": n + 0.0, "end_s": n + 0.2, "confidence": 0.8},
                {"word": "word", "start_s": n + 0.2, "end_s": n + 0.9, "confidence": None},
            ],
        },
        "ocr_text": lambda n: {
            "line": n,
            "text": "EXIT",
            "confidence": 0.7,
            "polygon": [{"x": 0.1, "y": 0.1}, {"x": 0.5, "y": 0.1}, {"x": 0.5, "y": 0.2}, {"x": 0.1, "y": 0.2}],
            "frame": 0,
            "frames_seen": 1,
        },
        "embeddings": lambda n: {"unit": "frame", "ordinal": n, "space": "joint", "vector": [0.6, 0.8]},
        "moderation_scores": lambda n: {"modality": "image", "label": "nudity", "score": 0.2, "source": str(n)},
        "moderation_labels": lambda n: {
            "label": "nudity",
            "severity": "low",
            "action": "allow",
            "rule": "nudity-low",
            "score": 0.2,
            "modality": "image",
            "policy_version": "p1",
        },
    }
    if asset == "near_duplicates":
        pair = {"group_id": clip, "media_id": clip, "other_id": PHOTO, "method": "exact", "distance": 0.0}
        return [pair | {"evidence": "same bytes"}, pair | {"method": "perceptual", "distance": 0.1, "evidence": "hash"}]
    names = set(schemas.PER_MEDIA[asset].names)
    return [{key: value for key, value in (row | own[asset](n)).items() if key in names} for n, row in enumerate(base)]


def schema_of(asset: str) -> pa.Schema:
    return schemas.NEAR_DUPLICATES if asset == "near_duplicates" else schemas.PER_MEDIA[asset]


def validate(asset: str, table: pa.Table, known: pa.Table) -> CheckReport:
    """As steps do it: in the checker process."""
    return checker().validate(asset, table, known, LIMIT_S)


def check(asset: str, rows: list[Row]) -> CheckReport:
    return validate(asset, schemas.table(schema_of(asset), rows), schemas.table(schemas.MEDIA, MEDIA))


def named(report: CheckReport, name: str) -> ExpectationReport:
    return next(entry for entry in report.expectations if entry.name == name)


ASSETS = [*schemas.PER_MEDIA, "near_duplicates"]


@pytest.mark.parametrize("asset", ASSETS)
def test_sound_rows_pass(asset: str) -> None:
    report = check(asset, rows_of(asset))
    assert report.failures == ()
    assert report.passed
    assert (report.rows, report.failing_items) == (len(rows_of(asset)), ())
    assert "expectations hold" in report.summary


@pytest.mark.parametrize("asset", ASSETS)
def test_no_rows_pass(asset: str) -> None:
    report = check(asset, [])
    assert report.passed
    assert (report.rows, report.items, report.figures) == (0, 0, {})


WORDS_OUT = [{"word": "late", "start_s": 7.0, "end_s": 9.0, "confidence": 0.5}]
WORDS_BACK = [
    {"word": "second", "start_s": 1.5, "end_s": 1.6, "confidence": 0.5},
    {"word": "first", "start_s": 1.1, "end_s": 1.2, "confidence": 0.5},
]
WORDS_SURE = [{"word": "sure", "start_s": 1.1, "end_s": 1.2, "confidence": 1.5}]
ITSELF = "the ID of the clip"
CORNER = {"x": 0.1, "y": 0.1}

DAMAGE: list[tuple[str, Row, str]] = [
    ("media", {"media_id": ITSELF}, "one row per item"),
    ("media", {"sha256": "xyz"}, "SHA-256 well formed"),
    ("media", {"kind": "hologram"}, "kind allowed"),
    ("media", {"mime": "not a type"}, "mime well formed"),
    ("media", {"bytes": 0}, "bytes positive"),
    ("media", {"kind": "video", "duration_s": -1.0}, "duration not negative"),
    ("media", {"width": None}, "picture has a size"),
    ("media", {"rotation": 45}, "rotation by quarter turns"),
    ("media", {"fps": 0.0}, "frame rate plausible"),
    *[
        (asset, damage, name)
        for asset in (
            "frames",
            "audio",
            "shots",
            "transcript",
            "ocr_text",
            "embeddings",
            "moderation_scores",
            "moderation_labels",
        )
        for damage, name in (
            ({"start_s": -1.0}, "start not negative"),
            ({"start_s": 2.0, "end_s": 1.5}, "start before end"),
            ({"end_s": 99.0}, "span inside the media"),
            ({"media_id": PHOTO}, "span inside the media"),
            ({"media_id": "stranger"}, "media known"),
        )
    ],
    *[(asset, {"start_s": -0.5}, "times monotone") for asset in ("frames", "audio", "shots", "transcript")],
    *[
        (asset, {"confidence": value}, "confidence between 0 and 1")
        for asset in ("shots", "transcript", "ocr_text")
        for value in (1.2, -0.1, math.nan)
    ],
    *[(asset, {"text": " \n"}, "text present") for asset in ("transcript", "ocr_text")],
    *[
        (asset, {"model": ""}, "model named")
        for asset in ("shots", "transcript", "ocr_text", "embeddings", "moderation_scores")
    ],
    *[(asset, {"score": 1.1}, "score between 0 and 1") for asset in ("moderation_scores", "moderation_labels")],
    *[(asset, {"modality": "smell"}, "modality allowed") for asset in ("moderation_scores", "moderation_labels")],
    ("frames", {"frame": -5}, "frame not negative"),
    ("frames", {"frame": 0}, "frames ascend"),
    ("frames", {"height": 0}, "still has a size"),
    ("frames", {"reason": "whim"}, "reason allowed"),
    ("frames", {"repeat_of": 25}, "repeats an earlier still"),
    ("audio", {"chunk": 5}, "chunk numbered from 0"),
    ("audio", {"samples": 8_000}, "length matches samples"),
    ("audio", {"rms": 1.5}, "rms between 0 and 1"),
    ("audio", {"peak": -0.5}, "peak between 0 and 1"),
    ("audio", {"rms": 0.6}, "rms below peak"),
    ("shots", {"shot": 7}, "shot numbered from 0"),
    ("shots", {"end_frame": 3}, "shot has frames"),
    ("shots", {"start_frame": 27}, "shots tile the video"),
    ("shots", {"transition": "wipe?"}, "transition allowed"),
    ("transcript", {"segment": 9}, "segment numbered from 0"),
    ("transcript", {"language": ""}, "language present"),
    ("transcript", {"timing": "guess"}, "timing allowed"),
    ("transcript", {"words": WORDS_OUT}, "words inside the segment"),
    ("transcript", {"words": WORDS_BACK}, "words in order"),
    ("transcript", {"words": WORDS_SURE}, "word confidence between 0 and 1"),
    ("ocr_text", {"line": 9}, "line numbered from 0"),
    ("ocr_text", {"polygon": [CORNER] * 3}, "polygon has four corners"),
    ("ocr_text", {"polygon": [{"x": 1.5, "y": 0.5}, *[CORNER] * 3]}, "polygon inside the picture"),
    ("ocr_text", {"polygon": [{"x": None, "y": 0.5}, *[CORNER] * 3]}, "polygon inside the picture"),
    ("ocr_text", {"frames_seen": 0}, "seen on a still"),
    ("embeddings", {"unit": "smell"}, "unit allowed"),
    ("embeddings", {"space": "outer"}, "space allowed"),
    ("embeddings", {"vector": [0.5, 0.5]}, "unit norm"),
    ("embeddings", {"vector": [math.nan, 0.5]}, "unit norm"),
    ("embeddings", {"vector": []}, "unit norm"),
    ("embeddings", {"vector": [1.0, 0.0, 0.0]}, "one dimension per model"),
    ("moderation_scores", {"label": ""}, "label present"),
    ("moderation_scores", {"score": None}, "score missing only where skipped"),
    ("moderation_scores", {"screening": "skipped"}, "score missing only where skipped"),
    ("moderation_scores", {"screening": "guessed"}, "screening allowed"),
    ("moderation_scores", {"screen_score": -0.1}, "screen score between 0 and 1"),
    ("moderation_labels", {"severity": "dire"}, "severity allowed"),
    ("moderation_labels", {"action": "pardon"}, "action allowed"),
    ("moderation_labels", {"rule": ""}, "rule named"),
    ("moderation_labels", {"policy_version": ""}, "policy named"),
    ("near_duplicates", {"other_id": "stranger"}, "media known"),
    ("near_duplicates", {"other_id": ITSELF}, "not its own duplicate"),
    ("near_duplicates", {"method": "hunch"}, "method allowed"),
    ("near_duplicates", {"distance": 1.5}, "distance between 0 and 1"),
    ("near_duplicates", {"method": "exact", "distance": 0.2}, "exact is distance 0"),
]


@pytest.mark.parametrize("asset", ASSETS)
def test_a_damaged_row_trips_its_expectation_and_is_named(asset: str) -> None:
    """Each damage is done to a clip of its own, so that one validation tells them apart."""
    rows: list[Row] = []
    wanted: dict[str, set[str]] = {}
    clips = [f"clip-{number:03d}" for number in range(len(DAMAGE))]
    for clip, (damaged, damage, name) in zip(clips, DAMAGE, strict=True):
        if damaged == asset:
            mine = rows_of(asset, clip)
            mine[1] |= {key: clip if value == ITSELF else value for key, value in damage.items()}
            rows.extend(mine)
            wanted.setdefault(name, set()).add(mine[1]["media_id"])
    known = schemas.table(schemas.MEDIA, [*MEDIA, *(media(clip) for clip in clips)])
    table = schemas.table(schema_of(asset), rows)
    report = validate(asset, table, known)
    declared = {entry.name for entry in report.expectations}
    assert not report.passed
    assert wanted.keys() == declared - {"schema"}
    for name, media_ids in wanted.items():
        broken = named(report, name)
        assert (broken.passed, broken.checked) == (False, len(rows))
        assert media_ids <= {row.media_id for row in broken.worst}
        assert broken.unexpected >= len(media_ids)
        assert name in report.summary
    assert {media_id for media_ids in wanted.values() for media_id in media_ids} <= set(report.failing_items)
    suite = expectations._SUITES[asset]
    frame = suite.frame(table, known)
    counted = {entry.name: int(breaks(entry, frame[entry.column]).sum()) for entry in suite.expectations}
    assert {entry.name: entry.unexpected for entry in report.expectations} == counted | {"schema": 0}


def breaks(entry: expectations.Expectation, values: pd.Series[Any]) -> pd.Series[bool]:
    """Which values break an expectation, worked out without Great Expectations."""
    there = values.notna()
    wrong = pd.Series(data=False, index=values.index) if entry.nullable else ~there
    if entry.low is not None:
        wrong |= there & (values < entry.low)
    if entry.high is not None:
        wrong |= there & (values > entry.high)
    if entry.allowed is not None:
        wrong |= there & ~values.isin(entry.allowed)
    if entry.pattern is not None:
        wrong |= there & ~values.fillna("").str.contains(entry.pattern)
    return wrong


def test_the_worst_rows_come_first_and_are_bounded() -> None:
    rows = [row | {"media_id": CLIP, "segment": n} for n, row in enumerate(rows_of("transcript") * 10)]
    for number, row in enumerate(rows):
        row |= {"start_s": 0.0, "end_s": 100.0 + number, "words": []}
    broken = named(check("transcript", rows), "span inside the media")
    assert broken.unexpected == 30
    assert [row.row for row in broken.worst] == [f"segment {number}" for number in range(29, 19, -1)]
    assert broken.worst[0].excess == pytest.approx(118.5)


def test_values_of_a_stranger_are_printable_in_the_report() -> None:
    rows = rows_of("transcript")
    rows[1]["language"] = "en\x1b[31m\n"
    broken = named(check("transcript", rows), "language present")
    assert broken.worst[0].value == r"en\x1b[31m\n"


def test_another_schema_fails_schema_alone() -> None:
    table = schemas.table(schemas.SHOTS, rows_of("shots"))
    wrong = table.drop_columns(["shot"]).set_column(1, "start_frame", pa.array([0.0, 1.0, 2.0]))
    report = validate("shots", wrong, schemas.table(schemas.MEDIA, MEDIA))
    assert [entry.name for entry in report.expectations] == ["schema"]
    assert {row.value for row in report.expectations[0].worst} == {
        "column shot is missing",
        "column start_frame is double, not int32",
    }


@pytest.mark.parametrize("asset", ["frames", "audio"])
def test_blobs_may_be_absent(asset: str) -> None:
    table = schemas.table(schema_of(asset), rows_of(asset)).select(lean(asset, schema_of(asset)).names)
    assert validate(asset, table, schemas.table(schemas.MEDIA, MEDIA)).passed


def test_the_distribution_of_confidences_is_reported() -> None:
    rows = rows_of("shots")
    for row, confidence in zip(rows, (0.2, 0.4, 0.9), strict=True):
        row["confidence"] = confidence
    figures = check("shots", rows).figures
    assert figures["confidence_p50"] == pytest.approx(0.4)
    assert figures["confidence_mean"] == pytest.approx(0.5)


def test_importing_the_module_loads_neither_great_expectations_nor_torch() -> None:
    heavy = "('great_expectations', 'torch')"
    code = f"import sys, media_assets.checks.expectations; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=dict(os.environ)
    )
    assert done.stdout.strip() == "[]"


def test_a_label_that_was_not_asked_for_needs_no_score() -> None:
    """Given rows of a model that was skipped, alone too, then they are sound, and quantiles are those of the scores."""
    scored = rows_of("moderation_scores")
    skipped = [
        row | {"score": None, "screening": "skipped", "screened_by": "m@1", "screen_score": 0.01} for row in scored
    ]
    report = check("moderation_scores", [*scored, *skipped])
    assert report.passed, report.summary
    assert report.figures == check("moderation_scores", scored).figures
    assert check("moderation_scores", skipped).figures == {}


def test_a_decision_about_an_item_without_scores_is_sound() -> None:
    row = rows_of("moderation_labels")[0] | {"label": "none", "severity": "none", "modality": "none", "model": "none"}
    assert check("moderation_labels", [row]).passed
