"""Text moderation: alt-profanity-check or any transformers text classifier, behind one interface."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from resources.errors import ModelUnavailable
from resources.models.registry import ModelSpec
from resources.models.transformers_classifier import TransformersTextClassifier
from resources.models.weights import locate


class TextScorer(Protocol):
    """A model that gives each text a score per class of its own vocabulary."""

    def score(self, texts: Sequence[str]) -> list[dict[str, float]]:
        """Class -> score 0-1 for each text, in order."""
        ...


def load_text_scorer(spec: ModelSpec, cache: Path) -> TextScorer:
    """The model that `spec.parameters["library"]` names: profanity_check or transformers. Raises ModelUnavailable."""
    library = str(spec.parameters.get("library"))
    if library not in _LIBRARIES:
        raise ModelUnavailable(
            f"Model {spec.name} ({spec.task}) names the unknown library {library}.", f"Known: {', '.join(_LIBRARIES)}."
        )
    weights = locate(spec, cache)
    try:
        return _LIBRARIES[library](spec, weights)
    except ImportError as error:
        raise ModelUnavailable(
            f"Model {spec.name} ({spec.task}) needs package {error.name}.", f"Install it: pip install {error.name}"
        ) from error


class ProfanityCheck:
    """alt-profanity-check (github.com/dimitrismistriotis/alt-profanity-check, MIT): a linear SVM over English words.

    It knows offensive words, not meaning: "I will hurt you" scores 0.44, "damn" 0.98.
    """

    def __init__(self, spec: ModelSpec, _weights: Mapping[str, Path]) -> None:
        spec.require("fp32")
        # The package unpickles its own files on import; their digests have been verified by then.
        from profanity_check import predict_prob

        self._predict: Any = predict_prob

    def score(self, texts: Sequence[str]) -> list[dict[str, float]]:
        """`offensive` -> probability."""
        return [{"offensive": float(p)} for p in self._predict(list(texts))] if texts else []


_LIBRARIES: dict[str, Callable[[ModelSpec, Mapping[str, Path]], TextScorer]] = {
    "profanity_check": ProfanityCheck,
    "transformers": TransformersTextClassifier,
}
