"""Chunks that workers read from files, and Parquet files that they write."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add a chunk's position in its file, and the table of outputs."""
    for name in ("input_offset", "input_bytes", "input_line"):
        op.add_column("chunks", sa.Column(name, sa.BigInteger(), nullable=True), schema="vectormill")
    op.create_table(
        "outputs",
        sa.Column("job_id", sa.Uuid(), nullable=False),
        sa.Column("chunk_id", sa.BigInteger(), nullable=False),
        sa.Column("fence", sa.BigInteger(), nullable=False),
        sa.Column("part", sa.Integer(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("rows", sa.Integer(), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["job_id"], ["vectormill.jobs.id"], name=op.f("outputs_job_id_fkey"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("chunk_id", "fence", "part", name=op.f("outputs_pkey")),
        schema="vectormill",
    )
    op.create_index("outputs_job_idx", "outputs", ["job_id", "chunk_id"], unique=False, schema="vectormill")
