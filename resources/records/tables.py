"""Tables of the registry, the planner and the outcome records (SQLAlchemy Core); migrations create them."""

from __future__ import annotations

import sqlalchemy as sa

REVISION = "0005"
"""The newest migration: alembic, which would say so too, takes a second to import."""

metadata = sa.MetaData()

_timestamp = sa.DateTime(timezone=True)

uploads = sa.Table(
    "uploads",
    metadata,
    sa.Column("media_id", sa.Text, primary_key=True),
    # In the order of its bytes, as S3 lists keys, so that a page of a listing is one range of the index.
    sa.Column("uri", sa.Text(collation="C"), nullable=False),
    sa.Column("etag", sa.Text, nullable=False),
    sa.Column("object_version", sa.Text),
    sa.Column("bytes", sa.BigInteger),
    sa.Column("modified_at", _timestamp),
    sa.Column("source", sa.Text, nullable=False),
    sa.Column("discovered_at", _timestamp, nullable=False, server_default=sa.func.now()),
    # When this version was known to be the current one; with `sequencer` it orders the versions of a URI.
    sa.Column("observed_at", _timestamp, nullable=False, server_default=sa.func.now()),
    sa.Column("sequencer", sa.Text, nullable=False, server_default=""),
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("changed_at", _timestamp, nullable=False, server_default=sa.func.now()),
    # The planner's: lower goes first; the plan all its outcomes are settled for; not before; in which batch.
    sa.Column("priority", sa.SmallInteger, nullable=False, server_default="0"),
    sa.Column("plan", sa.Text),
    sa.Column("due_at", _timestamp),
    sa.Column("batch_id", sa.BigInteger),
    sa.Column("launches", sa.Integer, nullable=False, server_default="0"),
    sa.CheckConstraint("state in ('live', 'superseded', 'removed', 'purged')", name="uploads_state"),
    sa.Index("uploads_uri", "uri"),
    sa.Index("uploads_changed", "changed_at"),
    sa.Index("uploads_batch", "batch_id"),
)

removals = sa.Table(
    "removals",
    metadata,
    sa.Column("uri", sa.Text(collation="C"), primary_key=True),
    sa.Column("observed_at", _timestamp, nullable=False),
    sa.Column("sequencer", sa.Text, nullable=False, server_default=""),
)

batches = sa.Table(
    "batches",
    metadata,
    sa.Column("id", sa.BigInteger, sa.Identity(), primary_key=True),
    sa.Column("group", sa.Text, nullable=False),
    sa.Column("lane", sa.Text, nullable=False),
    sa.Column("items", sa.Integer, nullable=False),
    sa.Column("seconds", sa.Float, nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("run_id", sa.Text),
    sa.Column("created_at", _timestamp, nullable=False, server_default=sa.func.now()),
    sa.Column("finished_at", _timestamp),
    sa.CheckConstraint("state in ('requested', 'running', 'finished', 'failed', 'lost')", name="batches_state"),
    sa.Index("batches_state", "state"),
)

rejected_messages = sa.Table(
    "rejected_messages",
    metadata,
    sa.Column("id", sa.BigInteger, sa.Identity(), primary_key=True),
    sa.Column("source", sa.Text, nullable=False),
    sa.Column("message_id", sa.Text, nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("body", sa.Text, nullable=False),
    sa.Column("at", _timestamp, nullable=False, server_default=sa.func.now()),
    sa.UniqueConstraint("source", "message_id", name="rejected_messages_once"),
)

library_state = sa.Table(
    "library_state",
    metadata,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("value", sa.Text, nullable=False),
    sa.Column("updated_at", _timestamp, nullable=False, server_default=sa.func.now()),
)

# Processes that load a model right now, and those that died while they did: no item of theirs was tried.
model_loads = sa.Table(
    "model_loads",
    metadata,
    sa.Column("run_id", sa.Text, primary_key=True),
    sa.Column("process", sa.Text, primary_key=True),
    sa.Column("since", _timestamp, nullable=False, server_default=sa.func.now()),
)

outcomes = sa.Table(
    "outcomes",
    metadata,
    sa.Column("media_id", sa.Text, primary_key=True),
    sa.Column("asset", sa.Text, primary_key=True),
    sa.Column("version", sa.Text, nullable=False),
    sa.Column("content", sa.Text, nullable=False, server_default=""),
    sa.Column("status", sa.Text, nullable=False),
    sa.Column("attempts", sa.Integer, nullable=False),
    sa.Column("claim", sa.BigInteger, nullable=False),
    sa.Column("error_class", sa.Text),
    sa.Column("error", sa.Text),
    sa.Column("run_id", sa.Text),
    sa.Column("seconds", sa.Float),
    sa.Column("units", sa.Integer),
    sa.Column("rows", sa.BigInteger),
    sa.Column("device", sa.Text),
    sa.Column("model", sa.Text),
    sa.Column("bytes_out", sa.BigInteger),
    sa.Column("copied_from", sa.Text),
    sa.Column("retry_at", _timestamp),
    sa.Column("updated_at", _timestamp, nullable=False, server_default=sa.func.now()),
    sa.CheckConstraint(
        "status in ('running', 'ok', 'not_applicable', 'retryable', 'quarantined')", name="outcomes_status"
    ),
    sa.Index("outcomes_asset_version", "asset", "version"),
    sa.Index("outcomes_status", "status", "asset"),
    sa.Index("outcomes_updated", "updated_at"),
)

outcome_history = sa.Table(
    "outcome_history",
    metadata,
    sa.Column("id", sa.BigInteger, sa.Identity(), primary_key=True),
    sa.Column("media_id", sa.Text, nullable=False),
    sa.Column("asset", sa.Text, nullable=False),
    sa.Column("version", sa.Text, nullable=False),
    sa.Column("claim", sa.BigInteger, nullable=False),
    sa.Column("status", sa.Text, nullable=False),
    sa.Column("error_class", sa.Text),
    sa.Column("error", sa.Text),
    sa.Column("run_id", sa.Text),
    sa.Column("at", _timestamp, nullable=False, server_default=sa.func.now()),
    sa.Index("outcome_history_item", "media_id", "asset", "id"),
)

# Append-only: what was erased is told by counts alone, never by content.
purges = sa.Table(
    "purges",
    metadata,
    sa.Column("id", sa.BigInteger, sa.Identity(), primary_key=True),
    sa.Column("media_id", sa.Text, nullable=False),
    sa.Column("step", sa.Text, nullable=False),
    sa.Column("os_user", sa.Text, nullable=False),
    sa.Column("host", sa.Text, nullable=False),
    sa.Column("counts", sa.Text, nullable=False),
    sa.Column("at", _timestamp, nullable=False, server_default=sa.func.now()),
    sa.CheckConstraint("step in ('begun', 'erased', 'incomplete')", name="purges_step"),
    sa.Index("purges_item", "media_id", "id"),
)
