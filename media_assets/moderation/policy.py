"""The moderation policy: rules from policy.toml turn raw scores into decisions. Pure functions, no model.

A rule watches one label. A score triggers one of its levels when it reaches the level's threshold, comes
from one of the rule's modalities and, where the rule asks for corroboration, overlaps in time with a
score of the other label that reaches its own threshold. Touching triggers form a span; in timed media a
span shorter than the rule's minimum is dropped. Where spans of one label overlap, the stronger decision
holds there and the weaker keeps the rest, so that spans of a label never overlap and together cover
exactly what triggered.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import pairwise
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from media_assets.moderation.taxonomy import LABELS, NO_FINDING
from resources import handwritten
from resources.errors import MediaError

DEFAULT_POLICY = Path(__file__).with_name("policy.toml")
OVERRIDE = "policy.toml"
FORMAT = 1

Span = tuple[float, float]
SeverityName = Literal["low", "medium", "high"]
ActionName = Literal["allow", "review", "block"]
ModalityName = Literal["image", "speech", "ocr", "text"]


class Severity(IntEnum):
    """How bad a finding is."""

    none = 0
    low = 1
    medium = 2
    high = 3


class Action(IntEnum):
    """What happens to the media."""

    allow = 0
    review = 1
    block = 2


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Level(_Part):
    """A threshold and what follows when a score reaches it."""

    min_score: float = Field(gt=0, le=1, description="score from which the level holds")
    severity: SeverityName
    action: ActionName


class Corroboration(_Part):
    """A second label that must be seen at the same time."""

    label: str = Field(description="label of the taxonomy")
    min_score: float = Field(gt=0, le=1, description="score it has to reach")

    @model_validator(mode="after")
    def _known(self) -> Self:
        _check_label(self.label)
        return self


class Rule(_Part):
    """What one label leads to."""

    name: str = Field(pattern=r"^[a-z0-9-]+$", description="unique name, shown with each decision")
    label: str = Field(description="label of the taxonomy")
    why: str = Field(description="the reason for the thresholds, for the people who review")
    modalities: tuple[ModalityName, ...] = Field(("image", "speech", "ocr", "text"), min_length=1)
    models: tuple[str, ...] = Field((), description="names of the models whose scores count; empty: all")
    min_duration_s: float = Field(0.0, ge=0, description="shortest span in timed media, seconds")
    min_frames: int = Field(1, ge=1, description="fewest distinct stills, segments or lines in a span of timed media")
    corroboration: Corroboration | None = None
    levels: tuple[Level, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        _check_label(self.label)
        ordered = sorted(self.levels, key=lambda level: level.min_score)
        strengths = [(Action[level.action], Severity[level.severity]) for level in ordered]
        if any(low >= high for low, high in pairwise(strengths)):
            raise ValueError(f"rule {self.name}: a higher threshold must lead to a stronger decision")
        return self


class Policy(_Part):
    """A versioned set of rules."""

    format: Literal[1] = Field(description="version of the file format")
    name: str = Field(description="what the policy is called")
    rules: tuple[Rule, ...]

    @model_validator(mode="after")
    def _unique(self) -> Self:
        names = [rule.name for rule in self.rules]
        if len(names) != len(set(names)) or {DEFAULT_RULE, UNSCORED_RULE} & set(names):
            raise ValueError(f"rule names must be unique and not {DEFAULT_RULE} or {UNSCORED_RULE}")
        return self

    @property
    def version(self) -> str:
        """First 12 hex digits of the SHA-256 of everything that can change a decision (comments and `why` cannot)."""
        rules = [rule.model_dump(mode="json", exclude={"why"}) for rule in self.rules]
        return hashlib.sha256(json.dumps([self.format, rules], sort_keys=True).encode()).hexdigest()[:12]


DEFAULT_RULE = "default"
UNSCORED_RULE = "unscored"


def _check_label(label: str) -> None:
    if label not in LABELS:
        raise ValueError(f"unknown label {label}; the taxonomy has {', '.join(LABELS)}")


class PolicyError(MediaError):
    """A policy file that cannot be used; the message names the file and what is wrong."""

    code, http_status = "bad_policy", 500
    remedy = "Mend the file, or remove it to use the shipped policy."


def load_policy(home: Path) -> Policy:
    """The policy in `<home>/policy.toml`, or the shipped one. Raises PolicyError."""
    override = home / OVERRIDE
    return read_policy(override if override.exists() else DEFAULT_POLICY)


def read_policy(path: Path) -> Policy:
    """The policy in a file. Raises PolicyError."""
    try:
        return Policy.model_validate(handwritten.read_toml(path))
    except (OSError, ValueError) as error:
        raise PolicyError(f"Policy {path} cannot be used: {handwritten.reason(error)}.") from error


@dataclass(frozen=True, slots=True)
class Score:
    """One raw score: a row of `moderation_scores`. Times in seconds, `start_s` <= `end_s`."""

    label: str
    score: float
    start_s: float
    end_s: float
    modality: str
    model: str
    source: str

    @property
    def span(self) -> Span:
        """(start_s, end_s)."""
        return (self.start_s, self.end_s)


@dataclass(frozen=True, slots=True)
class Decision:
    """One row of `moderation_labels`: what was found in a span and what follows from it."""

    label: str
    start_s: float
    end_s: float
    severity: str
    action: str
    rule: str
    score: float
    modality: str
    model: str


def decide(policy: Policy, scores: Iterable[Score]) -> list[Decision]:
    """Decisions for one media item, by label and start; independent of the order of `scores`.

    An item in which nothing triggered gets one decision: label `none`, rule `default` (or `unscored`
    where it had no score at all), action allow, with the strongest score it had.
    """
    ordered = sorted(scores, key=_order)
    timed = any(score.end_s > 0 for score in ordered)
    found: list[Decision] = []
    for label in sorted({rule.label for rule in policy.rules}):
        claims = [claim for rule in policy.rules if rule.label == label for claim in _claims(rule, ordered, timed)]
        found.extend(_settle(label, claims))
    return found or [_no_finding(ordered)]


@dataclass(frozen=True, slots=True)
class _Claim:
    """One level of one rule that triggered, and the scores that did it."""

    rule: str
    level: Level
    triggers: tuple[Score, ...]

    @property
    def strength(self) -> tuple[int, int, str]:
        # The name decides between equals, so that the order of rules in the file does not.
        return (Action[self.level.action], Severity[self.level.severity], self.rule)


def _claims(rule: Rule, scores: Sequence[Score], timed: bool) -> list[_Claim]:
    relevant = [score for score in scores if _is_relevant(rule, score)]
    if rule.corroboration is not None:
        other = rule.corroboration
        witnesses = merge_spans(s.span for s in scores if s.label == other.label and s.score >= other.min_score)
        relevant = [score for score in relevant if any(overlaps(score.span, span) for span in witnesses)]
    claims: list[_Claim] = []
    for level in rule.levels:
        triggers = [score for score in relevant if score.score >= level.min_score]
        kept = _long_enough(rule, triggers) if timed else triggers
        if kept:
            claims.append(_Claim(rule.name, level, tuple(kept)))
    return claims


def _is_relevant(rule: Rule, score: Score) -> bool:
    name = score.model.partition("@")[0]
    return score.label == rule.label and score.modality in rule.modalities and (not rule.models or name in rule.models)


def _long_enough(rule: Rule, triggers: Sequence[Score]) -> list[Score]:
    """Triggers in spans that reach the rule's minimum duration and number of distinct sources."""
    kept: list[Score] = []
    for start, end in merge_spans(score.span for score in triggers):
        members = [score for score in triggers if start <= score.start_s and score.end_s <= end]
        sources = {(score.modality, score.source, score.span) for score in members}
        if end - start >= rule.min_duration_s and len(sources) >= rule.min_frames:
            kept.extend(members)
    return kept


def _settle(label: str, claims: Sequence[_Claim]) -> list[Decision]:
    """Spans of the strongest claims first; weaker ones keep what is left."""
    taken: list[Span] = []
    decisions: list[Decision] = []
    for claim in sorted(claims, key=lambda claim: claim.strength, reverse=True):
        spans = merge_spans(score.span for score in claim.triggers)
        for start, end in subtract_spans(spans, taken):
            top = max((s for s in claim.triggers if overlaps(s.span, (start, end))), key=_order)
            decisions.append(
                Decision(
                    label=label,
                    start_s=start,
                    end_s=end,
                    severity=claim.level.severity,
                    action=claim.level.action,
                    rule=claim.rule,
                    score=top.score,
                    modality=top.modality,
                    model=top.model,
                )
            )
        taken = merge_spans([*taken, *spans])
    return sorted(decisions, key=lambda decision: (decision.start_s, decision.end_s))


def _no_finding(scores: Sequence[Score]) -> Decision:
    end = max((score.end_s for score in scores), default=0.0)
    top = max(scores, key=_order, default=None)
    return Decision(
        label=NO_FINDING,
        start_s=0.0,
        end_s=end,
        severity=Severity.none.name,
        action=Action.allow.name,
        rule=DEFAULT_RULE if scores else UNSCORED_RULE,
        score=top.score if top else 0.0,
        modality=top.modality if top else NO_FINDING,
        model=top.model if top else NO_FINDING,
    )


def _order(score: Score) -> tuple[float, str, str, str, str, float, float]:
    return (score.score, score.label, score.modality, score.model, score.source, score.start_s, score.end_s)


def overlaps(one: Span, other: Span) -> bool:
    """Whether two spans share more than an end point; an instant also counts at an end of the other."""
    low, high = max(one[0], other[0]), min(one[1], other[1])
    return low < high or (low == high and (one[0] == one[1] or other[0] == other[1]))


def merge_spans(spans: Iterable[Span]) -> list[Span]:
    """The union of `spans` as sorted, disjoint ones; touching spans become one."""
    merged: list[Span] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def subtract_spans(spans: Iterable[Span], taken: Iterable[Span]) -> list[Span]:
    """What is left of disjoint `spans` outside `taken`; an instant is left when no taken span contains it."""
    left = sorted(spans)
    for low, high in taken:
        left = [piece for span in left for piece in _outside(span, low, high)]
    return left


def _outside(span: Span, low: float, high: float) -> list[Span]:
    start, end = span
    if start == end:
        return [] if low <= start <= high else [span]
    if high <= start or end <= low or low == high:
        return [span]
    return [(a, b) for a, b in ((start, low), (high, end)) if a < b]


def as_rows(decisions: Sequence[Decision], policy: Policy, media_id: str, version: str) -> list[dict[str, object]]:
    """Decisions as rows of `moderation_labels`."""
    fixed: Mapping[str, object] = {"media_id": media_id, "policy_version": policy.version, "version": version}
    return [{**fixed, **{name: getattr(decision, name) for name in Decision.__slots__}} for decision in decisions]
