"""Event-driven ingestion and the planner: versions and tombstones of uploads, batches, rejected messages, state."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

_TIMESTAMP = sa.DateTime(timezone=True)


def upgrade() -> None:
    """Widen `uploads`, add the tables of ingestion and planning."""
    for column in (
        sa.Column("object_version", sa.Text),
        sa.Column("observed_at", _TIMESTAMP, nullable=False, server_default=sa.func.now()),
        sa.Column("sequencer", sa.Text, nullable=False, server_default=""),
        sa.Column("changed_at", _TIMESTAMP, nullable=False, server_default=sa.func.now()),
        sa.Column("priority", sa.SmallInteger, nullable=False, server_default="0"),
        sa.Column("plan", sa.Text),
        sa.Column("due_at", _TIMESTAMP),
        sa.Column("batch_id", sa.BigInteger),
        sa.Column("launches", sa.Integer, nullable=False, server_default="0"),
    ):
        op.add_column("uploads", column)
    op.execute("update uploads set observed_at = discovered_at, changed_at = discovered_at")
    op.drop_constraint("uploads_state", "uploads")
    op.create_check_constraint("uploads_state", "uploads", "state in ('live', 'superseded', 'removed', 'purged')")
    op.create_index("uploads_changed", "uploads", ["changed_at"])
    op.create_index("uploads_batch", "uploads", ["batch_id"])
    op.create_index("outcomes_updated", "outcomes", ["updated_at"])
    op.create_table(
        "removals",
        sa.Column("uri", sa.Text, primary_key=True),
        sa.Column("observed_at", _TIMESTAMP, nullable=False),
        sa.Column("sequencer", sa.Text, nullable=False, server_default=""),
    )
    op.create_table(
        "batches",
        sa.Column("id", sa.BigInteger, sa.Identity(), primary_key=True),
        sa.Column("group", sa.Text, nullable=False),
        sa.Column("lane", sa.Text, nullable=False),
        sa.Column("items", sa.Integer, nullable=False),
        sa.Column("seconds", sa.Float, nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("run_id", sa.Text),
        sa.Column("created_at", _TIMESTAMP, nullable=False, server_default=sa.func.now()),
        sa.Column("finished_at", _TIMESTAMP),
        sa.CheckConstraint("state in ('requested', 'running', 'finished', 'failed', 'lost')", name="batches_state"),
    )
    op.create_index("batches_state", "batches", ["state"])
    op.create_table(
        "rejected_messages",
        sa.Column("id", sa.BigInteger, sa.Identity(), primary_key=True),
        sa.Column("source", sa.Text, nullable=False),
        sa.Column("message_id", sa.Text, nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("body", sa.Text, nullable=False),
        sa.Column("at", _TIMESTAMP, nullable=False, server_default=sa.func.now()),
        sa.UniqueConstraint("source", "message_id", name="rejected_messages_once"),
    )
    op.create_table(
        "library_state",
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("value", sa.Text, nullable=False),
        sa.Column("updated_at", _TIMESTAMP, nullable=False, server_default=sa.func.now()),
    )


def downgrade() -> None:
    """Back to the first schema; what purging forbade is forgotten."""
    for name in ("library_state", "rejected_messages", "batches", "removals"):
        op.drop_table(name)
    op.drop_index("outcomes_updated", "outcomes")
    op.drop_index("uploads_batch", "uploads")
    op.drop_index("uploads_changed", "uploads")
    op.execute("update uploads set state = 'removed' where state = 'purged'")
    op.drop_constraint("uploads_state", "uploads")
    op.create_check_constraint("uploads_state", "uploads", "state in ('live', 'superseded', 'removed')")
    for name in (
        "launches",
        "batch_id",
        "due_at",
        "plan",
        "priority",
        "changed_at",
        "sequencer",
        "observed_at",
        "object_version",
    ):
        op.drop_column("uploads", name)
