"""Witness inside the database, by triggers. It records each commit under another fence than its chunk has at that
moment, which no count shows afterwards if only a part was committed; and the time of each claim, where the chunk
keeps only the first one's."""

from uuid import UUID

from sqlalchemy import Connection, text

# The functions run with the rights of their owner, since no process has any in this schema.
_INSTALL = """
create schema if not exists witness;
create table if not exists witness.stale_commits (
  job_id uuid not null, chunk_id bigint not null, fence bigint not null, newest bigint not null
);
create table if not exists witness.claims (
  chunk_id bigint not null, fence bigint not null, at timestamptz not null default clock_timestamp(),
  primary key (chunk_id, fence)
);
create or replace function witness.look() returns trigger language plpgsql security definer
set search_path = pg_catalog as $$
begin
  insert into witness.stale_commits
  select new.job_id, new.chunk_id, new.fence, fence from vectormill.chunks
  where id = new.chunk_id and fence <> new.fence;
  return new;
end
$$;
create or replace function witness.look_at_claim() returns trigger language plpgsql security definer
set search_path = pg_catalog as $$
begin
  insert into witness.claims (chunk_id, fence) values (new.id, new.fence) on conflict do nothing;
  return new;
end
$$;
create or replace trigger witness before insert on vectormill.usage for each row execute function witness.look();
create or replace trigger witness after update on vectormill.chunks
for each row when (new.fence > old.fence) execute function witness.look_at_claim();
"""


def install(connection: Connection) -> None:
    """Install the triggers, which see all commits and claims from now on."""
    connection.exec_driver_sql(_INSTALL)


def stale_commits(connection: Connection, job: UUID) -> int:
    """Return the number of a job's commits that were recorded as stale."""
    query = text("select count(*) from witness.stale_commits where job_id = :job")
    return int(connection.execute(query, {"job": job}).scalar_one())
