"""The one Postgres database: an external one by URL, or an embedded server started in the home folder."""

from __future__ import annotations

import select
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import insert

from resources.errors import DatabaseUnavailable, MediaError, printable
from resources.records import embedded_postgres
from resources.records.database_url import psycopg2_url
from resources.records.tables import REVISION, library_state
from resources.settings import Settings

if TYPE_CHECKING:
    from alembic.config import Config

LOCK_NAMESPACE = 0x6D65  # advisory locks of this project: "me"
KEEPALIVE = {"keepalives_idle": 60, "keepalives_interval": 10, "keepalives_count": 3, "tcp_user_timeout": 60_000}
"""For connections that stay open: a server gone without a word is noticed within a minute or two, not in hours."""


class SchemaOutdated(MediaError):
    """The tables of an external database are of an older version of this project."""

    code, http_status = "schema_outdated", 503
    remedy = "Stop what uses the database, back it up, and run `media-assets migrate`."


class SchemaNewer(MediaError):
    """The tables are of a newer version of this project than the code."""

    code, http_status = "schema_newer", 503
    remedy = "Upgrade media-assets on this machine to the version that migrated the database."


class StorageMismatch(MediaError):
    """The database belongs to other derived files."""

    code, http_status = "storage_mismatch", 409
    remedy = "Use the MEDIA_DATABASE_URL, --home and MEDIA_STORAGE_URL that belong together, or an empty database."


@dataclass(frozen=True, slots=True)
class Schema:
    """Revision of a database's schema, None for an empty one, and the newest one the code knows."""

    current: str | None
    newest: str

    @property
    def pending(self) -> bool:
        """Whether there is something to migrate."""
        return self.current != self.newest


@dataclass(frozen=True, slots=True)
class Database:
    """An open database: its URL (psycopg2 dialect, what dagster-postgres speaks) and pooled engines.

    Statements on `transitions` commit one by one and do not wait for the disk. Should the database server
    itself crash, the last moments of records are lost and these items are worked on again: safe, since outputs
    are written before their record and do not depend on it.
    """

    url: str
    engine: sa.Engine
    transitions: sa.Engine

    @classmethod
    def open(cls, settings: Settings) -> Database:
        """Connect, starting the embedded server when no URL is set, and see that the schema is the code's.

        An embedded or an empty database is upgraded; an external one only by `media-assets migrate`. The
        embedded server stops when the last process using it exits. Raises DatabaseUnavailable,
        SchemaOutdated, SchemaNewer.
        """
        database = cls.connect(settings)
        try:
            state = database.schema()
            if state.pending and state.current and settings.database_url:
                raise SchemaOutdated(f"The database has schema {state.current}, this version needs {state.newest}.")
            database.migrate()
        except BaseException:
            database.close()
            raise
        return database

    @classmethod
    def connect(cls, settings: Settings) -> Database:
        """Connect, starting the embedded server when no URL is set, whatever schema there is."""
        url = psycopg2_url(settings.database_url or embedded_postgres.serve(settings.home / "postgres"))
        # Connections are tried before use: a process that stays from run to run may outlive its server's restart.
        options = {"pool_pre_ping": True, "connect_args": KEEPALIVE}
        transitions = sa.create_engine(
            url, pool_size=2, isolation_level="AUTOCOMMIT", pool_reset_on_return=None, **options
        )
        sa.event.listen(transitions, "connect", _commit_without_waiting)
        return cls(url, sa.create_engine(url, pool_size=4, **options), transitions)

    def schema(self) -> Schema:
        """Revision of the schema in the database and in the code. Raises DatabaseUnavailable, SchemaNewer."""
        with _answering(), self.engine.connect() as connection:
            current = _revision(connection)
        if current not in (None, REVISION) and not _is_known(current):
            raise SchemaNewer(f"The database has schema {current}, this version knows {REVISION} at most.")
        return Schema(current, REVISION)

    def migrate(self) -> Schema:
        """Upgrade the schema to the newest revision, or create it; returns what it was.

        Raises DatabaseUnavailable, SchemaNewer.
        """
        before = self.schema()
        if before.pending:
            with _answering():
                upgrade(self.engine)
        return before

    def belongs_to(self, storage: str) -> None:
        """Bind the database to the storage of its derived files, once. Raises StorageMismatch for another.

        Records of one library with files of another would claim what is not there.
        """
        statement = insert(library_state).values(name="storage", value=storage).on_conflict_do_nothing()
        with _answering(), self.engine.begin() as connection:
            connection.execute(statement)
            kept = connection.execute(
                sa.select(library_state.c.value).where(library_state.c.name == "storage")
            ).scalar()
        if kept != storage:
            raise StorageMismatch(f"This database keeps the records of the files in {kept}, not of those in {storage}.")

    @contextmanager
    def exclusive(self, lock: int) -> Iterator[bool]:
        """Hold an advisory lock of the project; whether it was free. A dead holder frees it."""
        with self.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            key = (LOCK_NAMESPACE, lock)
            free = bool(connection.execute(sa.select(sa.func.pg_try_advisory_lock(*key))).scalar())
            try:
                yield free
            finally:
                if free:
                    connection.execute(sa.select(sa.func.pg_advisory_unlock(*key)))

    @contextmanager
    def listening(self, channel: str) -> Iterator[Callable[[float], bool]]:
        """Hear what transactions notify `channel` of from here on; yields a wait.

        The wait takes seconds at most and returns whether something was told, be it before the wait began.
        """
        with self.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(sa.text(f"listen {channel}"))
            raw: Any = connection.connection.dbapi_connection

            def wait(seconds: float) -> bool:
                end = time.monotonic() + seconds
                raw.poll()
                while not raw.notifies and (left := end - time.monotonic()) > 0:
                    select.select([raw], [], [], left)
                    raw.poll()
                told = bool(raw.notifies)
                raw.notifies.clear()
                return told

            try:
                yield wait
                connection.execute(sa.text(f"unlisten {channel}"))
            except BaseException:
                connection.invalidate()  # it listens still, and the pool would hand it on
                raise

    def close(self) -> None:
        """Close pooled connections."""
        self.engine.dispose()
        self.transitions.dispose()


def explained(error: BaseException) -> DatabaseUnavailable | None:
    """What an error of SQLAlchemy or the driver says of the database as a whole: gone, full, or closed to this user.

    None for any other error, such as a statement that is wrong.
    """
    from psycopg2 import InterfaceError, OperationalError, errors, extensions  # type: ignore[import-untyped]

    raw = getattr(error, "orig", None) or error
    said = printable(next(iter(str(raw).strip().splitlines()), type(raw).__name__), 300).rstrip(".")
    if isinstance(raw, errors.InsufficientPrivilege):
        return DatabaseUnavailable(f"The database refuses: {said}.", "Give the user of MEDIA_DATABASE_URL that right.")
    if isinstance(raw, errors.ReadOnlySqlTransaction):
        return DatabaseUnavailable(
            f"The database refuses: {said}.", "Have MEDIA_DATABASE_URL name a server that writes."
        )
    if isinstance(raw, errors.DiskFull):
        return DatabaseUnavailable(f"The database cannot write: {said}.", "Free space on its disk.")
    if isinstance(raw, extensions.TransactionRollbackError | errors.QueryCanceled):
        return None  # a deadlock is a defect, not a database that is gone
    if isinstance(raw, OperationalError | InterfaceError) or getattr(error, "connection_invalidated", False):
        return DatabaseUnavailable(f"The database does not answer: {said}.")
    return None


@contextmanager
def _answering() -> Iterator[None]:
    try:
        yield
    except sa.exc.DBAPIError as error:
        if (told := explained(error)) is None:
            raise
        raise told from error


def upgrade(engine: sa.Engine, revision: str = "head") -> None:
    """Run the migrations up to `revision` in one transaction; a no-op when they have run."""
    from alembic import command

    config = _config()
    with engine.begin() as connection:
        # Two processes may start on an empty database at once; the second waits and finds it done.
        connection.execute(sa.text("select pg_advisory_xact_lock(:space, 0)"), {"space": LOCK_NAMESPACE})
        config.attributes["connection"] = connection
        command.upgrade(config, revision)


def _config() -> Config:
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", "resources.records:migrations")
    return config


def _is_known(revision: str) -> bool:
    from alembic.script import ScriptDirectory
    from alembic.util import CommandError

    try:
        ScriptDirectory.from_config(_config()).get_revision(revision)
    except CommandError:
        return False
    return True


def _commit_without_waiting(connection: Any, _record: object) -> None:
    connection.autocommit = True
    with connection.cursor() as cursor:
        cursor.execute("set synchronous_commit to off")


def _revision(connection: sa.Connection) -> str | None:
    if not sa.inspect(connection).has_table("media_schema_version"):
        return None
    revision: str | None = connection.execute(sa.text("select version_num from media_schema_version")).scalar()
    return revision
