"""Screens: a light model looks at everything, a task's champion only at what is not clearly safe."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from media_assets.engine.versions import code_version
from media_assets.moderation.policy import DEFAULT_POLICY, Decision, Score, decide, read_policy
from media_assets.stages.moderation_scores import ModerationScores
from media_assets.stages.support.screening import Answers, Screened, Screening, strongest, verdict_of
from resources.errors import ModelUnavailable
from resources.models.registry import ModelRegistry, ModelSpec
from resources.models.screens import Screen
from resources.settings import Settings
from tests.toy_stages import Numbers

MODELS = """
[offline]
{screens}
[[offline.body]]
name = "detector"
adapter = "toy"
source = "file:/nowhere"
licence = "none"
parameters = {{ labels = {{ bare = "nudity" }} }}

[[offline.body]]
name = "old-detector"
adapter = "toy"
source = "file:/nowhere"
licence = "none"

[[offline.whole]]
name = "classifier"
adapter = "toy"
source = "file:/nowhere"
licence = "none"
parameters = {{ labels = {{ nsfw = "sexual" }} }}

[[offline.whole]]
name = "small"
adapter = "toy"
source = "file:/nowhere"
licence = "none"
parameters = {{ labels = {{ nsfw = "sexual" }} }}
"""
ACROSS = """
[[offline.screens]]
task = "body"
screened_by = "classifier"
ask_above = 0.1
"""
WITHIN = """
[[offline.screens]]
task = "whole"
screened_by = "small"
ask_above = 0.1
"""
TASKS = ("body", "whole")


def registry(folder: Path, screens: str, models: str = MODELS) -> ModelRegistry:
    """The registry of a catalogue with these screens."""
    path = folder / "models.toml"
    path.write_text(models.format(screens=screens))
    return ModelRegistry(Settings(home=folder), path)


class Toys:
    """Models that give every unit, a number, as their score; `small` cannot read negative ones."""

    def __init__(self, models: ModelRegistry) -> None:
        self.calls: list[tuple[str, list[float]]] = []
        self._screened: Screened[float] = Screened(
            models, self._score, lambda unit: str(unit).encode(), lambda spec, unit: spec.name != "small" or unit >= 0
        )

    def _score(self, spec: ModelSpec, units: Sequence[float]) -> list[dict[str, float]]:
        self.calls.append((spec.name, list(units)))
        (label,) = spec.parameters["labels"].values()
        return [{label: unit} for unit in units]

    def ask(self, *units: float) -> list[Answers]:
        """Answers about the units, in order."""
        found = self._screened.ask(TASKS, {str(unit): unit for unit in units})
        return [found[str(unit)] for unit in units]


def who(answers: Answers) -> list[str]:
    """Names of the models whose labels stand."""
    return sorted(identity.partition("@")[0] for identity in answers.labels)


def test_without_a_screen_every_champion_is_asked_about_everything(tmp_path: Path) -> None:
    toys = Toys(registry(tmp_path, ""))
    safe, risky = toys.ask(0.05, 0.5)
    assert who(safe) == who(risky) == ["classifier", "detector"]
    assert not safe.screenings
    assert toys.ask() == []


def test_the_champion_is_asked_only_above_the_threshold_and_the_first_model_once(tmp_path: Path) -> None:
    """Given another task's champion as the screen, then it answers for its own task without being asked again."""
    models = registry(tmp_path, ACROSS)
    toys = Toys(models)
    safe, edge, risky = toys.ask(0.05, 0.1, 0.2)
    assert toys.calls == [("classifier", [0.05, 0.1, 0.2]), ("detector", [0.2])]
    assert [who(found) for found in (safe, edge, risky)] == [["classifier"], ["classifier"], ["classifier", "detector"]]
    assert edge.screenings == {"body": Screening(models.spec("whole").identity, 0.1, "skipped")}
    assert risky.screenings["body"].verdict == "asked"


def test_a_lighter_model_of_the_task_answers_where_it_was_sure(tmp_path: Path) -> None:
    toys = Toys(registry(tmp_path, WITHIN))
    safe, risky, unread = toys.ask(0.05, 0.2, -1.0)
    assert [who(found) for found in (safe, risky, unread)] == [
        ["detector", "small"],
        ["classifier", "detector"],
        ["classifier", "detector"],
    ]
    assert ("small", [0.05, 0.2]) in toys.calls
    # What the first model cannot read is never skipped, whatever it would say.
    assert (unread.screenings["whole"].score, unread.screenings["whole"].verdict) == (None, "asked")


def test_second_looks_are_a_fixed_share_drawn_by_the_content() -> None:
    screen = Screen(task="body", screened_by="classifier", ask_above=0.1, second_look=0.2)
    contents = [f"still {number}".encode() for number in range(2000)]
    verdicts = [verdict_of(screen, 0.05, content) for content in contents]
    assert set(verdicts) == {"second_look", "skipped"}
    assert verdicts.count("second_look") / len(verdicts) == pytest.approx(0.2, abs=0.04)
    assert verdicts == [verdict_of(screen, 0.0, content) for content in contents]
    # A larger share contains the smaller one's sample, so raising it keeps what was seen.
    wider = [verdict_of(screen.model_copy(update={"second_look": 0.5}), 0.05, content) for content in contents]
    assert all(more == "second_look" for more, less in zip(wider, verdicts, strict=True) if less == "second_look")
    assert {verdict_of(screen.model_copy(update={"second_look": 0.0}), 0.05, c) for c in contents} == {"skipped"}
    assert {verdict_of(screen.model_copy(update={"second_look": 1.0}), 0.05, c) for c in contents} == {"second_look"}


def test_a_text_in_pieces_was_asked_about_if_any_piece_was() -> None:
    skipped, asked = Screening("m@1", 0.01, "skipped"), Screening("m@1", 0.3, "asked")
    assert strongest([skipped, asked]) == asked
    assert strongest([skipped, Screening("m@1", None, "asked")]) == Screening("m@1", 0.01, "asked")
    assert strongest([skipped, Screening("m@1", 0.0, "second_look")]) == Screening("m@1", 0.01, "second_look")


@pytest.mark.parametrize(
    ("screens", "message"),
    [
        (ACROSS.replace("classifier", "huge"), "names huge, and no models of the profile have that name"),
        (ACROSS.replace('"body"', '"bodies"'), "task bodies, which has no models"),
        (ACROSS.replace("classifier", "detector"), "task's own champion detector"),
        (ACROSS.replace("classifier", "old-detector"), "old-detector, which has no labels"),
        (ACROSS.replace("0.1", "1.5"), r"screen of models.toml \(body\) is wrong: ask_above"),
        (ACROSS + "second_look = 2\n", "second_look"),
        (ACROSS + "sample = 2\n", "sample: Extra inputs"),
        (ACROSS + ACROSS, "two screens for one task"),
        (ACROSS + WITHIN, "classifier screens task body and is itself screened in task whole"),
        (ACROSS, "2 models of the profile have that name"),
    ],
)
def test_a_wrong_screen_is_refused_by_name(tmp_path: Path, screens: str, message: str) -> None:
    twice = MODELS.replace('name = "small"', 'name = "classifier"') if message.startswith("2 models") else MODELS
    with pytest.raises(ModelUnavailable, match=message):
        registry(tmp_path, screens, twice)


def test_versions_follow_whatever_may_change_what_is_asked(tmp_path: Path) -> None:
    """Given a stage of screened tasks, then its version follows the screen and the model that looks first."""

    class Looking(Numbers):
        tasks: ClassVar[tuple[str, ...]] = ("body",)
        screened: ClassVar[tuple[tuple[str, ...], ...]] = (TASKS,)

    def version(screens: str, models: str = MODELS) -> str:
        made = registry(tmp_path, screens, models)
        return code_version(Looking(made.settings, made))

    by_small = ACROSS.replace("classifier", "small")
    heavier = MODELS.replace('name = "small"\n', 'name = "small"\nprecision = "fp16"\n')
    variants = [
        version(""),
        version(ACROSS),
        version(ACROSS.replace("0.1", "0.2")),
        version(ACROSS + "second_look = 0.1\n"),
        version(by_small),
        version(by_small, heavier),
    ]
    assert len(set(variants)) == len(variants)
    assert version(ACROSS + "enabled = false\n") == version("") == version("", heavier)


def test_a_screen_that_no_stage_follows_is_refused(tmp_path: Path) -> None:
    class Single(Numbers):
        tasks: ClassVar[tuple[str, ...]] = ("body",)

    made = registry(tmp_path, ACROSS)
    with pytest.raises(ModelUnavailable, match=r"numbers cannot let classifier \(whole\) look first .* task body"):
        Single(made.settings, made)


def test_a_text_model_cannot_look_first_at_pictures(models: ModelRegistry, tmp_path: Path) -> None:
    path = tmp_path / "models.toml"
    path.write_text(models.path.read_text().replace('screened_by = "open-nsfw"', 'screened_by = "alt-profanity-check"'))
    with pytest.raises(ModelUnavailable, match=r"alt-profanity-check \(toxicity\) look first at what task nudity"):
        ModerationScores(models.settings, ModelRegistry(models.settings, path))


SHIPPED = read_policy(DEFAULT_POLICY)
PROBABILITY = st.floats(0, 1)


@settings(deadline=None)
@given(st.lists(st.tuples(PROBABILITY, PROBABILITY), min_size=1, max_size=8))
def test_the_shipped_screen_leaves_out_nothing_the_shipped_policy_acts_on(
    models: ModelRegistry, stills: list[tuple[float, float]]
) -> None:
    """Given any scores of nudity and of sexual content, then a review or block does not depend on what was skipped."""
    found = models.screen("nudity")
    assert found is not None
    screen, first = found
    assert list(first.parameters["labels"].values()) == ["sexual"]
    rows = [
        Score(label, value, float(second), second + 1.0, "image", f"{label}@1", str(second))
        for second, scores in enumerate(stills)
        for label, value in zip(("nudity", "sexual"), scores, strict=True)
    ]
    left = [row for row in rows if row.label != "nudity" or stills[int(row.source)][1] > screen.ask_above]

    def actions(scores: list[Score]) -> list[Decision]:
        return [decision for decision in decide(SHIPPED, scores) if decision.action != "allow"]

    assert actions(left) == actions(rows)
