"""Index of chunks whose claim was lost: the lookup is fast however many chunks are pending."""

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add an index."""
    op.create_index(
        "chunks_lost_idx",
        "chunks",
        ["id"],
        schema="vectormill",
        postgresql_where=sa.text("state = 'pending' and crashes > 0"),
    )
