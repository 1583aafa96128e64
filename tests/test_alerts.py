"""The alert sensor: what failed is posted once and never lost, whatever the receiver does."""

from __future__ import annotations

import json
import threading
import uuid
from base64 import b64encode
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import sqlalchemy as sa

from cli.instance import open_instance
from resources.library import Library
from resources.records.tables import batches, outcome_history, rejected_messages
from resources.settings import Alerts, Settings
from sensors import failures
from sensors.alerts import UNSET, build_alert_sensor
from sensors.webhook import AlertUndelivered, masked, post

SECRET = "T0/B0/s3cr3t"


@dataclass
class Receiver:
    """A webhook on loopback that answers as told and keeps what it accepted or refused."""

    port: int = 0
    answer: int = 200
    login: str | None = None
    requests: list[tuple[str, Any]] = field(default_factory=list)

    @property
    def url(self) -> str:
        """Its secret URL."""
        return f"http://127.0.0.1:{self.port}/services/{SECRET}"


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    """A running webhook."""
    told = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            told.requests.append((f"{self.command} {self.path}", body))
            told.login = self.headers["authorization"]
            self.send_response(told.answer)
            if told.answer == 302:
                self.send_header("location", "/elsewhere")
            self.end_headers()

        def do_GET(self) -> None:
            told.requests.append((f"{self.command} {self.path}", None))
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    told.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield told
    server.shutdown()
    thread.join()
    server.server_close()


@dataclass
class Ticking:
    """The sensor of a library, ticked as the daemon does: the cursor moves only with a tick that ends well."""

    library: Library
    instance: dg.DagsterInstance
    alerts: Alerts
    cursor: str | None = None

    def tick(self) -> str:
        """One tick; returns what it says."""
        sensor = build_alert_sensor(self.library.settings.model_copy(update={"alerts": self.alerts}))
        with dg.build_sensor_context(
            instance=self.instance, cursor=self.cursor, resources={"media": self.library}
        ) as context:
            result = sensor.evaluate_tick(context)
        assert not result.run_requests
        self.cursor = result.cursor or self.cursor
        return result.skip_message or ""

    def write(self, table: sa.Table, *rows: dict[str, Any]) -> None:
        """Insert rows."""
        with self.library.database.engine.begin() as connection:
            connection.execute(sa.insert(table), list(rows))


def alerts(receiver: Receiver, **values: Any) -> Alerts:
    """Settings for a receiver, without a pause between posts."""
    return Alerts.model_validate({"webhook_url": receiver.url, "min_interval_s": 0, **values})


@pytest.fixture(scope="module")
def installation(server_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Library, Any]]:
    """A library and its Dagster instance on Postgres, which the tests share: each looks at what is new to it."""
    name = f"t{uuid.uuid4().hex[:12]}"
    admin = sa.create_engine(server_url, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(sa.text(f"create database {name}"))
    url = sa.make_url(server_url).set(database=name).render_as_string(hide_password=False)
    with pytest.MonkeyPatch.context() as patch:
        for variable in ("MEDIA_DATABASE_URL", "MEDIA_HOME", "DAGSTER_HOME"):
            patch.setenv(variable, url if variable == "MEDIA_DATABASE_URL" else "unset")  # put back at the end
        library = Library(Settings(home=tmp_path_factory.mktemp("alerts"), database_url=url))
        with open_instance(library) as instance:
            yield library, instance
        library.close()
    with admin.connect() as connection:
        connection.execute(sa.text(f"drop database {name} with (force)"))
    admin.dispose()


@pytest.fixture
def ticking(
    installation: tuple[Library, dg.DagsterInstance], receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> Ticking:
    """The sensor after its first tick; records count as soon as they are there."""
    monkeypatch.setattr(failures, "SETTLED_S", 0.0)
    made = Ticking(*installation, alerts(receiver))
    assert "from now on" in made.tick()
    return made


def quarantined(media_id: str, asset: str = "media", error_class: str = "truncated", error: str = "") -> dict[str, Any]:
    """A row of the history."""
    return {
        "media_id": media_id,
        "asset": asset,
        "version": "v",
        "claim": 1,
        "status": "quarantined",
        "error_class": error_class,
        "error": error or "The file ends early.",
        "run_id": "run-1",
    }


def parts(receiver: Receiver) -> dict[str, dict[str, Any]]:
    """Failures of the last post, by kind."""
    return {part["kind"]: part for part in receiver.requests[-1][1]["failures"]}


def test_everything_that_failed_comes_in_one_post_once(ticking: Ticking, receiver: Receiver) -> None:
    """Given a failed run, outcomes, a check, a batch and a message, then one post tells all, and the next tick none."""

    class Batch(dg.Config):  # type: ignore[misc]
        keys: list[str]

    def fail(config: Batch) -> None:
        raise ValueError("the disk is <full>\nand \x1b[31mred")

    fail.__annotations__["config"] = Batch
    decode = dg.op(name="decode")(fail)
    job = dg.GraphDefinition("process_decode", node_defs=[decode]).to_job(tags={"media/group": "decode"})
    config = {"ops": {"decode": {"config": {"keys": ["a-1", "a-2", "a-3"]}}}}
    ran = job.execute_in_process(run_config=config, instance=ticking.instance, raise_on_error=False)

    @dg.asset_check(asset="shots")
    def expectations() -> dg.AssetCheckResult:
        return dg.AssetCheckResult(passed=False, severity=dg.AssetCheckSeverity.ERROR, description="Spans overlap.")

    @dg.asset_check(asset="shots")
    def items() -> dg.AssetCheckResult:
        return dg.AssetCheckResult(passed=False, severity=dg.AssetCheckSeverity.WARN)

    checks = dg.Definitions(asset_checks=[expectations, items], assets=[dg.AssetSpec("shots")])
    checked = checks.resolve_implicit_global_asset_job_def().execute_in_process(instance=ticking.instance)
    assert checked.success
    ticking.write(
        outcome_history,
        quarantined("a-1"),
        quarantined("a-2"),
        quarantined("a-2", "frames", "upstream_failed"),
        quarantined("a-3", "shots", "model_failed"),
        quarantined("a-4") | {"status": "retryable"},
    )
    batch = {"group": "decode", "lane": "photos", "items": 7, "seconds": 1.0, "reason": "full"}
    ticking.write(
        batches,
        batch | {"state": "lost", "run_id": None, "finished_at": datetime.now(UTC)},
    )
    ticking.write(batches, batch | {"state": "finished", "run_id": "r", "finished_at": datetime.now(UTC)})
    ticking.write(rejected_messages, {"source": "sqs", "message_id": "m\n1", "reason": "not JSON", "body": "<private>"})

    said = ticking.tick()
    assert len(receiver.requests) == 1
    path, body = receiver.requests[0]
    assert path == f"POST /services/{SECRET}"
    assert said == f"Posted: {body['text'].splitlines()[0].removeprefix('media-assets: ')}."
    found = parts(receiver)
    assert {kind: part["count"] for kind, part in found.items()} == {
        "runs failed": 1,
        "outcomes quarantined": 3,
        "checks failed": 1,
        "planned batches failed or lost": 1,
        "ingest messages rejected": 1,
    }
    assert body["total"] == 7
    (run,) = found["runs failed"]["examples"]
    assert run["run_id"] == ran.run_id
    assert run["what"].startswith("process_decode (group decode, 3 items")
    assert run["error"] == "ValueError: the disk is <full> and \\x1b[31mred"
    assert found["outcomes quarantined"]["by"] == [
        {"what": "media: truncated", "count": 2},
        {"what": "shots: model_failed", "count": 1},
    ]
    assert found["outcomes quarantined"]["examples"][0]["what"] == "media of a-1"
    (check,) = found["checks failed"]["examples"]
    assert (check["what"], check["error"]) == ("shots: expectations", "Spans overlap.")
    assert found["planned batches failed or lost"]["by"] == [{"what": "decode: lost", "count": 1}]
    assert found["ingest messages rejected"]["examples"][0]["what"] == "sqs message m\\n1"
    assert "private" not in json.dumps(body)
    assert ticking.tick() == "Nothing failed."
    assert len(receiver.requests) == 1


def test_a_flood_is_one_bounded_post(ticking: Ticking, receiver: Receiver) -> None:
    """Given thousands of failures of many classes, then one short post counts all and says how many more there are."""
    ticking.write(
        outcome_history,
        *(quarantined(f"a-{n}", error_class=f"class_{n % 40:02}", error="x" * 5000) for n in range(2000)),
    )
    ticking.tick()
    ((_, body),) = receiver.requests
    (part,) = body["failures"]
    assert (part["count"], len(part["examples"]), part["more"]) == (2000, failures.EXAMPLES, 2000 - failures.EXAMPLES)
    assert len(part["by"]) == failures.KINDS_LISTED
    assert "and 1,995 more" in body["text"]
    assert "and 30 more classes" in body["text"]
    assert len(json.dumps(body)) < 10_000


@pytest.mark.parametrize("answer", [302, 404, 500])
def test_a_receiver_that_refuses_loses_nothing(ticking: Ticking, receiver: Receiver, answer: int) -> None:
    """Given a receiver that answers no 2xx, then the tick fails without the secret, and all comes once it does."""
    receiver.answer = answer
    ticking.write(outcome_history, quarantined("a-1"))
    for _ in range(2):
        with pytest.raises(AlertUndelivered) as failed:
            ticking.tick()
        assert f"http://127.0.0.1:{receiver.port}/… answered {answer}." in str(failed.value)
        assert (failed.value.__cause__, failed.value.__context__) == (None, None)
    ticking.write(outcome_history, quarantined("a-2"))
    receiver.answer = 204
    ticking.tick()
    assert [method.split()[0] for method, _ in receiver.requests] == ["POST"] * 3
    assert parts(receiver)["outcomes quarantined"]["count"] == 2
    assert ticking.tick() == "Nothing failed."


def test_a_receiver_that_is_away_is_told_by_scheme_and_host_alone() -> None:
    """Given nobody who listens, then the error names no path, query or password."""
    url = f"http://user:pass@127.0.0.1:1/{SECRET}?key=s3cr3t"
    with pytest.raises(AlertUndelivered) as failed:
        post(url, {}, timeout_s=5)
    assert "http://127.0.0.1:1/… did not answer (ConnectionRefusedError)." in str(failed.value)
    for secret in ("s3cr3t", "pass", "user"):
        assert secret not in str(failed.value)
    assert masked("https://[broken") == "the webhook"


def test_a_name_and_a_password_in_the_url_become_a_login(receiver: Receiver) -> None:
    """Given a URL with a login, then the receiver gets it as basic authentication."""
    post(f"http://user:p%40ss@127.0.0.1:{receiver.port}/{SECRET}", {}, timeout_s=5)
    assert receiver.login == "Basic " + b64encode(b"user:p@ss").decode()


def test_failures_within_the_pause_are_joined(ticking: Ticking, receiver: Receiver) -> None:
    """Given a post a moment ago, then later failures wait for the pause to end and come together."""
    ticking.write(outcome_history, quarantined("a-1"))
    ticking.tick()
    ticking.alerts = alerts(receiver, min_interval_s=3600)
    ticking.write(outcome_history, quarantined("a-2"))
    assert "joined" in ticking.tick()
    ticking.write(outcome_history, quarantined("a-3"))
    ticking.alerts = alerts(receiver)
    ticking.tick()
    assert [body["total"] for _, body in receiver.requests] == [1, 2]


def test_records_that_are_younger_than_others_still_to_come_wait(
    ticking: Ticking, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given an old record behind a young one, then both wait until the young one has settled, and none is skipped."""
    monkeypatch.setattr(failures, "SETTLED_S", 60.0)
    long_ago = sa.text("now() - interval '1 hour'")
    ticking.write(outcome_history, quarantined("a-1"))
    with ticking.library.database.engine.begin() as connection:
        connection.execute(sa.insert(outcome_history).values(**quarantined("a-2"), at=long_ago))
    assert ticking.tick() == "Nothing failed."
    with ticking.library.database.engine.begin() as connection:
        connection.execute(sa.update(outcome_history).values(at=long_ago))
    ticking.tick()
    assert [body["total"] for _, body in receiver.requests] == [2]


def test_slack_gets_text_that_it_cannot_take_for_its_own_markup(ticking: Ticking, receiver: Receiver) -> None:
    """Given an error with Slack's control characters, then the text has them escaped, and nothing else is sent."""
    ticking.alerts = alerts(receiver, format="slack")
    ticking.write(outcome_history, quarantined("a-1", error="<!channel> & <http://evil|click>"))
    ticking.tick()
    ((_, body),) = receiver.requests
    assert list(body) == ["text"]
    assert "&lt;!channel&gt; &amp; &lt;http://evil|click&gt;" in body["text"]
    assert "<" not in body["text"]


def test_without_a_webhook_the_sensor_is_stopped_and_says_why(ticking: Ticking) -> None:
    """Given no URL, then the sensor is stopped; started by hand, it skips and names the setting."""
    assert build_alert_sensor(ticking.library.settings).default_status is dg.DefaultSensorStatus.STOPPED
    ticking.alerts = Alerts()
    assert ticking.tick() == UNSET


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "ftp://host/s3cr3t", "hooks.example.com/s3cr3t", "https:///s3cr3t"]
)
def test_only_http_urls_are_taken_and_never_shown(url: str, tmp_path: Path) -> None:
    """Given a URL of another scheme or without a host, then the settings refuse it without repeating it."""
    with pytest.raises(ValueError, match="must begin with http:// or https://") as refused:
        Settings(home=tmp_path, alerts={"webhook_url": url})  # type: ignore[arg-type]
    assert url not in str(refused.value)
    kept = Alerts.model_validate({"webhook_url": f"https://hooks.example.com/{SECRET}"})
    assert SECRET not in repr(kept)
