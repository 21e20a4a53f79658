"""Batch requests and their files."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

_STATES = ("validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled")


def _moment(name: str, *, now: bool = False) -> sa.Column[object]:
    default = sa.func.now() if now else None
    return sa.Column(name, sa.DateTime(timezone=True), nullable=not now, server_default=default)


def upgrade() -> None:
    """Add two tables. Existing ones don't change."""
    op.create_table(
        "files",
        sa.Column("id", sa.Text(), primary_key=True),
        sa.Column("workspace_id", sa.BigInteger(), sa.ForeignKey("vectormill.workspaces.id"), nullable=False),
        sa.Column("purpose", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("uri", sa.Text(), nullable=False),
        sa.Column("etag", sa.Text(), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("sha256", sa.Text(), nullable=False),
        _moment("created_at", now=True),
        _moment("expires_at"),
        sa.CheckConstraint("purpose in ('batch', 'batch_output')", name=op.f("files_purpose_check")),
        schema="vectormill",
    )
    op.create_index("files_workspace_idx", "files", ["workspace_id", "id"], schema="vectormill")
    op.create_index(
        "files_expiry_idx",
        "files",
        ["expires_at"],
        schema="vectormill",
        postgresql_where=sa.text("expires_at is not null"),
    )
    op.create_table(
        "batches",
        sa.Column("id", sa.Text(), primary_key=True),
        sa.Column("workspace_id", sa.BigInteger(), sa.ForeignKey("vectormill.workspaces.id"), nullable=False),
        sa.Column("state", sa.Text(), nullable=False, server_default="validating"),
        sa.Column("ends_as", sa.Text()),
        sa.Column("endpoint", sa.Text(), nullable=False),
        sa.Column("completion_window", sa.Text(), nullable=False),
        sa.Column("input_file_id", sa.Text(), nullable=False),
        sa.Column("output_file_id", sa.Text()),
        sa.Column("error_file_id", sa.Text()),
        sa.Column("job_id", sa.Uuid()),
        sa.Column("model", sa.Text()),
        sa.Column("metadata", JSONB()),
        sa.Column("max_rejects", sa.Text(), nullable=False, server_default=""),
        sa.Column("output_seconds", sa.BigInteger()),
        sa.Column("errors", JSONB()),
        sa.Column("counts", JSONB()),
        _moment("created_at", now=True),
        _moment("expires_at"),
        _moment("in_progress_at"),
        _moment("finalizing_at"),
        _moment("cancelling_at"),
        _moment("ended_at"),
        sa.CheckConstraint(
            "state in ({})".format(", ".join(f"'{one}'" for one in _STATES)), name=op.f("batches_state_check")
        ),
        sa.CheckConstraint("ends_as in ('cancelled', 'expired')", name=op.f("batches_ends_as_check")),
        schema="vectormill",
    )
    op.create_index("batches_workspace_idx", "batches", ["workspace_id", "id"], schema="vectormill")
    op.create_index(
        "batches_open_idx", "batches", ["id"], schema="vectormill", postgresql_where=sa.text("ended_at is null")
    )
