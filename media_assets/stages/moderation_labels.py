"""`moderation_labels`: the policy's decision per label and span. No model runs, so a new policy only decides anew."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from media_assets import schemas
from media_assets.engine.contract import Inputs, Prepared, Product, Stage
from media_assets.moderation.policy import Action, Decision, Score, as_rows, decide, load_policy
from resources.models.registry import ModelRegistry
from resources.settings import Settings


class ModerationLabels(Stage[None, None]):
    """Decisions of `<home>/policy.toml`, or of the shipped policy, over the item's raw scores.

    Every item gets at least one row: without a finding its label is `none` and its action allow, by rule
    `default`, or by rule `unscored` where no model had anything to score.
    """

    name = "moderation_labels"
    inputs = ("moderation_scores",)
    code_version = "1"
    description = "Moderation decisions: label, severity, action and rule per span, by a versioned policy."

    def __init__(self, settings: Settings, models: ModelRegistry) -> None:
        super().__init__(settings, models)
        self.policy = load_policy(settings.home)

    def parameters(self) -> Mapping[str, object]:
        """The policy's version: a changed rule re-decides."""
        return {"policy": self.policy.version}

    def prepare(self, inputs: Inputs) -> Prepared[None]:
        """Nothing goes to a model."""
        return Prepared(carry=decide(self.policy, _scores(inputs)))

    def assemble(self, inputs: Inputs, carry: Any, outputs: Mapping[str, None]) -> Product:  # noqa: ARG002 - the interface
        """A row per decision."""
        decisions: list[Decision] = carry
        rows = as_rows(decisions, self.policy, inputs.media_id, inputs.version)
        strongest = max(decisions, key=lambda decision: Action[decision.action])
        by_action = Counter(decision.action for decision in decisions)
        facts: dict[str, int | float | str] = {"action": strongest.action, "policy": self.policy.version}
        facts.update({f"spans_{action}": count for action, count in sorted(by_action.items())})
        return Product(schemas.table(schemas.MODERATION_LABELS, rows), facts=facts)


def _scores(inputs: Inputs) -> list[Score]:
    rows = inputs.table("moderation_scores", columns=list(Score.__slots__)).to_pylist()
    return [Score(**row) for row in rows if row["score"] is not None]
