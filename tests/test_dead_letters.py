"""Dead letters: grouped under their root cause, with examples, and given a fresh start exactly where asked."""

from __future__ import annotations

import json
from typing import Any

import pytest
import sqlalchemy as sa

from cli.dead_letters import show_dead_letters
from media_assets.engine.contract import MediaItem
from media_assets.engine.versions import item_version
from media_assets.library.dead_letters import Chosen, dead_letters, grouped, rejected, replay
from resources.errors import Failure
from resources.ingest.registry import UnknownMedia
from resources.ingest.uploads import Removal
from resources.library import Library
from resources.records.outcome import Claim, Cost, Outcome, Status
from resources.records.tables import rejected_messages, uploads
from tests.shelf import register
from tests.toy_stages import CHAIN, Doubled, Numbers, Total, Toy

BROKEN = Failure("undecodable", "It does not decode.", retryable=False)
SLOW = Failure("timeout", "It took too long.", retryable=False)
PASSING = Failure("model_failed", "The server answered 503.", retryable=True)


@pytest.fixture
def stages(library: Library) -> list[Toy]:
    return [kind(library.settings, library.models) for kind in CHAIN]


def settle(library: Library, media_id: str, stage: Toy, failure: Failure | None = None, content: str = "") -> None:
    """Finish or fail one stage of an item at the version it has now."""
    records = library.outcomes.load([media_id])
    contents = [records[media_id, name].content for name in stage.inputs]
    (row,) = library.registry.live([media_id])
    version = item_version(stage, MediaItem(media_id, row["uri"], row["etag"]), contents)
    with library.outcomes.lease("run") as lease:
        claim = library.outcomes.claim(media_id, stage.name, version, "run", lease.liveness)
    assert isinstance(claim, Claim)
    if failure is None:
        library.outcomes.succeed(claim, Status.OK, content or version, Cost())
    else:
        library.outcomes.fail(claim, failure, Cost())


def block(library: Library, media_id: str, asset: str, cause: str, retryable: bool = False) -> None:
    library.outcomes.block(media_id, asset, "v1", cause, retryable, "run")


def record(library: Library, media_id: str, asset: str) -> Outcome:
    return library.outcomes.load([media_id])[media_id, asset]


def names(library: Library, stages: list[Toy], **chosen: Any) -> set[tuple[str, str]]:
    return {(letter.media_id, letter.asset) for letter in dead_letters(library, stages, Chosen(**chosen))}


@pytest.fixture
def failed(library: Library, stages: list[Toy]) -> dict[str, str]:
    """Two files that do not decode, one whose `doubled` timed out, one that waits, one good, one removed."""
    numbers, doubled, total = stages
    ids = {name: register(library, f"{name}.mp4") for name in ("one", "two", "slow", "waits", "good", "gone")}
    for name in ("one", "two", "gone"):
        settle(library, ids[name], numbers, BROKEN)
        block(library, ids[name], "doubled", "numbers failed (undecodable)")
        block(library, ids[name], "total", "numbers failed (undecodable)")
    settle(library, ids["slow"], numbers)
    settle(library, ids["slow"], doubled, SLOW)
    block(library, ids["slow"], "total", "doubled failed (timeout)")
    settle(library, ids["waits"], numbers, PASSING)
    block(library, ids["waits"], "doubled", "numbers failed (model_failed)", retryable=True)
    for stage in (numbers, doubled, total):
        settle(library, ids["good"], stage)
    library.registry.register([], [Removal("/shelf/gone.mp4")])
    return ids


def test_failures_are_counted_once_under_their_root_cause(
    library: Library, stages: list[Toy], failed: dict[str, str]
) -> None:
    """Given failures with descendants, a retryable one and a removed item, then only live roots are dead letters."""
    groups = grouped(dead_letters(library, stages, Chosen()), examples=1)
    assert [(g.error_class, g.asset, g.items, dict(g.waiting)) for g in groups] == [
        ("undecodable", "numbers", 2, {"doubled": 2, "total": 2}),
        ("timeout", "doubled", 1, {"total": 1}),
    ]
    (example,) = groups[0].examples
    assert example.media_id == failed["two"]
    assert (example.uri, example.error) == ("/shelf/two.mp4", "It does not decode.")
    assert groups[0].since < groups[0].latest == example.at


def test_two_causes_of_one_item_share_its_descendants(library: Library) -> None:
    """Given an item with two failures of its own, then each descendant waits for the first input that failed."""
    kinds = [type(name, (Numbers,), {"name": name}) for name in ("left", "right")]
    made = [kind(library.settings, library.models) for kind in kinds]
    heirs = [
        type(name, (Total,), {"name": name, "inputs": inputs})(library.settings, library.models)
        for name, inputs in (("from_left", ("left",)), ("from_right", ("right",)), ("both", ("right", "left")))
    ]
    media_id = register(library, "a.mp4")
    for stage in made:
        settle(library, media_id, stage, BROKEN)
    for stage in heirs:
        block(library, media_id, stage.name, "an input failed")
    found = {letter.asset: letter.waiting for letter in dead_letters(library, [*made, *heirs], Chosen())}
    assert found == {"left": ("from_left",), "right": ("both", "from_right")}


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ({"error_classes": ["timeout"]}, {"slow"}),
        ({"assets": ["numbers"]}, {"one", "two"}),
        ({"assets": ["numbers"], "error_classes": ["timeout"]}, set()),
        ({}, {"one", "two", "slow"}),
    ],
)
def test_a_replay_restarts_exactly_what_the_list_shows(
    library: Library, stages: list[Toy], failed: dict[str, str], chosen: dict[str, Any], expected: set[str]
) -> None:
    """Given filters, when their dead letters are replayed, then those are due with all attempts, and no others."""
    meant = names(library, stages, **chosen)
    assert {media_id for media_id, _ in meant} == {failed[name] for name in expected}
    before = {key: found for key, found in library.outcomes.load(list(failed.values())).items() if key not in meant}
    assert replay(library, dead_letters(library, stages, Chosen(**chosen))) == len(meant)
    after = library.outcomes.load(list(failed.values()))
    assert {after[key].status for key in meant} <= {Status.RETRYABLE}
    assert {after[key].attempts for key in meant} <= {0}
    assert {key: found for key, found in after.items() if key not in meant} == before
    assert names(library, stages, **chosen) == set()


def test_a_replayed_item_goes_back_to_the_planner(library: Library, stages: list[Toy], failed: dict[str, str]) -> None:
    """Given items the planner holds for settled, when one is replayed, then that one alone is looked at again."""
    with library.database.engine.begin() as connection:
        connection.execute(sa.update(uploads).values(plan="digest", launches=3))
    replay(library, dead_letters(library, stages, Chosen(media_ids=[failed["slow"]])))
    with library.database.engine.connect() as connection:
        query = sa.select(uploads.c.media_id, uploads.c.launches).where(uploads.c.plan.is_(None))
        assert [tuple(row) for row in connection.execute(query)] == [(failed["slow"], 0)]


def test_changed_means_another_code_model_or_input(
    library: Library, stages: list[Toy], failed: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given dead letters, when the code of one stage or the content of an input changes, then those are `changed`."""
    assert names(library, stages, changed=True) == set()
    monkeypatch.setattr(Doubled, "code_version", "2")
    newer = [kind(library.settings, library.models) for kind in CHAIN]
    assert names(library, newer, changed=True) == {(failed["slow"], "doubled")}
    monkeypatch.undo()
    monkeypatch.setattr(Numbers, "code_version", "2")
    newer = [kind(library.settings, library.models) for kind in CHAIN]
    assert names(library, newer, changed=True) == {(failed["one"], "numbers"), (failed["two"], "numbers")}
    monkeypatch.undo()
    library.outcomes.reset([failed["slow"]], ["numbers"], finished=True)
    with library.outcomes.lease("again") as lease:
        claim = library.outcomes.claim(failed["slow"], "numbers", "other", "again", lease.liveness)
    assert isinstance(claim, Claim)
    assert names(library, stages, changed=True) == set()  # the input is not there: nobody can say
    library.outcomes.succeed(claim, Status.OK, "other content", Cost())
    assert names(library, stages, changed=True) == {(failed["slow"], "doubled")}


def test_messages_nobody_understood_are_listed_with_their_reason(
    library: Library, capsys: pytest.CaptureFixture[str]
) -> None:
    """Given rejected messages with hostile bodies, then they are grouped by reason and printed without controls."""
    rows = [
        {"source": "sqs", "message_id": f"m{number}", "reason": "not JSON", "body": f"\x1b[31m<b>{number}"}
        for number in range(3)
    ]
    with library.database.engine.begin() as connection:
        connection.execute(sa.insert(rejected_messages), [*rows, {**rows[0], "message_id": "x", "reason": "no key"}])
    first, second = rejected(library, examples=2)
    assert (first.reason, first.messages, [key for key, _ in first.examples]) == ("not JSON", 3, ["m2", "m1"])
    assert (second.reason, second.messages) == ("no key", 1)
    show_dead_letters(library, Chosen(), again=False, examples=1, as_json=False)
    printed = capsys.readouterr().out
    assert "3 messages" in printed
    assert "\x1b[31m<b>" not in printed


def test_the_command_lists_and_replays(
    library: Library, failed: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Given dead letters, then the JSON document lists them, a replay counts them, and an unknown ID is told."""
    show_dead_letters(library, Chosen(), again=False, examples=5, as_json=True)
    document = json.loads(capsys.readouterr().out)
    assert {(group["error_class"], group["items"]) for group in document["dead_letters"]} == {
        ("undecodable", 2),
        ("timeout", 1),
    }
    show_dead_letters(library, Chosen(), again=False, examples=5, as_json=False)
    printed = capsys.readouterr().out
    assert "/shelf/one.mp4" in printed
    chosen = Chosen(error_classes=["undecodable"])
    show_dead_letters(library, chosen, again=True, examples=5, as_json=True)
    assert json.loads(capsys.readouterr().out) == {"replayed": 2}
    assert record(library, failed["one"], "numbers").status is Status.RETRYABLE
    with pytest.raises(UnknownMedia, match="No live item no-such-item"):
        show_dead_letters(library, Chosen(media_ids=["no-such-item"]), again=True, examples=1, as_json=True)
