"""Runs one evaluation: the part of the evals that knows no Dagster."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from evals.asr import evaluate_asr
from evals.duplicates import evaluate_duplicates
from evals.golden import Golden
from evals.moderation import evaluate_moderation
from evals.ocr import evaluate_ocr
from evals.result import EvalResult, Reader
from evals.retrieval import evaluate_retrieval
from evals.shots import evaluate_shots

EVALS: Mapping[str, Callable[[Golden, Reader], EvalResult]] = {
    "asr": evaluate_asr,
    "ocr": evaluate_ocr,
    "shots": evaluate_shots,
    "retrieval": evaluate_retrieval,
    "moderation": evaluate_moderation,
    "duplicates": evaluate_duplicates,
}


def evaluate(name: str, golden: Golden, tables: Reader) -> EvalResult:
    """The evaluation `name` of EVALS on the derived tables of the golden media.

    Raises KeyError for an unknown name, GoldenSetError for an unusable golden set and NotProcessedError,
    with the command to run, when the media have not been processed.
    """
    return EVALS[name](golden, tables)
