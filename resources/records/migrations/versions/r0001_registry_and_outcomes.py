"""Registry of uploads, outcome records and their history."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Create the first schema."""
    op.create_table(
        "uploads",
        sa.Column("media_id", sa.Text, primary_key=True),
        sa.Column("uri", sa.Text, nullable=False),
        sa.Column("etag", sa.Text, nullable=False),
        sa.Column("bytes", sa.BigInteger),
        sa.Column("modified_at", sa.DateTime(timezone=True)),
        sa.Column("source", sa.Text, nullable=False),
        sa.Column("discovered_at", sa.DateTime(timezone=True), nullable=False, server_default=sa.func.now()),
        sa.Column("state", sa.Text, nullable=False),
        sa.CheckConstraint("state in ('live', 'superseded', 'removed')", name="uploads_state"),
    )
    op.create_index("uploads_uri", "uploads", ["uri"])
    op.create_table(
        "outcomes",
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
        sa.Column("retry_at", sa.DateTime(timezone=True)),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False, server_default=sa.func.now()),
        sa.CheckConstraint(
            "status in ('running', 'ok', 'not_applicable', 'retryable', 'quarantined')", name="outcomes_status"
        ),
    )
    op.create_index("outcomes_asset_version", "outcomes", ["asset", "version"])
    op.create_index("outcomes_status", "outcomes", ["status", "asset"])
    op.create_table(
        "outcome_history",
        sa.Column("id", sa.BigInteger, sa.Identity(), primary_key=True),
        sa.Column("media_id", sa.Text, nullable=False),
        sa.Column("asset", sa.Text, nullable=False),
        sa.Column("version", sa.Text, nullable=False),
        sa.Column("claim", sa.BigInteger, nullable=False),
        sa.Column("status", sa.Text, nullable=False),
        sa.Column("error_class", sa.Text),
        sa.Column("error", sa.Text),
        sa.Column("run_id", sa.Text),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False, server_default=sa.func.now()),
    )
    op.create_index("outcome_history_item", "outcome_history", ["media_id", "asset", "id"])


def downgrade() -> None:
    """Drop everything."""
    for name in ("outcome_history", "outcomes", "uploads"):
        op.drop_table(name)
