"""Device, precision and roofline of what was embedded; rates by them; kinds of devices that workers have."""

import sqlalchemy as sa
from alembic import op

revision = "0018"
down_revision = "0017"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add columns and a table. Workers of the previous version leave the columns empty."""
    for column in ("device", "precision"):
        op.add_column("usage", sa.Column(column, sa.Text()), schema="vectormill")
    op.add_column("usage", sa.Column("roofline_seconds", sa.Double()), schema="vectormill")
    op.add_column(
        "workers",
        sa.Column("device_kinds", sa.ARRAY(sa.Text()), server_default="{}", nullable=False),
        schema="vectormill",
    )
    op.create_table(
        "model_rates",
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("device", sa.Text(), nullable=False),
        sa.Column("precision", sa.Text(), nullable=False),
        sa.Column("tokens_per_second", sa.Double(), nullable=False),
        sa.Column("measured_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.CheckConstraint("tokens_per_second > 0", name=op.f("model_rates_positive_check")),
        sa.ForeignKeyConstraint(
            ["model"], ["vectormill.models.name"], name=op.f("model_rates_model_fkey"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("model", "device", "precision", name=op.f("model_rates_pkey")),
        schema="vectormill",
    )
