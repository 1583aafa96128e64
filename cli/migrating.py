"""`media-assets migrate`: the tables of this project and of Dagster, brought up to date."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import sqlalchemy as sa
from rich.console import Console

from cli.instance import prepare_environment
from resources.library import Library
from resources.records.database import LOCK_NAMESPACE, Database, Schema, SchemaNewer

_LOCK = -2  # within the project's advisory locks: one migration at a time
EMPTY = "an empty database"


@dataclass(frozen=True, slots=True)
class Part:
    """The tables of one owner before and after: revisions, None for none; and whether something is to be done."""

    name: str
    before: str | None
    after: str
    pending: bool


def migrate(library: Library, check: bool, console: Console) -> list[Part]:
    """Upgrade both schemas, or with `check` only say what there is to upgrade.

    Raises DatabaseUnavailable, SchemaNewer.
    """
    database = Database.connect(library.settings)
    try:
        if check:
            return [_part(database.schema()), _dagster(database)]
        with database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(sa.select(sa.func.pg_advisory_lock(LOCK_NAMESPACE, _LOCK)))
            before = _dagster(database)
            own = _part(database.migrate())
            if before.pending:
                _upgrade_dagster(library, database, console)
            return [own, before]
    finally:
        database.close()


def as_json(parts: list[Part]) -> dict[str, Any]:
    """What `--json` prints."""
    return {"pending": any(part.pending for part in parts), "schemas": [asdict(part) for part in parts]}


def told(part: Part, check: bool) -> str:
    """One sentence about one schema."""
    before = part.before or EMPTY
    if not part.pending:
        return f"{part.name}: up to date at {part.after}."
    if part.before == part.after:
        return f"{part.name}: data to rewrite at {part.after}." if check else f"{part.name}: data rewritten."
    return f"{part.name}: {'to upgrade' if check else 'upgraded'} from {before} to {part.after}."


def _part(schema: Schema) -> Part:
    return Part("media-assets", schema.current, schema.newest, schema.pending)


def _dagster(database: Database) -> Part:
    """State of Dagster's tables, read without creating them."""
    from alembic.config import Config
    from alembic.script import ScriptDirectory
    from alembic.util import CommandError

    config = Config()
    config.set_main_option("script_location", "dagster:_core/storage/alembic")
    script = ScriptDirectory.from_config(config)
    newest = str(script.get_current_head())
    with database.engine.connect() as connection:
        tables = set(sa.inspect(connection).get_table_names())
        if "alembic_version" not in tables:
            return Part("Dagster", None, newest, pending=True)
        current: str | None = connection.execute(sa.text("select version_num from alembic_version")).scalar()
        # Dagster notes here which of its rewrites of old rows are done.
        done = set(
            connection.execute(
                sa.text("select name from secondary_indexes where migration_completed is not null")
            ).scalars()
            if "secondary_indexes" in tables
            else ()
        )
    try:
        if current is not None:
            script.get_revision(current)
    except CommandError:
        raise SchemaNewer(
            f"Dagster's tables have schema {current}, this version knows {newest} at most.",
            "Upgrade dagster and dagster-postgres to the version that migrated the database.",
        ) from None
    return Part("Dagster", current, newest, pending=current != newest or not _rewrites() <= done)


def _rewrites() -> set[str]:
    """Names of the rewrites of old rows that Dagster requires."""
    from dagster._core.storage.event_log.migration import ASSET_DATA_MIGRATIONS
    from dagster._core.storage.runs.migration import REQUIRED_DATA_MIGRATIONS
    from dagster._core.storage.schedules.migration import REQUIRED_SCHEDULE_DATA_MIGRATIONS

    return {*ASSET_DATA_MIGRATIONS, *REQUIRED_DATA_MIGRATIONS, *REQUIRED_SCHEDULE_DATA_MIGRATIONS}


def _upgrade_dagster(library: Library, database: Database, console: Console) -> None:
    from dagster import DagsterInstance

    # Opening it creates the tables where there are none.
    with DagsterInstance.from_config(str(prepare_environment(library, database.url))) as instance:
        instance.upgrade(lambda line: console.print(line, style="dim"))
