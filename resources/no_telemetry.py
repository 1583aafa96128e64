"""Libraries do not report to their makers what runs here; imported before any of them, by the package itself.

Whoever wants such a report sets the variable to another value. Dagster's is switched off in each dagster.yaml.
"""

from __future__ import annotations

import os

SWITCHES = {
    "ORT_DISABLE_TELEMETRY": "1",  # ONNX Runtime from 1.29: models, devices and an ID of the machine kept in ~/.cache
    "PYANNOTE_METRICS_ENABLED": "false",  # pyannote.audio: lengths of recordings, numbers of speakers
    "GX_ANALYTICS_ENABLED": "false",  # Great Expectations
    "HF_HUB_DISABLE_TELEMETRY": "1",  # Hugging Face hub client
    "RAY_USAGE_STATS_ENABLED": "0",  # a Ray cluster that is started here
}


def switch_off() -> None:
    """Set the variables that are not set, for this process and its children."""
    for name, value in SWITCHES.items():
        os.environ.setdefault(name, value)
