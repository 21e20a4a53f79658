"""Parquet files of collections: a folder for each version, the files in it that count, and the keys that changed; and
where files of which keys are forgotten couldn't be found."""

import sqlalchemy as sa
from alembic import op

revision = "0025"
down_revision = "0024"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add a table and columns. Workers of the version before note no changes, so no collection may have files before
    all are of this version."""
    for column in (
        sa.Column("output", sa.Text(), nullable=True),
        sa.Column("output_number", sa.Integer(), server_default="0", nullable=False),
        sa.Column("output_shown", sa.Integer(), server_default="0", nullable=False),
        sa.Column("output_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("output_problem", sa.Text(), nullable=True),
        sa.Column("compacts", sa.Boolean(), server_default="false", nullable=False),
    ):
        op.add_column("collection_versions", column, schema="vectormill")
    op.create_table(
        "collection_changes",
        sa.Column("version_id", sa.BigInteger(), nullable=False),
        sa.Column("key", sa.Text(collation="C"), nullable=False),
        schema="vectormill",
    )
    op.create_index("collection_changes_version_idx", "collection_changes", ["version_id"], schema="vectormill")
    op.create_table(
        "collection_files",
        sa.Column("version_id", sa.BigInteger(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("rows", sa.Integer(), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("version_id", "name", name=op.f("collection_files_pkey")),
        sa.ForeignKeyConstraint(
            ["version_id"],
            ["vectormill.collection_versions.id"],
            name=op.f("collection_files_version_id_fkey"),
            ondelete="CASCADE",
        ),
        schema="vectormill",
    )
    op.add_column(
        "forgets",
        sa.Column("unseen", sa.ARRAY(sa.Text()), server_default="{}", nullable=False),
        schema="vectormill",
    )
