"""Alembic environment: runs inside the connection that `resources.records.database.migrate` hands over."""

from alembic import context

from resources.records.tables import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    version_table="media_schema_version",
)
context.run_migrations()
