"""Quality figures as pure functions: transcripts, recognised text, shots, retrieval, decisions, duplicates."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from evals.golden import Cuts, Range

SHOT_TOLERANCE = 2
"""How far a detected boundary may be from the true one, frames."""
WRITTEN_OUT = {"mr": "mister", "mrs": "missus", "ms": "miss", "dr": "doctor", "st": "saint"}
"""Abbreviations that transcripts write either way."""
_APOSTROPHES = str.maketrans({"’": "'", "‘": "'", "ʼ": "'", "`": "'"})

Pair = frozenset[str]


@dataclass(frozen=True, slots=True)
class Errors:
    """Edits (substitutions, deletions, insertions) against a reference of `length` units."""

    edits: int
    length: int

    @property
    def rate(self) -> float:
        """Edits per unit of the reference; for an empty reference 0 without edits, else 1."""
        return self.edits / self.length if self.length else float(self.edits > 0)

    def __add__(self, other: Errors) -> Errors:
        return Errors(self.edits + other.edits, self.length + other.length)


def total(errors: Iterable[Errors]) -> Errors:
    """The sum: its rate is the micro-average, in which long items weigh more."""
    return sum(errors, Errors(0, 0))


@dataclass(frozen=True, slots=True)
class Decisions:
    """Counts of right and wrong decisions."""

    true_positive: int
    false_positive: int
    false_negative: int

    @property
    def precision(self) -> float | None:
        """Right decisions among those made; None when none was made."""
        return _ratio(self.true_positive, self.true_positive + self.false_positive)

    @property
    def recall(self) -> float | None:
        """Right decisions among those due; None when none was due."""
        return _ratio(self.true_positive, self.true_positive + self.false_negative)

    @property
    def f1(self) -> float | None:
        """Harmonic mean of precision and recall; None when there was nothing to decide."""
        return _ratio(2 * self.true_positive, 2 * self.true_positive + self.false_positive + self.false_negative)

    def __add__(self, other: Decisions) -> Decisions:
        return Decisions(
            self.true_positive + other.true_positive,
            self.false_positive + other.false_positive,
            self.false_negative + other.false_negative,
        )


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def normalise_speech(text: str) -> str:
    """Text as word error rate compares it.

    Unicode NFKC, case-folded, curly apostrophes straightened, hyphens and dashes as spaces, everything
    but letters, digits and apostrophes inside words removed, common abbreviations written out (mr ->
    mister), single spaces. Numbers are left as they are written.
    """
    folded = unicodedata.normalize("NFKC", text).casefold().translate(_APOSTROPHES)
    spaced = "".join(char if _is_word(char) else " " for char in folded)
    words = (word.strip("'") for word in re.sub(r"(?<!\w)'|'(?!\w)", " ", spaced).split())
    return " ".join(WRITTEN_OUT.get(word, word) for word in words if word)


def _is_word(char: str) -> bool:
    return char == "'" or unicodedata.category(char)[0] in "LNM"


def word_errors(reference: str, hypothesis: str) -> Errors:
    """Edits between the normalised words (jiwer)."""
    truth, guess = normalise_speech(reference), normalise_speech(hypothesis)
    if not truth or not guess:
        length = len(truth.split())
        return Errors(max(length, len(guess.split())), length)
    import jiwer

    found = jiwer.process_words(truth, guess)
    return Errors(found.substitutions + found.deletions + found.insertions, len(truth.split()))


def spoken_character_errors(reference: str, hypothesis: str) -> Errors:
    """Edits between the normalised characters without spaces: for languages written without them."""
    truth, guess = (normalise_speech(text).replace(" ", "") for text in (reference, hypothesis))
    return Errors(_distance(truth, guess), len(truth))


def word_count(text: str) -> int:
    """Words of the normalised text."""
    return len(normalise_speech(text).split())


def normalise_print(text: str) -> str:
    """Text as character error rate compares it: Unicode NFKC and single spaces; case and punctuation count."""
    return " ".join(unicodedata.normalize("NFKC", text).translate(_APOSTROPHES).split())


def character_errors(reference: Sequence[str], hypothesis: Sequence[str]) -> Errors:
    """Edits between the lines joined in the order given: sensitive to reading order."""
    truth, guess = (normalise_print(" ".join(lines)) for lines in (reference, hypothesis))
    return Errors(_distance(truth, guess), len(truth))


def unordered_character_errors(reference: Sequence[str], hypothesis: Sequence[str]) -> Errors:
    """Edits whatever the order and the splitting of lines.

    After the flexible character accuracy of Clausner et al. (2020): the best matching pair of a true and
    a recognised line is taken, the shorter against the best part of the longer, whose rest goes back into
    the pool, until nothing matches. Never more edits than `character_errors`.
    """
    truth = [line for line in map(normalise_print, reference) if line]
    guess = [line for line in map(normalise_print, hypothesis) if line]
    ordered = character_errors(reference, hypothesis)
    edits = 0
    left, right = list(truth), list(guess)
    while pick := _best_pair(left, right):
        one, other, start, end = pick
        left.remove(one)
        right.remove(other)
        if len(one) <= len(other):
            edits += _distance(one, other[start:end])
            right.extend(_rest(other, start, end))
        else:
            edits += _distance(one[start:end], other)
            left.extend(_rest(one, start, end))
    # What matches nothing is exchanged as far as it goes and deleted or inserted beyond.
    edits += max(sum(map(len, left)), sum(map(len, right)))
    length = ordered.length
    return Errors(min(edits, ordered.edits), length)


_MIN_SIMILARITY = 50.0


def _best_pair(left: Sequence[str], right: Sequence[str]) -> tuple[str, str, int, int] | None:
    """The most similar pair and the part (start, end) of its longer line; the longest of equally similar ones."""
    from rapidfuzz.fuzz import partial_ratio_alignment

    best: tuple[tuple[float, int, int], tuple[str, str, int, int]] | None = None
    for one in sorted(set(left)):
        for other in sorted(set(right)):
            shorter, longer = (one, other) if len(one) <= len(other) else (other, one)
            found = partial_ratio_alignment(shorter, longer, score_cutoff=_MIN_SIMILARITY)
            if found is None:
                continue
            # A whole line is preferred to a part of one, so that equal lines find each other.
            rank = (found.score, len(shorter), -len(longer))
            if best is None or rank > best[0]:
                best = (rank, (one, other, found.dest_start, found.dest_end))
    return best[1] if best else None


def _rest(line: str, start: int, end: int) -> list[str]:
    return [piece for part in (line[:start], line[end:]) if (piece := part.strip())]


def contains_text(line: str, found: Iterable[str], max_error: float = 0.25) -> bool:
    """Whether some part of the recognised lines reads `line`, case aside, within `max_error` edits per character."""
    from rapidfuzz.fuzz import partial_ratio_alignment

    wanted = normalise_print(line).casefold()
    text = normalise_print(" ".join(found)).casefold()
    if not wanted or not text:
        return not wanted
    if len(text) < len(wanted):
        return _distance(wanted, text) <= max_error * len(wanted)
    match = partial_ratio_alignment(wanted, text)
    return match is not None and _distance(wanted, text[match.dest_start : match.dest_end]) <= max_error * len(wanted)


def _distance(one: str, other: str) -> int:
    from rapidfuzz.distance import Levenshtein

    return Levenshtein.distance(one, other)


@dataclass(frozen=True, slots=True)
class Boundary:
    """A detected boundary: the new shot's first frame, and the transition's frames (inclusive)."""

    frame: int
    transition: Range
    gradual: bool


@dataclass(frozen=True, slots=True)
class ShotScore:
    """How detected boundaries compare with the truth.

    `cuts` counts hard cuts; a detection inside a gradual transition or an ambiguous range is no false cut.
    """

    cuts: Decisions
    gradual: int
    gradual_found: int
    gradual_named: int


def shot_errors(truth: Cuts, detected: Sequence[Boundary], tolerance: int = SHOT_TOLERANCE) -> ShotScore:
    """Match detected boundaries with hard cuts one to one, then with gradual and ambiguous ranges."""
    matched, rest = _match_cuts(sorted(set(truth.hard)), sorted(detected, key=lambda b: b.frame), tolerance)
    hits = {span: [b for b in rest if _touches(b, span, tolerance)] for span in truth.gradual}
    excused = {id(b) for found in hits.values() for b in found}
    excused |= {id(b) for b in rest for span in truth.ambiguous if _touches(b, span, tolerance)}
    return ShotScore(
        cuts=Decisions(matched, sum(id(b) not in excused for b in rest), len(set(truth.hard)) - matched),
        gradual=len(truth.gradual),
        gradual_found=sum(bool(hits[span]) for span in truth.gradual),
        gradual_named=sum(any(b.gradual for b in hits[span]) for span in truth.gradual),
    )


def _match_cuts(cuts: Sequence[int], detected: Sequence[Boundary], tolerance: int) -> tuple[int, list[Boundary]]:
    """How many cuts find a detection of their own, and the detections left. Both are sorted by frame.

    Giving each detection the earliest free cut within reach makes the largest matching, as on any line.
    """
    matched, next_cut = 0, 0
    rest: list[Boundary] = []
    for boundary in detected:
        while next_cut < len(cuts) and cuts[next_cut] < boundary.frame - tolerance:
            next_cut += 1
        if next_cut < len(cuts) and abs(cuts[next_cut] - boundary.frame) <= tolerance:
            matched, next_cut = matched + 1, next_cut + 1
        else:
            rest.append(boundary)
    return matched, rest


def _touches(boundary: Boundary, span: Range, tolerance: int) -> bool:
    first = min(boundary.transition.first, boundary.frame)
    last = max(boundary.transition.last, boundary.frame)
    return first <= span.last + tolerance and last >= span.first - tolerance


def first_hit(ranking: Sequence[Hashable], relevant: Collection[Hashable]) -> int | None:
    """1-based rank of the first relevant answer, or None."""
    return next((rank for rank, answer in enumerate(ranking, 1) if answer in relevant), None)


def recall_at(ranks: Sequence[int | None], k: int) -> float | None:
    """Share of the queries with a relevant answer among the first `k`; None without queries."""
    return _ratio(sum(rank is not None and rank <= k for rank in ranks), len(ranks))


def label_decisions(
    expected: Sequence[Collection[str]], predicted: Collection[str], label: str | None = None
) -> Decisions:
    """Labels of one item against what was expected.

    Each expectation is a non-empty sequence of labels any of which fulfils it, the usual one first. With
    `label`, only predictions of that label and expectations whose usual label it is are counted.
    """
    allowed = {name for choices in expected for name in choices}
    counted = {name for name in predicted if label in (None, name)}
    due = [choices for choices in expected if label in (None, next(iter(choices)))]
    hit = sum(any(name in predicted for name in choices) for choices in due)
    return Decisions(hit, len(counted - allowed), len(due) - hit)


def binary_decisions(truth: Sequence[bool], predicted: Sequence[bool]) -> Decisions:
    """Yes-or-no decisions, item by item."""
    pairs = list(zip(truth, predicted, strict=True))
    return Decisions(pairs.count((True, True)), pairs.count((False, True)), pairs.count((True, False)))


def average_precision(truth: Sequence[bool], scores: Sequence[float]) -> float | None:
    """Area under the precision-recall curve; ties are counted together. None without a positive."""
    positives = sum(truth)
    if not positives:
        return None
    area, hits, seen = 0.0, 0, 0
    for threshold in sorted(set(scores), reverse=True):
        group = [yes for yes, score in zip(truth, scores, strict=True) if score == threshold]
        seen += len(group)
        hits += sum(group)
        area += sum(group) / positives * hits / seen
    return area


def pairs_in_groups(groups: Mapping[str, str | None]) -> set[Pair]:
    """Unordered pairs of members of the same group; None is no group."""
    members: dict[str, list[str]] = {}
    for member, group in groups.items():
        if group is not None:
            members.setdefault(group, []).append(member)
    return {frozenset(pair) for names in members.values() for pair in combinations(names, 2)}


def connected_pairs(links: Iterable[tuple[str, str]]) -> set[Pair]:
    """All pairs within the connected components of `links`: what a grouping by those links claims."""
    leader: dict[str, str] = {}

    def lead(name: str) -> str:
        leader.setdefault(name, name)
        while leader[name] != name:
            leader[name] = leader[leader[name]]
            name = leader[name]
        return name

    for one, other in links:
        leader[lead(one)] = lead(other)
    return {pair for pair in pairs_in_groups({name: lead(name) for name in list(leader)}) if len(pair) == 2}


def pair_decisions(truth: Collection[Pair], predicted: Collection[Pair], judged: Collection[str]) -> Decisions:
    """Predicted pairs against true ones, among the `judged` members alone."""
    known = set(judged)
    made = {pair for pair in predicted if pair <= known}
    due = {pair for pair in truth if pair <= known}
    return Decisions(len(made & due), len(made - due), len(due - made))


def hallucination_rate(word_counts: Sequence[int]) -> float | None:
    """Share of clips without speech in which words were heard; None without such clips."""
    return _ratio(sum(count > 0 for count in word_counts), len(word_counts))
