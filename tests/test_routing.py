"""Routes: a cheap model first, the next where it was unsure, a declared fallback where one fails; and who answered."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from media_assets.engine.versions import code_version
from media_assets.stages.support.routing import Routed
from resources.errors import ModelUnavailable
from resources.models.registry import ModelRegistry, ModelSpec
from resources.settings import Settings
from tests.toy_stages import Numbers

MODELS = """
[offline]
{routes}
[[offline.toy]]
name = "large"
adapter = "toy"
source = "file:/nowhere"
licence = "none"

[[offline.toy]]
name = "small"
adapter = "toy"
source = "file:/nowhere"
licence = "none"
"""
ROUTE = """
[[offline.routes]]
task = "toy"
models = ["small", "large"]
min_confidence = [0.5]
"""
FALLBACK = 'fallback = ["small"]\n'

Inputs = Mapping[str, float]
"""How sure the small model is of each input."""


def registry(folder: Path, routes: str, models: str = MODELS) -> ModelRegistry:
    """The registry of a catalogue with these routes."""
    path = folder / "models.toml"
    path.write_text(models.format(routes=routes))
    return ModelRegistry(Settings(home=folder), path)


class Toys:
    """Two models that answer with their name; those in `broken` raise, those in `missing` do not load."""

    def __init__(self, models: ModelRegistry, broken: Mapping[str, Exception] = {}, missing: str = "") -> None:
        self.broken = broken
        self.missing = missing
        self.loads: list[str] = []
        self.calls: list[tuple[str, list[str]]] = []
        self.routed: Routed[str] = Routed(models, "toy", self._load)

    def _load(self, spec: ModelSpec) -> str:
        self.loads.append(spec.name)
        if spec.name == self.missing:
            raise ModelUnavailable(f"No weights of {spec.name}.")
        return spec.name

    def _call(self, spec: ModelSpec, model: str, inputs: Inputs) -> dict[str, tuple[str, float]]:
        assert spec.name == model
        self.calls.append((model, sorted(inputs)))
        if model in self.broken:
            raise self.broken[model]
        return {key: (model, sure if model == "small" else 1.0) for key, sure in inputs.items()}

    def ask(self, inputs: Inputs) -> dict[str, str]:
        """Who answered each input."""
        found = self.routed.ask(inputs, self._call, lambda answer: answer[1], lambda answer: len(answer[0]))
        assert all(answered.by.name == answered.answer[0] for answered in found.values())
        return {key: answered.by.name for key, answered in found.items()}


def test_without_a_route_the_champion_answers_alone(tmp_path: Path) -> None:
    models = registry(tmp_path, "")
    toys = Toys(models)
    assert toys.ask({"a": 0.9, "b": 0.1}) == {"a": "large", "b": "large"}
    assert toys.loads == ["large"]
    assert [spec.name for spec in models.asked("toy")] == ["large"]


def test_the_next_model_is_asked_only_where_the_first_was_not_sure(tmp_path: Path) -> None:
    toys = Toys(registry(tmp_path, ROUTE))
    toys.routed.load()
    assert toys.ask({"a": 0.9, "b": 0.5}) == {"a": "small", "b": "small"}
    assert toys.loads == ["small"], "what nobody needs is not loaded"
    assert toys.ask({"a": 0.9, "b": 0.1, "c": 0.4}) == {"a": "small", "b": "large", "c": "large"}
    assert toys.calls[-2:] == [("small", ["a", "b", "c"]), ("large", ["b", "c"])]
    assert toys.ask({}) == {}


def test_an_answer_too_short_to_matter_is_not_asked_again(tmp_path: Path) -> None:
    """Given an answer of five letters and a route that asks again from six on, then it stands as it is."""
    short = Toys(registry(tmp_path, ROUTE + "min_letters = [6]\n"))
    assert short.ask({"a": 0.1}) == {"a": "small"}
    assert short.loads == ["small"]
    assert Toys(registry(tmp_path, ROUTE + "min_letters = [5]\n")).ask({"a": 0.1, "b": 0.9}) == {
        "a": "large",
        "b": "small",
    }


def test_a_model_that_does_not_load_fails_unless_a_fallback_is_declared(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ModelUnavailable, match="No weights of large"):
        Toys(registry(tmp_path, ROUTE), missing="large").ask({"a": 0.1})
    toys = Toys(registry(tmp_path, ROUTE + FALLBACK), missing="large")
    with caplog.at_level(logging.WARNING):
        assert toys.ask({"a": 0.1, "b": 0.2, "c": 0.9}) == {"a": "small", "b": "small", "c": "small"}
        assert toys.ask({"d": 0.1}) == {"d": "small"}
    assert toys.loads == ["small", "large"], "within a run it is tried once"
    assert "large failed, small answers instead: No weights of large" in caplog.text


def test_an_error_is_isolated_to_one_input_before_a_fallback_answers(tmp_path: Path) -> None:
    toys = Toys(registry(tmp_path, ROUTE + FALLBACK), broken={"large": RuntimeError("shape mismatch")})
    with pytest.raises(RuntimeError, match="shape mismatch"):
        toys.ask({"a": 0.1, "b": 0.1})
    assert toys.ask({"a": 0.1}) == {"a": "small"}


def test_exhausted_memory_is_left_to_the_engine(tmp_path: Path) -> None:
    toys = Toys(registry(tmp_path, ROUTE + FALLBACK), broken={"large": RuntimeError("CUDA out of memory.")})
    with pytest.raises(RuntimeError, match="out of memory"):
        toys.ask({"a": 0.1})


@pytest.mark.parametrize(
    ("route", "message"),
    [
        (ROUTE.replace('"large"', '"huge"'), "unknown models: huge.* The task has: large, small"),
        (ROUTE + 'fallback = ["tiny"]\n', "unknown models: tiny"),
        (ROUTE.replace("toy", "toys"), "task toys .* unknown models: small, large.* no models"),
        (ROUTE.replace("[0.5]", "[]"), "min_confidence needs a value for every model but the last"),
        (ROUTE + "min_letters = [3, 3]\n", "min_letters needs a value for every model but the last, or none at all"),
        (ROUTE.replace('"large"', '"small"'), "a model is named twice"),
        (ROUTE + "retries = 3\n", "route of models.toml .toy. is wrong: retries: Extra inputs"),
        (ROUTE + ROUTE, "two routes for one task"),
    ],
)
def test_a_wrong_route_is_refused_by_name(tmp_path: Path, route: str, message: str) -> None:
    with pytest.raises(ModelUnavailable, match=message):
        registry(tmp_path, route)


def test_versions_follow_whatever_may_change_who_answers_and_nothing_else(tmp_path: Path) -> None:
    """Given a stage of a routed task, then its version follows models, thresholds and fallbacks, not batch sizes."""

    class Routed(Numbers):
        tasks = ("toy",)
        routed = ("toy",)

    def version(routes: str, models: str = MODELS) -> str:
        made = registry(tmp_path, routes, models)
        return code_version(Routed(made.settings, made))

    batched = MODELS.replace('licence = "none"', 'licence = "none"\nbatch_size = 4\nmax_wait_ms = 5')
    variants = [
        version(""),
        version(ROUTE),
        version(ROUTE.replace("0.5", "0.6")),
        version(ROUTE + FALLBACK),
        version(ROUTE + "min_letters = [3]\n"),
        version("", MODELS.replace('licence = "none"', 'licence = "none"\nprecision = "fp16"')),
        version("", MODELS.replace('licence = "none"', 'licence = "none"\ncompile = true')),
    ]
    assert len(set(variants)) == len(variants)
    assert version(ROUTE + "enabled = false\n") == version("") == version("", batched)
    assert version(ROUTE, batched) == version(ROUTE)


def test_a_route_that_no_stage_follows_is_refused(tmp_path: Path) -> None:
    """Given a route for a task whose stage asks one model, then the stage says so instead of ignoring it."""

    class Single(Numbers):
        tasks = ("toy",)

    made = registry(tmp_path, ROUTE)
    with pytest.raises(ModelUnavailable, match=r"numbers asks one model of task toy.* Remove the route"):
        Single(made.settings, made)


def test_an_adapter_refuses_what_it_cannot_do() -> None:
    spec = ModelSpec(task="toy", name="small", adapter="toy", source="file:/nowhere", licence="none", precision="bf16")
    spec.require("fp32", "bf16")
    with pytest.raises(ModelUnavailable, match=r"small .toy. cannot run in bf16"):
        spec.require("fp32", "int8")
    with pytest.raises(ModelUnavailable, match="cannot be compiled"):
        spec.model_copy(update={"compile": True}).require("bf16")
    spec.model_copy(update={"compile": True}).require("bf16", compiles=True)


def test_a_model_that_hangs_while_it_loads_holds_up_no_other(tmp_path: Path) -> None:
    """Given a load that does not return, then another model loads, and who wants the same one waits for it."""
    models = registry(tmp_path, ROUTE)
    small, large = models.spec("toy", "small"), models.spec("toy", "large")
    begun, released = threading.Event(), threading.Event()

    def hangs() -> str:
        begun.set()
        released.wait()
        return "slow"

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(models.loaded, small, hangs)
        begun.wait()
        second = pool.submit(models.loaded, small, lambda: "twice")
        assert models.loaded(large, lambda: "other") == "other"
        released.set()
        assert (first.result(), second.result()) == ("slow", "slow")
    assert set(models.loads.values()) == {1}


def test_entries_that_differ_in_how_they_ask_share_a_network(tmp_path: Path) -> None:
    """Given entries with the same weights, then they share what lies in memory unless precision or device differ."""
    spec = ModelSpec(task="toy", name="small", adapter="toy", source="file:/nowhere", licence="none")
    greedy = spec.model_copy(update={"name": "greedy", "parameters": {"beam_size": 1}})
    others = [
        spec.model_copy(update=change)
        for change in (
            {"precision": "int8"},
            {"parameters": {"device": "cuda"}},
            {"sha256": {"model.bin": "0" * 64}},
            {"source": "file:/elsewhere"},
            {"compile": True},
        )
    ]
    models = registry(tmp_path, "")
    assert models.shared(spec, object) is models.shared(greedy, object)
    assert len({id(models.shared(other, object)) for other in (spec, *others)}) == 1 + len(others)
    assert list(models.loads.values()) == [1] * (1 + len(others))


@pytest.mark.parametrize("task", ["vad", "ocr_detector", "nudity", "nsfw", "toxicity", "shots", "embedding"])
def test_no_adapter_takes_a_precision_silently(models: ModelRegistry, task: str) -> None:
    """Given int8 for a model that cannot do it, then its adapter refuses before anything loads."""
    from importlib import import_module

    from resources.models.nudity import load_image_scorer
    from resources.models.openclip import OpenClip
    from resources.models.toxicity import load_text_scorer
    from resources.models.transnet import TransNet
    from resources.models.vad import SpeechDetector

    loaders = {
        "vad": SpeechDetector,
        "ocr_detector": import_module("resources.models.rapidocr_detector").load,
        "nudity": load_image_scorer,
        "nsfw": load_image_scorer,
        "toxicity": load_text_scorer,
        "shots": TransNet,
        "embedding": OpenClip,
    }
    spec = models.spec(task).model_copy(update={"precision": "int8"})
    with pytest.raises(ModelUnavailable, match="cannot run in int8"):
        loaders[task](spec, models.cache)
