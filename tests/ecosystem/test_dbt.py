"""dbt project ops/schedulers/dbt: a model whose post-hook requests a job, run by dbt with a role of its own."""

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psycopg
import pytest
from psycopg import sql

from tests.ecosystem.conftest import SCHEDULERS, Site, new_role

_ROWS = 80


@dataclass
class _Dbt:
    """dbt on a database into which somebody has loaded raw articles."""

    site: Site
    environment: dict[str, str]
    scratch: Path

    def run(self, *command: str, **variables: Any) -> subprocess.CompletedProcess[str]:
        """Run a command of dbt, with its variables."""
        project = str(SCHEDULERS / "dbt")
        given = {"model": "static", "reader": self.site.reader, **variables}
        return self.site.run(
            "dbt",
            *("--log-path", str(self.scratch), *command),
            *("--project-dir", project, "--profiles-dir", project, "--target-path", str(self.scratch)),
            *("--vars", json.dumps(given)),
            **self.environment,
        )

    def wait(self, **variables: Any) -> subprocess.CompletedProcess[str]:
        """Wait for the job of `articles`, as a script would."""
        return self.run("run-operation", "wait_for_vectormill", "--args", "{table: articles}", **variables)

    def do(self, statement: str) -> None:
        """Run a statement as the database's owner, for a change upstream."""
        with psycopg.connect(self.site.gateway.fleet.environment["VECTORMILL_DATABASE_URL"]) as connection:
            connection.execute(statement.encode())


@pytest.fixture(scope="module")
def dbt(site: Site, tmp_path_factory: pytest.TempPathFactory) -> _Dbt:
    name, url = new_role(site.gateway)
    address = urlsplit(url)
    environment = {
        "DBT_HOST": str(address.hostname),
        "DBT_PORT": str(address.port),
        "DBT_DATABASE": address.path[1:],
        "DBT_USER": name,
        "DBT_PASSWORD": str(address.password),
        "DBT_SEND_ANONYMOUS_USAGE_STATS": "false",
    }
    made = _Dbt(site, environment, tmp_path_factory.mktemp("dbt"))
    made.do(
        "create schema raw; create table raw.articles as select n as id, 'Mill ' || n as title, "
        f"'It grinds ' || n || ' sacks' as body from generate_series(1, {_ROWS}) n"
    )
    with psycopg.connect(site.gateway.fleet.environment["VECTORMILL_DATABASE_URL"]) as connection:
        for grant in (
            "create on database {} to {}",
            "usage on schema raw, vectormill to {1}",
            "select on raw.articles, vectormill.job_status to {1}",
            "execute on function vectormill.submit to {1}",
            "execute on function vectormill.sync to {1}",
        ):
            connection.execute(sql.SQL("grant " + grant).format(sql.Identifier(address.path[1:]), sql.Identifier(name)))
    return made


def test_a_model_is_embedded_and_a_second_run_attaches(dbt: _Dbt) -> None:
    before = dbt.site.embedded()
    for _ in range(2):
        built = dbt.run("run", day="2026-10-24")
        assert built.returncode == 0, built.stdout
        waited = dbt.wait(day="2026-10-24")
        assert waited.returncode == 0, waited.stdout
        assert "articles-2026-10-24 is completed." in waited.stdout
    assert dbt.site.jobs("articles-2026-10-24") == ["completed"]
    assert dbt.site.embedded() == before + _ROWS
    keys = """
        select count(distinct e.key) from vectormill.embeddings e join vectormill.jobs j on j.id = e.job_id
        where j.name = :name
    """
    assert dbt.site.gateway.fleet.scalar(keys, name="articles-2026-10-24") == _ROWS


def test_another_job_of_the_same_name_isnt_waited_for(dbt: _Dbt) -> None:
    """The other job belongs to another workspace, and is made later."""
    built = dbt.run("run", day="2026-10-23")
    assert built.returncode == 0, built.stdout
    dbt.site.gateway.workspace("namesakes")
    texts = dbt.site.write("namesake.jsonl", [{"id": n, "text": ""} for n in range(3)])
    asked = ("--model", "static", "--name", "articles-2026-10-23", "--workspace", "namesakes")
    dbt.site.gateway.fleet.await_end(dbt.site.gateway.fleet.submit(str(texts), *asked))
    waited = dbt.wait()
    assert waited.returncode == 0, waited.stdout
    assert dbt.site.jobs("articles-2026-10-23") == ["completed", "failed"]


def test_an_empty_upstream_fails_loudly(dbt: _Dbt) -> None:
    dbt.do("update raw.articles set body = ''")
    built = dbt.run("run", day="2026-10-25")
    assert built.returncode == 0, built.stdout
    waited = dbt.wait(day="2026-10-25")
    assert waited.returncode != 0
    assert "articles-2026-10-25: failed, empty_source" in waited.stdout


def test_a_table_that_changes_is_kept_in_step(dbt: _Dbt) -> None:
    dbt.site.collection("tickets-of-dbt")
    dbt.do(
        "create table raw.tickets as select n as id, 'Ticket ' || n as subject, 'the sieve ' || n as body "
        "from generate_series(1, 50) n"
    )
    dbt.do(f'grant select on raw.tickets to "{dbt.environment["DBT_USER"]}"')
    wait = ("run-operation", "wait_for_vectormill", "--args", "{table: tickets}")
    for day in ("2026-10-27", "2026-10-28"):
        built = dbt.run("run", "--select", "tickets", day=day, tickets=True, collection="tickets-of-dbt")
        assert built.returncode == 0, built.stdout
        waited = dbt.run(*wait, day=day)
        assert waited.returncode == 0, waited.stdout
        dbt.do("update raw.tickets set body = 'it is whole again' where id = 7; delete from raw.tickets where id = 8")
    assert dbt.site.syncs("tickets-of-dbt") == [(50, 0, 0, 0), (0, 1, 48, 1)]


def test_who_may_not_is_refused(dbt: _Dbt) -> None:
    dbt.do(f'revoke execute on function vectormill.submit from "{dbt.environment["DBT_USER"]}"')
    built = dbt.run("run", day="2026-10-26")
    assert built.returncode != 0
    assert "permission denied for function submit" in built.stdout
