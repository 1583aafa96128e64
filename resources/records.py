"""Tables of the registry and of the outcome records (SQLAlchemy Core); migrations create them."""

from __future__ import annotations

import sqlalchemy as sa

metadata = sa.MetaData()

_timestamp = sa.DateTime(timezone=True)

uploads = sa.Table(
    "uploads",
    metadata,
    sa.Column("media_id", sa.Text, primary_key=True),
    sa.Column("uri", sa.Text, nullable=False),
    sa.Column("etag", sa.Text, nullable=False),
    sa.Column("bytes", sa.BigInteger),
    sa.Column("modified_at", _timestamp),
    sa.Column("source", sa.Text, nullable=False),
    sa.Column("discovered_at", _timestamp, nullable=False, server_default=sa.func.now()),
    sa.Column("state", sa.Text, nullable=False),
    sa.CheckConstraint("state in ('live', 'superseded', 'removed')", name="uploads_state"),
    sa.Index("uploads_uri", "uri"),
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
