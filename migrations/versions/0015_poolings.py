"""Pooling of a model, for bare transformers whose folder doesn't say how they pool."""

import sqlalchemy as sa
from alembic import op

revision = "0015"
down_revision = "0014"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add a column. The table isn't rewritten."""
    op.add_column("models", sa.Column("pooling", sa.Text), schema="vectormill")
