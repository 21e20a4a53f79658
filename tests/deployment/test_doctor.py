"""Doctor on a healthy fleet, and on one with a planted fault: it finds that fault, and no other."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.catalog import models
from pipeline.db.database import make_engine
from pipeline.doctor import host
from pipeline.doctor.checks import CHECKS, run_checks
from pipeline.doctor.context import Context
from pipeline.doctor.report import State
from pipeline.embedded.runtime import Running
from tests.acceptance.fleet import Fleet, eventually
from tests.conftest import new_database, set_fsync
from tests.deployment.ailments import FAULTS, Plant, no_dispatcher, replace_urls
from tests.deployment.deployed import KEY, QUERIES, Deployment, add_gateway
from tests.support.jobs_made import run_sql
from tests.support.ports import free_port


@pytest.fixture(scope="module")
def deployment(
    servers: Running, static_description: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Deployment]:
    folder = tmp_path_factory.mktemp("doctor")
    redis_url = servers.redis_url.rsplit("/", 1)[0] + "/3"
    set_fsync(servers.database_url, "on")
    with new_database(servers.database_url) as url:
        engine = make_engine(url, application="vectormill-tests", pool_size=4)
        with engine.begin() as connection:
            models.add_model(connection, "static", static_description)
        add_gateway(engine, "near", KEY)
        environment = {
            "VECTORMILL_DATABASE_URL": url,
            "VECTORMILL_REDIS_URL": redis_url,
            "HF_HUB_OFFLINE": "1",
            KEY: "sk-near",
        }
        fleet = Fleet(engine=engine, environment=environment, logs=folder)
        made = Deployment(fleet, engine, url, redis_url, f"http://127.0.0.1:{free_port()}", folder)
        try:
            run_sql(engine, f"create role {QUERIES} login password 'secret'")
            made.start_api()
            fleet.start_dispatcher()
            made.start_worker()
            made.start_engine()
            yield made
        finally:
            fleet.close()
            run_sql(engine, f"drop role {QUERIES}")
            engine.dispose()
            set_fsync(servers.database_url, "off")


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY, "sk-near")


def states(context: Context) -> dict[str, State]:
    """Return the worst state that each check finds."""
    order = [State.OK, State.SKIPPED, State.WARN, State.FAIL]
    found: dict[str, State] = {}
    try:
        for name, finding in run_checks(context):
            print(finding.state, name, finding.found, finding.mend)
            found[name] = max(found.get(name, State.OK), finding.state, key=order.index)
    finally:
        context.close()
    assert list(found) == [check.name for check in CHECKS]
    return found


def bad(context: Context) -> dict[str, State]:
    """Return the checks that find something to fix, with their states."""
    return {name: state for name, state in states(context).items() if state in (State.WARN, State.FAIL)}


def test_a_healthy_deployment(deployment: Deployment) -> None:
    eventually(lambda: bad(deployment.context()) == {}, "an api that answers")
    found = states(deployment.context())
    assert {name for name, state in found.items() if state is not State.OK} == {"flower"}, "nobody knows where it is"
    assert deployment.fleet.scalar("select count(*) from vectormill.jobs") == 0, "the canary's job is purged"


@pytest.mark.parametrize(("plant", "expected"), FAULTS, ids=[plant.__name__ for plant, _ in FAULTS])
def test_a_fault_is_found_and_no_other(deployment: Deployment, plant: Plant, expected: dict[str, State]) -> None:
    eventually(lambda: bad(deployment.context()) == {}, "a healthy deployment")
    with plant(deployment) as context:
        assert bad(context) == expected
    assert deployment.fleet.scalar("select count(*) from vectormill.jobs") == 0


def _owner(url: str) -> str:
    """Return user and password of a URL."""
    return url.split("//")[1].split("@")[0]


REFUSALS: list[tuple[str, Callable[[Deployment], Context], str, str]] = [
    (
        "postgres",
        lambda it: replace_urls(it, database=it.database_url.replace(_owner(it.database_url), "stranger:sesame")),
        'authentication failed for user "stranger"',
        "password in VECTORMILL_DATABASE_URL",
    ),
    (
        "postgres",
        lambda it: replace_urls(it, database=it.database_url.rsplit("/", 1)[0] + "/nowhere"),
        'database "nowhere" does not exist',
        "create it",
    ),
    (
        "redis",
        lambda it: replace_urls(it, redis=it.redis_url.replace(_owner(it.redis_url), ":sesame")),
        "invalid username-password pair",
        "password in VECTORMILL_REDIS_URL",
    ),
]


@pytest.mark.parametrize(("check", "plant", "found", "mend"), REFUSALS, ids=["password", "database", "redis"])
def test_who_is_refused_is_told_why(
    deployment: Deployment, check: str, plant: Callable[[Deployment], Context], found: str, mend: str
) -> None:
    context = plant(deployment)
    ((_, finding),) = run_checks(context, [each for each in CHECKS if each.name == check])
    context.close()
    assert (finding.state, finding.unreachable) == (State.FAIL, False), "to repeat it is of no use"
    assert found in finding.found
    assert mend in finding.mend
    assert "sesame" not in finding.found + finding.mend


def test_who_finds_nobody_may_repeat_it(deployment: Deployment) -> None:
    for url, reason in (
        ("postgresql://vectormill@127.0.0.1:1/vectormill", "Connection refused"),
        ("postgresql://vectormill@nowhere.invalid/vectormill", "failed to resolve host 'nowhere.invalid'"),
    ):
        context = replace_urls(deployment, database=url)
        ((_, finding),) = run_checks(context, [check for check in CHECKS if check.name == "postgres"])
        context.close()
        assert finding.unreachable
        assert reason in finding.found


def test_each_check_has_a_fault_that_it_finds() -> None:
    untested = {check.name for check in CHECKS} - {name for _, expected in FAULTS for name in expected}
    assert untested == {"pgvector", "space"}, "these need a server and a disk of their own"


def test_an_empty_database(deployment: Deployment, empty_database: str) -> None:
    assert bad(replace_urls(deployment, database=empty_database)) == {"pgvector": State.FAIL, "schema": State.FAIL}


def test_little_space(deployment: Deployment, monkeypatch: pytest.MonkeyPatch) -> None:
    for limit, state in (("_LITTLE_BYTES", State.WARN), ("_TOO_LITTLE_BYTES", State.FAIL)):
        monkeypatch.setattr(host, limit, 10**18)
        assert bad(deployment.context()) == {"space": state}


def test_the_command(deployment: Deployment, tmp_path: Path) -> None:
    fleet = deployment.fleet
    fleet.environment |= {"VECTORMILL_API_URL": deployment.api_url, "VECTORMILL_HOME": str(tmp_path)}
    fleet.environment |= {"VECTORMILL_FLOWER_PASSWORD": "long enough by far"}
    done = fleet.cli("doctor")
    lines = done.stdout.splitlines()
    assert [line[:10] for line in lines if not line.startswith("✓ ok")] == ["– skipped "] * 3
    assert any("static embedded it" in line for line in lines)
    assert done.stderr == f"{len(lines) - 3} ok, 3 skipped.\n"

    with no_dispatcher(deployment):
        done = fleet.cli("doctor", "--json", check=False)
        assert (done.returncode, done.stderr) == (1, "")
        (problem,) = [row for row in json.loads(done.stdout) if row["state"] == "fail"]
        assert problem["check"] == "dispatcher"
        assert "vectormill dispatcher" in problem["mend"]
        done = fleet.cli("doctor", "--no-canary", check=False)
        assert [line for line in done.stdout.splitlines() if line.startswith("✗ fail")] == [
            f"✗ fail    dispatcher  {problem['found']}. {problem['mend']}"
        ]
    done = fleet.cli("doctor", "--model", "nothing", check=False)
    assert done.returncode == 1
    assert '✗ fail    canary      no model "nothing"; available: near, static.' in done.stdout

    fleet.environment["VECTORMILL_DATABASE_URL"] = "postgresql://vectormill@127.0.0.1:1/vectormill"
    assert fleet.cli("doctor", check=False).returncode == 6
    del fleet.environment["VECTORMILL_DATABASE_URL"]
    done = fleet.cli("doctor", check=False)
    assert (done.returncode, done.stdout) == (6, "")
    fleet.environment["VECTORMILL_DATABASE_URL"] = deployment.database_url
