"""Scores become shots: whatever the scores, the shots tile the video; each rule holds on the scores it is for."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from media_assets.stages.support.shot_boundaries import Boundary, Rules, boundaries, change, luma, shots

scores = hnp.arrays(np.float32, st.integers(1, 200), elements=st.floats(0, 1, width=32))


@st.composite
def videos(draw):
    single = draw(scores)
    n = len(single)
    many = draw(hnp.arrays(np.float32, n, elements=st.floats(0, 1, width=32)))
    levels = st.floats(0, 255, width=32)
    return (
        single,
        many,
        draw(st.none() | hnp.arrays(np.float32, n, elements=levels)),
        draw(st.none() | hnp.arrays(np.float32, n, elements=levels)),
    )


@given(videos(), st.integers(1, 8), st.integers(0, 50))
def test_shots_tile_the_video_in_order_whatever_the_scores(video, gradual_frames, dark_frames):
    rules = Rules(gradual_frames=gradual_frames, dark_frames=dark_frames, dark_luma=128.0)
    n = len(video[0])
    found = shots(boundaries(*video, rules=rules), n)
    assert [frame for shot in found for frame in range(shot.start, shot.end + 1)] == list(range(n))
    assert found[0].opening.kind == "start"
    for shot in found:
        assert 0 <= shot.opening.first <= shot.opening.last < n
        assert 0.0 <= shot.opening.confidence <= 1.0
    for shot in found[1:]:
        assert shot.opening.frame == shot.start
        assert shot.opening.kind in ("cut", "gradual")


@given(st.integers(2, 300), st.sets(st.integers(0, 298), max_size=10))
def test_a_lone_peak_is_a_cut_after_its_frame(n, peaks):
    # given peaks that do not touch, each on the last frame of a shot
    chosen = [p for p in sorted(peaks) if p < n - 1 and p - 1 not in peaks]
    single = np.zeros(n, np.float32)
    single[chosen] = 0.9
    found = boundaries(single, single)
    assert [boundary.frame for boundary in found] == [p + 1 for p in chosen]
    assert {boundary.kind for boundary in found} <= {"cut"}


def _scores(n, gradual=(), cuts=()):
    """Scores as the model gives them: a plateau of `many` with one peak of `single`, or a lone peak."""
    single, many = np.zeros(n, np.float32), np.zeros(n, np.float32)
    for first, last in gradual:
        many[first : last + 1] = 0.9
        many[[first - 1, last + 1]] = 0.3
        single[(first + last) // 2] = 0.7
    for frame in cuts:
        single[frame - 1] = many[frame - 1] = 0.95
    return single, many


def test_a_dissolve_is_one_gradual_transition_with_its_extent():
    assert boundaries(*_scores(100, gradual=[(40, 59)])) == [Boundary(50, 39, 60, pytest.approx(0.7), "gradual")]


def test_a_fade_out_and_in_is_one_transition_at_the_middle_of_the_black():
    light = np.full(100, 100.0)
    light[20:40] = np.linspace(100, 0, 20)
    light[40:60] = 0
    light[60:80] = np.linspace(0, 100, 20)
    single, many = _scores(100, gradual=[(21, 38), (61, 78)])
    (found,) = boundaries(single, many, light)
    assert (found.kind, found.first, found.last) == ("gradual", 20, 79)
    assert found.frame == pytest.approx(50, abs=1)


def test_black_that_lasts_is_a_shot_of_its_own():
    light = np.concatenate([np.full(40, 100.0), np.zeros(120), np.full(40, 100.0)])
    single, many = _scores(200, gradual=[(35, 44), (155, 164)])
    assert len(boundaries(single, many, light)) == 2


def test_two_dissolves_with_a_bright_picture_between_stay_two():
    single, many = _scores(100, gradual=[(21, 38), (61, 78)])
    assert len(boundaries(single, many, np.full(100, 100.0))) == 2


def test_a_cut_moves_to_where_the_picture_really_changes():
    single, many = _scores(60, cuts=[21])
    jump = np.full(60, 0.2)
    jump[20] = 34.0
    assert [b.frame for b in boundaries(single, many, change=jump)] == [20]
    # but not for ordinary motion around it
    assert [b.frame for b in boundaries(single, many, change=np.linspace(5, 9, 60))] == [21]


def test_scores_of_different_length_are_refused():
    with pytest.raises(ValueError, match="3 values for 2 frames"):
        boundaries(np.zeros(2), np.zeros(3))


def test_no_frames_no_shots():
    assert shots([], 0) == []


def test_luma_and_change_measure_pictures():
    track = np.zeros((3, 27, 48, 3), np.uint8)
    track[1] = 200
    track[2, ..., 1] = 100
    assert luma(track) == pytest.approx([0, 200, 58.7], abs=0.01)
    assert change(track) == pytest.approx([0, 200, (200 + 100 + 200) / 3], abs=0.01)


def test_a_short_black_inside_one_transition_is_where_it_falls():
    light = np.abs(np.linspace(-100, 100, 41))
    single, many = _scores(41, gradual=[(5, 35)])
    single[20], single[12] = 0.0, 0.7
    (found,) = boundaries(single, many, light)
    assert found.frame == 20


def test_a_weak_peak_is_enough_for_a_long_transition_but_not_for_a_cut():
    single, many = _scores(100, gradual=[(40, 59)])
    assert [b.kind for b in boundaries(single * 0.5, many)] == ["gradual"]
    single, many = _scores(100, cuts=[50])
    assert boundaries(single * 0.5, many) == []
