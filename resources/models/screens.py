"""Screens in models.toml: a light model looks at everything, the model of a task only at what is not clearly safe."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from resources import handwritten
from resources.errors import ModelUnavailable

if TYPE_CHECKING:
    from resources.models.registry import ModelSpec

SCREENS = "screens"
"""The key of a profile that holds its screens."""


class Screen(BaseModel):
    """Which model looks first at what a task's champion would score, and from which score on the champion is asked."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    task: str = Field(description="the task whose champion is asked only where the screen is not sure")
    screened_by: str = Field(description="name of the model that looks first: of this task or of another")
    ask_above: float = Field(
        ge=0, lt=1, description="the champion is asked where any label of the first model scores more than this (0-1)"
    )
    second_look: float = Field(
        default=0.0, ge=0, le=1, description="share of what lies below that is asked about all the same, as a sample"
    )
    enabled: bool = Field(default=True, description="false: the champion is asked about everything")

    @property
    def digest(self) -> str:
        """SHA-256 (hex) over everything that can change what is asked."""
        return hashlib.sha256(self.model_dump_json(exclude={"enabled"}).encode()).hexdigest()


def read_screens(
    declared: Sequence[Mapping[str, Any]], specs: Mapping[str, Sequence[ModelSpec]], path: Path
) -> dict[str, tuple[Screen, ModelSpec]]:
    """Enabled screens by task, each with the model that looks first. Raises ModelUnavailable."""
    found = [_screen(entry, specs, path) for entry in declared]
    if len({screen.task for screen, _ in found}) < len(found):
        raise ModelUnavailable(f"{path.name} has two screens for one task in a profile.", "Keep one of them.")
    enabled = {screen.task: (screen, light) for screen, light in found if screen.enabled}
    for screen, light in enabled.values():
        if light.task in enabled and light == specs[light.task][0]:
            raise ModelUnavailable(
                f"In {path.name}, {light.name} screens task {screen.task} and is itself screened in task {light.task}.",
                "A model that looks first is asked about everything: remove one of the two screens.",
            )
    return enabled


def _screen(entry: Mapping[str, Any], specs: Mapping[str, Sequence[ModelSpec]], path: Path) -> tuple[Screen, ModelSpec]:
    try:
        screen = Screen.model_validate(entry)
    except ValidationError as error:
        raise ModelUnavailable(
            f"A screen of {path.name} ({entry.get('task', 'without a task')}) is wrong: {handwritten.reason(error)}.",
            "Mend the screen.",
        ) from error
    if not specs.get(screen.task):
        raise ModelUnavailable(
            f"A screen of {path.name} is for task {screen.task}, which has no models.",
            f"The profile has models for: {', '.join(specs)}.",
        )
    named = [spec for models in specs.values() for spec in models if spec.name == screen.screened_by]
    if len(named) != 1:
        raise ModelUnavailable(
            f"The screen of task {screen.task} in {path.name} names {screen.screened_by}, "
            f"and {len(named) or 'no'} models of the profile have that name.",
            "Name one model.",
        )
    if named[0] == specs[screen.task][0]:
        raise ModelUnavailable(
            f"The screen of task {screen.task} in {path.name} names the task's own champion {screen.screened_by}.",
            "Name a lighter model, or remove the screen.",
        )
    if not named[0].parameters.get("labels"):
        raise ModelUnavailable(
            f"The screen of task {screen.task} in {path.name} names {screen.screened_by}, which has no labels.",
            "Map its classes to labels: their scores are what ask_above is compared with.",
        )
    return screen, named[0]
