"""When the checks of a step are made, and what becomes of their errors; test_expectations has what they say."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import dagster as dg
import pytest

from media_assets.orchestration import quality
from media_assets.orchestration.quality import EXPECTATIONS, ITEMS, Checks

CHOSEN = [(asset, check) for asset in ("media", "frames") for check in (ITEMS, EXPECTATIONS)]
LIBRARY: Any = None


class Asked:
    """Stands in for both checks: who asked, when, and an error where one is to be raised."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun: dict[str, threading.Event] = {"media": threading.Event(), "frames": threading.Event()}
        self.threads: dict[str, str] = {}
        self.error: Exception | None = None
        monkeypatch.setattr(quality, "items_check", self.items)
        monkeypatch.setattr(quality, "expectations_check", self.expectations)

    def items(self, _library: Any, asset: str, _ids: Sequence[str] | None) -> tuple[str, str]:
        return asset, ITEMS

    def expectations(self, _library: Any, asset: str, _ids: Sequence[str] | None) -> tuple[str, str]:
        self.threads[asset] = threading.current_thread().name
        self.begun[asset].set()
        if self.error is not None:
            raise self.error
        return asset, EXPECTATIONS


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    return Asked(monkeypatch)


def test_expectations_begin_with_the_last_item_of_their_asset(asked: Asked) -> None:
    """Given a batch of two, then `media` is checked once both are settled, though `frames` are not, and beside them."""
    with Checks(LIBRARY, CHOSEN, ["a", "b"]) as checks:
        for asset in ("media", "frames"):
            checks.settled(asset)
        assert not checks._begun
        checks.settled("media")
        assert asked.begun["media"].wait(10)
        assert not asked.begun["frames"].is_set()
        assert list(checks.results()) == CHOSEN
    me = threading.current_thread().name
    assert asked.threads["media"] != me
    assert asked.threads["frames"] == me
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("checks")]


@pytest.mark.parametrize("media_ids", [[], None])
def test_without_a_batch_all_is_asked_at_the_end(asked: Asked, media_ids: list[str] | None) -> None:
    """Given a run over nothing, or over the library, in which nothing is settled, then each check is made once."""
    with Checks(LIBRARY, CHOSEN, media_ids) as checks:
        assert not asked.threads
        assert list(checks.results()) == CHOSEN


def test_only_what_was_chosen_is_begun(asked: Asked) -> None:
    """Given a run without the expectations of an asset, then they are not looked at."""
    with Checks(LIBRARY, [("media", ITEMS)], ["a"]) as checks:
        checks.settled("media")
        assert list(checks.results()) == [("media", ITEMS)]
    assert not asked.threads


def test_an_error_of_an_early_check_ends_the_step_when_it_asks(asked: Asked) -> None:
    """Given a check that raises beside the work, then the work goes on, and the step raises it at its end."""
    asked.error = TimeoutError("no answer")
    with Checks(LIBRARY, CHOSEN, ["a"]) as checks:
        checks.settled("media")
        assert asked.begun["media"].wait(10)
        checks.settled("frames")
        with pytest.raises(TimeoutError, match="no answer"):
            list(checks.results())


def test_an_error_of_the_step_is_not_hidden_by_a_check(asked: Asked) -> None:
    """Given a step that fails while a check is under way, then its own error is the one raised."""
    asked.error = TimeoutError("no answer")

    def step() -> None:
        with Checks(LIBRARY, CHOSEN, ["a"]) as checks:
            checks.settled("media")
            raise dg.DagsterError("of the step")

    with pytest.raises(dg.DagsterError, match="of the step"):
        step()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("checks")]
