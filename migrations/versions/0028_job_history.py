"""History of jobs: who submitted each one and by which query, then each change of its state and priority."""

import sqlalchemy as sa
from alembic import op

revision = "0028"
down_revision = "0027"
branch_labels = None
depends_on = None

# By a trigger, so that no change is missed, whichever process or person makes it, and no login needs a right.
NOTE = """
create function vectormill.note_job_change() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
begin
  insert into vectormill.job_history (job_id, state, reason, message, priority)
  values (new.id, new.state, new.reason, new.message, new.priority);
  return null;
end
$$
"""
TRIGGER = """
create trigger note_change after update of state, priority on vectormill.jobs
for each row when ((old.state, old.priority) is distinct from (new.state, new.priority))
execute function vectormill.note_job_change()
"""


def upgrade() -> None:
    """Add the table and the trigger; jobs that are there have no history before now."""
    op.create_table(
        "job_history",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("job_id", sa.Uuid(), nullable=False),
        sa.Column(
            "changed_at", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False
        ),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("message", sa.Text(), nullable=True),
        sa.Column("priority", sa.SmallInteger(), nullable=False),
        sa.Column("submitted_by", sa.Text(), nullable=True),
        sa.Column("query", sa.Text(), nullable=True),
        sa.ForeignKeyConstraint(
            ["job_id"], ["vectormill.jobs.id"], name=op.f("job_history_job_id_fkey"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("job_history_pkey")),
        schema="vectormill",
    )
    op.create_index(op.f("job_history_job_idx"), "job_history", ["job_id", "id"], schema="vectormill")
    op.create_index(
        op.f("job_history_query_idx"),
        "job_history",
        ["job_id"],
        schema="vectormill",
        postgresql_where=sa.text("query is not null"),
    )
    op.execute(NOTE)
    op.execute(TRIGGER)
