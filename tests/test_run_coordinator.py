"""Which runs wait in Dagster's queue on one machine; what runs say of their needs on clusters is in test_deploy."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml
from dagster._core.remote_origin import GrpcServerCodeLocationOrigin, RemoteJobOrigin, RemoteRepositoryOrigin

from jobs.express import EXPRESS_JOB
from jobs.quiet_sensors import LOGGER
from jobs.run_coordinator import DirectRunCoordinator
from tests.conftest import SILENT

PROJECT = Path(__file__).parents[1]
STARTING, QUEUED, FAILURE = (
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.QUEUED,
    dg.DagsterRunStatus.FAILURE,
)

Opened = Callable[..., dg.DagsterInstance]


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Opened]:
    """An instance with the queue and the limits of dagster.yaml, and a launcher that only takes note."""
    with ExitStack() as stack:

        def make(launcher: str = "MockedRunLauncher", **concurrency: Any) -> dg.DagsterInstance:
            given = yaml.safe_load((PROJECT / "dagster.yaml").read_text())
            overrides = {
                "run_coordinator": given["run_coordinator"],
                "concurrency": given["concurrency"] | concurrency,
                "run_launcher": {"module": "dagster._core.test_utils", "class": launcher},
            }
            instance = stack.enter_context(dg.DagsterInstance.local_temp(str(tmp_path), overrides=overrides | SILENT))
            assert isinstance(instance.run_coordinator, DirectRunCoordinator)
            return instance

        yield make


def submitted(instance: dg.DagsterInstance, name: str = EXPRESS_JOB) -> dg.DagsterRun:
    server = RemoteRepositoryOrigin(GrpcServerCodeLocationOrigin("code", 4000), "__repository__")
    job = dg.JobDefinition(name=name, graph_def=dg.GraphDefinition(name))
    run = instance.create_run_for_job(job, remote_job_origin=RemoteJobOrigin(server, name))
    context = dg.SubmitRunContext(run, workspace=None)  # type: ignore[arg-type]
    answered = instance.run_coordinator.submit_run(context)
    stored = instance.get_run_by_id(run.run_id)
    assert stored is not None
    assert stored.status is answered.status
    return stored


def test_an_express_run_is_launched_at_once_where_all_is_idle(opened: Opened) -> None:
    """Given an idle machine, then the first express run is under way, and one beside it waits its turn."""
    instance = opened()
    first = submitted(instance)
    assert first.status is STARTING
    assert instance.run_launcher.did_run_launch(first.run_id)  # type: ignore[attr-defined]
    assert submitted(instance).status is QUEUED
    instance.report_run_failed(first)
    assert submitted(instance).status is QUEUED, "the second one is there"


def test_other_runs_are_queued(opened: Opened) -> None:
    """Given a run of a group, then it is for the queue, and an express run behind it too."""
    instance = opened()
    assert submitted(instance, "process_decode").status is QUEUED
    assert submitted(instance).status is QUEUED


@pytest.mark.parametrize(
    "concurrency",
    [
        {"runs": {"max_concurrent_runs": 0}},
        {"runs": {"tag_concurrency_limits": [{"key": "media/group", "limit": 1}]}},
        {"pools": {"default_limit": 0, "granularity": "run"}},
    ],
)
def test_limits_that_may_hold_it_back_are_for_the_queue_to_judge(
    opened: Opened, concurrency: Mapping[str, Any]
) -> None:
    """Given an operator who has paused runs or pools, or limits them by tag, then an express run is queued as well."""
    assert submitted(opened(**concurrency)).status is QUEUED


def test_a_paused_pool_holds_it_back(opened: Opened) -> None:
    """Given a pool set to 0 in the UI, then an express run waits."""
    instance = opened()
    instance.event_log_storage.set_concurrency_slots("gpu", 0)
    assert submitted(instance).status is QUEUED


def test_one_that_cannot_be_launched_has_failed_and_says_why(opened: Opened) -> None:
    """Given a launcher that raises, then the run has failed with its words, and whoever submitted it goes on."""
    instance = opened("ExplodingRunLauncher")
    run = submitted(instance)
    assert run.status is FAILURE
    said = [str(event) for event in instance.all_logs(run.run_id)]
    assert any("throw on launch" in text for text in said)


def test_the_daemon_logs_of_sensors_what_is_new(opened: Opened, caplog: pytest.LogCaptureFixture) -> None:
    """Given the instance of dagster.yaml, then looks and repeated reasons to skip are not logged; a new reason, another
    sensor's and everything else are."""
    assert opened().run_coordinator
    logger = logging.getLogger(LOGGER)
    with caplog.at_level(logging.INFO, LOGGER):
        for text in (
            "Checking for new runs for sensor: planner",
            "Sensor planner skipped: backlog: 0 uploads ready",
            "Sensor folder skipped: backlog: 0 uploads ready",
            "Checking for new runs for sensor: planner",
            "Sensor planner skipped: backlog: 0 uploads ready",
            "No run requests returned for alerts, skipping",
            "No run requests returned for alerts, skipping",
            "Sensor planner skipped: backlog: 1 uploads ready",
            "Launching run for planner",
            "Launching run for planner",
            "Sensor planner skipped: backlog: 0 uploads ready",
        ):
            logger.info(text)
    assert [record.getMessage() for record in caplog.records if record.name == LOGGER] == [
        "Sensor planner skipped: backlog: 0 uploads ready",
        "Sensor folder skipped: backlog: 0 uploads ready",
        "No run requests returned for alerts, skipping",
        "Sensor planner skipped: backlog: 1 uploads ready",
        "Launching run for planner",
        "Launching run for planner",
        "Sensor planner skipped: backlog: 0 uploads ready",
    ]
