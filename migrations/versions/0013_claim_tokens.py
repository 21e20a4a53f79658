"""Random tokens of claims and producers' staging leases: a server that lost its last commits gives a fence again."""

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add columns. Workers of the previous version neither set nor check tokens."""
    for table in ("jobs", "chunks", "usage"):
        op.add_column(table, sa.Column("token", sa.Uuid()), schema="vectormill")
    parts = sa.Column("parts", sa.Integer(), server_default="0", nullable=False)
    op.add_column("chunks", parts, schema="vectormill")
