"""Index of jobs by name, which each submission and each command that is given a name looks up."""

from alembic import op
from sqlalchemy import text

revision = "0016"
down_revision = "0015"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add an index."""
    op.create_index("jobs_named_idx", "jobs", ["name", text("id desc")], schema="vectormill")
