"""Deprecated models: when, and which one replaces them."""

import sqlalchemy as sa
from alembic import op

revision = "0026"
down_revision = "0025"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add columns."""
    op.add_column("models", sa.Column("deprecated_at", sa.Date(), nullable=True), schema="vectormill")
    op.add_column("models", sa.Column("replaced_by", sa.Text(), nullable=True), schema="vectormill")
