"""Stored baselines: what the figures of a golden set were, and how much worse they may get."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict

from evals.golden import Golden, GoldenSetError
from evals.result import Better, EvalResult, Figure, safe_name
from resources import handwritten
from resources.files.local import replacing

SHIPPED = Path(__file__).with_name("baselines")
ROUNDING = 1e-9


class StoredFigure(BaseModel):
    """One figure of a baseline; an edited tolerance is kept when the baseline is stored again."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    value: float
    better: Better | None = None
    tolerance: float = 0.0


class StoredEval(BaseModel):
    """The figures of one evaluation and the models that reached them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    figures: dict[str, StoredFigure]


class Baseline(BaseModel):
    """Figures of one golden set, by evaluation. `digest` is that of the manifest they were measured on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    golden: str
    digest: str
    evals: dict[str, StoredEval] = {}

    @classmethod
    def load(cls, golden: Golden, home: Path) -> Self | None:
        """The baseline of a golden set: the installation's own, else the shipped one, else None.

        Raises GoldenSetError when the file cannot be used.
        """
        for folder in (home_folder(home), SHIPPED):
            if (found := cls.read(path_of(folder, golden.name))) is not None:
                return found
        return None

    @classmethod
    def read(cls, path: Path) -> Self | None:
        """The baseline in a file; None where there is none. Raises GoldenSetError when it cannot be used."""
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            said = handwritten.reason(error)
            raise GoldenSetError(f"The baseline {path} cannot be used: {said}.", "Mend or remove it.") from error


@dataclass(frozen=True, slots=True)
class Regression:
    """A figure that got worse than its baseline allows; `value` is None when it is gone."""

    figure: str
    value: float | None
    baseline: float
    tolerance: float

    def __str__(self) -> str:
        now = "gone" if self.value is None else f"{self.value:.4g}"
        return f"{self.figure}: {now}, baseline {self.baseline:.4g}, tolerance {self.tolerance:.4g}"


def home_folder(home: Path) -> Path:
    """Where an installation keeps its own baselines."""
    return home / "evals" / "baselines"


def path_of(folder: Path, golden: str) -> Path:
    """The baseline file of a golden set."""
    return folder / f"{safe_name(golden)}.json"


def regressions(result: EvalResult, stored: StoredEval) -> list[Regression]:
    """Figures of `result` that are worse than the baseline by more than its tolerance, or missing."""
    return [
        Regression(name, now.value if now else None, before.value, before.tolerance)
        for name, before in stored.figures.items()
        if before.better is not None and _is_worse(before, now := result.figures.get(name))
    ]


def _is_worse(before: StoredFigure, now: Figure | None) -> bool:
    if now is None:
        return True
    loss = before.value - now.value if before.better == "higher" else now.value - before.value
    return loss > before.tolerance + ROUNDING


def store_baseline(results: Iterable[EvalResult], folder: Path) -> list[Path]:
    """Make the figures of `results` the baseline of their golden sets, in `folder`; returns the files written.

    Evaluations that are not among `results` keep their figures as long as the golden set is the same.
    """
    by_golden: dict[tuple[str, str], list[EvalResult]] = {}
    for result in results:
        by_golden.setdefault((result.golden, result.golden_digest), []).append(result)
    return [_store(name, digest, found, folder) for (name, digest), found in by_golden.items()]


def _store(name: str, digest: str, results: Sequence[EvalResult], folder: Path) -> Path:
    path = path_of(folder, name)
    before = Baseline.read(path)
    evals = dict(before.evals) if before is not None and before.digest == digest else {}
    for result in results:
        kept = evals[result.name].figures if result.name in evals else {}
        figures = {
            key: StoredFigure(
                value=figure.value,
                better=figure.better,
                tolerance=kept[key].tolerance if key in kept else figure.tolerance,
            )
            for key, figure in result.figures.items()
        }
        evals[result.name] = StoredEval(model=result.model, figures=figures)
    baseline = Baseline(golden=name, digest=digest, evals=dict(sorted(evals.items())))
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(baseline.model_dump(), indent=1) + "\n", encoding="utf-8")
    return path
