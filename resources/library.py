"""The library: one installation's settings, storage, database, records and models, handed to assets as `media`."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import insert

from resources.errors import printable
from resources.files.derived import DerivedStore
from resources.files.local import private
from resources.files.object_store import location
from resources.ingest.registry import Registry
from resources.models.registry import ModelRegistry
from resources.records.backlog import Backlog
from resources.records.database import Database
from resources.records.outcomes import OutcomeStore
from resources.records.tables import library_state
from resources.settings import BadSettings, Settings


class Library:
    """Opens its parts on first use; closing it closes what was opened.

    `listeners` hear all that batch engines in this process say; a command line draws its progress from that.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.listeners: list[Callable[[Any], None]] = []

    @classmethod
    def open(cls, home: Path | str | None = None) -> Self:
        """The library of `home` (default: $MEDIA_HOME, then ./var)."""
        return cls(Settings.load(home))

    @cached_property
    def store(self) -> DerivedStore:
        """Tables of derived artifacts. Raises BadSettings for a storage_url of no known kind."""
        settings = self.settings
        try:
            root = location(settings.storage_url or settings.home / "derived", settings.s3)
        except (ValueError, ImportError) as error:
            scheme = (settings.storage_url or "").partition("://")[0]
            told = f"Wrong settings: storage_url: {scheme}:// cannot be used: {printable(str(error), 200)}."
            raise BadSettings(told, "Set MEDIA_STORAGE_URL to a folder or to s3://bucket/prefix.") from error
        return DerivedStore(root, settings.s3.part_bytes)

    @cached_property
    def models(self) -> ModelRegistry:
        """Model specs and loaded models."""
        return ModelRegistry(self.settings)

    @cached_property
    def database(self) -> Database:
        """The Postgres database; starts the embedded server when none is configured.

        Raises DatabaseUnavailable, and StorageMismatch when its records are of other files than `store`.
        """
        private(self.settings.home)
        database = Database.open(self.settings)
        try:
            database.belongs_to(str(self.store.root))
        except BaseException:
            database.close()
            raise
        return database

    @cached_property
    def outcomes(self) -> OutcomeStore:
        """Outcome records."""
        return OutcomeStore(self.database, self.settings.engine)

    @cached_property
    def registry(self) -> Registry:
        """Registered uploads."""
        return Registry(self.database)

    @cached_property
    def backlog(self) -> Backlog:
        """Unsettled uploads and the batches made of them."""
        return Backlog(self.database)

    def items(self) -> list[tuple[str, str, str | None]]:
        """(media_id, uri, sha256 where known) of every live upload, in order of discovery."""
        contents = self.outcomes.content_of("media")  # <code version>:<sha256>
        hashes = {media_id: content.rsplit(":", 1)[-1] for media_id, content in contents.items()}
        return [(row["media_id"], row["uri"], hashes.get(row["media_id"])) for row in self.registry.live()]

    def remembered(self, name: str) -> str | None:
        """A value kept in `library_state`, or None."""
        query = sa.select(library_state.c.value).where(library_state.c.name == name)
        with self.database.engine.connect() as connection:
            value: str | None = connection.execute(query).scalar()
        return value

    def remember(self, name: str, value: str) -> None:
        """Keep a value in `library_state`."""
        statement = insert(library_state).values(name=name, value=value)
        changed = {"value": statement.excluded.value, "updated_at": sa.func.now()}
        with self.database.engine.begin() as connection:
            connection.execute(statement.on_conflict_do_update(index_elements=["name"], set_=changed))

    def close(self) -> None:
        """Close the database connections."""
        if "database" in self.__dict__:
            self.database.close()
