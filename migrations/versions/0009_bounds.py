"""Bounds on requests in SQL: their options, the roles that may make them, and the retention of their queries.

Requests can be cancelled. Events are indexed by the host of their receiver.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import ARRAY

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

# As before, plus bounds of numbers, the roles of a workspace, and a query that is restored when it is requested again.
SUBMIT = """
create or replace function vectormill.submit(
  query text,
  model text,
  idempotency_key text default null,
  name text default null,
  text_column text default 'text',
  key_column text default null,
  options jsonb default '{}',
  workspace text default 'default'
) returns uuid
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  statement text := btrim(submit.query, E' \\t\\r\\n;');
  wish jsonb := jsonb_strip_nulls(coalesce(submit.options, '{}'));
  owner bigint;
  roles text[];
  wrong text;
  digest text;
  request vectormill.requests;
  made uuid := encode(set_bit(set_bit(overlay(uuid_send(gen_random_uuid()) placing
    substring(int8send(floor(extract(epoch from clock_timestamp()) * 1000)::bigint) from 3) from 1 for 6),
    52, 1), 53, 1), 'hex')::uuid;
begin
  if coalesce(statement, '') = '' then
    raise exception 'query: give one select.' using errcode = 'invalid_parameter_value';
  end if;
  if octet_length(statement) > 100000 then
    raise exception 'query: it is longer than 100,000 bytes; put it into a view and select from that.'
      using errcode = 'invalid_parameter_value';
  end if;
  if length(submit.idempotency_key) not between 1 and 200 then
    raise exception 'idempotency_key: give 1 to 200 characters.' using errcode = 'invalid_parameter_value';
  end if;
  if jsonb_typeof(wish) <> 'object' then
    raise exception 'options: give a JSON object.' using errcode = 'invalid_parameter_value';
  end if;
  if octet_length(wish::text) > 100000 then
    raise exception 'options: they are longer than 100,000 bytes.' using errcode = 'invalid_parameter_value';
  end if;
  select case when known.kind is null then format('options: there is no "%s"; there are %s.', left(given.key, 100),
                (select string_agg(each, ', ') from unnest(array['carry', 'labels', 'priority', 'dimensions', 'dtype',
                   'max_item_tokens', 'on_long', 'max_rejects', 'unique_keys', 'webhook']) each))
              when known.kind <> jsonb_typeof(given.value)
                then format('options: "%s" must be of type %s.', given.key, known.kind)
              else format('options: "%s" must be a whole number from %s to %s.', given.key, known.least, known.most) end
    into wrong
    from jsonb_each(wish) given
    left join (values ('carry', 'array', null, null), ('labels', 'object', null, null),
                      ('priority', 'number', -100, 100), ('dimensions', 'number', 1, 16000),
                      ('dtype', 'string', null, null), ('max_item_tokens', 'number', 1, 1000000),
                      ('on_long', 'string', null, null), ('max_rejects', 'string', null, null),
                      ('unique_keys', 'boolean', null, null), ('webhook', 'string', null, null)
              ) known (name, kind, least, most) on known.name = given.key
    where case when known.kind is distinct from jsonb_typeof(given.value) then true
               when known.kind = 'number' then given.value::numeric not between known.least and known.most
                                            or given.value::numeric <> trunc(given.value::numeric)
               else false end
    limit 1;
  if wrong is not null then
    raise exception '%', wrong using errcode = 'invalid_parameter_value';
  end if;
  select w.id, w.sql_roles into owner, roles from vectormill.workspaces w where w.name = submit.workspace;
  if owner is null then
    raise exception 'no workspace "%".', submit.workspace using errcode = 'invalid_parameter_value';
  end if;
  if not (
    submit.workspace = 'default' and roles = '{}'
    or exists (select from pg_roles r where r.rolname = any(roles) and pg_has_role(session_user, r.oid, 'member'))
    or pg_has_role(session_user, (select nspowner from pg_namespace where nspname = 'vectormill'), 'member')
  ) then
    raise exception 'role "%" may not ask for jobs in the workspace "%"; an operator lets it by: vectormill workspaces '
      'set % --sql-role %', session_user, submit.workspace, submit.workspace, session_user
      using errcode = 'insufficient_privilege';
  end if;
  if not exists (
    select from vectormill.workspace_models e join vectormill.models m on m.name = e.model_name
    where e.workspace_id = owner and (m.name = submit.model or submit.model = any(m.aliases))
  ) then
    raise exception 'no model "%" in the workspace "%".', submit.model, submit.workspace
      using errcode = 'invalid_parameter_value';
  end if;
  if exists (select from vectormill.jobs j where j.workspace_id = owner and j.idempotency_key = submit.idempotency_key)
     and not exists (select from vectormill.requests r
                     where r.workspace_id = owner and r.idempotency_key = submit.idempotency_key) then
    raise exception 'the idempotency key "%" made a job that was not asked for in SQL; use another key.',
      submit.idempotency_key using errcode = 'unique_violation';
  end if;

  -- All that decides the result.
  digest := encode(sha256(convert_to(jsonb_build_array(statement, submit.model, submit.text_column, submit.key_column,
    wish - array['labels', 'priority', 'webhook'])::text, 'UTF8')), 'hex');
  -- Locks the row that is there, so that no dispatcher ends the request meanwhile.
  insert into vectormill.requests as r
    (job_id, workspace_id, requested_by, query, model, name, text_column, key_column, options, idempotency_key,
     payload_sha256)
  values (made, owner, session_user, statement, submit.model, submit.name, submit.text_column, submit.key_column, wish,
          submit.idempotency_key, digest)
  on conflict (workspace_id, idempotency_key) do update set workspace_id = excluded.workspace_id
  returning r.* into request;
  if request.job_id = made then
    return made;
  end if;
  if request.payload_sha256 <> digest then
    raise exception
      'the idempotency key "%" made job % from another payload (query, model or options differ); use another key.',
      submit.idempotency_key, request.job_id using errcode = 'unique_violation';
  end if;
  if request.state = 'failed' or request.state = 'submitted' and not exists (
    select from vectormill.jobs j where j.id = request.job_id and j.state <> 'failed'
  ) then
    update vectormill.requests r
    set state = 'requested', reason = null, message = null, requested_by = session_user,
        requested_at = clock_timestamp(), unreachable_since = null, finished_at = null,
        query = statement  -- which may have been forgotten
    where r.job_id = request.job_id;
  end if;
  return request.job_id;
end
$$
"""

# As before, but a job in staging shows as cancelled as soon as its request is.
JOB_STATUS = """
create or replace view vectormill.job_status as
select j.id, w.name as workspace, j.name,
       case when again then 'requested' when stopped then r.state else j.state end as state,
       case when again then null when refused or stopped then r.reason else j.reason end as reason,
       case when again or refused or stopped then r.message else j.message end as message,
       j.model_name as model, j.items_total, embedded, reused, rejected, cancelled,
       greatest(0, j.items_total - embedded - reused - rejected - cancelled) as pending,
       r.requested_by, j.created_at, j.started_at,
       case when again then null when stopped then r.finished_at else j.finished_at end as finished_at
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
         coalesce((items->>'rejected')::bigint, 0) as rejected, coalesce((items->>'cancelled')::bigint, 0) as cancelled
) c
union all
select r.job_id, w.name, coalesce(r.name, 'query'), r.state, r.reason, r.message, r.model, 0, 0, 0, 0, 0, 0,
       r.requested_by, r.requested_at, null, r.finished_at
from vectormill.requests r
join vectormill.workspaces w on w.id = r.workspace_id
where r.state <> 'submitted' and not exists (select from vectormill.jobs j where j.id = r.job_id)
"""


def upgrade() -> None:
    """Add columns and indexes, and replace the function and the view."""
    op.add_column(
        "workspaces", sa.Column("sql_roles", ARRAY(sa.Text()), nullable=False, server_default="{}"), schema="vectormill"
    )
    op.add_column("requests", sa.Column("unreachable_since", sa.DateTime(timezone=True)), schema="vectormill")
    op.alter_column("requests", "query", existing_type=sa.Text(), nullable=True, schema="vectormill")
    op.drop_constraint("requests_state_check", "requests", schema="vectormill", type_="check")
    op.create_check_constraint(
        "requests_state_check",
        "requests",
        "state in ('requested', 'submitted', 'failed', 'cancelled')",
        schema="vectormill",
    )
    op.create_index(
        "requests_no_job_idx",
        "requests",
        ["job_id"],
        schema="vectormill",
        postgresql_where=sa.text("state <> 'submitted'"),
    )
    op.create_index(
        "requests_queries_idx",
        "requests",
        ["finished_at"],
        schema="vectormill",
        postgresql_where=sa.text("query is not null"),
    )
    op.drop_index("events_due_idx", table_name="events", schema="vectormill")
    op.create_index(
        "events_due_idx",
        "events",
        [sa.text("split_part(url, '/', 3)"), "next_try_at"],
        schema="vectormill",
        postgresql_where=sa.text("state = 'waiting'"),
    )
    op.create_index(
        "events_ended_idx",
        "events",
        ["state", "finished_at"],
        schema="vectormill",
        postgresql_where=sa.text("state <> 'waiting'"),
    )
    op.execute(SUBMIT)
    op.execute(JOB_STATUS)
