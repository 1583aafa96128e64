"""What a command is asked about and is not there: the same sentence and exit code from every command."""

from __future__ import annotations

import pytest

from cli import asked
from cli.exit_codes import Exit
from resources.errors import Failure, of_items
from resources.ingest.uploads import Removal
from resources.library import Library
from resources.records.outcome import Claim, Cost
from tests.commands import Commands
from tests.shelf import register


@pytest.fixture
def call(library: Library, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Commands:
    return Commands(library.settings.home, monkeypatch, capsys)


ASKING = {
    "status": ["status"],
    "status, JSON": ["status", "--json"],
    "similar": ["similar"],
    "retry": ["retry"],
    "retry, finished": ["retry", "--finished"],
    "dead-letters": ["dead-letters"],
    "replay": ["dead-letters", "--replay"],
}


@pytest.mark.parametrize("command", ASKING.values(), ids=ASKING)
@pytest.mark.parametrize("name", ["nobody", "removed"])
def test_an_item_that_is_not_there_is_the_same_to_every_command(
    library: Library, call: Commands, command: list[str], name: str
) -> None:
    """Given the ID of no item, or of one that was removed, then it exits 4 with one sentence and prints nothing."""
    media_id = register(library, "gone.mp4") if name == "removed" else "nobody"
    library.registry.register([], [Removal("/shelf/gone.mp4")])
    there = [register(library, "there.mp4")] if command[0] not in ("status", "similar") else []
    done = call(*command, *there, media_id)
    assert (done.code, done.out) == (Exit.NOTHING_FOUND, "")
    assert done.err.startswith(f"No live item {media_id}. `media-assets search` and")
    assert done.err.count("\n") == 1


def test_a_purge_of_nobody_is_refused_as_well(library: Library, call: Commands) -> None:
    """Given one ID that is known and one that is not, then nothing is purged, with the exit code of the others."""
    media_id = register(library, "a.mp4")
    done = call("purge", media_id, "nobody", "--yes")
    assert (done.code, done.out) == (Exit.NOTHING_FOUND, "")
    assert done.err.startswith("No media item nobody; nothing was purged.")
    assert library.registry.live([media_id])


@pytest.mark.parametrize(
    ("command", "option", "said"),
    [
        (["dead-letters"], "--class", "no error class tmeout; there are: "),
        (["dead-letters", "--replay"], "--class", "no error class tmeout; there are: "),
        (["retry"], "--error-class", "no error class tmeout; there are: "),
        (["dead-letters"], "--asset", "no asset tmeout; there are: media, "),
        (["retry"], "--asset", "no asset tmeout; there are: media, "),
        (["run"], "--select", "no asset tmeout; there are: media, "),
    ],
)
def test_a_mistyped_name_is_refused_with_those_there_are(
    call: Commands, command: list[str], option: str, said: str
) -> None:
    """Given a class or an asset with a typo, then it is a wrong argument, and the right ones are listed."""
    done = call(*command, option, "tmeout")
    assert done.code == Exit.USAGE
    told = " ".join(done.err.replace("│", "").split())
    assert f"Invalid value for {option}: {said}" in told
    assert "timeout," in told or "frames," in told


@pytest.mark.parametrize("select", ["", ",", " , "])
def test_a_selection_of_nothing_is_refused(call: Commands, select: str) -> None:
    """Given `--select` without a name, as of a variable that is not set, then it does not mean everything."""
    done = call("run", "--select", select)
    assert done.code == Exit.USAGE
    assert "names no asset" in done.err


@pytest.mark.parametrize("error_class", of_items())
def test_every_class_that_an_item_may_end_in_may_be_asked_for(library: Library, error_class: str) -> None:
    """Given a class of the runbook, then it may be asked for though nothing ended in it yet."""
    asked.outcomes(library, ["media"], [error_class], "--class")


def test_what_only_old_records_have_may_be_asked_for(library: Library, call: Commands) -> None:
    """Given an outcome with an asset and a class of an earlier version, then both may be asked for."""
    media_id = register(library, "a.mp4")
    with library.outcomes.lease("run") as lease:
        claim = library.outcomes.claim(media_id, "faces", "v1", "run", lease.liveness)
        assert isinstance(claim, Claim)
        library.outcomes.fail(claim, Failure("too_blurred", "It is blurred.", retryable=False), Cost())
    done = call("dead-letters", "--asset", "faces", "--class", "too_blurred", "--json")
    assert done.code == Exit.OK
    assert media_id in done.out
