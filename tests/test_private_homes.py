"""Homes are their user's alone: new ones, and those that were open before; what is no home is left as it is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from resources.files.local import FolderUnusable, private


def mode(folder: Path) -> int:
    """Permissions of a folder."""
    return folder.stat().st_mode & 0o7777


def test_a_new_home_is_private(tmp_path: Path) -> None:
    """Given no home, then it is made for its user alone, and what is above it as usual."""
    home = private(tmp_path / "above" / "home")
    assert mode(home) == 0o700
    assert mode(home.parent) != 0o700


@pytest.mark.parametrize("holds", ["", "postgres", "derived", "settings.toml"])
def test_a_home_that_was_open_is_closed(tmp_path: Path, holds: str) -> None:
    """Given a home of an earlier version, or an empty folder made for one, then others are shut out."""
    if holds:
        (tmp_path / holds).mkdir()
    tmp_path.chmod(0o755)
    assert mode(private(tmp_path)) == 0o700


@pytest.mark.parametrize(("before", "holds"), [(0o755, "thesis"), (0o2775, "postgres"), (0o1777, "derived")])
def test_what_somebody_chose_stays(tmp_path: Path, before: int, holds: str) -> None:
    """Given a folder of other things, one whose group may write, or one that is everybody's, then it stays as it is."""
    (tmp_path / holds).mkdir()
    tmp_path.chmod(before)
    assert mode(private(tmp_path)) == before


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give a folder away")
def test_a_home_of_another_user_stays(tmp_path: Path) -> None:
    """Given a home of somebody else, then its mode is their affair."""
    tmp_path.chmod(0o755)
    os.chown(tmp_path, 12345, 12345)
    assert mode(private(tmp_path)) == 0o755


def test_a_home_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    """Given a file where the home should be, then one sentence names it."""
    (tmp_path / "home").write_text("")
    with pytest.raises(FolderUnusable, match="home"):
        private(tmp_path / "home")
