"""Outcome records on a real Postgres: every transition is guarded, fenced by the claim and written to the history."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from resources.errors import Failure
from resources.records.database import Database
from resources.records.outcome import Claim, Cost, LostClaim, Outcome, Status, failed, succeeded
from resources.records.outcomes import OutcomeStore
from resources.records.tables import metadata, outcome_history
from resources.settings import Engine

PERMANENT = Failure("undecodable", "It does not decode.", retryable=False)
PASSING = Failure("model_failed", "The server answered 503.", retryable=True)


@pytest.fixture
def store(database: Database) -> OutcomeStore:
    """Outcome records with two attempts and no waiting."""
    return OutcomeStore(database, Engine(max_attempts=2, retry_base_s=0))


def claimed(store: OutcomeStore, version: str = "v1", run: str = "run") -> Claim | Outcome:
    """Claim `frames` of item `a` for a run that is alive."""
    with store.lease(run) as lease:
        return store.claim("a", "frames", version, run, lease.liveness)


def claim(store: OutcomeStore, version: str = "v1", run: str = "run") -> Claim:
    """A claim that must be granted."""
    granted = claimed(store, version, run)
    assert isinstance(granted, Claim)
    return granted


def test_migrations_make_the_schema_the_code_expects(database: Database) -> None:
    """Given a migrated database, when it is compared with the tables in code, then nothing differs."""
    with database.engine.connect() as connection:
        options = {"version_table": "media_schema_version"}
        assert compare_metadata(MigrationContext.configure(connection, opts=options), metadata) == []


def test_a_restart_of_the_server_costs_an_idle_process_nothing(store: OutcomeStore, database: Database) -> None:
    """Given connections that the server has ended, then the next run of the same process claims and ends items."""
    claim(store)
    with database.engine.connect() as connection:
        own = connection.execute(sa.text("select pg_backend_pid()")).scalar_one()
        others = "select pg_terminate_backend(pid, 5000) from pg_stat_activity where datname = current_database()"
        ended = connection.execute(sa.text(f"{others} and pid <> :own"), {"own": own}).all()
        assert ended
    assert store.succeed(claim(store), Status.OK, "", Cost()).status is Status.OK


def test_success_is_final_for_its_version(store: OutcomeStore) -> None:
    """Given a finished item, then it cannot be claimed at that version, but can at another."""
    done = store.succeed(claim(store), Status.OK, "content", Cost(seconds=1.5, rows=3))
    assert (done.status, done.seconds, done.rows, done.content) == (Status.OK, 1.5, 3, "content")
    assert claimed(store) == done
    assert claim(store, "v2").attempts == 1


def test_many_are_claimed_and_ended_at_once(store: OutcomeStore) -> None:
    """Given new, finished, failed and foreign items in one call, then each gets its own answer, in their order."""
    with store.lease("run") as lease, store.lease("other"):
        done, again, _ = (store.claim(key, "frames", "v1", "other", lease.liveness) for key in "bcd")
        assert isinstance(done, Claim)
        assert isinstance(again, Claim)
        store.succeed(done, Status.OK, "", Cost())
        store.fail(again, PASSING, Cost())
        wanted = [(key, "frames", "v1") for key in "abcde"] + [("a", "audio", "v1")]
        first, finished, retried, busy, last, audio = store.claim_many(wanted, "run", lease.liveness)
    granted = [first, retried, last, audio]
    assert all(isinstance(claim, Claim) for claim in granted)
    assert [claim.attempts for claim in granted if isinstance(claim, Claim)] == [1, 2, 1, 1]
    assert {claim.twin for claim in granted if isinstance(claim, Claim)} == {"b", None}
    assert isinstance(finished, Outcome)
    assert finished.status is Status.OK
    assert isinstance(busy, Outcome)
    assert (busy.status, busy.run_id) == (Status.RUNNING, "other")
    claims = [claim for claim in granted if isinstance(claim, Claim)]
    stale = Claim("a", "frames", "v1", 7, 1)
    endings = [
        failed(claims[1], Failure("model_failed", "Said \0 and \udc80.", True), Cost(), Engine(max_attempts=2)),
        succeeded(stale, Status.OK, "", Cost()),
        succeeded(claims[0], Status.NOT_APPLICABLE, "c", Cost(seconds=1.5, device="cpu"), "It has no picture."),
    ]
    broken, lost, empty = store.end(endings)
    assert isinstance(lost, LostClaim)
    assert isinstance(broken, Outcome)
    assert (broken.media_id, broken.status) == ("c", Status.QUARANTINED)
    assert broken.error == r"Said \0 and \udc80."
    assert isinstance(empty, Outcome)
    assert (empty.status, empty.seconds, empty.error) == (Status.NOT_APPLICABLE, 1.5, "It has no picture.")
    assert store.load(["a"])["a", "frames"] == empty
    assert store.load(["e"])["e", "frames"].status is Status.RUNNING


def test_a_worker_that_lost_its_claim_cannot_write(store: OutcomeStore) -> None:
    """Given a dead worker's item claimed by another, then the first one's result is refused and changes nothing."""
    first = claim(store, run="dead")
    second = claim(store, run="other")
    assert second.attempts == 2
    with pytest.raises(LostClaim):
        store.succeed(first, Status.OK, "stale", Cost())
    with pytest.raises(LostClaim):
        store.fail(first, PERMANENT, Cost())
    assert store.succeed(second, Status.OK, "fresh", Cost()).content == "fresh"


def test_a_claim_cannot_be_finished_twice(store: OutcomeStore) -> None:
    """Given a finished claim, then finishing it again raises."""
    granted = claim(store)
    store.succeed(granted, Status.OK, "", Cost())
    with pytest.raises(LostClaim):
        store.fail(granted, PERMANENT, Cost())


def test_only_a_success_can_succeed(store: OutcomeStore) -> None:
    """Given a claim, then committing a failure status as success raises."""
    with pytest.raises(ValueError, match="not a success"):
        store.succeed(claim(store), Status.QUARANTINED, "", Cost())


def test_retryable_failures_are_quarantined_when_attempts_are_used_up(store: OutcomeStore) -> None:
    """Given two attempts, then the first failure waits with a due time, the second is quarantined and held."""
    waiting = store.fail(claim(store), PASSING, Cost())
    assert waiting.status is Status.RETRYABLE
    assert waiting.retry_at is not None
    poisoned = store.fail(claim(store), PASSING, Cost())
    assert (poisoned.status, poisoned.attempts) == (Status.QUARANTINED, 2)
    assert claimed(store) == poisoned


def test_reset_gives_a_fresh_start_by_class_asset_or_item(store: OutcomeStore) -> None:
    """Given a quarantined item, then a reset that matches it makes it claimable, one that does not leaves it."""
    store.fail(claim(store), PERMANENT, Cost())
    assert store.reset(error_classes=["timeout"]) == 0
    assert store.reset(assets=["audio"]) == 0
    assert store.reset(media_ids=["a"], assets=["frames"], error_classes=["undecodable"]) == 1
    assert claim(store).attempts == 1


def test_a_quarantined_item_is_tried_again_at_a_new_version(store: OutcomeStore) -> None:
    """Given a poisoned item, when the model changes, then it is claimable with all its attempts."""
    store.fail(claim(store), PERMANENT, Cost())
    assert claim(store, "v2").attempts == 1


def test_release_gives_the_attempt_back(store: OutcomeStore) -> None:
    """Given a clean shutdown, then the item waits with no attempt used."""
    store.release(claim(store))
    assert claim(store).attempts == 1


def test_a_live_run_keeps_its_item(store: OutcomeStore) -> None:
    """Given an item in flight in a live run, then another run gets the record instead of a claim."""
    with store.lease("first") as lease:
        store.claim("a", "frames", "v1", "first", lease.liveness)
        seen = claimed(store, run="second")
    assert isinstance(seen, Outcome)
    assert (seen.status, seen.run_id) == (Status.RUNNING, "first")
    assert claim(store, run="second").attempts == 2


def test_workers_that_die_count_as_attempts(store: OutcomeStore, database: Database) -> None:
    """Given a worker killed twice with an item in flight, then the item is quarantined as `worker_lost`."""
    script = textwrap.dedent(
        f"""
        import os, signal
        from pathlib import Path
        from resources.records.database import Database
        from resources.records.outcomes import OutcomeStore
        from resources.settings import Engine, Settings
        database = Database.open(Settings(home=Path("/nowhere"), database_url={database.url!r}))
        store = OutcomeStore(database, Engine(max_attempts=2))
        with store.lease("doomed") as lease:
            store.claim("a", "frames", "v1", "doomed", lease.liveness)
            os.kill(os.getpid(), signal.SIGKILL)
        """
    )
    for _ in range(2):
        assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -9
    lost = claimed(store)
    assert isinstance(lost, Outcome)
    assert (lost.status, lost.error_class, lost.attempts) == (Status.QUARANTINED, "worker_lost", 2)


def test_blocked_items_cost_no_attempt_and_do_not_touch_one_in_flight(store: OutcomeStore) -> None:
    """Given a failed input, then the dependant is recorded with its cause; an item in flight is left alone."""
    blocked = store.block("a", "frames", "v1", "media failed (empty)", retryable=False, run_id="run")
    assert (blocked.status, blocked.attempts, blocked.error_class) == (Status.QUARANTINED, 0, "upstream_failed")
    claim(store)
    with pytest.raises(LostClaim):
        store.block("a", "frames", "v1", "media failed (empty)", retryable=False, run_id="run")


def test_every_transition_is_in_the_history(store: OutcomeStore, database: Database) -> None:
    """Given a failure, a reset and a success, then the history tells them in order with their run."""
    store.fail(claim(store, run="one"), PERMANENT, Cost())
    store.reset()
    store.succeed(claim(store, run="two"), Status.OK, "", Cost())
    with database.engine.connect() as connection:
        query = sa.select(outcome_history.c.status, outcome_history.c.run_id).order_by(outcome_history.c.id)
        told = [tuple(row) for row in connection.execute(query)]
    assert told == [
        ("running", "one"),
        ("quarantined", "one"),
        ("retryable", "one"),
        ("running", "two"),
        ("ok", "two"),
    ]


def test_a_claim_names_its_twin(store: OutcomeStore) -> None:
    """Given an item finished at a version, then a claim at that version names it; a failed one is nobody's twin."""
    store.succeed(claim(store), Status.OK, "", Cost())
    twins: dict[str, str | None] = {}
    with store.lease("run") as lease:
        for media_id, version in (("b", "v2"), ("c", "v2"), ("d", "v1")):
            other = store.claim(media_id, "frames", version, "run", lease.liveness)
            assert isinstance(other, Claim)
            twins[media_id] = other.twin
            store.fail(other, PASSING, Cost())
        again = store.claim("d", "frames", "v1", "run", lease.liveness)
    assert twins == {"b": None, "c": None, "d": "a"}
    assert isinstance(again, Claim)
    assert (again.twin, again.attempts) == ("a", 2)
