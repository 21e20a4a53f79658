"""Collections: their versions, keys and vectors, the syncs that change them, and the views that show them."""

import sqlalchemy as sa
from alembic import op
from pgvector.sqlalchemy import HALFVEC, VECTOR
from sqlalchemy.dialects.postgresql import JSONB

revision = "0021"
down_revision = "0020"
branch_labels = None
depends_on = None

# Tables and views are the schema owner's, whoever asks for them. Statements name the parents, so partitions need no
# grants.
MAKE_TABLES = """
create function vectormill.make_collection_tables(version bigint) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  parent name;
begin
  if not exists (select from vectormill.collection_versions v where v.id = version) then
    raise exception 'no version % of any collection.', version using errcode = 'invalid_parameter_value';
  end if;
  foreach parent in array array['collection_keys', 'collection_vectors'] loop
    -- Made apart and attached: that lets readers and writers of other collections go on.
    execute format('create table vectormill.%I (like vectormill.%I including all)', parent || '_' || version, parent);
    execute format('alter table vectormill.%I attach partition vectormill.%I for values in (%L)',
                   parent, parent || '_' || version, version);
  end loop;
end
$$
"""

# Without CONCURRENTLY, which no function may use: it lets readers go on, and nobody else writes while a sync ends.
INDEX = """
create function vectormill.index_collection(version bigint) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  place name := (select n.nspname from pg_extension e join pg_namespace n on n.oid = e.extnamespace
                 where e.extname = 'vector');
  size integer;
  kind text;
  needed bigint := pg_table_size(to_regclass('vectormill.collection_vectors_' || version)) * 3 / 2;
begin
  if needed is null then  -- it has been dropped
    return;
  end if;
  -- A graph that outgrows this memory takes several times as long. Without other processes, whose memory would be
  -- shared, and a container may have little of that.
  if needed > pg_size_bytes(current_setting('maintenance_work_mem')) then
    perform set_config('maintenance_work_mem', least(needed / 1024, 2000000) || 'kB', true),
            set_config('max_parallel_maintenance_workers', '0', true);
  end if;
  select s.dimensions, case v.options->>'dtype' when 'float16' then 'half' else 'vector' end into strict size, kind
  from vectormill.collection_versions v join vectormill.vector_spaces s on s.id = v.vector_space_id
  where v.id = version;
  execute format('create index if not exists %I on vectormill.%I using hnsw ((%I::%I.%I(%s)) %I.%I)',
                 'collection_vectors_' || version || '_hnsw', 'collection_vectors_' || version, kind, place,
                 case kind when 'half' then 'halfvec' else 'vector' end, size, place,
                 case kind when 'half' then 'halfvec_cosine_ops' else 'vector_cosine_ops' end);
end
$$
"""

SHOW = """
create function vectormill.show_collection(collection bigint) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  place name := (select n.nspname from pg_extension e join pg_namespace n on n.oid = e.extnamespace
                 where e.extname = 'vector');
  known vectormill.collections;
  current vectormill.collection_versions;
  size integer;
  columns text := 'k.key';
  carried text;
  allowed regrole;
begin
  select c.* into strict known from vectormill.collections c where c.id = collection;
  select v.* into strict current from vectormill.collection_versions v
  where v.collection_id = collection and v.state = 'current';
  select s.dimensions into strict size from vectormill.vector_spaces s where s.id = current.vector_space_id;
  if current.options->>'split' is not null or current.options->>'on_long' = 'split' then
    columns := columns || ', v.passage, v.start, v.stop';
  end if;
  for carried in select jsonb_array_elements_text(coalesce(current.options->'carry', '[]')) loop
    columns := columns || format(', k.carried->>%L as %I', carried, carried);
  end loop;
  -- As the index has it.
  columns := columns || case current.options->>'dtype'
    when 'float16' then format(', v.half::%I.halfvec(%s) as vector', place, size)
    else format(', v.vector::%I.vector(%s) as vector', place, size) end;
  execute format('%s view vectormill.%I as select %s from vectormill.%I v join vectormill.%I k on k.slot = v.slot',
                 case when known.is_shown then 'create or replace' else 'create' end, known.view, columns,
                 'collection_vectors_' || current.id, 'collection_keys_' || current.id);
  update vectormill.collections c set is_shown = true where c.id = collection;
  for allowed in
    select distinct g.grantee::regrole
    from pg_class c cross join aclexplode(c.relacl) g
    where c.oid = 'vectormill.collections'::regclass and g.grantee not in (0, c.relowner)
      and g.privilege_type = 'SELECT'
  loop
    execute format('grant select on vectormill.%I to %s', known.view, allowed);
  end loop;
end
$$
"""

DROP = """
create function vectormill.drop_collection(collection bigint) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  known vectormill.collections;
  version bigint;
begin
  select c.* into strict known from vectormill.collections c where c.id = collection for update;
  if known.is_shown then
    execute format('drop view vectormill.%I', known.view);
  end if;
  for version in select v.id from vectormill.collection_versions v where v.collection_id = collection loop
    -- In the order in which readers lock them.
    execute format('drop table vectormill.%I', 'collection_vectors_' || version);
    execute format('drop table vectormill.%I', 'collection_keys_' || version);
  end loop;
  delete from vectormill.syncs s where s.collection_id = collection;
  delete from vectormill.collections c where c.id = collection;
end
$$
"""

REVOKE = """
revoke execute on function vectormill.make_collection_tables, vectormill.index_collection, vectormill.show_collection,
  vectormill.drop_collection from public
"""

# As before, but a sync counts the rows that it found unchanged, and no index that is vacant.
RECEIPTS = """
create or replace view vectormill.receipts as
select j.id as job_id, j.name, j.state, j.items_total - c.vacant + coalesce(s.unchanged, 0) as items_in,
       c.embedded, c.reused, c.rejected, c.cancelled, c.prompt_tokens, c.reused_tokens,
       j.items_total = c.embedded + c.reused + c.rejected + c.cancelled + c.vacant as balanced, c.truncated,
       c.passages, c.lost_tokens, coalesce(s.unchanged, 0) as unchanged, coalesce(s.removed, 0) as removed
from vectormill.jobs j
left join vectormill.syncs s on s.job_id = j.id
cross join lateral (
  select coalesce(sum(embedded), 0)::bigint as embedded, coalesce(sum(reused), 0)::bigint as reused,
         coalesce(sum(rejected), 0)::bigint as rejected, coalesce(sum(cancelled), 0)::bigint as cancelled,
         coalesce(sum(prompt_tokens), 0)::bigint as prompt_tokens,
         coalesce(sum(reused_tokens), 0)::bigint as reused_tokens,
         coalesce(sum(truncated), 0)::bigint as truncated,
         coalesce(sum(passages), 0)::bigint as passages, coalesce(sum(lost_tokens), 0)::bigint as lost_tokens,
         coalesce(sum(vacant), 0)::bigint as vacant
  from vectormill.chunks where job_id = j.id
) c
"""

# As before, plus `unchanged` and `removed`; `items_total` and `pending` count as `receipts` does.
JOB_STATUS = """
create or replace view vectormill.job_status as
select j.id, w.name as workspace, j.name,
       case when again then 'requested' when stopped then r.state else j.state end as state,
       case when again then null when refused or stopped then r.reason else j.reason end as reason,
       case when again or refused or stopped then r.message else j.message end as message,
       j.model_name as model, coalesce((items->>'total')::bigint, (items->>'in')::bigint, j.items_total) as items_total,
       embedded, reused, rejected, cancelled,
       greatest(0, coalesce((items->>'total')::bigint, (items->>'in')::bigint, j.items_total)
                   - embedded - reused - unchanged - rejected - cancelled) as pending,
       r.requested_by, j.created_at, j.started_at,
       case when again then null when stopped then r.finished_at else j.finished_at end as finished_at,
       j.notices, unchanged, removed
from vectormill.jobs j
join vectormill.workspaces w on w.id = j.workspace_id
left join vectormill.requests r on r.job_id = j.id
cross join lateral (
  select coalesce(j.state = 'failed' and r.state = 'requested', false) as again,
         coalesce(j.state = 'failed' and r.state = 'failed', false) as refused,
         coalesce(j.state = 'staging' and r.state = 'cancelled', false) as stopped,
         coalesce(j.receipt, j.progress)->'items' as items
) s
cross join lateral (
  select coalesce((items->>'embedded')::bigint, 0) as embedded, coalesce((items->>'reused')::bigint, 0) as reused,
         coalesce((items->>'rejected')::bigint, 0) as rejected, coalesce((items->>'cancelled')::bigint, 0) as cancelled,
         coalesce((items->>'unchanged')::bigint, 0) as unchanged, coalesce((items->>'removed')::bigint, 0) as removed
) c
union all
select r.job_id, w.name, coalesce(r.name, 'query'), r.state, r.reason, r.message, r.model, 0, 0, 0, 0, 0, 0,
       r.requested_by, r.requested_at, null, r.finished_at, '[]', 0, 0
from vectormill.requests r
join vectormill.workspaces w on w.id = r.workspace_id
where r.state <> 'submitted' and not exists (select from vectormill.jobs j where j.id = r.job_id)
"""


def _count(name: str) -> "sa.Column[int]":
    return sa.Column(name, sa.BigInteger(), server_default="0", nullable=False)


def _now(name: str) -> "sa.Column[object]":
    return sa.Column(name, sa.DateTime(timezone=True), server_default=sa.func.now(), nullable=False)


def upgrade() -> None:
    """Add tables, columns and functions, and replace the views. Processes of the version before know no collection, so
    none may be synced before all are of this version."""
    op.create_table(
        "collections",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("workspace_id", sa.BigInteger(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("view", sa.Text(), nullable=False),
        sa.Column("is_shown", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column("expect_every", sa.Interval(), nullable=True),
        _now("created_at"),
        sa.PrimaryKeyConstraint("id", name=op.f("collections_pkey")),
        sa.ForeignKeyConstraint(
            ["workspace_id"], ["vectormill.workspaces.id"], name=op.f("collections_workspace_id_fkey")
        ),
        sa.UniqueConstraint("workspace_id", "name", name=op.f("collections_workspace_id_name_key")),
        sa.UniqueConstraint("view", name=op.f("collections_view_key")),
        schema="vectormill",
    )
    op.create_table(
        "collection_versions",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("collection_id", sa.BigInteger(), nullable=False),
        sa.Column("model_name", sa.Text(), nullable=False),
        sa.Column("vector_space_id", sa.BigInteger(), nullable=False),
        sa.Column("options", JSONB(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        _now("created_at"),
        sa.PrimaryKeyConstraint("id", name=op.f("collection_versions_pkey")),
        sa.ForeignKeyConstraint(
            ["collection_id"],
            ["vectormill.collections.id"],
            name=op.f("collection_versions_collection_id_fkey"),
            ondelete="CASCADE",
        ),
        sa.ForeignKeyConstraint(
            ["vector_space_id"], ["vectormill.vector_spaces.id"], name=op.f("collection_versions_vector_space_id_fkey")
        ),
        sa.UniqueConstraint("collection_id", "state", name=op.f("collection_versions_collection_id_state_key")),
        sa.CheckConstraint("state in ('current')", name=op.f("collection_versions_state_check")),
        schema="vectormill",
    )
    op.execute("create sequence vectormill.collection_slots")
    op.create_table(
        "collection_keys",
        sa.Column("version_id", sa.BigInteger(), nullable=False),
        sa.Column("key", sa.Text(collation="C"), nullable=False),
        sa.Column(
            "slot", sa.BigInteger(), server_default=sa.text("nextval('vectormill.collection_slots')"), nullable=False
        ),
        sa.Column("identity", sa.LargeBinary(), nullable=False),
        sa.Column("carried", JSONB(), nullable=True),
        sa.Column("tokens", sa.Integer(), nullable=False),
        sa.Column("job_id", sa.Uuid(), nullable=False),
        sa.PrimaryKeyConstraint("version_id", "key", name=op.f("collection_keys_pkey")),
        sa.UniqueConstraint("version_id", "slot", name=op.f("collection_keys_version_id_slot_key")),
        schema="vectormill",
        postgresql_partition_by="LIST (version_id)",
    )
    op.create_table(
        "collection_vectors",
        sa.Column("version_id", sa.BigInteger(), nullable=False),
        sa.Column("slot", sa.BigInteger(), nullable=False),
        sa.Column("passage", sa.Integer(), nullable=False),
        sa.Column("start", sa.Integer(), nullable=True),
        sa.Column("stop", sa.Integer(), nullable=True),
        sa.Column("vector", VECTOR(), nullable=True),
        sa.Column("half", HALFVEC(), nullable=True),
        sa.PrimaryKeyConstraint("version_id", "slot", "passage", name=op.f("collection_vectors_pkey")),
        sa.CheckConstraint("(vector is null) <> (half is null)", name=op.f("collection_vectors_one_vector_check")),
        schema="vectormill",
        postgresql_partition_by="LIST (version_id)",
    )
    op.create_table(
        "syncs",
        sa.Column("job_id", sa.Uuid(), nullable=False),
        sa.Column("collection_id", sa.BigInteger(), nullable=False),
        sa.Column("version_id", sa.BigInteger(), nullable=False),
        sa.Column("is_whole", sa.Boolean(), nullable=False),
        sa.Column("last_slot", sa.BigInteger(), nullable=False),
        *map(_count, ("named", "unchanged", "updated", "repeated", "tokens_saved", "removed", "added", "changed")),
        sa.Column("settled_at", sa.DateTime(timezone=True), nullable=True),
        _now("created_at"),
        sa.PrimaryKeyConstraint("job_id", name=op.f("syncs_pkey")),
        schema="vectormill",
    )
    op.create_index("syncs_version_idx", "syncs", ["version_id", sa.text("job_id desc")], schema="vectormill")
    op.create_table(
        "sync_seen",
        sa.Column("job_id", sa.Uuid(), nullable=False),
        sa.Column("page", sa.BigInteger(), nullable=False),
        sa.Column("bits", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("job_id", "page", name=op.f("sync_seen_pkey")),
        schema="vectormill",
    )
    op.create_table(
        "sync_changes",
        sa.Column("job_id", sa.Uuid(), nullable=False),
        sa.Column("slot", sa.BigInteger(), nullable=False),
        sa.Column("identity", sa.LargeBinary(), nullable=True),
        sa.Column("carried", JSONB(), nullable=True),
        sa.PrimaryKeyConstraint("job_id", "slot", name=op.f("sync_changes_pkey")),
        schema="vectormill",
    )
    op.add_column("items", sa.Column("identity", sa.LargeBinary(), nullable=True), schema="vectormill")
    op.add_column("chunks", _count("vacant"), schema="vectormill")
    op.add_column("jobs", sa.Column("version_id", sa.BigInteger(), nullable=True), schema="vectormill")
    op.create_index(
        "jobs_syncing_idx",
        "jobs",
        ["version_id"],
        unique=True,
        schema="vectormill",
        postgresql_where=sa.text("version_id is not null and state not in ('completed', 'failed', 'cancelled')"),
    )
    op.execute(RECEIPTS)
    op.execute(JOB_STATUS)
    for statement in (MAKE_TABLES, INDEX, SHOW, DROP, REVOKE):
        op.execute(statement)
