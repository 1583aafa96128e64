"""Migrations: old schemas with data in them, newer ones, Dagster's tables, and the command that upgrades both."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from typer.testing import CliRunner

from cli.exit_codes import Exit
from cli.main import app
from resources.ingest.registry import Registry
from resources.library import Library
from resources.records.database import Database, SchemaNewer, SchemaOutdated, _config, upgrade
from resources.records.tables import REVISION, metadata
from resources.settings import Settings

OLD_ROWS = (
    "insert into uploads (media_id, uri, etag, bytes, source, discovered_at, state) values"
    " ('a-000000000001', '/m/a.mp4', 'e1', 5, 'folder', '2026-01-02T03:04:05Z', 'live'),"
    " ('a-000000000002', '/m/a.mp4', 'e0', 4, 'folder', '2026-01-01T00:00:00Z', 'superseded')",
    "insert into outcomes (media_id, asset, version, status, attempts, claim, error_class, error, updated_at) values"
    " ('a-000000000001', 'media', 'v1', 'quarantined', 3, 7, 'truncated', 'It ends early.', '2026-01-02T04:00:00Z')",
    "insert into outcome_history (media_id, asset, version, claim, status) values"
    " ('a-000000000001', 'media', 'v1', 7, 'quarantined')",
)


@pytest.fixture
def settings(database_url: str, tmp_path: Path) -> Settings:
    """Settings of an external database that is empty."""
    return Settings(home=tmp_path / "home", database_url=database_url)


@pytest.fixture
def old(settings: Settings) -> Iterator[Database]:
    """A database as version 0001 left it, with data in it."""
    database = Database.connect(settings)
    upgrade(database.engine, "0001")
    execute(database, *OLD_ROWS)
    yield database
    database.close()


def execute(database: Database, *statements: str) -> None:
    """Run statements in one transaction."""
    with database.engine.begin() as connection:
        for statement in statements:
            connection.execute(sa.text(statement))


def rows(database: Database, query: str) -> list[tuple[object, ...]]:
    """Rows of a query."""
    with database.engine.connect() as connection:
        return [tuple(row) for row in connection.execute(sa.text(query))]


def test_an_upgrade_keeps_every_row(old: Database, settings: Settings) -> None:
    """Given a database of the first version with data, when it is upgraded, then all of it is there and usable."""
    before = {name: rows(old, f"select * from {name} order by 1") for name in ("outcomes", "outcome_history")}
    assert old.migrate().current == "0001"
    for name, expected in before.items():
        assert rows(old, f"select * from {name} order by 1") == expected
    assert rows(old, "select media_id, uri, etag, bytes, state, observed_at = discovered_at from uploads") == [
        ("a-000000000001", "/m/a.mp4", "e1", 5, "live", True),
        ("a-000000000002", "/m/a.mp4", "e0", 4, "superseded", True),
    ]
    with old.engine.connect() as connection:
        options = {"version_table": "media_schema_version"}
        assert compare_metadata(MigrationContext.configure(connection, opts=options), metadata) == []
    opened = Database.open(settings)
    assert Registry(opened).live_below("/m/") == {"/m/a.mp4": "a-000000000001"}
    opened.close()


def test_an_external_database_of_an_older_version_is_refused(old: Database, settings: Settings) -> None:
    """Given an older schema behind a URL, when it is opened, then it is refused with the command, and untouched."""
    with pytest.raises(SchemaOutdated, match=r"schema 0001.*media-assets migrate"):
        Database.open(settings)
    assert old.schema().current == "0001"


def test_a_schema_newer_than_the_code_is_refused(old: Database, settings: Settings) -> None:
    """Given a schema this code does not know, then opening and migrating refuse it and change nothing."""
    execute(old, "update media_schema_version set version_num = '9999'")
    with pytest.raises(SchemaNewer, match=r"schema 9999.*Upgrade media-assets"):
        Database.open(settings)
    with pytest.raises(SchemaNewer):
        old.migrate()
    assert rows(old, "select version_num from media_schema_version") == [("9999",)]


def test_the_code_names_the_newest_migration() -> None:
    """Given the migrations in the code, then the revision it takes for the newest is."""
    assert ScriptDirectory.from_config(_config()).get_heads() == [REVISION]


def test_an_empty_external_database_is_filled_silently(settings: Settings) -> None:
    """Given an empty database, when it is opened, then it has the newest schema."""
    database = Database.open(settings)
    assert not database.schema().pending
    database.close()


def test_an_embedded_database_upgrades_when_it_is_opened(
    old: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given an older schema on the embedded server, when it is opened, then it is upgraded."""
    monkeypatch.setattr("resources.records.embedded_postgres.serve", lambda folder: old.url)
    database = Database.open(Settings(home=tmp_path))
    assert not database.schema().pending
    database.close()


@pytest.fixture
def command(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> CliRunner:
    """The command line on the external database; variables it sets are put back."""
    assert settings.database_url
    monkeypatch.setenv("MEDIA_DATABASE_URL", settings.database_url)
    monkeypatch.setenv("MEDIA_HOME", str(settings.home))
    monkeypatch.setenv("DAGSTER_HOME", str(settings.home / "dagster"))
    return CliRunner()


def states(command: CliRunner, *options: str) -> tuple[int, dict[str, tuple[str | None, bool]]]:
    """Exit code of `migrate --json`, and revision before and whether there is something to do, by owner."""
    done = command.invoke(app, ["migrate", "--json", *options])
    parts = json.loads(done.stdout)["schemas"]
    return done.exit_code, {part["name"]: (part["before"], part["pending"]) for part in parts}


def test_one_command_upgrades_both_schemas(old: Database, command: CliRunner) -> None:
    """Given old tables of both owners, when `migrate` ran, then both are at their newest and nothing is pending."""
    code, before = states(command, "--check")
    assert (code, before) == (Exit.DATABASE, {"media-assets": ("0001", True), "Dagster": (None, True)})
    assert old.schema().current == "0001"
    assert states(command)[0] == Exit.OK
    newest = rows(old, "select version_num from alembic_version")[0][0]
    assert states(command, "--check") == (
        Exit.OK,
        {"media-assets": (old.schema().newest, False), "Dagster": (newest, False)},
    )
    # As if one of the rewrites of old rows had not run yet.
    from cli.migrating import _rewrites

    execute(old, f"delete from secondary_indexes where name = '{sorted(_rewrites())[0]}'")
    assert states(command, "--check") == (
        Exit.DATABASE,
        {"media-assets": (old.schema().newest, False), "Dagster": (newest, True)},
    )
    done = command.invoke(app, ["migrate"])
    assert (done.exit_code, "Dagster: data rewritten." in done.stdout) == (Exit.OK, True)
    assert states(command, "--check")[0] == Exit.OK


def test_older_tables_of_dagster_are_upgraded(settings: Settings, command: CliRunner) -> None:
    """Given Dagster's tables one revision back, when `migrate` ran, then they are at the newest and say from where."""
    from dagster import DagsterInstance
    from dagster._core.storage.sql import get_alembic_config, run_alembic_downgrade

    from cli.instance import prepare_environment

    library = Library(settings)
    with DagsterInstance.from_config(str(prepare_environment(library))) as instance:
        newest = instance.run_storage.alembic_version()
        assert newest
    with library.database.engine.begin() as connection:
        run_alembic_downgrade(get_alembic_config(__file__), connection, "-1")
    (before,) = rows(library.database, "select version_num from alembic_version")[0]
    assert before != newest[1]
    assert states(command, "--check")[1]["Dagster"] == (before, True)
    done = command.invoke(app, ["migrate"])
    assert f"Dagster: upgraded from {before} to {newest[1]}." in done.stdout
    assert states(command, "--check")[0] == Exit.OK
    library.close()
