"""Files that are replaced in one step."""

from __future__ import annotations

from pathlib import Path

import pytest

from resources.files.local import replacing


def test_a_file_is_replaced_when_the_block_ends(tmp_path: Path) -> None:
    """Given a file in a folder to be made, then it appears as a whole, and its successor takes its place."""
    path = tmp_path / "folder" / "figures.json"
    for text in ("first", "second"):
        before = path.read_text() if path.exists() else None
        with replacing(path) as temporary:
            temporary.write_text(text)
            assert (path.read_text() if path.exists() else None) == before
        assert path.read_text() == text
    assert list(path.parent.iterdir()) == [path]


def test_a_block_that_fails_leaves_all_as_it_was(tmp_path: Path) -> None:
    """Given an error after half of the file, then the file is the earlier one, and nothing lies beside it."""
    path = tmp_path / "figures.json"
    path.write_text("whole")

    def fail() -> None:
        with replacing(path) as temporary:
            temporary.write_text("ha")
            raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        fail()
    assert path.read_text() == "whole"
    assert list(tmp_path.iterdir()) == [path]
