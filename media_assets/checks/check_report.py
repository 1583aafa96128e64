"""What the expectations say of one table: counts and worst rows, and the same as JSON-ready fields."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class WorstRow:
    """A row that broke an expectation: where it is, the value found, and how far out of range (0 without one)."""

    media_id: str
    row: str
    value: str
    excess: float


@dataclass(frozen=True, slots=True)
class ExpectationReport:
    """How one expectation fared: rows checked, rows that broke it, and the worst of these."""

    name: str
    column: str
    passed: bool
    checked: int
    unexpected: int
    worst: tuple[WorstRow, ...] = ()


@dataclass(frozen=True, slots=True)
class CheckReport:
    """What the expectations say of one table.

    `figures` are counts and the distribution of confidences or scores (quantiles and mean), for trends.
    """

    asset: str
    passed: bool
    rows: int
    items: int
    expectations: tuple[ExpectationReport, ...]
    failing_items: tuple[str, ...] = ()
    figures: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> CheckReport:
        """The report that `dataclasses.asdict` turned into `fields`, with lists for tuples."""
        expectations = (
            ExpectationReport(**{**entry, "worst": tuple(WorstRow(**row) for row in entry["worst"])})
            for entry in fields["expectations"]
        )
        return cls(
            **{**fields, "expectations": tuple(expectations), "failing_items": tuple(fields["failing_items"])},
        )

    @property
    def failures(self) -> tuple[ExpectationReport, ...]:
        """Expectations that were broken, most rows first."""
        return tuple(sorted((e for e in self.expectations if not e.passed), key=lambda e: -e.unexpected))

    @property
    def summary(self) -> str:
        """One sentence for people."""
        if self.passed:
            return f"All {len(self.expectations)} expectations hold on {self.rows} rows of {self.items} items."
        broken = ", ".join(f"{entry.name} ({entry.unexpected} of {entry.checked})" for entry in self.failures)
        return f"{len(self.failures)} of {len(self.expectations)} expectations are broken: {broken}."
