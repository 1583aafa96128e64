"""URIs sort by their bytes, as S3 lists keys."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Give the URI columns, and with them their indexes, the collation C."""
    for table in ("uploads", "removals"):
        op.alter_column(table, "uri", type_=sa.Text(collation="C"), existing_type=sa.Text, existing_nullable=False)


def downgrade() -> None:
    """Back to the database's own collation."""
    for table in ("removals", "uploads"):
        op.alter_column(table, "uri", type_=sa.Text(), existing_type=sa.Text(collation="C"), existing_nullable=False)
