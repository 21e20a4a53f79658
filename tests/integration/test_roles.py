"""Rights of each process's login: statements it is refused, and allowed ones that whole jobs
(tests/acceptance/test_roles.py) rarely meet."""

from collections.abc import Iterator
from datetime import UTC, datetime

import psycopg
import pytest
from psycopg.errors import InsufficientPrivilege
from sqlalchemy import Engine
from uuid_utils.compat import uuid7

from pipeline.core.models import Model
from pipeline.db import chunks, forgets, health, lost_claims, overview, partitions, workers
from pipeline.db.database import make_engine
from pipeline.db.migrate import known_revisions
from pipeline.doctor import servers as checks
from pipeline.doctor.checks import CHECKS, run_checks
from pipeline.doctor.context import Context
from pipeline.doctor.report import State
from pipeline.embedded.runtime import Running
from pipeline.infra.settings import Settings
from pipeline.jobs import control
from pipeline.jobs.purge import purge_month
from tests.acceptance.fleet import eventually
from tests.conftest import set_fsync
from tests.support.jobs_made import WORKER, make_job, run_sql, taken
from tests.support.roles import PROCESSES, SCRIPT, logins

#: Statements that every process is refused.
_EVERYBODY = """
drop table vectormill.jobs
create table vectormill.mine (id int)
create function vectormill.mine() returns int language sql as 'select 1'
alter table vectormill.jobs add column mine int
truncate vectormill.items
create schema mine
update vectormill.alembic_version set version_num = 'mine'
insert into vectormill.models (name) values ('mine')
delete from vectormill.models
update vectormill.models set path = 'mine'
update vectormill.models set gateway_url = 'http://mine'
insert into vectormill.workspaces (name) values ('mine')
update vectormill.workspaces set monthly_cost = null
insert into vectormill.workspace_models values (1, 'small')
update vectormill.embeddings set vector = null
update vectormill.usage set cost = 0
delete from vectormill.usage
update vectormill.outputs set chunk_id = 1
delete from vectormill.outputs
delete from vectormill.attempts
delete from vectormill.claim_losses
update vectormill.jobs set workspace_id = 1, options = '{}'
"""
#: Refused to all but the dispatcher, which may set any column of a job.
_BUT_THE_DISPATCHER = _EVERYBODY.splitlines()[-1]
_REFUSED = {
    "dispatcher": """
select id from vectormill.api_keys
insert into vectormill.embeddings (job_id, index) values (gen_random_uuid(), 0)
insert into vectormill.usage (workspace_id, model) values (1, 'small')
insert into vectormill.outputs (job_id) values (gen_random_uuid())
insert into vectormill.workers (id) values (gen_random_uuid())
update vectormill.engines set url = 'http://mine'
insert into vectormill.requests (job_id) values (gen_random_uuid())
delete from vectormill.requests
insert into vectormill.batches (id) values ('mine')
delete from vectormill.batches
update vectormill.rejects set code = 'mine'
delete from vectormill.tombstones
""",
    "worker": """
delete from vectormill.embeddings
select key from vectormill.forget_keys
delete from vectormill.tombstones
select id from vectormill.api_keys
select query from vectormill.requests
select url from vectormill.events
select name from vectormill.workspaces
insert into vectormill.job_history (job_id, state, priority) values (gen_random_uuid(), 'paused', 0)
select query from vectormill.job_history
select cost from vectormill.usage
select id from vectormill.usage
insert into vectormill.jobs (id) values (gen_random_uuid())
delete from vectormill.jobs
update vectormill.jobs set priority = 9
update vectormill.jobs set receipt = null
insert into vectormill.chunks (job_id) values (gen_random_uuid())
update vectormill.chunks set items = 1
update vectormill.chunks set job_id = gen_random_uuid()
delete from vectormill.chunks
update vectormill.items set text = 'mine'
delete from vectormill.items
delete from vectormill.rejects
update vectormill.attempts set estimated_tokens = 0
delete from vectormill.collection_keys
update vectormill.collection_keys set key = 'mine'
delete from vectormill.syncs
select vectormill.drop_collection(1)
update vectormill.leases set holder = 'mine'
insert into vectormill.files (id) values ('mine')
select vectormill.make_partitions('2030-01-01')
""",
    "engine": """
delete from vectormill.embeddings
select text from vectormill.items
select vector from vectormill.embeddings
select id from vectormill.jobs
select id from vectormill.api_keys
select id from vectormill.chunks
select id from vectormill.usage
select uri from vectormill.files
select key from vectormill.collection_keys
select vectormill.make_collection_tables(1)
insert into vectormill.workers (id) values (gen_random_uuid())
select vectormill.make_partitions('2030-01-01')
""",
    "api": """
delete from vectormill.embeddings
select holder from vectormill.leases
select worker_id from vectormill.claim_losses
update vectormill.tombstones set digest = ''
update vectormill.api_keys set admin = true
update vectormill.api_keys set secret_sha256 = ''
delete from vectormill.api_keys
select query from vectormill.requests
insert into vectormill.requests (job_id) values (gen_random_uuid())
select body from vectormill.events
delete from vectormill.job_history
update vectormill.job_history set submitted_by = 'mine'
insert into vectormill.embeddings (job_id, index) values (gen_random_uuid(), 0)
update vectormill.items set text = 'mine'
insert into vectormill.collection_keys (version_id, key) values (1, 'mine')
delete from vectormill.collection_keys
delete from vectormill.collection_vectors
update vectormill.collection_versions set model_name = 'mine'
delete from vectormill.collections
select vectormill.index_collection(1)
update vectormill.chunks set embedded = 0
update vectormill.chunks set items = 1
update vectormill.leases set holder = 'mine'
insert into vectormill.workers (id) values (gen_random_uuid())
update vectormill.engines set url = 'http://mine'
insert into vectormill.attempts (chunk_id) values (1)
""",
    "reader": """
select id from vectormill.api_keys
select query from vectormill.requests
select url from vectormill.events
select webhook from vectormill.workspaces
select query from vectormill.job_history
update vectormill.jobs set priority = 9
delete from vectormill.jobs
insert into vectormill.items (job_id, index) values (gen_random_uuid(), 0)
update vectormill.chunks set state = 'done'
delete from vectormill.workers
update vectormill.leases set holder = 'mine'
select vectormill.make_partitions('2030-01-01')
""",
}


@pytest.fixture
def urls(database: str) -> dict[str, str]:
    return logins(database)


def refused(url: str, statement: str) -> bool:
    """Return True if Postgres refuses a login the statement for lack of rights. The statement is rolled back."""
    with psycopg.connect(url) as connection:
        try:
            connection.execute(statement.encode())
        except InsufficientPrivilege:
            return True
        except psycopg.Error:
            return False
        finally:
            connection.rollback()
    return False


@pytest.mark.parametrize("process", PROCESSES)
def test_what_a_process_may_not_do(process: str, urls: dict[str, str], engine: Engine, model: Model) -> None:
    make_job(engine, model)
    leaf = partitions.leaf("items", uuid7()).as_string()
    statements = [*_EVERYBODY.strip().splitlines(), *_REFUSED[process].strip().splitlines(), f"drop table {leaf}"]
    if process == "dispatcher":
        statements.remove(_BUT_THE_DISPATCHER)
    else:
        statements.append(f"delete from {leaf}" if process != "api" else f"update {leaf} set text = ''")
    assert [statement for statement in statements if not refused(urls[process], statement)] == []


def test_the_script_takes_back_what_it_doesnt_give(urls: dict[str, str], engine: Engine, database: str) -> None:
    run_sql(engine, "grant select on vectormill.api_keys to vectormill_worker")
    run_sql(engine, "grant update (text) on vectormill.items to vectormill_worker")
    assert not refused(urls["worker"], "select id from vectormill.api_keys")
    logins(database)
    assert refused(urls["worker"], "select id from vectormill.api_keys")
    assert refused(urls["worker"], "update vectormill.items set text = ''")


@pytest.fixture
def as_worker(urls: dict[str, str]) -> Iterator[Engine]:
    made = make_engine(urls["worker"], application="vectormill-worker")
    yield made
    made.dispose()


@pytest.fixture
def as_dispatcher(urls: dict[str, str]) -> Iterator[Engine]:
    made = make_engine(urls["dispatcher"], application="vectormill-dispatcher")
    yield made
    made.dispose()


def test_months_that_the_dispatcher_makes_have_the_rights_of_their_tables(
    urls: dict[str, str], as_dispatcher: Engine, engine: Engine
) -> None:
    month = datetime(2021, 3, 1, tzinfo=UTC)
    with as_dispatcher.begin() as connection:
        partitions.make_month(connection, month)
    leaf = partitions.leaf("items", partitions.lowest_id(month)).as_string()
    insert = f"insert into {leaf} (job_id, index) values ('{partitions.lowest_id(month)}', 0)"
    with psycopg.connect(urls["worker"]) as connection:
        connection.execute(insert.encode())
    assert refused(urls["worker"], f"update {leaf} set text = ''")
    assert refused(urls["reader"], insert)
    assert not refused(urls["reader"], f"select text from {leaf}")
    assert refused(urls["engine"], f"select text from {leaf}")
    assert purge_month(engine, month) is None, "the owner's, whoever made it"


def test_the_dispatcher_ends_the_backend_of_a_worker_that_froze(
    as_dispatcher: Engine, as_worker: Engine, engine: Engine, model: Model
) -> None:
    job = make_job(engine, model)
    claim = taken(as_worker, job, lease_seconds=0.2)
    with as_worker.connect() as frozen:
        chunks.renew(frozen, claim, committing=True)

        def ended() -> list[int]:
            with as_dispatcher.begin() as connection:
                return lost_claims.terminate_frozen_backends(connection, 0.1)

        assert eventually(ended, "an ended backend") == [claim.chunk_id]
        frozen.invalidate()


def test_a_worker_looks_back_at_what_it_lost(as_worker: Engine, engine: Engine, model: Model) -> None:
    claim = taken(engine, make_job(engine, model))
    with as_worker.begin() as connection:
        lost_claims.note_stop(connection, claim)
        assert lost_claims.of_worker(connection, WORKER) == 1


def test_the_api_cancels_what_was_asked_for_in_sql(urls: dict[str, str], engine: Engine, model: Model) -> None:
    job = run_sql(engine, "select vectormill.submit('select 1 as id, ''a'' as text', 'small')")[0][0]
    run_sql(engine, "update vectormill.workspaces set webhook = 'http://127.0.0.1:1/'")
    as_api = make_engine(urls["api"], application="vectormill-api")
    with as_api.begin() as connection:
        assert control.cancel(connection, job) == "cancelled"
    as_api.dispose()
    assert run_sql(engine, "select count(*) from vectormill.events")[0][0] == 1


@pytest.fixture
def waits_for_disk(servers: Running, engine: Engine) -> Iterator[None]:
    """Turn fsync on, as on an operator's server: the doctor objects to a server that a crash may damage."""
    set_fsync(servers.database_url, "on")
    eventually(lambda: run_sql(engine, "show fsync") == [("on",)], "a server that waits for its disk")
    yield
    set_fsync(servers.database_url, "off")


@pytest.mark.usefixtures("waits_for_disk")
@pytest.mark.parametrize("process", PROCESSES)
def test_the_doctor_takes_no_processs_login_for_broken(
    process: str, urls: dict[str, str], redis_url: str, settings: Settings
) -> None:
    context = Context(
        settings=settings,
        database_url=urls[process],
        redis_url=redis_url,
        api_url=None,
        flower_url=None,
        flower_password=None,
    )
    asked = [check for check in CHECKS if check.name not in ("dispatcher", "workers", "engines", "flower")]
    try:
        found = [(name, finding) for name, finding in run_checks(context, asked)]
        (role,) = checks.role(context)
    finally:
        context.close()
    assert [(name, finding) for name, finding in found if finding.state is State.FAIL] == []
    assert role.found.startswith(f"a login for {process}")
    canary = next(finding for name, finding in found if name == "canary")
    assert canary.state is State.SKIPPED


def test_the_doctor_objects_to_a_login_without_rights(database: str, redis_url: str, settings: Settings) -> None:
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute("drop role if exists test_nobody; create role test_nobody login password 'nobody'")
    bare = database.rpartition("@")[2]
    context = Context(
        settings=settings,
        database_url=f"postgresql://test_nobody:nobody@{bare}",
        redis_url=redis_url,
        api_url=None,
        flower_url=None,
        flower_password=None,
    )
    try:
        (role,) = checks.role(context)
    finally:
        context.close()
    assert role.state is State.FAIL
    assert "roles.sql" in role.mend


def test_the_script_knows_the_newest_migration() -> None:
    assert f"'roles.sql of {known_revisions()[-1]}'" in SCRIPT.read_text(encoding="utf-8")


@pytest.mark.parametrize("login", ["worker", "owner"])
def test_the_doctor_tells_that_the_script_is_older_than_the_schema(
    login: str, urls: dict[str, str], engine: Engine, database: str, redis_url: str, settings: Settings
) -> None:
    run_sql(engine, "comment on schema vectormill is 'roles.sql of 0010'")
    context = Context(
        settings=settings,
        database_url=urls.get(login, database),
        redis_url=redis_url,
        api_url=None,
        flower_url=None,
        flower_password=None,
    )
    try:
        findings = list(checks.role(context))
    finally:
        context.close()
    assert [finding.state for finding in findings] == [State.OK, State.FAIL]
    assert "was run for 0010" in findings[1].found


@pytest.fixture
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return Settings(home=tmp_path_factory.mktemp("home"))


def test_the_api_may_read_all_that_its_overview_shows(urls: dict[str, str], engine: Engine, model: Model) -> None:
    make_job(engine, model)
    api = make_engine(urls["api"], application="vectormill-tests")
    with api.begin() as connection:
        for workspace in (None, 1):
            assert [each.model for each in overview.waiting(connection, workspace)] == [model.name]
            assert overview.paused_by_system(connection, workspace, 5) == []
            assert overview.stuck(connection, workspace, 900) == []
            assert overview.failures_today(connection, workspace, 5).jobs == []
            assert overview.lost_claims_today(connection, workspace) == 0
            assert overview.freshness(connection, workspace, 5) == []
            assert forgets.with_problems(connection, workspace, 5) == []
            hour = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
            assert overview.tokens_of_hour(connection, workspace, hour) == 0
        assert health.lease_seconds_left(connection, workers.DISPATCHER_ROLE) is None
        assert health.overdue_chunks(connection, 15)["chunks"] == 0
    api.dispose()
