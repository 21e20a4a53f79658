"""Jobs requested in SQL: the requests, the function that makes them, and a view of job status; events for webhooks."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

# The job's id is a UUIDv7, which Postgres generates from version 18 on only. Here it is a random UUID with the time in
# milliseconds as its first six bytes, and its version changed from 4 to 7.
SUBMIT = """
create function vectormill.submit(
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
  select case when known.kind is null then format('options: there is no "%s"; there are %s.', left(given.key, 100),
                (select string_agg(each, ', ') from unnest(array['carry', 'labels', 'priority', 'dimensions', 'dtype',
                   'max_item_tokens', 'on_long', 'max_rejects', 'unique_keys', 'webhook']) each))
              else format('options: "%s" must be of type %s.', given.key, known.kind) end
    into wrong
    from jsonb_each(wish) given
    left join (values ('carry', 'array'), ('labels', 'object'), ('priority', 'number'), ('dimensions', 'number'),
                      ('dtype', 'string'), ('max_item_tokens', 'number'), ('on_long', 'string'),
                      ('max_rejects', 'string'), ('unique_keys', 'boolean'), ('webhook', 'string')
              ) known (name, kind) on known.name = given.key
    where known.kind is distinct from jsonb_typeof(given.value)
    limit 1;
  if wrong is not null then
    raise exception '%', wrong using errcode = 'invalid_parameter_value';
  end if;
  select w.id into owner from vectormill.workspaces w where w.name = submit.workspace;
  if owner is null then
    raise exception 'no workspace "%".', submit.workspace using errcode = 'invalid_parameter_value';
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
        requested_at = clock_timestamp(), finished_at = null
    where r.job_id = request.job_id;
  end if;
  return request.job_id;
end
$$
"""

# Counts come from the job's receipt, or from a progress snapshot that is about a second old; nothing is summed.
JOB_STATUS = """
create view vectormill.job_status as
select j.id, w.name as workspace, j.name,
       case when again then 'requested' else j.state end as state,
       case when again then null when refused then r.reason else j.reason end as reason,
       case when again then r.message when refused then r.message else j.message end as message,
       j.model_name as model, j.items_total, embedded, reused, rejected, cancelled,
       greatest(0, j.items_total - embedded - reused - rejected - cancelled) as pending,
       r.requested_by, j.created_at, j.started_at, case when again then null else j.finished_at end as finished_at
from vectormill.jobs j
join vectormill.workspaces w on w.id = j.workspace_id
left join vectormill.requests r on r.job_id = j.id
cross join lateral (
  select coalesce(j.state = 'failed' and r.state = 'requested', false) as again,
         coalesce(j.state = 'failed' and r.state = 'failed', false) as refused,
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
    """Add tables, a column, a function and a view."""
    op.add_column("workspaces", sa.Column("webhook", sa.Text()), schema="vectormill")
    op.create_table(
        "requests",
        sa.Column("job_id", sa.Uuid(), primary_key=True),
        sa.Column("workspace_id", sa.BigInteger(), sa.ForeignKey("vectormill.workspaces.id"), nullable=False),
        sa.Column("requested_by", sa.Text(), nullable=False),
        sa.Column("query", sa.Text(), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("name", sa.Text()),
        sa.Column("text_column", sa.Text(), nullable=False),
        sa.Column("key_column", sa.Text()),
        sa.Column("options", JSONB(), nullable=False),
        sa.Column("idempotency_key", sa.Text()),
        sa.Column("payload_sha256", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False, server_default="requested"),
        sa.Column("reason", sa.Text()),
        sa.Column("message", sa.Text()),
        sa.Column("requested_at", sa.DateTime(timezone=True), nullable=False, server_default=sa.text("now()")),
        sa.Column("finished_at", sa.DateTime(timezone=True)),
        sa.CheckConstraint("state in ('requested', 'submitted', 'failed')", name="requests_state_check"),
        sa.UniqueConstraint("workspace_id", "idempotency_key"),
        schema="vectormill",
    )
    op.create_index(
        "requests_due_idx",
        "requests",
        ["requested_at"],
        schema="vectormill",
        postgresql_where=sa.text("state = 'requested'"),
    )
    op.create_table(
        "events",
        sa.Column("id", sa.Text(), primary_key=True),
        sa.Column("workspace_id", sa.BigInteger(), nullable=False),
        sa.Column("type", sa.Text(), nullable=False),
        sa.Column("url", sa.Text(), nullable=False),
        sa.Column("body", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False, server_default="waiting"),
        sa.Column("tries", sa.SmallInteger(), nullable=False, server_default="0"),
        sa.Column("next_try_at", sa.DateTime(timezone=True), nullable=False, server_default=sa.text("now()")),
        sa.Column("answer", sa.Text()),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False, server_default=sa.text("now()")),
        sa.Column("finished_at", sa.DateTime(timezone=True)),
        sa.CheckConstraint("state in ('waiting', 'delivered', 'given_up')", name="events_state_check"),
        schema="vectormill",
    )
    op.create_index(
        "events_due_idx",
        "events",
        ["next_try_at"],
        schema="vectormill",
        postgresql_where=sa.text("state = 'waiting'"),
    )
    op.execute(SUBMIT)
    op.execute("revoke all on function vectormill.submit from public")
    op.execute(JOB_STATUS)
