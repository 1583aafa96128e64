"""`media-assets evaluate`: every evaluation on a golden set, outside Dagster."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Console

from evals.assets import check_result
from evals.baseline import home_folder, store_baseline
from evals.evaluate import EVALS, evaluate
from evals.probes import golden_for, reader_of
from resources.library import Library
from resources.records.outcomes import EVALUATION

if TYPE_CHECKING:
    from evals.result import EvalResult


def evaluate_all(library: Library, folder: str | None, keep: bool, console: Console) -> list[dict[str, Any]]:
    """Figures of every evaluation, with what its baseline says; `keep` makes them the baseline of this home.

    Raises GoldenSetError, NotProcessedError.
    """
    with library.outcomes.lease(EVALUATION):  # a purge waits for whoever may still write
        golden, tables = golden_for(library, folder), reader_of(library)
        results: list[EvalResult] = []
        for name in EVALS:
            console.print(f"evaluating {name}", style="dim")
            result = evaluate(name, golden, tables)
            result.write(library.settings.home)
            results.append(result)
    if keep:
        store_baseline(results, home_folder(library.settings.home))
    return [_told(result, golden, library) for result in results]


def _told(result: EvalResult, golden: Any, library: Library) -> dict[str, Any]:
    check = check_result(result, golden, library.settings.home)
    return {
        "eval": result.name,
        "golden": result.golden,
        "model": result.model,
        "passed": check.passed,
        "baseline": check.description or "",
        "figures": {name: figure.value for name, figure in result.figures.items()},
    }
