"""Known texts, whose vectors are copied; and the items of each commit that got a copy."""

import sqlalchemy as sa
from alembic import op

revision = "0020"
down_revision = "0019"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add a table and a column. A worker of the version before embeds every text, and reads none of it."""
    op.create_table(
        "known_texts",
        sa.Column("workspace_id", sa.BigInteger(), nullable=False),
        sa.Column("vector_space_id", sa.BigInteger(), nullable=False),
        sa.Column("hash", sa.LargeBinary(), nullable=False),
        sa.Column("job_id", sa.Uuid(), nullable=False),
        sa.Column("index", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("workspace_id", "vector_space_id", "hash", name=op.f("known_texts_pkey")),
        schema="vectormill",
    )
    op.create_index("known_texts_job_idx", "known_texts", ["job_id"], schema="vectormill", postgresql_using="brin")
    op.add_column(
        "usage", sa.Column("reused_items", sa.BigInteger(), server_default="0", nullable=False), schema="vectormill"
    )
