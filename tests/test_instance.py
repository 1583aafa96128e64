"""The Dagster instance of a library: its dagster.yaml is whole for whoever reads it."""

from __future__ import annotations

import os

import pytest

from cli.instance import prepare_environment
from resources.library import Library
from resources.settings import HOME_VARIABLE


def test_readers_never_see_half_of_it(library: Library, database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given processes that open the instance while others prepare it, then the file is left alone where it is right
    and replaced in one step where it is not: whoever had it open has the whole of the older one."""
    for name in ("DAGSTER_HOME", "MEDIA_DATABASE_URL", "MEDIA_GOLDEN", HOME_VARIABLE):
        monkeypatch.setenv(name, "")  # which the call sets, and the test restores
    file = prepare_environment(library, database_url) / "dagster.yaml"
    written, right = file.stat(), file.read_text()
    assert "PooledPostgresStorage" in right
    prepare_environment(library, database_url)
    assert (file.stat().st_ino, file.stat().st_mtime_ns) == (written.st_ino, written.st_mtime_ns)
    file.write_text("of an older version")
    with file.open() as reader:
        prepare_environment(library, database_url)
        assert reader.read() == "of an older version"
    assert file.read_text() == right
    assert os.listdir(file.parent) == ["dagster.yaml"]
