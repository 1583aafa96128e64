"""Text moderation: alt-profanity-check or any transformers text classifier, behind one interface."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from resources.errors import ModelUnavailable
from resources.models.nudity import activation, checkpoint_folder, named_scores, torch_dtype, unreadable_checkpoint
from resources.models.registry import ModelSpec
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
    """alt-profanity-check (github.com/dimitrismistriotis/alt-profanity-check, MIT): a linear SVM over word counts, English.

    It knows offensive words, not meaning: "I will hurt you" scores 0.44, "damn" 0.98.
    """

    def __init__(self, _spec: ModelSpec, _weights: Mapping[str, Path]) -> None:
        # The package unpickles its own files on import; their digests have been verified by then.
        from profanity_check import predict_prob

        self._predict: Any = predict_prob

    def score(self, texts: Sequence[str]) -> list[dict[str, float]]:
        """`offensive` -> probability."""
        return [{"offensive": float(p)} for p in self._predict(list(texts))] if texts else []


class TransformersTextClassifier:
    """Any Hugging Face sequence classifier, read from a local folder; classes come from the checkpoint."""

    def __init__(self, spec: ModelSpec, weights: Mapping[str, Path]) -> None:
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        folder = checkpoint_folder(spec, weights)
        self._torch: Any = torch
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            model: Any = AutoModelForSequenceClassification.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, RuntimeError) as error:
            raise unreadable_checkpoint(spec, error) from error
        self._model = model.to(self._device, dtype=torch_dtype(spec, self._device)).eval()
        self._activation = activation(spec)
        self._max_tokens = int(spec.parameters.get("max_tokens", 512))

    def score(self, texts: Sequence[str]) -> list[dict[str, float]]:
        """Class of the checkpoint -> probability; a text is read up to `max_tokens` tokens."""
        if not texts:
            return []
        with self._torch.inference_mode():
            tokens = self._tokenizer(
                list(texts), padding=True, truncation=True, max_length=self._max_tokens, return_tensors="pt"
            )
            logits = self._model(**tokens.to(self._device)).logits
        return named_scores(logits, self._activation, self._model.config.id2label)


_LIBRARIES: dict[str, Callable[[ModelSpec, Mapping[str, Path]], TextScorer]] = {
    "profanity_check": ProfanityCheck,
    "transformers": TransformersTextClassifier,
}
