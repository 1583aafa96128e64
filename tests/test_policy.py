"""Raw scores become decisions by the rules of a policy: spans, thresholds, corroboration, and files people edit."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from media_assets.moderation.policy import (
    DEFAULT_POLICY,
    Decision,
    Policy,
    PolicyError,
    Score,
    decide,
    load_policy,
    merge_spans,
    read_policy,
    subtract_spans,
)

POLICY = Policy.model_validate(
    {
        "format": 1,
        "name": "test",
        "rules": [
            {
                "name": "weapon",
                "label": "weapons",
                "why": "two levels",
                "levels": [
                    {"min_score": 0.4, "severity": "low", "action": "allow"},
                    {"min_score": 0.8, "severity": "high", "action": "block"},
                ],
            },
            {
                "name": "naked",
                "label": "nudity",
                "why": "needs a second opinion",
                "corroboration": {"label": "sexual", "min_score": 0.5},
                "levels": [{"min_score": 0.6, "severity": "high", "action": "block"}],
            },
            {
                "name": "smoke",
                "label": "tobacco",
                "why": "long enough to matter",
                "min_duration_s": 3,
                "min_frames": 2,
                "levels": [{"min_score": 0.5, "severity": "low", "action": "review"}],
            },
        ],
    }
)


def score(label: str, value: float, start: float = 0.0, end: float = 0.0, modality: str = "image") -> Score:
    return Score(label, value, start, end, modality, "model@0123", f"{start}")


def shown(decisions: list[Decision]) -> list[tuple[str, float, float, str]]:
    return [(d.label, d.start_s, d.end_s, d.action) for d in decisions]


def test_adjacent_stills_become_one_span_and_a_stronger_still_keeps_its_own() -> None:
    scores = [score("weapons", value, float(i), i + 1.0) for i, value in enumerate([0.5, 0.6, 0.9, 0.5, 0.1, 0.7])]
    assert shown(decide(POLICY, scores)) == [
        ("weapons", 0.0, 2.0, "allow"),
        ("weapons", 2.0, 3.0, "block"),
        ("weapons", 3.0, 4.0, "allow"),
        ("weapons", 5.0, 6.0, "allow"),
    ]
    assert decide(POLICY, scores)[0].score == 0.6


def test_corroboration_must_come_at_the_same_time() -> None:
    alone = [score("nudity", 0.9, 0, 1), score("sexual", 0.2, 0, 1), score("sexual", 0.9, 1, 2)]
    assert [d.rule for d in decide(POLICY, alone)] == ["default"]
    agreed = [*alone, score("nudity", 0.7, 1, 2)]
    assert shown(decide(POLICY, agreed)) == [("nudity", 1.0, 2.0, "block")]


def test_a_picture_is_corroborated_although_its_span_is_an_instant() -> None:
    assert shown(decide(POLICY, [score("nudity", 0.9), score("sexual", 0.6)])) == [("nudity", 0.0, 0.0, "block")]


def test_minimum_duration_holds_for_films_and_not_for_pictures() -> None:
    short = [score("tobacco", 0.9, 0, 1), score("tobacco", 0.9, 1, 2)]
    assert [d.rule for d in decide(POLICY, short)] == ["default"]
    assert shown(decide(POLICY, [*short, score("tobacco", 0.9, 2, 3)])) == [("tobacco", 0.0, 3.0, "review")]
    assert shown(decide(POLICY, [score("tobacco", 0.9)])) == [("tobacco", 0.0, 0.0, "review")]


def test_every_item_has_a_decision() -> None:
    (harmless,) = decide(POLICY, [score("weapons", 0.1, 0, 4)])
    assert (harmless.label, harmless.action, harmless.severity, harmless.rule) == ("none", "allow", "none", "default")
    assert (harmless.start_s, harmless.end_s, harmless.score) == (0.0, 4.0, 0.1)
    assert [d.rule for d in decide(POLICY, [])] == ["unscored"]


LABEL = st.sampled_from(["weapons", "nudity", "sexual", "tobacco", "alcohol"])
SPANS = st.tuples(st.integers(0, 20), st.integers(0, 4)).map(lambda t: (float(t[0]), float(t[0] + t[1])))
SCORES = st.lists(
    st.builds(
        lambda label, value, span, modality: score(label, value, span[0], span[1], modality),
        LABEL,
        st.sampled_from([0.1, 0.4, 0.5, 0.6, 0.79, 0.8, 1.0]),
        SPANS,
        st.sampled_from(["image", "speech"]),
    ),
    max_size=25,
)


@given(SCORES, st.randoms())
def test_decisions_do_not_depend_on_the_order_of_scores(scores: list[Score], chance: random.Random) -> None:
    shuffled = list(scores)
    chance.shuffle(shuffled)
    assert decide(POLICY, shuffled) == decide(POLICY, scores)


@given(SCORES)
def test_spans_of_a_label_never_overlap(scores: list[Score]) -> None:
    decisions = decide(POLICY, scores)
    for label in {d.label for d in decisions}:
        spans = sorted((d.start_s, d.end_s) for d in decisions if d.label == label)
        assert all(one[1] <= other[0] for one, other in pairwise([s for s in spans if s[0] < s[1]]))
        assert len(spans) == len(set(spans))


@given(SCORES)
def test_spans_cover_exactly_the_triggering_scores(scores: list[Score]) -> None:
    triggering = [s.span for s in scores if s.label == "weapons" and s.score >= 0.4]
    decided = [(d.start_s, d.end_s) for d in decide(POLICY, scores) if d.label == "weapons"]
    assert merge_spans(decided) == merge_spans(triggering)


@given(SCORES)
def test_a_blocking_score_is_always_blocked(scores: list[Score]) -> None:
    blocked = [(d.start_s, d.end_s) for d in decide(POLICY, scores) if d.label == "weapons" and d.action == "block"]
    assert merge_spans(blocked) == merge_spans(s.span for s in scores if s.label == "weapons" and s.score >= 0.8)


@given(st.lists(SPANS), st.lists(SPANS))
def test_what_is_subtracted_is_gone_and_the_rest_is_kept(
    spans: list[tuple[float, float]], taken: list[tuple[float, float]]
) -> None:
    whole, hole = merge_spans(spans), merge_spans(taken)
    left = subtract_spans(whole, hole)
    for tick in range(100):
        at = tick / 4 + 0.1
        inside = any(a < at < b for a, b in whole) and not any(a < at < b for a, b in hole)
        assert any(a < at < b for a, b in left) == inside


def test_the_shipped_policy_blocks_agreed_nudity_and_not_a_detector_alone() -> None:
    policy = read_policy(DEFAULT_POLICY)
    agreed = decide(policy, [score("nudity", 0.8), score("sexual", 0.9)])
    assert {(d.label, d.action) for d in agreed} == {("nudity", "block"), ("sexual", "review")}
    alone = decide(policy, [score("nudity", 0.8), score("sexual", 0.05)])
    assert [(d.label, d.action, d.rule) for d in alone] == [("nudity", "allow", "uncorroborated-nudity")]


def test_a_policy_in_the_home_folder_wins_and_has_its_own_version(tmp_path: Path) -> None:
    shipped = load_policy(tmp_path)
    text = DEFAULT_POLICY.read_text()
    (tmp_path / "policy.toml").write_text("# reworded comment\n" + text)
    assert load_policy(tmp_path).version == shipped.version
    (tmp_path / "policy.toml").write_text(text.replace("min_score = 0.85", "min_score = 0.9"))
    assert load_policy(tmp_path).version != shipped.version


@pytest.mark.parametrize(
    ("find", "replace", "says"),
    [
        ('label = "weapons"', 'label = "wepons"', "unknown label wepons"),
        ('action = "block"', 'action = "explode"', "allow"),
        ("min_score = 0.85", "min_score = 0.2", "stronger decision"),
        ('name = "weapons"', 'name = "military"', "unique"),
        ("format = 1", "format = 2", "format"),
        ("format = 1", "format = ", "policy.toml"),
    ],
)
def test_a_broken_policy_says_which_file_and_what(tmp_path: Path, find: str, replace: str, says: str) -> None:
    (tmp_path / "policy.toml").write_text(DEFAULT_POLICY.read_text().replace(find, replace, 1))
    with pytest.raises(PolicyError, match=says) as raised:
        load_policy(tmp_path)
    assert str(tmp_path) in str(raised.value)
