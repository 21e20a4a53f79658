"""Lifetime of API keys, and an index that alone answers the sum of a month's usage."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add a column, filled from existing rows, and rebuild an index. Writes of requests' usage wait meanwhile."""
    op.add_column("api_keys", sa.Column("lives", sa.Interval()), schema="vectormill")
    op.execute("update vectormill.api_keys set lives = expires_at - created_at")
    op.drop_index("usage_workspace_idx", table_name="usage", schema="vectormill")
    op.create_index(
        "usage_workspace_idx",
        "usage",
        ["workspace_id", "created_at"],
        schema="vectormill",
        postgresql_include=["total_tokens", "cost"],
    )
