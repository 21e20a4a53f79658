"""Indexes of what the dashboard's overview asks every other second: jobs that ended of late, and each last sync."""

import sqlalchemy as sa
from alembic import op

revision = "0029"
down_revision = "0028"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make the indexes."""
    op.create_index(
        "jobs_ended_idx",
        "jobs",
        ["finished_at"],
        schema="vectormill",
        postgresql_where=sa.text("state in ('completed', 'failed', 'cancelled')"),
    )
    op.create_index("syncs_settled_idx", "syncs", ["version_id", "settled_at"], schema="vectormill")
