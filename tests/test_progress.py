"""Progress of `run`: one account of the whole work, in seconds of work, whatever is reused, blocked or copied."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
from rich.console import Console

from cli.progress import Account, Reporter, line
from media_assets.engine.events import (
    BatchFinished,
    BatchStarted,
    Event,
    How,
    InferenceBegun,
    OutcomeCommitted,
    Result,
    WorkDone,
)
from resources.records.outcome import Outcome, Status

EXPECTED = {
    ("film", "media"): ("video", 1.0),
    ("film", "transcript"): ("video", 60.0),
    ("photo", "media"): ("image", 1.0),
    ("photo", "ocr_text"): ("image", 2.0),
}


def settle(
    listener: Callable[[Event], None],
    media_id: str,
    asset: str,
    how: How = How.COMPUTED,
    status: Status = Status.OK,
    seconds: float = 1.0,
    error_class: str | None = None,
) -> None:
    """One task of a batch comes to its end."""
    record = Outcome(media_id, asset, "v", "c", status, 1, 1, error_class, seconds=seconds)
    if how is How.COMPUTED:
        listener(WorkDone(asset, seconds))
    listener(OutcomeCommitted(Result(media_id, asset, how, record)))


def test_the_share_is_of_the_work_not_of_the_tasks() -> None:
    """Given three short tasks done and a long one left, then little of the work is done, though most of the tasks."""
    account = Account(EXPECTED)
    for media_id, asset, seconds in (("film", "media", 1.0), ("photo", "media", 1.0), ("photo", "ocr_text", 2.0)):
        settle(account.take, media_id, asset, seconds=seconds)
    assert account.share == pytest.approx(4 / 64)
    assert (account.items_done, account.items) == (1, 2)
    assert account.left_s == pytest.approx(60.0)


def test_what_is_reused_or_copied_makes_nothing_faster() -> None:
    """Given tasks that were reused and copied, then no work was done, and what is left is expected to take as long."""
    account = Account(EXPECTED)
    settle(account.take, "film", "media", How.REUSED)
    settle(account.take, "photo", "media", How.COPIED)
    settle(account.take, "photo", "ocr_text", How.REUSED)
    assert account.spent_s == 0
    assert account.share == 0
    assert account.left_s == pytest.approx(60.0)
    assert "time left not known yet" in line(account, account.share, "", 10.0)


def test_dependants_of_a_failure_are_no_failures() -> None:
    """Given an item whose `media` failed and three assets that follow from it, then one item failed."""
    account = Account(EXPECTED)
    settle(account.take, "film", "media", status=Status.QUARANTINED, error_class="truncated")
    for asset in ("transcript", "ocr_text", "embeddings"):
        settle(account.take, "film", asset, How.BLOCKED, Status.QUARANTINED, error_class="upstream_failed")
    assert line(account, account.share, "", 1.0)[-1] == "1 failed"


def test_what_takes_longer_than_expected_corrects_the_rest() -> None:
    """Given photos that take ten times as long as expected, then so do those left; films are expected as before."""
    expected = {(f"photo-{n}", "ocr_text"): ("image", 2.0) for n in range(100)}
    expected |= {("film", "ocr_text"): ("video", 60.0)}
    account = Account(expected)
    for n in range(50):
        settle(account.take, f"photo-{n}", "ocr_text", seconds=20.0)
    assert account.left_s == pytest.approx(50 * 20 + 60, rel=0.02)


def test_work_on_an_item_in_flight_counts() -> None:
    """Given a transcript of which 45 of 60 s are done, then 15 are left."""
    account = Account(EXPECTED)
    account.take(WorkDone("transcript", 45.0))
    assert account.left_s == pytest.approx(15 + 1 + 1 + 2)


def test_one_account_over_several_batches() -> None:
    """Given two batches, then the second goes on where the first ended, and the end is everything."""
    account = Account(EXPECTED)
    account.take(BatchStarted(1))
    settle(account.take, "photo", "media")
    settle(account.take, "photo", "ocr_text", seconds=2.0)
    account.take(BatchFinished())
    account.take(BatchStarted(1))
    settle(account.take, "film", "media")
    assert account.spent_s == pytest.approx(4.0)
    settle(account.take, "film", "transcript", seconds=60.0)
    assert (account.share, account.items_done) == (1.0, 2)


def test_a_terminal_shows_one_line_that_fits() -> None:
    """Given a terminal of forty columns, then every drawing fits it and begins where the last one did."""
    file = io.StringIO()
    reporter = Reporter(Console(file=file, force_terminal=True, width=40), EXPECTED)
    reporter(InferenceBegun("moderation_scores", 1, loads=True))
    settle(reporter, "photo", "media")
    reporter.close()
    drawn = file.getvalue()
    assert drawn.count("\n") == 1
    assert all(len(part) < 40 for part in drawn.replace("\n", "").split("\r\x1b[2K"))
