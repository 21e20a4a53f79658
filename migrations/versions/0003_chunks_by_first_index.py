"""Index of chunks by their first item."""

from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make the unique index serve the lookup of an item's chunk, and drop an index that no query uses."""
    op.drop_constraint(op.f("chunks_job_id_ordinal_key"), "chunks", schema="vectormill")
    op.create_unique_constraint(
        op.f("chunks_job_id_first_index_key"), "chunks", ["job_id", "first_index"], schema="vectormill"
    )
    op.drop_index("chunks_finished_idx", table_name="chunks", schema="vectormill")
