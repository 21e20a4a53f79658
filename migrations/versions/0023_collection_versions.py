"""Several vector spaces of a collection: the current one, the next one beside it, and the previous one for a while."""

import sqlalchemy as sa
from alembic import op

revision = "0023"
down_revision = "0022"
branch_labels = None
depends_on = None

# As before, but the view is made anew where its vectors get another type, with the rights that it had.
SHOW = """
create or replace function vectormill.show_collection(collection bigint) returns void
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
  body text;
  rights text[];
  one text;
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
  body := format('view vectormill.%I as select %s from vectormill.%I v join vectormill.%I k on k.slot = v.slot',
                 known.view, columns, 'collection_vectors_' || current.id, 'collection_keys_' || current.id);
  begin
    execute case when known.is_shown then 'create or replace ' else 'create ' end || body;
  exception when invalid_table_definition then
    select array_agg(format('grant %s on vectormill.%I to %s%s', g.privilege_type, known.view,
                            case g.grantee when 0 then 'public' else g.grantee::regrole::text end,
                            case when g.is_grantable then ' with grant option' else '' end))
    into rights
    from pg_class c cross join aclexplode(c.relacl) g
    where c.oid = format('vectormill.%I', known.view)::regclass and g.grantee <> c.relowner;
    rights := rights || (
      select array_agg(format('grant %s (%I) on vectormill.%I to %s%s', g.privilege_type, a.attname, known.view,
                              case g.grantee when 0 then 'public' else g.grantee::regrole::text end,
                              case when g.is_grantable then ' with grant option' else '' end))
      from pg_attribute a cross join aclexplode(a.attacl) g
      where a.attrelid = format('vectormill.%I', known.view)::regclass);
    execute format('drop view vectormill.%I', known.view);
    execute 'create ' || body;
    foreach one in array coalesce(rights, '{}') loop
      execute one;
    end loop;
  end;
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

DROP_VERSION = """
create function vectormill.drop_version(version bigint) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
begin
  delete from vectormill.collection_versions v where v.id = version and v.state = 'gone';
  if found then
    -- In the order in which readers lock them.
    execute format('drop table vectormill.%I', 'collection_vectors_' || version);
    execute format('drop table vectormill.%I', 'collection_keys_' || version);
  end if;
end
$$
"""

REVOKE = "revoke execute on function vectormill.drop_version from public"


def upgrade() -> None:
    """Let a collection have several versions. Processes of the version before sync the current one alone, so none may
    be upgraded before all are of this version."""
    table = "collection_versions"
    op.add_column(table, sa.Column("kept_until", sa.DateTime(timezone=True), nullable=True), schema="vectormill")
    op.drop_constraint(op.f("collection_versions_collection_id_state_key"), table, schema="vectormill")
    op.drop_constraint(op.f("collection_versions_state_check"), table, schema="vectormill")
    op.create_check_constraint(
        op.f("collection_versions_state_check"),
        table,
        "state in ('next', 'current', 'previous', 'gone')",
        schema="vectormill",
    )
    op.create_index(
        "collection_versions_state_idx",
        table,
        ["collection_id", "state"],
        unique=True,
        schema="vectormill",
        postgresql_where=sa.text("state <> 'gone'"),
    )
    op.add_column("syncs", sa.Column("beside", sa.Uuid(), nullable=True), schema="vectormill")
    for statement in (SHOW, DROP_VERSION, REVOKE):
        op.execute(statement)
