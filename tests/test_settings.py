"""Settings from variables: what is misspelt is refused by its name, and what belongs to others is left alone."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from resources.settings import BadSettings, Settings, variables

PROJECT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("MEDIA_PROFIL", "MEDIA_PROFILE"),
        ("media_profil", "MEDIA_PROFILE"),
        ("MEDIA_LIMITS_MAX_BYTES", "MEDIA_LIMITS__MAX_BYTES"),
        ("MEDIA_LIMIT__MAX_BYTES", "MEDIA_LIMITS__MAX_BYTES"),
        ("MEDIA_INGESTION_FOLDERS", "MEDIA_INGESTION__FOLDERS"),
        ("MEDIA_PROFILE__NAME", "MEDIA_PROFILE"),
        ("MEDIA_DATABASEURL", "MEDIA_DATABASE_URL"),
    ],
)
def test_a_misspelt_variable_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, nearest: str
) -> None:
    """Given a variable that nobody reads, then it is refused with its name and the nearest that there is, never its
    value; empty, it counts as not set."""
    monkeypatch.setenv(name, "secret-value")
    with pytest.raises(BadSettings, match=rf"{name} is no setting; the nearest is {nearest}\b") as refused:
        Settings.load(tmp_path)
    assert "secret-value" not in str(refused.value)
    monkeypatch.setenv(name, "")
    Settings.load(tmp_path)


def test_a_misspelt_field_of_a_section_is_still_refused_by_the_section(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given a variable of a section that it does not have, then the section names it."""
    monkeypatch.setenv("MEDIA_LIMITS__MAX_BITES", "1")
    with pytest.raises(BadSettings, match=r"limits\.max_bites"):
        Settings.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MEDIA_FAULT", "nowhere:kill"),
        ("MEDIA_CODE_HOST", "code"),
        ("MEDIA_K8S_IMAGE", "media-assets"),
        ("MEDIA_LIMITS", '{"max_bytes": 1}'),
        ("MEDIA_LIMITS__MAX_BYTES", "1"),
        ("MEDIA_COMPUTE__GROUPS__ANALYSE__CPUS", "2"),
        ("media_profile", "offline"),
        ("MEDIA_ASSETS_CODE_SERVICE_HOST", "10.0.0.7"),
        ("MEDIA_ASSETS_CODE_SERVICE_PORT_GRPC", "4000"),
        ("MEDIA_ASSETS_CODE_PORT_4000_TCP_ADDR", "10.0.0.7"),
        ("MEDIA_ASSETS_CODE_PORT", "tcp://10.0.0.7:4000"),
        ("MEDIASOUP_WORKER", "of somebody else"),
    ],
)
def test_other_variables_stay_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    """Given a setting, in any way there is, a variable that the project reads elsewhere, or one of others, then it is
    no mistake."""
    monkeypatch.setenv(name, value)
    Settings.load(tmp_path)


def test_every_variable_of_the_documentation_is_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given the variables that the settings' page names, then each is a setting, or none is refused."""
    page = (PROJECT / "docs" / "settings.md").read_text()
    named = set(re.findall(r"`(MEDIA_[A-Z0-9_]+)`", page))
    assert variables(Settings) & named
    for name in named - variables(Settings):
        monkeypatch.setenv(name, "/somewhere")
    Settings.load(tmp_path)
