"""Gateway while its database is frozen or unreachable."""

import time
from collections.abc import Iterator
from urllib.parse import urlsplit

import httpx2 as httpx
import pytest
from sqlalchemy import text

from pipeline.api.gateway.cache import _REST_SECONDS
from tests.acceptance.fleet import eventually
from tests.contract.conftest import Gateway
from tests.contract.test_gateway import code, counted, embed
from tests.support.jobs_made import run_sql
from tests.support.lines import Line, line_to


@pytest.fixture(scope="module")
def line(gateway: Gateway) -> Iterator[Line]:
    """Put a line between the api and its database. The engine keeps a connection of its own."""
    url = gateway.fleet.environment["VECTORMILL_DATABASE_URL"]
    parts = urlsplit(url)
    assert parts.hostname
    assert parts.port
    with line_to(parts.hostname, parts.port, Line) as made:
        gateway.stop_api()
        gateway.start_api(VECTORMILL_DATABASE_URL=url.replace(f":{parts.port}/", f":{made.port}/"))
        yield made
        made.mend()


@pytest.fixture
def client(gateway: Gateway, line: Line) -> Iterator[httpx.Client]:
    line.mend()
    with gateway.client() as made:
        eventually(lambda: embed(made).status_code == 200, "a request that comes through")
        yield made


def test_a_frozen_database_stalls_nobody_who_is_known(client: httpx.Client, line: Line, gateway: Gateway) -> None:
    line.freeze()
    time.sleep(2.1)  # cached entries have become stale
    began, waited, failures = time.monotonic(), 0, counted(gateway)["database_failures"]
    for _ in range(100):
        assert embed(client).status_code == 200
        before, failures = failures, counted(gateway)["database_failures"]
        waited += failures > before
    assert 0 < waited <= 1 + (time.monotonic() - began) / _REST_SECONDS, "whoever comes next finds that it is away"


def test_usage_of_that_time_is_written_later(client: httpx.Client, line: Line, gateway: Gateway) -> None:
    line.freeze()
    ids = [embed(client).headers["x-request-id"] for _ in range(3)]
    line.cut()
    ids += [embed(client).headers["x-request-id"] for _ in range(3)]
    line.mend()
    query = "select count(*) from vectormill.usage where request_id = any(:ids)"
    eventually(lambda: run_sql(gateway.engine, query, ids=ids) == [(6,)], "all rows")


def test_what_isnt_known_is_unavailable(client: httpx.Client, line: Line, gateway: Gateway) -> None:
    stranger = gateway.new_key()
    line.cut()
    with gateway.client(stranger) as other:
        assert code(embed(other)) == (503, "upstream_unavailable")
    for reply in (
        client.get("/api/usage"),
        client.get("/api/keys"),
        client.post("/api/keys", json={"name": "none"}),
        client.post("/api/keys/none/rotate", json={}),
        client.delete("/api/keys/none"),
    ):
        assert (reply.status_code, reply.json()["title"]) == (503, "upstream unavailable")
        assert int(reply.headers["retry-after"]) >= 1


def test_engines_are_known_until_they_had_time_to_show_themselves(
    client: httpx.Client, line: Line, gateway: Gateway
) -> None:
    """After an outage, an engine that couldn't send heartbeats looks as if it were gone."""
    line.cut()
    assert embed(client).status_code == 200
    time.sleep(2.1)
    assert embed(client).status_code == 200
    with gateway.engine.connect() as held:

        def silent() -> bool:
            """Return True if the engine can't send a heartbeat now, and hasn't for a while."""
            run_sql(gateway.engine, "update vectormill.engines set seen_at = now() - interval '30 s' returning 1")
            held.rollback()
            held.execute(text("lock table vectormill.engines in share mode"))
            seen = "select 1 from vectormill.engines where seen_at > now() - interval '20 s'"
            return held.execute(text(seen)).first() is None

        eventually(silent, "an engine that is silent")
        line.mend()
        eventually(lambda: client.get("/api/usage").status_code == 200, "the database")
        time.sleep(2.1)
        assert embed(client).status_code == 200


def test_an_api_ends_though_its_database_is_frozen(line: Line, gateway: Gateway, client: httpx.Client) -> None:
    line.freeze()
    assert embed(client).status_code == 200
    gateway.stop_api()
    gateway.start_api()
