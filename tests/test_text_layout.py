"""Reading order of lines on a page, and the same line over consecutive stills."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from media_assets.stages.support.text_layout import (
    Box,
    TextLine,
    bounds,
    clockwise,
    merge_over_time,
    reading_order,
    same_text,
    turned,
)

untimed = settings(deadline=None)

coordinate = st.integers(0, 400).map(float)
extent = st.integers(1, 120).map(float)
boxes = st.lists(
    st.builds(lambda x, y, w, h: (x, y, x + w, y + h), coordinate, coordinate, extent, extent), max_size=25, unique=True
)


def box(x: float, y: float, width: float, height: float = 10) -> Box:
    return (x, y, x + width, y + height)


def line(text: str, still: int, confidence: float = 0.9, x: float = 0.1) -> TextLine:
    quad = np.array([[x, 0.1], [x + 0.2, 0.1], [x + 0.2, 0.2], [x, 0.2]], np.float32)
    return TextLine(text, confidence, quad, frame=still * 25, start_s=float(still), end_s=still + 1.0)


@untimed
@given(boxes)
def test_every_box_is_read_exactly_once(page: list[Box]) -> None:
    assert sorted(reading_order(page)) == list(range(len(page)))


@untimed
@given(boxes, st.randoms(use_true_random=False))
def test_order_does_not_depend_on_the_order_of_detection(page: list[Box], random: object) -> None:
    shuffled = list(page)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert [page[i] for i in reading_order(page)] == [shuffled[i] for i in reading_order(shuffled)]


@untimed
@given(boxes, st.sampled_from([2.0, 4.0, 0.5]), st.integers(-64, 64))
def test_order_does_not_depend_on_scale_or_place(page: list[Box], scale: float, shift: int) -> None:
    moved = [(l * scale + shift, t * scale + shift, r * scale + shift, b * scale + shift) for l, t, r, b in page]  # noqa: E741
    assert reading_order(moved) == reading_order(page)


def test_two_columns_are_read_one_after_the_other_below_their_heading() -> None:
    heading = [box(0, 0, 210)]
    left = [box(0, 40 + 14 * i, 95) for i in range(5)]
    right = [box(115, 40 + 14 * i, 95) for i in range(5)]
    interleaved = heading + [b for pair in zip(left, right, strict=True) for b in pair]
    assert [interleaved[i] for i in reading_order(interleaved)] == heading + left + right


def test_a_short_table_is_read_row_by_row() -> None:
    page = [box(0, 0, 60), box(200, 1, 40), box(0, 20, 60), box(200, 21, 40)]
    assert reading_order(list(reversed(page))) == [3, 2, 1, 0]


def test_words_of_one_skewed_row_are_read_left_to_right() -> None:
    page = [box(0, 6, 40), box(50, 3, 40), box(100, 0, 40), box(0, 14, 140)]
    assert reading_order(page) == [0, 1, 2, 3]


@untimed
@given(st.integers(0, 3), st.integers(0, 50), st.integers(0, 50), st.integers(4, 40), st.integers(4, 40))
def test_a_turned_quad_covers_the_turned_pixels(turn: int, x: int, y: int, width: int, height: int) -> None:
    picture = np.zeros((100, 120), np.uint8)
    picture[y : y + height, x : x + width] = 1
    quad = np.array([[x, y], [x + width, y], [x + width, y + height], [x, y + height]], np.float32)
    left, top, right, bottom = (int(v) for v in bounds(turned(quad, turn, 120, 100)))
    upright = np.rot90(picture, turn)
    assert upright[top:bottom, left:right].all()
    assert upright.sum() == (bottom - top) * (right - left)


def test_corners_start_at_the_top_left_and_go_clockwise() -> None:
    shuffled = np.array([[30, 22], [0, 0], [30, 2], [0, 20]], np.float32)
    assert clockwise(shuffled).tolist() == [[0, 0], [30, 2], [30, 22], [0, 20]]


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("Hell0 World", "HellO World"),
        ("of file format.", "of file format:"),
        ("Palais du LOUVRE", "Falais du LOUVRF"),
        ("Frame = l", "Frame = 1"),
        ("TAXI", "TAX!"),
        ("Copyright @ 2013", "Copyright 0 2013"),
    ],
)
def test_flicker_leaves_a_text_the_same(a: str, b: str) -> None:
    assert same_text(a, b)
    assert same_text(b, a)


@pytest.mark.parametrize(
    ("a", "b"),
    [("Frame = 11", "Frame = 12"), ("PTS = O.Os", "PTS = 1.0s"), ("cat", "car"), ("stop", "go"), ("", "word")],
)
def test_other_words_and_other_numbers_are_other_texts(a: str, b: str) -> None:
    assert not same_text(a, b)
    assert not same_text(b, a)


@untimed
@given(st.text(max_size=30), st.text(max_size=30))
def test_sameness_is_reflexive_and_symmetric(a: str, b: str) -> None:
    assert same_text(a, a)
    assert same_text(a, b) == same_text(b, a)


def test_a_title_that_flickers_is_one_row_with_its_best_reading() -> None:
    stills = [[line("Big Buck BUNMY", 0, 0.4)], [line("Big Buck BUNNY", 1, 0.9)], [line("Big Buck BUNNY", 2, 0.7)]]
    (span,) = merge_over_time(stills)
    assert (span.best.text, span.best.frame) == ("Big Buck BUNNY", 25)
    assert (span.start_s, span.end_s, span.frames_seen) == (0.0, 3.0, 3)


def test_a_still_that_was_misread_does_not_break_a_span_and_a_longer_absence_does() -> None:
    missed = merge_over_time([[line("EXIT", 0)], [], [line("EXIT", 2)]])
    assert [(s.start_s, s.end_s, s.frames_seen) for s in missed] == [(0.0, 3.0, 2)]
    gone = merge_over_time([[line("EXIT", 0)], [], [], [line("EXIT", 3)]])
    assert [(s.start_s, s.end_s) for s in gone] == [(0.0, 1.0), (3.0, 4.0)]


def test_a_word_shown_twice_at_once_stays_two_rows() -> None:
    stills = [[line("SALE", i, x=0.1), line("SALE", i, x=0.7)] for i in range(3)]
    spans = merge_over_time(stills)
    assert [(s.frames_seen, round(float(s.best.quad[0, 0]), 1)) for s in spans] == [(3, 0.1), (3, 0.7)]


@untimed
@given(st.lists(st.lists(st.sampled_from(["alpha", "bravo", "charlie", "9", "10"]), max_size=4), max_size=8))
def test_merging_loses_no_sighting_and_invents_no_time(words: list[list[str]]) -> None:
    stills = [[line(word, at) for word in still] for at, still in enumerate(words)]
    spans = merge_over_time(stills)
    assert sum(span.frames_seen for span in spans) == sum(len(still) for still in stills)
    for span in spans:
        showing = [at for at, still in enumerate(words) if span.best.text in still]
        assert span.start_s in [float(at) for at in showing]
        assert span.end_s in [at + 1.0 for at in showing]
        assert span.start_s <= span.best.start_s <= span.best.end_s <= span.end_s
    assert [span.start_s for span in spans] == sorted(span.start_s for span in spans)
