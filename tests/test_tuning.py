"""The auto-tuner on a model whose speed is known, and what stages make of its findings."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import pytest
import typer
from rich.console import Console

from cli.tuning import tune
from media_assets.engine.contract import Unit
from media_assets.engine.tuning import LARGEST, NothingToTune, best_of, sample, trials
from media_assets.orchestration.grouping import groups
from resources.errors import Failure
from resources.library import Library
from resources.models.registry import ModelRegistry
from resources.models.tuning import FILE, Tuned, TuningUnreadable, device_name, record, tuned
from resources.settings import Settings
from tests.test_routing import MODELS, registry
from tests.toy_stages import Numbers


class Device:
    """A clock, and a model on it: `fixed_s` per call, `unit_s` per unit, memory for `memory` units."""

    def __init__(self, fixed_s: float, unit_s: float, memory: int) -> None:
        self.now = 0.0
        self.fixed_s, self.unit_s, self.memory = fixed_s, unit_s, memory
        self.sizes: list[int] = []

    def stage(self, models: ModelRegistry) -> Numbers:
        device = self

        class Modelled(Numbers):
            tasks = ("toy",)

            def infer(self, units: Sequence[Unit[int]]) -> Mapping[str, int | Failure]:
                device.sizes.append(len(units))
                if len(units) > device.memory:
                    raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB.")
                device.now += device.fixed_s + device.unit_s * len(units)
                answers = super().infer(units)
                assert len(answers) == len(units), "every unit has an ID of its own"
                return answers

        return Modelled(models.settings, models)


@pytest.fixture
def toys(tmp_path: Path) -> ModelRegistry:
    return registry(tmp_path, "")


UNITS = [Unit(str(at), at) for at in range(3)]


def test_growing_ends_where_it_stops_paying(toys: ModelRegistry) -> None:
    """Given a call that costs as much as eight units, then a batch near a hundred is chosen and not the largest."""
    device = Device(fixed_s=0.8, unit_s=0.1, memory=10_000)
    tried = list(trials(device.stage(toys), UNITS, 3600, lambda: device.now))
    assert [trial.batch_size for trial in tried] == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
    assert best_of(tried) == Tuned(128, pytest.approx(9.412))  # type: ignore[arg-type]
    flat = Device(fixed_s=0.0, unit_s=0.1, memory=10_000)
    assert best_of(list(trials(flat.stage(toys), UNITS, 3600, lambda: flat.now))).batch_size == 1
    assert max(flat.sizes) == 4 < LARGEST


def test_memory_ends_growing_and_the_size_before_is_taken(toys: ModelRegistry) -> None:
    device = Device(fixed_s=1.0, unit_s=0.001, memory=20)
    tried = list(trials(device.stage(toys), UNITS, 3600, lambda: device.now))
    assert (tried[-1].batch_size, tried[-1].stopped) == (32, "out of memory")
    assert best_of(tried).batch_size == 16
    with pytest.raises(NothingToTune, match="Not even one unit"):
        best_of(list(trials(Device(1, 1, 0).stage(toys), UNITS, 3600)))


def test_the_time_is_bounded(toys: ModelRegistry) -> None:
    device = Device(fixed_s=1.0, unit_s=0.5, memory=10_000)
    tried = list(trials(device.stage(toys), UNITS, 30, lambda: device.now))
    assert device.now <= 30
    assert (len(tried), tried[-1].stopped) == (5, "out of time")
    with pytest.raises(NothingToTune, match="more --seconds"):
        best_of(tried)


def test_a_stage_uses_what_was_tuned_for_its_models_on_this_device(toys: ModelRegistry, tmp_path: Path) -> None:
    stage = Device(1, 1, 1).stage(toys)
    assert stage.units_per_call() == stage.micro_batch == 4
    path = record(toys.settings, stage.specs(), Tuned(32, 9.5))
    assert path == tmp_path / FILE
    assert device_name(toys.settings) in path.read_text()
    assert stage.units_per_call() == 32
    changed = registry(tmp_path, "", MODELS.replace('licence = "none"', 'licence = "none"\nprecision = "fp16"'))
    assert Device(1, 1, 1).stage(changed).units_per_call() == 4, "another model is not tuned yet"
    declared = registry(tmp_path, "", MODELS.replace('licence = "none"', 'licence = "none"\nbatch_size = 6'))
    assert Device(1, 1, 1).stage(declared).units_per_call() == 6, "what is written down comes first"


@pytest.mark.parametrize("text", ["", "[]", '{"a": {"batch_size": 0, "units_per_s": 1}}', '{"a": {"size": 1}}'])
def test_a_broken_record_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE).write_text(text)
    with pytest.raises(TuningUnreadable, match=r"tuning\.json"):
        tuned(Settings(home=tmp_path), ())


def test_an_empty_library_has_nothing_to_tune_with(library: Library) -> None:
    with pytest.raises(NothingToTune, match="media-assets run"):
        sample(library, Numbers(library.settings, library.models))


def test_the_command_names_unknown_tasks_and_what_is_missing(library: Library) -> None:
    console = Console(stderr=True)
    with pytest.raises(typer.BadParameter, match=r"no task speech; the profile has: .*asr"):
        tune(library, ["speech"], 10, console)
    with pytest.raises(NothingToTune, match="No media in this library give transcript anything to do"):
        tune(library, ["asr"], 10, console)


def test_a_stage_that_cannot_be_tuned_does_not_stop_the_others(
    library: Library, toys: ModelRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given all stages and media for one alone, then that one is tuned and the others are said; with none, it fails."""
    said = io.StringIO()
    group = groups(library.settings)[0]
    stages = [Device(1, 1, 1).stage(toys), Device(0.1, 0.001, 10_000).stage(toys)]
    monkeypatch.setattr(type(stages[1]), "name", "second")
    monkeypatch.setattr("media_assets.orchestration.grouping.groups", lambda _settings: [group])
    monkeypatch.setattr(type(group), "load", lambda *_: stages)
    monkeypatch.setattr(
        "media_assets.engine.tuning.sample", lambda _library, stage: UNITS if stage is stages[1] else _none()
    )
    (found,) = tune(library, [], 10, Console(file=said))
    assert found["asset"] == "second"
    assert "is not tuned: nothing here" in said.getvalue()
    monkeypatch.setattr("media_assets.engine.tuning.sample", lambda *_: _none())
    with pytest.raises(NothingToTune, match="No stage could be tuned"):
        tune(library, [], 10, Console(file=said))


def _none() -> NoReturn:
    raise NothingToTune("nothing here")
