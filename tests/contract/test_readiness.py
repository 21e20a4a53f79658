"""Readiness probe `/readyz`, by which a load balancer chooses among replicas."""

import httpx2 as httpx
from sqlalchemy import text

from pipeline.db.database import make_engine
from pipeline.embedded.runtime import Running
from tests.acceptance.fleet import eventually
from tests.contract.conftest import Gateway


def test_ready_while_the_database_answers(gateway: Gateway, servers: Running) -> None:
    def ready() -> bool:
        return httpx.get(f"{gateway.url}/readyz").status_code == 200

    eventually(ready, "a ready api")
    name = gateway.engine.url.database
    administrator = make_engine(servers.database_url, application="vectormill-tests", pool_size=1)
    with administrator.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        try:
            connection.execute(text(f'alter database "{name}" allow_connections false'))
            others = "select pg_terminate_backend(pid) from pg_stat_activity where datname = :name"
            connection.execute(text(others), {"name": name})
            assert not ready()
            assert httpx.get(f"{gateway.url}/healthz").status_code == 200, "the process lives"
        finally:
            connection.execute(text(f'alter database "{name}" allow_connections true'))
    administrator.dispose()
    eventually(ready, "an api that is ready again")
