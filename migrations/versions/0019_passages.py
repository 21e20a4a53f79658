"""Passages: a table of their vectors, their titles, and what truncation has cost."""

import sqlalchemy as sa
from alembic import op
from pgvector.sqlalchemy import HALFVEC, VECTOR
from sqlalchemy.dialects.postgresql import JSONB

revision = "0019"
down_revision = "0018"
branch_labels = None
depends_on = None

# As before, plus `passages` and `lost_tokens`.
RECEIPTS = """
create or replace view vectormill.receipts as
select j.id as job_id, j.name, j.state, j.items_total as items_in,
       c.embedded, c.reused, c.rejected, c.cancelled, c.prompt_tokens, c.reused_tokens,
       j.items_total = c.embedded + c.reused + c.rejected + c.cancelled as balanced, c.truncated,
       c.passages, c.lost_tokens
from vectormill.jobs j
cross join lateral (
  select coalesce(sum(embedded), 0)::bigint as embedded, coalesce(sum(reused), 0)::bigint as reused,
         coalesce(sum(rejected), 0)::bigint as rejected, coalesce(sum(cancelled), 0)::bigint as cancelled,
         coalesce(sum(prompt_tokens), 0)::bigint as prompt_tokens,
         coalesce(sum(reused_tokens), 0)::bigint as reused_tokens,
         coalesce(sum(truncated), 0)::bigint as truncated,
         coalesce(sum(passages), 0)::bigint as passages, coalesce(sum(lost_tokens), 0)::bigint as lost_tokens
  from vectormill.chunks where job_id = j.id
) c
"""


# As before, plus partitions of `passages`.
MAKE_PARTITIONS = """
create or replace function vectormill.make_partitions(month date) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  first date := date_trunc('month', month);
  bounds uuid[];
  parent name;
  child text;
  allowed record;
begin
  -- No job made from a moment on has a lower id.
  select array_agg(rpad(lpad(to_hex((extract(epoch from moment) * 1000)::bigint), 12, '0'), 32, '0')::uuid
                   order by moment)
    into bounds
    from unnest(array[first, first + interval '1 month']) moment;
  -- One at a time: attaching takes this lock anyway. An advisory one could be held by anybody's query.
  lock table vectormill.items in share update exclusive mode;
  foreach parent in array array['items', 'embeddings', 'passages', 'rejects'] loop
    child := parent || to_char(first, '_YYYY_MM');
    if not exists (select from pg_tables where schemaname = 'vectormill' and tablename = child) then
      -- Whoever may call this mustn't make tables without end; a job's month is the one that it is made in.
      if (first between '2020-01-01' and now() + interval '3 months') is not true then
        raise exception using errcode = 'invalid_parameter_value', message = format(
          'no partitions are made for %s: it isn''t between 2020 and three months from now; set the clocks right.',
          to_char(first, 'YYYY-MM'));
      end if;
      -- Made apart and attached: that lets readers and writers of the other months go on.
      execute format('create table vectormill.%I (like vectormill.%I including all)', child, parent);
      execute format('alter table vectormill.%I attach partition vectormill.%I for values from (%L) to (%L)',
                     parent, child, bounds[1], bounds[2]);
    end if;
    for allowed in
      select g.grantee::regrole as role, g.privilege_type as what
      from pg_class c cross join aclexplode(c.relacl) g
      where c.oid = format('vectormill.%I', parent)::regclass and g.grantee not in (0, c.relowner)
    loop
      execute format('grant %s on vectormill.%I to %s', allowed.what, child, allowed.role);
    end loop;
  end loop;
end
$$
"""

# The same months as the other tables have.
PARTITIONS = """
select vectormill.make_partitions(to_date(right(relname, 7), 'YYYY_MM')) from pg_class
where relnamespace = 'vectormill'::regnamespace and relispartition and relkind = 'r' and relname ~ '^items_'
"""


def upgrade() -> None:
    """Add a table and columns. No job may use them before all processes are of this version."""
    op.create_table(
        "passages",
        sa.Column("job_id", sa.Uuid(), nullable=False),
        sa.Column("index", sa.BigInteger(), nullable=False),
        sa.Column("passage", sa.Integer(), nullable=False),
        sa.Column("start", sa.Integer(), nullable=False),
        sa.Column("stop", sa.Integer(), nullable=False),
        sa.Column("key", sa.Text()),
        sa.Column("vector_space_id", sa.BigInteger(), nullable=False),
        sa.Column("tokens", sa.Integer(), nullable=False),
        sa.Column("truncated", sa.Boolean(), nullable=False),
        sa.Column("vector", VECTOR()),
        sa.Column("half", HALFVEC()),
        sa.PrimaryKeyConstraint("job_id", "index", "passage", name=op.f("passages_pkey")),
        sa.CheckConstraint("(vector is null) <> (half is null)", name=op.f("passages_one_vector_check")),
        schema="vectormill",
        postgresql_partition_by="RANGE (job_id)",
    )
    op.execute(MAKE_PARTITIONS)
    op.execute(PARTITIONS)
    op.add_column("items", sa.Column("title", sa.Text()), schema="vectormill")
    for column in ("passages", "lost_tokens"):
        op.add_column(
            "chunks", sa.Column(column, sa.BigInteger(), server_default="0", nullable=False), schema="vectormill"
        )
    op.add_column(
        "chunks", sa.Column("most_truncated", JSONB(), server_default="[]", nullable=False), schema="vectormill"
    )
    op.execute(RECEIPTS)
