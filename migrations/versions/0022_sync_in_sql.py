"""Syncs requested in SQL by `vectormill.sync`, which takes requests as `vectormill.submit` does."""

import sqlalchemy as sa
from alembic import op

revision = "0022"
down_revision = "0021"
branch_labels = None
depends_on = None

# As `submit` was before, for both functions.
TAKE_REQUEST = """
create function vectormill.take_request(
  query text,
  model text,
  collection text,
  idempotency_key text,
  name text,
  text_column text,
  key_column text,
  options jsonb,
  workspace text
) returns uuid
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  statement text := btrim(take_request.query, E' \\t\\r\\n;');
  wish jsonb := jsonb_strip_nulls(coalesce(take_request.options, '{}'));
  owner bigint;
  roles text[];
  embedder text := take_request.model;
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
  if length(take_request.idempotency_key) not between 1 and 200 then
    raise exception 'idempotency_key: give 1 to 200 characters.' using errcode = 'invalid_parameter_value';
  end if;
  if jsonb_typeof(wish) <> 'object' then
    raise exception 'options: give a JSON object.' using errcode = 'invalid_parameter_value';
  end if;
  if octet_length(wish::text) > 100000 then
    raise exception 'options: they are longer than 100,000 bytes.' using errcode = 'invalid_parameter_value';
  end if;
  -- Dispatchers of before, in an upgrade or after a step back, would write wherever it says.
  if wish ? 'output' then
    raise exception 'options: there is no "output"; vectors go to Postgres.' using errcode = 'invalid_parameter_value';
  end if;
  select w.id, w.sql_roles into owner, roles from vectormill.workspaces w where w.name = take_request.workspace;
  if owner is null then
    raise exception 'no workspace "%".', take_request.workspace using errcode = 'invalid_parameter_value';
  end if;
  if not (
    take_request.workspace = 'default' and roles = '{}'
    or exists (select from pg_roles r where r.rolname = any(roles) and pg_has_role(session_user, r.oid, 'member'))
    or pg_has_role(session_user, (select nspowner from pg_namespace where nspname = 'vectormill'), 'member')
  ) then
    raise exception 'role "%" may not ask for jobs in the workspace "%"; an operator lets it by: vectormill workspaces '
      'set % --sql-role %', session_user, take_request.workspace, take_request.workspace, session_user
      using errcode = 'insufficient_privilege';
  end if;
  if collection is not null then
    select v.model_name into embedder
    from vectormill.collections c
    join vectormill.collection_versions v on v.collection_id = c.id and v.state = 'current'
    where c.workspace_id = owner and c.name = take_request.collection;
    if embedder is null then
      raise exception 'no collection "%" in the workspace "%".', take_request.collection, take_request.workspace
        using errcode = 'invalid_parameter_value';
    end if;
  elsif not exists (
    select from vectormill.workspace_models e join vectormill.models m on m.name = e.model_name
    where e.workspace_id = owner and (m.name = take_request.model or take_request.model = any(m.aliases))
  ) then
    raise exception 'no model "%" in the workspace "%".', take_request.model, take_request.workspace
      using errcode = 'invalid_parameter_value';
  end if;
  if exists (select from vectormill.jobs j
             where j.workspace_id = owner and j.idempotency_key = take_request.idempotency_key)
     and not exists (select from vectormill.requests r
                     where r.workspace_id = owner and r.idempotency_key = take_request.idempotency_key) then
    raise exception 'the idempotency key "%" made a job that was not asked for in SQL; use another key.',
      take_request.idempotency_key using errcode = 'unique_violation';
  end if;

  -- All that decides the result.
  digest := encode(sha256(convert_to((case when collection is null
    then jsonb_build_array(statement, take_request.model, take_request.text_column, take_request.key_column,
                           wish - array['labels', 'priority', 'webhook'])
    else jsonb_build_array('sync', take_request.collection, statement, wish - array['labels', 'priority', 'webhook'])
    end)::text, 'UTF8')), 'hex');
  -- Locks the row that is there, so that no dispatcher ends the request meanwhile.
  insert into vectormill.requests as r
    (job_id, workspace_id, requested_by, query, model, collection, name, text_column, key_column, options,
     idempotency_key, payload_sha256)
  values (made, owner, session_user, statement, embedder, take_request.collection,
          coalesce(take_request.name, take_request.collection), take_request.text_column, take_request.key_column, wish,
          take_request.idempotency_key, digest)
  on conflict (workspace_id, idempotency_key) do update set workspace_id = excluded.workspace_id
  returning r.* into request;
  if request.job_id = made then
    return made;
  end if;
  -- One that came to nothing may be asked for anew, mended: no job has been made of it.
  if request.payload_sha256 <> digest and (request.state <> 'failed'
      or exists (select from vectormill.jobs j where j.id = request.job_id)) then
    raise exception
      'the idempotency key "%" made job % from another payload (query, model or options differ); use another key.',
      take_request.idempotency_key, request.job_id using errcode = 'unique_violation';
  end if;
  if request.state = 'failed' or request.state = 'submitted' and not exists (
    select from vectormill.jobs j where j.id = request.job_id and j.state <> 'failed'
  ) then
    update vectormill.requests r
    set state = 'requested', reason = null, message = null, requested_by = session_user,
        requested_at = clock_timestamp(), unreachable_since = null, finished_at = null,
        query = statement,  -- which may have been forgotten
        model = embedder, collection = take_request.collection,
        name = coalesce(take_request.name, take_request.collection), text_column = take_request.text_column,
        key_column = take_request.key_column,
        options = wish, payload_sha256 = digest
    where r.job_id = request.job_id;
  end if;
  return request.job_id;
end
$$
"""

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
language sql security definer set search_path = pg_catalog, pg_temp
as $$
  select vectormill.take_request(query, model, null, idempotency_key, name, text_column, key_column, options, workspace)
$$
"""

SYNC = """
create function vectormill.sync(
  collection text,
  query text,
  idempotency_key text default null,
  name text default null,
  options jsonb default '{}',
  workspace text default 'default'
) returns uuid
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
begin
  if coalesce(sync.collection, '') = '' then
    raise exception 'collection: name one.' using errcode = 'invalid_parameter_value';
  end if;
  return vectormill.take_request(sync.query, null, sync.collection, sync.idempotency_key, sync.name, 'text', null,
                                 sync.options, sync.workspace);
end
$$
"""

REVOKE = "revoke execute on function vectormill.take_request, vectormill.sync from public"


def upgrade() -> None:
    """Add a column and functions. Dispatchers of the version before would take a sync for a job, so none may be asked
    for before all are of this version."""
    op.add_column("requests", sa.Column("collection", sa.Text(), nullable=True), schema="vectormill")
    for statement in (TAKE_REQUEST, SUBMIT, SYNC, REVOKE):
        op.execute(statement)
