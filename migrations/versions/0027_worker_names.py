"""Names of workers in Celery, by which Flower's pages of them are found."""

import sqlalchemy as sa
from alembic import op

revision = "0027"
down_revision = "0026"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add a column; a worker that runs already shows no name."""
    op.add_column("workers", sa.Column("name", sa.Text(), nullable=True), schema="vectormill")
