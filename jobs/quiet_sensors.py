"""The daemon's log of sensors without what an idle system says anew every five seconds."""

from __future__ import annotations

import logging
import re

LOGGER = "dagster.daemon.SensorDaemon"
_LOOKS = "Checking for new runs for sensor: "
_SKIPS = re.compile(r"Sensor (?P<name>\S+) skipped: |No run requests returned for (?P<other>\S+), skipping")


class OnlyNews(logging.Filter):
    """Leaves out that a sensor is looked at, and that it skipped for the very reason of its tick before."""

    def __init__(self) -> None:
        super().__init__()
        self._said: dict[str, str] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the line says something new."""
        text = record.getMessage()
        if text.startswith(_LOOKS):
            return False
        found = _SKIPS.match(text)
        if found is None:
            return True
        name = found["name"] or found["other"]
        before, self._said[name] = self._said.get(name), text
        return text != before


_only_news = OnlyNews()


def hush() -> None:
    """Have this process's sensor daemon, if it has one, say what is new alone."""
    logging.getLogger(LOGGER).addFilter(_only_news)
