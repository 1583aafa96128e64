"""The record of purges: who erased what, and when."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Add the table of purges."""
    op.create_table(
        "purges",
        sa.Column("id", sa.BigInteger, sa.Identity(), primary_key=True),
        sa.Column("media_id", sa.Text, nullable=False),
        sa.Column("step", sa.Text, nullable=False),
        sa.Column("os_user", sa.Text, nullable=False),
        sa.Column("host", sa.Text, nullable=False),
        sa.Column("counts", sa.Text, nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False, server_default=sa.func.now()),
        sa.CheckConstraint("step in ('begun', 'erased', 'incomplete')", name="purges_step"),
    )
    op.create_index("purges_item", "purges", ["media_id", "id"])


def downgrade() -> None:
    """Forget who purged what."""
    op.drop_table("purges")
