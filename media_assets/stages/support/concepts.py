"""Concepts of the taxonomy, recognised zero-shot in the joint space; a home encodes their prompts once per model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from media_assets.moderation.taxonomy import CONCEPTS, NEUTRAL, TEMPLATES
from resources.errors import ModelUnavailable
from resources.files.local import replacing
from resources.models.registry import ModelSpec

CLIP_LOGIT_SCALE = 100.0
PROMPTS_DIGEST = hashlib.sha256(json.dumps([dict(CONCEPTS), NEUTRAL, TEMPLATES], sort_keys=True).encode()).hexdigest()
"""SHA-256 (hex) of the prompts."""

Vectors = npt.NDArray[np.float32]
Encode = Callable[[list[str]], Vectors]
"""Texts -> joint vectors, float32 [n, d], unit length."""


class Concepts:
    """Zero-shot concept scores: a softmax over the prompts of every label and the neutral ones.

    `vectors` are those of the prompts, float32 [n, d], unit length, in the order of CONCEPTS and NEUTRAL;
    `logit_scale` is the inverse temperature that belongs to the embedding (100 for CLIP's own).
    """

    def __init__(self, vectors: Vectors, logit_scale: float) -> None:
        self._owners = [label for label, prompts in CONCEPTS.items() for _ in prompts]
        self._vectors = vectors
        self._scale = logit_scale

    def score(self, vector: Vectors) -> dict[str, float]:
        """Label -> probability that the picture shows it, of a unit-normalised float32 [d]."""
        logits = self._scale * (self._vectors @ vector).astype(np.float64)
        weights = np.exp(logits - logits.max())
        weights /= weights.sum()
        scores = dict.fromkeys(CONCEPTS, 0.0)
        for label, weight in zip(self._owners, weights, strict=False):
            scores[label] += float(weight)
        return {label: min(score, 1.0) for label, score in scores.items()}


def load_concepts(spec: ModelSpec, cache: Path, open_encoder: Callable[[], Encode]) -> Concepts:
    """Concepts in the space of the embedding model `spec`; its text side is opened only if no file in `cache` has them.

    Raises ModelUnavailable, and whatever the encoder raises.
    """
    path = cache / f"concepts-{spec.digest[:12]}-{PROMPTS_DIGEST[:12]}.npy"
    if not path.exists():
        _keep(path, _prompt_vectors(open_encoder()))
    try:
        vectors: Vectors = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ModelUnavailable(f"{path.name} cannot be read: {error}", f"Delete {path}; it is made anew.") from error
    return Concepts(vectors, float(spec.parameters.get("logit_scale", CLIP_LOGIT_SCALE)))


def _prompt_vectors(encode: Encode) -> Vectors:
    prompts = [prompt for group in CONCEPTS.values() for prompt in group] + list(NEUTRAL)
    summed = np.sum([encode([template.format(prompt) for prompt in prompts]) for template in TEMPLATES], axis=0)
    vectors: Vectors = summed / np.linalg.norm(summed, axis=1, keepdims=True)
    return vectors


def _keep(path: Path, vectors: Vectors) -> None:
    with replacing(path) as temporary, temporary.open("wb") as file:  # given a name, NumPy would add to it
        np.save(file, vectors)
