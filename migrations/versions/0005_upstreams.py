"""Models of kind gateway: limits of a request, and the format of the endpoint's replies."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

_NEW: tuple[sa.Column[object], ...] = (
    sa.Column("reply_model", sa.Text()),
    sa.Column("base64", sa.Boolean()),
    sa.Column("request_inputs", sa.Integer()),
    sa.Column("request_tokens", sa.Integer()),
)


def upgrade() -> None:
    """Add columns. No table is rewritten."""
    for column in _NEW:
        op.add_column("models", column, schema="vectormill")
    op.create_check_constraint(
        "models_upstream_check",
        "models",
        "kind <> 'gateway' or (gateway_url is not null and upstream_model is not null and request_inputs > 0 "
        "and request_tokens > 0)",
        schema="vectormill",
    )
