"""Figures of quality: worked examples, and properties that hold for any input."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from evals.golden import Cuts, Range
from evals.metrics import (
    Boundary,
    Errors,
    average_precision,
    binary_decisions,
    character_errors,
    connected_pairs,
    contains_text,
    first_hit,
    hallucination_rate,
    label_decisions,
    normalise_speech,
    pair_decisions,
    pairs_in_groups,
    recall_at,
    shot_errors,
    spoken_character_errors,
    total,
    unordered_character_errors,
    word_errors,
)

WORDS = st.lists(st.text(alphabet="abcde", min_size=1, max_size=5), max_size=8).map(" ".join)
LINES = st.lists(st.text(alphabet="abcdef ", min_size=1, max_size=12).filter(str.strip), max_size=5)
FRAMES = st.lists(st.integers(0, 400), max_size=8, unique=True)


def cut(frame: int) -> Boundary:
    return Boundary(frame, Range(frame, frame), gradual=False)


def test_words_are_compared_without_case_punctuation_and_abbreviations() -> None:
    assert normalise_speech("Mr. Quilter’s well-known—“gospel”!") == "mister quilter's well known gospel"
    assert word_errors("And so, my fellow Americans,", "and so my fellow americans").edits == 0
    assert word_errors("mister john dashwood had", "Mr. Dashwood has had it") == Errors(3, 4)


def test_an_empty_reference_counts_every_word_heard() -> None:
    assert word_errors("", "thank you") == Errors(2, 0)
    assert word_errors("", "thank you").rate == 1.0
    assert word_errors("", "...").rate == 0.0


def test_a_language_without_spaces_is_measured_in_characters() -> None:
    assert spoken_character_errors("真っ昼間なのに。", "真っ昼間 なので") == Errors(1, 7)


def test_the_sum_of_errors_weighs_long_items_more() -> None:
    assert total([Errors(1, 2), Errors(0, 8)]).rate == 0.1


@given(WORDS, WORDS)
def test_word_errors_are_bounded_symmetric_in_edits_and_zero_for_equals(one: str, other: str) -> None:
    errors, swapped = word_errors(one, other), word_errors(other, one)
    longest = max(len(one.split()), len(other.split()))
    assert abs(len(one.split()) - len(other.split())) <= errors.edits <= longest
    assert errors.edits == swapped.edits
    assert word_errors(one, one).rate == 0


def test_reading_order_matters_to_one_rate_and_not_to_the_other() -> None:
    truth, read = ["Public Library", "Open Monday"], ["Open Monday", "Public Library"]
    assert character_errors(truth, read).edits > 10
    assert unordered_character_errors(truth, read).edits == 0


def test_a_line_read_in_two_pieces_costs_at_most_the_missing_space() -> None:
    assert unordered_character_errors(["TOTAL $60.44", "DATE"], ["DATE", "$60.44", "TOTAL"]).edits <= 1


def test_text_that_matches_nothing_is_wrong_throughout() -> None:
    assert unordered_character_errors(["abc"], ["xyzw"]) == Errors(4, 3)
    assert unordered_character_errors(["abc"], []).rate == 1.0


@settings(deadline=None)
@given(LINES, LINES)
def test_any_order_never_costs_more_than_the_given_order(truth: list[str], read: list[str]) -> None:
    free, ordered = unordered_character_errors(truth, read), character_errors(truth, read)
    assert 0 <= free.edits <= ordered.edits
    assert free.length == ordered.length


@settings(deadline=None)
@given(LINES.flatmap(lambda lines: st.tuples(st.just(lines), st.permutations(lines))))
def test_the_same_lines_in_any_order_are_no_error(lines: tuple[list[str], list[str]]) -> None:
    assert unordered_character_errors(*lines).edits == 0


def test_a_caption_is_found_inside_longer_text_and_despite_a_slip() -> None:
    assert contains_text("READY FOR LAUNCH", ["NASA", "ready for lanch now"])
    assert not contains_text("READY FOR LAUNCH", ["Espresso Bar"])
    assert not contains_text("READY FOR LAUNCH", [])


def test_cuts_are_found_within_two_frames_and_a_second_detection_is_false() -> None:
    score = shot_errors(Cuts((75, 200), (), ()), [cut(77), cut(197), cut(76)])
    assert (score.cuts.true_positive, score.cuts.false_positive, score.cuts.false_negative) == (1, 2, 1)


def test_a_detection_in_a_fade_is_no_false_cut() -> None:
    truth = Cuts((), (Range(450, 499),), (Range(10, 20),))
    fade = Boundary(500, Range(460, 499), gradual=True)
    score = shot_errors(truth, [fade, cut(8), cut(300)])
    assert score.cuts.false_positive == 1
    assert (score.gradual, score.gradual_found, score.gradual_named) == (1, 1, 1)


def test_a_fade_taken_for_a_cut_is_found_but_not_named() -> None:
    score = shot_errors(Cuts((), (Range(450, 499),), ()), [cut(475)])
    assert (score.gradual_found, score.gradual_named, score.cuts.false_positive) == (1, 0, 0)


@given(FRAMES, FRAMES)
def test_cut_counts_add_up(true: list[int], detected: list[int]) -> None:
    counts = shot_errors(Cuts(tuple(true), (), ()), [cut(frame) for frame in detected]).cuts
    assert counts.true_positive + counts.false_negative == len(true)
    assert counts.true_positive + counts.false_positive == len(detected)
    mirrored = shot_errors(Cuts(tuple(detected), (), ()), [cut(frame) for frame in true]).cuts
    assert mirrored.true_positive == counts.true_positive


@given(FRAMES.filter(bool))
def test_the_truth_scores_one(frames: list[int]) -> None:
    counts = shot_errors(Cuts(tuple(frames), (), ()), [cut(frame) for frame in frames]).cuts
    assert counts.precision == counts.recall == counts.f1 == 1


def test_recall_at_k_counts_queries_answered_early_enough() -> None:
    ranks = [first_hit(["a", "b", "c"], {"b", "c"}), first_hit(["a"], {"a"}), first_hit(["a"], {"z"})]
    assert ranks == [2, 1, None]
    assert recall_at(ranks, 1) == 1 / 3
    assert recall_at(ranks, 5) == 2 / 3
    assert recall_at([], 1) is None


@given(st.lists(st.none() | st.integers(1, 50), min_size=1), st.integers(1, 50))
def test_recall_grows_with_k(ranks: list[int | None], k: int) -> None:
    low, high = recall_at(ranks, k), recall_at(ranks, k + 1)
    assert low is not None
    assert high is not None
    assert 0 <= low <= high <= 1


def test_an_expectation_is_met_by_any_of_its_labels() -> None:
    due = [("weapons", "military"), ("alcohol",)]
    counts = label_decisions(due, {"military", "tobacco"})
    assert (counts.true_positive, counts.false_positive, counts.false_negative) == (1, 1, 1)
    alone = label_decisions(due, {"military", "tobacco"}, "alcohol")
    assert (alone.true_positive, alone.false_positive, alone.false_negative) == (0, 0, 1)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=30))
def test_precision_and_recall_trade_places_with_truth_and_prediction(pairs: list[tuple[bool, bool]]) -> None:
    truth, made = [a for a, _ in pairs], [b for _, b in pairs]
    one, other = binary_decisions(truth, made), binary_decisions(made, truth)
    assert one.precision == other.recall
    assert one.f1 == other.f1
    assert one.precision is None or 0 <= one.precision <= 1


@given(st.lists(st.tuples(st.booleans(), st.sampled_from([0.1, 0.4, 0.7, 0.9])), min_size=1, max_size=20))
def test_average_precision_is_bounded_and_one_for_the_truth(pairs: list[tuple[bool, float]]) -> None:
    truth, scores = [yes for yes, _ in pairs], [score for _, score in pairs]
    area = average_precision(truth, scores)
    assert (area is None) == (not any(truth))
    if area is not None:
        assert 0 <= area <= 1 + 1e-9
        perfect = average_precision(truth, [float(yes) for yes in truth])
        assert perfect is not None
        assert abs(perfect - 1) < 1e-9


def test_a_chain_of_matches_claims_every_pair_in_it() -> None:
    assert connected_pairs([("a", "b"), ("b", "c")]) == {frozenset("ab"), frozenset("bc"), frozenset("ac")}


@given(st.dictionaries(st.sampled_from("abcdefgh"), st.none() | st.sampled_from(["x", "y"]), min_size=1))
def test_the_true_groups_score_one(groups: dict[str, str | None]) -> None:
    truth = pairs_in_groups(groups)
    counts = pair_decisions(truth, connected_pairs([(a, b) for a, b in map(sorted, truth)]), groups)
    assert (counts.false_positive, counts.false_negative) == (0, 0)


def test_pairs_with_files_outside_the_judged_set_do_not_count() -> None:
    counts = pair_decisions({frozenset("ab")}, {frozenset("ab"), frozenset("az")}, "ab")
    assert (counts.true_positive, counts.false_positive) == (1, 0)


def test_hallucination_is_the_share_of_silent_clips_with_words() -> None:
    assert hallucination_rate([0, 3, 0, 1]) == 0.5
    assert hallucination_rate([]) is None
