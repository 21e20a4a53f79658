"""Keys that are forgotten: who asked for it, how far it is, and tombstones that keep them from coming back."""

import sqlalchemy as sa
from alembic import op

revision = "0024"
down_revision = "0023"
branch_labels = None
depends_on = None

# As before, plus what is forgotten.
RECEIPTS = """
create or replace view vectormill.receipts as
select j.id as job_id, j.name, j.state, j.items_total - c.vacant + coalesce(s.unchanged, 0) as items_in,
       c.embedded, c.reused, c.rejected, c.cancelled, c.prompt_tokens, c.reused_tokens,
       j.items_total = c.embedded + c.reused + c.rejected + c.cancelled + c.vacant as balanced, c.truncated,
       c.passages, c.lost_tokens, coalesce(s.unchanged, 0) as unchanged, coalesce(s.removed, 0) as removed, c.forgotten
from vectormill.jobs j
left join vectormill.syncs s on s.job_id = j.id
cross join lateral (
  select coalesce(sum(embedded), 0)::bigint as embedded, coalesce(sum(reused), 0)::bigint as reused,
         coalesce(sum(rejected), 0)::bigint as rejected, coalesce(sum(cancelled), 0)::bigint as cancelled,
         coalesce(sum(prompt_tokens), 0)::bigint as prompt_tokens,
         coalesce(sum(reused_tokens), 0)::bigint as reused_tokens,
         coalesce(sum(truncated), 0)::bigint as truncated,
         coalesce(sum(passages), 0)::bigint as passages, coalesce(sum(lost_tokens), 0)::bigint as lost_tokens,
         coalesce(sum(vacant), 0)::bigint as vacant, coalesce(sum(forgotten), 0)::bigint as forgotten
  from vectormill.chunks where job_id = j.id
) c
"""


def _count(name: str) -> "sa.Column[int]":
    return sa.Column(name, sa.BigInteger(), server_default="0", nullable=False)


def upgrade() -> None:
    """Add tables and columns. Processes of the version before know no tombstones, so nothing may be forgotten before
    all are of this version."""
    op.add_column(
        "workspaces",
        sa.Column(
            "tombstone_key",
            sa.LargeBinary(),
            server_default=sa.text("uuid_send(gen_random_uuid()) || uuid_send(gen_random_uuid())"),
            nullable=False,
        ),
        schema="vectormill",
    )
    for name in ("forgotten", "forgotten_vectors", "forgotten_rejects", "forgotten_passages"):
        op.add_column("chunks", _count(name), schema="vectormill")
    op.create_table(
        "forgets",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("workspace_id", sa.BigInteger(), nullable=False),
        sa.Column("collection_id", sa.BigInteger(), nullable=True),
        sa.Column("requested_by", sa.Text(), nullable=False),
        *map(_count, ("keys", "items", "collected")),
        sa.Column("after_job", sa.Uuid(), nullable=True),
        sa.Column("waits_for", sa.ARRAY(sa.Uuid()), server_default="{}", nullable=False),
        sa.Column("problem", sa.Text(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.func.now(), nullable=False),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("forgets_pkey")),
        sa.ForeignKeyConstraint(["workspace_id"], ["vectormill.workspaces.id"], name=op.f("forgets_workspace_id_fkey")),
        schema="vectormill",
    )
    op.create_index(
        "forgets_unfinished_idx",
        "forgets",
        ["id"],
        schema="vectormill",
        postgresql_where=sa.text("finished_at is null"),
    )
    op.create_table(
        "forget_keys",
        sa.Column("forget_id", sa.Uuid(), nullable=False),
        sa.Column("key", sa.Text(collation="C"), nullable=False),
        sa.PrimaryKeyConstraint("forget_id", "key", name=op.f("forget_keys_pkey")),
        sa.ForeignKeyConstraint(
            ["forget_id"], ["vectormill.forgets.id"], name=op.f("forget_keys_forget_id_fkey"), ondelete="CASCADE"
        ),
        schema="vectormill",
    )
    op.create_table(
        "tombstones",
        sa.Column("workspace_id", sa.BigInteger(), nullable=False),
        sa.Column("digest", sa.LargeBinary(), nullable=False),
        sa.Column("forgotten_by", sa.Text(), nullable=False),
        sa.Column("forgotten_at", sa.DateTime(timezone=True), server_default=sa.func.now(), nullable=False),
        sa.PrimaryKeyConstraint("workspace_id", "digest", name=op.f("tombstones_pkey")),
        schema="vectormill",
    )
    op.execute(RECEIPTS)
