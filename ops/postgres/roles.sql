-- A role for each kind of process, with the rights that its statements need and no others.
--
--   psql --set ON_ERROR_STOP=1 --dbname "$ADMIN_URL" --file ops/postgres/roles.sql
--
-- Run it after each `vectormill migrate`, by a superuser, or by whoever may create roles, has the schema owner's role
-- and may grant pg_signal_backend and pg_read_all_stats. Doing it again changes nothing. Then give each process a login:
--
--   create role worker_1 login password '…' in role vectormill_worker;
--
-- `migrate`, `purge` and the other commands of an operator stay with the schema's owner. What each role may is told in
-- ops/postgres/README.md.
begin;

do $$
declare
  name text;
begin
  foreach name in array array['dispatcher', 'worker', 'engine', 'api', 'reader'] loop
    name := 'vectormill_' || name;
    if not exists (select from pg_roles where rolname = name) then
      execute format('create role %I nologin', name);
    end if;
    -- What an older version of this file gave goes with what it gives now.
    execute format('revoke all on all tables in schema vectormill from %I', name);
    execute format('revoke all on all functions in schema vectormill from %I', name);
    execute format('grant usage on schema vectormill to %I', name);
  end loop;
end
$$;

-- The dispatcher: how jobs stand is its to decide; vectors and what was metered are for it to read.
grant select, insert, update, delete
  on vectormill.jobs, vectormill.inputs, vectormill.chunks, vectormill.items, vectormill.files, vectormill.events,
     vectormill.leases
  to vectormill_dispatcher;
grant select, insert, update (query) on vectormill.job_history to vectormill_dispatcher;
grant select, insert, delete on vectormill.rejects to vectormill_dispatcher;
grant select, update on vectormill.batches, vectormill.requests to vectormill_dispatcher;
grant select
  on vectormill.workspaces, vectormill.workspace_models, vectormill.models, vectormill.vector_spaces,
     vectormill.embeddings, vectormill.passages, vectormill.outputs, vectormill.usage, vectormill.attempts,
     vectormill.claim_losses,
     vectormill.workers, vectormill.engines, vectormill.job_status, vectormill.alembic_version
  to vectormill_dispatcher;
grant insert on vectormill.vector_spaces, vectormill.claim_losses to vectormill_dispatcher;
grant delete on vectormill.workers to vectormill_dispatcher;
grant update (tokens_per_second) on vectormill.models to vectormill_dispatcher;
grant select, insert, update (tokens_per_second, measured_at) on vectormill.model_rates to vectormill_dispatcher;
grant execute on function vectormill.make_partitions to vectormill_dispatcher;
-- It stages the syncs that are asked for in SQL, and ends all of them.
grant select on vectormill.collections, vectormill.collection_versions to vectormill_dispatcher;
grant select, insert, update, delete
  on vectormill.collection_keys, vectormill.collection_vectors, vectormill.syncs, vectormill.sync_seen,
     vectormill.sync_changes
  to vectormill_dispatcher;
grant usage on sequence vectormill.collection_slots to vectormill_dispatcher;
grant execute on function vectormill.index_collection, vectormill.drop_version to vectormill_dispatcher;
grant update (state, output_number, output_shown, output_at, output_problem, compacts)
  on vectormill.collection_versions to vectormill_dispatcher;
grant select, insert, delete on vectormill.collection_changes, vectormill.collection_files to vectormill_dispatcher;
-- It erases keys that are forgotten.
grant select on vectormill.forgets, vectormill.forget_keys, vectormill.tombstones to vectormill_dispatcher;
grant update (items, collected, after_job, waits_for, problem, unseen, finished_at)
  on vectormill.forgets to vectormill_dispatcher;
grant update (name, rows, bytes) on vectormill.outputs to vectormill_dispatcher;
grant update (uri, etag, bytes, sha256) on vectormill.files to vectormill_dispatcher;
grant delete on vectormill.forget_keys, vectormill.embeddings, vectormill.passages to vectormill_dispatcher;
grant select, delete, update (index) on vectormill.known_texts to vectormill_dispatcher;
-- Nobody writes it: without it, no row of a collection could be locked.
grant update (created_at) on vectormill.collections to vectormill_dispatcher, vectormill_api;
-- To see which worker's backend froze while it held a chunk, and to end it.
grant pg_read_all_stats, pg_signal_backend to vectormill_dispatcher;

-- A worker: claims chunks of jobs that others made, and adds what comes of them.
grant select
  on vectormill.jobs, vectormill.inputs, vectormill.chunks, vectormill.items, vectormill.embeddings, vectormill.passages,
     vectormill.rejects, vectormill.outputs, vectormill.models, vectormill.model_rates, vectormill.vector_spaces,
     vectormill.claim_losses, vectormill.alembic_version
  to vectormill_worker;
grant select (chunk_id, fence, token, part, model, created_at) on vectormill.usage to vectormill_worker;
grant select (id) on vectormill.attempts to vectormill_worker;
grant insert
  on vectormill.items, vectormill.embeddings, vectormill.passages, vectormill.rejects, vectormill.outputs, vectormill.usage,
     vectormill.attempts, vectormill.claim_losses
  to vectormill_worker;
grant select, insert, update, delete on vectormill.workers to vectormill_worker;
grant select, insert, update (job_id, index) on vectormill.known_texts to vectormill_worker;
grant select, insert, update (identity, carried, tokens, job_id) on vectormill.collection_keys to vectormill_worker;
grant select, insert, delete on vectormill.collection_vectors to vectormill_worker;
grant select on vectormill.collection_versions to vectormill_worker;
grant insert on vectormill.collection_changes to vectormill_worker;
grant usage on sequence vectormill.collection_slots to vectormill_worker;
grant update (state, reason, message, ends_as, started_at) on vectormill.jobs to vectormill_worker;
grant update (state, fence, token, parts, lease_until, not_before, backend_pid, worker_id, task_id, crashes, isolation,
              last_error, embedded, reused, reused_tokens, rejected, cancelled, truncated, prompt_tokens, passages,
              lost_tokens, most_truncated, output_uri, started_at, finished_at)
  on vectormill.chunks to vectormill_worker;
grant update (status, billed_tokens, finished_at) on vectormill.attempts to vectormill_worker;

-- It keeps forgotten keys out of what it reads from files.
grant select on vectormill.tombstones to vectormill_worker;
grant select (id, tombstone_key) on vectormill.workspaces to vectormill_worker;

-- An engine: knows the catalogue, and shows itself.
grant select on vectormill.models, vectormill.alembic_version to vectormill_engine;
grant select, insert, update, delete on vectormill.engines to vectormill_engine;

-- The api: stages jobs, tells of them, and keeps keys, files and batch requests.
grant select
  on vectormill.workspaces, vectormill.workspace_models, vectormill.models, vectormill.model_rates,
     vectormill.vector_spaces, vectormill.api_keys, vectormill.jobs, vectormill.inputs, vectormill.chunks,
     vectormill.items, vectormill.embeddings, vectormill.passages, vectormill.rejects, vectormill.outputs, vectormill.usage,
     vectormill.attempts, vectormill.workers, vectormill.engines, vectormill.files, vectormill.batches,
     vectormill.job_status, vectormill.alembic_version
  to vectormill_api;
grant select (job_id, workspace_id, model, name, options, state) on vectormill.requests to vectormill_api;
grant insert
  on vectormill.api_keys, vectormill.vector_spaces, vectormill.jobs, vectormill.inputs, vectormill.chunks,
     vectormill.items, vectormill.rejects, vectormill.usage, vectormill.files, vectormill.batches, vectormill.events
  to vectormill_api;
grant delete
  on vectormill.jobs, vectormill.inputs, vectormill.chunks, vectormill.items, vectormill.rejects, vectormill.files
  to vectormill_api;
grant update (expires_at, revoked_at) on vectormill.api_keys to vectormill_api;
grant update (state, reason, message, ends_as, priority, fence, token, lease_until, items_total, max_rejects, payload_sha256,
              receipt, queued_at, resumed_at, finished_at, texts_kept_from, notices)
  on vectormill.jobs to vectormill_api;
grant update (rows) on vectormill.inputs to vectormill_api;
grant update (state, fence, lease_until, not_before, worker_id, crashes, isolation, rejected, cancelled, vacant,
              forgotten, finished_at)
  on vectormill.chunks to vectormill_api;
grant update (state, ends_as, cancelling_at) on vectormill.batches to vectormill_api;
grant update (state, reason, message, finished_at) on vectormill.requests to vectormill_api;
grant execute on function vectormill.make_partitions to vectormill_api;
-- It tells people of a dispatcher that is away, and of claims that were lost.
grant select, insert on vectormill.job_history to vectormill_api;
grant select (name, lease_until) on vectormill.leases to vectormill_api;
grant select (model, job_id, cause, lost_at) on vectormill.claim_losses to vectormill_api;
-- It makes collections, upgrades and drops them, and stages their syncs.
grant select on vectormill.collection_keys, vectormill.collection_vectors to vectormill_api;
grant select, insert on vectormill.collections, vectormill.collection_versions to vectormill_api;
grant update (state, kept_until, compacts) on vectormill.collection_versions to vectormill_api;
grant select on vectormill.collection_files to vectormill_api;
grant select, delete on vectormill.collection_changes to vectormill_api;
grant select, insert, update, delete on vectormill.syncs, vectormill.sync_seen, vectormill.sync_changes
  to vectormill_api;
grant usage on sequence vectormill.collection_slots to vectormill_api;
grant execute on function vectormill.make_collection_tables, vectormill.show_collection, vectormill.drop_collection
  to vectormill_api;

grant select, insert on vectormill.forgets, vectormill.forget_keys, vectormill.tombstones to vectormill_api;
grant update (keys, created_at) on vectormill.forgets to vectormill_api;
grant delete on vectormill.forget_keys, vectormill.tombstones to vectormill_api;

-- A reader: all that people look things up in. No keys, no queries, no webhooks' addresses but those of jobs' options.
grant select
  on vectormill.jobs, vectormill.inputs, vectormill.chunks, vectormill.items, vectormill.embeddings, vectormill.passages,
     vectormill.rejects, vectormill.outputs, vectormill.usage, vectormill.attempts, vectormill.claim_losses,
     vectormill.models, vectormill.model_rates, vectormill.workspace_models, vectormill.vector_spaces,
     vectormill.workers, vectormill.engines, vectormill.leases, vectormill.files, vectormill.batches, vectormill.receipts, vectormill.job_status,
     vectormill.collections, vectormill.collection_versions, vectormill.collection_keys,
     vectormill.collection_vectors, vectormill.collection_changes, vectormill.collection_files, vectormill.syncs,
     vectormill.forgets,
     vectormill.alembic_version
  to vectormill_reader;
grant select (id, name, weight, requests_per_minute, tokens_per_minute, monthly_tokens, monthly_cost, created_at)
  on vectormill.workspaces to vectormill_reader;
grant select (id, job_id, changed_at, state, reason, message, priority, submitted_by)
  on vectormill.job_history to vectormill_reader;
grant select (job_id, workspace_id, requested_by, model, name, state, reason, message, requested_at, finished_at)
  on vectormill.requests to vectormill_reader;

-- Partitions that are there already get the rights of their tables, too.
select vectormill.make_partitions(to_date(right(relname, 7), 'YYYY_MM'))
from pg_class
where relnamespace = 'vectormill'::regnamespace and relispartition and relkind = 'r' and relname ~ '^items_';

-- So do the views of collections.
select vectormill.show_collection(id) from vectormill.collections;

-- The newest migration that this file knows: the doctor tells when the schema is at another.
comment on schema vectormill is 'roles.sql of 0029';

commit;
