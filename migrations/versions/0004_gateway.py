"""Gateway: engines, limits of workspaces, prices and dimensions of models, usage of requests."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

_NEW: dict[str, list[sa.Column[object]]] = {
    "workspaces": [
        sa.Column("requests_per_minute", sa.BigInteger()),
        sa.Column("tokens_per_minute", sa.BigInteger()),
        sa.Column("monthly_tokens", sa.BigInteger()),
        sa.Column("monthly_cost", sa.Numeric()),
    ],
    "models": [
        sa.Column("matryoshka", postgresql.ARRAY(sa.Integer()), nullable=False, server_default="{}"),
        sa.Column("price_per_million", sa.Numeric()),
    ],
    "usage": [
        sa.Column("truncated", sa.BigInteger(), nullable=False, server_default="0"),
        sa.Column("end_user", sa.Text()),
    ],
}


def upgrade() -> None:
    """Add a table, an index and columns. No table is rewritten."""
    for table, columns in _NEW.items():
        for column in columns:
            op.add_column(table, column, schema="vectormill")
    op.create_index(
        "usage_request_idx",
        "usage",
        ["request_id"],
        unique=True,
        schema="vectormill",
        postgresql_where=sa.text("request_id is not null"),
    )
    op.create_table(
        "engines",
        sa.Column("id", sa.Uuid(), primary_key=True),
        sa.Column("url", sa.Text(), nullable=False),
        sa.Column("models", postgresql.ARRAY(sa.Text()), nullable=False),
        sa.Column("device", sa.Text(), nullable=False),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=False, server_default=sa.func.now()),
        sa.Column("seen_at", sa.DateTime(timezone=True), nullable=False, server_default=sa.func.now()),
        schema="vectormill",
    )
