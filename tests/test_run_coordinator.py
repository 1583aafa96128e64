"""What the daemon logs; what runs say of their needs on clusters is in test_deploy."""

from __future__ import annotations

import logging
from pathlib import Path

import dagster as dg
import pytest
import yaml

from jobs.quiet_sensors import LOGGER
from jobs.run_coordinator import QuietRunCoordinator
from tests.conftest import SILENT

PROJECT = Path(__file__).parents[1]


def test_the_daemon_logs_of_sensors_what_is_new(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Given the instance of dagster.yaml, then looks and repeated reasons to skip are not logged; a new reason, another
    sensor's and everything else are."""
    given = yaml.safe_load((PROJECT / "dagster.yaml").read_text())
    overrides = {"run_coordinator": given["run_coordinator"], "concurrency": given["concurrency"]}
    with dg.DagsterInstance.local_temp(str(tmp_path), overrides=overrides | SILENT) as instance:
        assert isinstance(instance.run_coordinator, QuietRunCoordinator)
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
