"""Function that makes partitions, so that its callers need not own the schema."""

from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None

# Rows are copied into partitions by name, so each partition gets the grants of its table.
MAKE_PARTITIONS = """
create function vectormill.make_partitions(month date) returns void
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
  foreach parent in array array['items', 'embeddings', 'rejects'] loop
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


def upgrade() -> None:
    """Add the function. Only the schema's owner may execute it for now."""
    op.execute(MAKE_PARTITIONS)
    op.execute("revoke execute on function vectormill.make_partitions from public")
