"""Task of a lost claim, by which a worker can tell if a process that died had claimed anything."""

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add a column."""
    op.add_column("claim_losses", sa.Column("task_id", sa.Text), schema="vectormill")
