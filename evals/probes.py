"""The models an evaluation asks directly: the query encoder and the text moderator, as the graph uses them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from evals.golden import Golden, Item, golden_of
from evals.result import Reader, Vectors, Verdict
from media_assets.moderation.policy import Policy, Score, decide, load_policy
from media_assets.moderation.taxonomy import NO_FINDING
from resources.files.derived import DerivedStore
from resources.models.registry import ModelRegistry
from resources.settings import Settings


class Media(Protocol):
    """The `media` resource, as far as evaluations need it."""

    @property
    def settings(self) -> Settings:
        """Settings of the installation."""
        ...

    @property
    def store(self) -> DerivedStore:
        """Derived tables."""
        ...

    @property
    def models(self) -> ModelRegistry:
        """Model specs and loaded models."""
        ...

    def items(self) -> list[Item]:
        """(media ID, URI, SHA-256 where known) of every live media item."""
        ...


class QueryEncoder:
    """The champion embedding's text side; loaded at the first query."""

    def __init__(self, models: ModelRegistry) -> None:
        self._models = models
        self._spec = models.spec("embedding")

    @property
    def identity(self) -> str:
        """Identity of the embedding model."""
        return self._spec.identity

    def encode_texts(self, texts: Sequence[str]) -> Vectors:
        """float32 [n, d], unit length. Raises ModelUnavailable."""
        from resources.models.openclip import OpenClip

        encoder = self._models.loaded(self._spec, lambda: OpenClip(self._spec, self._models.cache))
        return encoder.encode_texts(texts)


class PolicyModerator:
    """The toxicity models of the graph, as its screen asks them, followed by the policy of the installation."""

    MODALITY = "text"

    def __init__(self, settings: Settings, models: ModelRegistry) -> None:
        from media_assets.stages.moderation_scores import TEXT_TASK, ModerationScores

        self._settings = settings
        self._stage = ModerationScores(settings, models)
        self._specs = [spec for spec in self._stage.specs() if spec.task == TEXT_TASK]

    @property
    def identity(self) -> str:
        """Identities of the text models and version of the policy."""
        version = load_policy(self._settings.home).version
        return "+".join([*(spec.identity for spec in self._specs), f"policy-{version}"])

    def judge(self, texts: Sequence[str]) -> list[Verdict]:
        """A verdict per text, in order. Raises ModelUnavailable, PolicyError."""
        from media_assets.stages.moderation_scores import TextUnit

        policy = load_policy(self._settings.home)
        answers = self._stage.answer_texts({str(number): TextUnit(text) for number, text in enumerate(texts)})
        return [self._verdict(policy, answers[str(number)].labels) for number in range(len(texts))]

    def _verdict(self, policy: Policy, labels: Mapping[str, Mapping[str, float]]) -> Verdict:
        rows = [
            Score(label, score, 0.0, 0.0, self.MODALITY, identity, "0")
            for identity, scores in labels.items()
            for label, score in scores.items()
        ]
        found = [decision for decision in decide(policy, rows) if decision.label != NO_FINDING]
        names = frozenset(decision.label for decision in found)
        return Verdict(names, any(d.action != "allow" for d in found), max((row.score for row in rows), default=0.0))


def reader_of(media: Media) -> Reader:
    """A reader over the installation's tables, with its models. Reads the list of media items once."""
    return Reader(media.store, media.items(), QueryEncoder(media.models), PolicyModerator(media.settings, media.models))


def golden_for(media: Media, folder: str | None = None) -> Golden:
    """The golden set in `folder`, else that of the settings, else the shipped samples. Raises GoldenSetError."""
    return Golden.load(folder) if folder else golden_of(media.settings)
