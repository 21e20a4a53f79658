"""Names and aliases in the catalogue: each stands for one model."""

import json
import threading
from typing import Any

import pytest
from sqlalchemy import Engine, text

from pipeline.catalog import models as catalog
from pipeline.cli import main
from pipeline.core.errors import UserError
from pipeline.db import models, workspaces
from tests.acceptance.fleet import eventually
from tests.support.jobs_made import run_sql


@pytest.fixture
def described(engine: Engine, static_description: dict[str, Any]) -> dict[str, Any]:
    with engine.begin() as connection:
        catalog.add_model(connection, "first", static_description, ["alias"])
        catalog.add_model(connection, "second", static_description)
    return static_description


def test_a_name_that_another_model_has_is_refused(engine: Engine, described: dict[str, Any]) -> None:
    for name, aliases in (("third", ["alias"]), ("third", ["first"]), ("alias", [])):
        with pytest.raises(UserError, match="another model, or a collection, is called"), engine.begin() as connection:
            catalog.add_model(connection, name, described, aliases)
    with engine.begin() as connection:
        catalog.check_names(connection, "first", ["alias", "free"])


def test_two_who_want_a_name_at_once_dont_both_get_it(engine: Engine, described: dict[str, Any]) -> None:
    refused: list[Exception] = []

    def second() -> None:
        try:
            with engine.begin() as connection:
                catalog.add_model(connection, "fourth", described, ["wanted"])
        except UserError as error:
            refused.append(error)

    with engine.begin() as connection:
        catalog.add_model(connection, "third", described, ["wanted"])
        other = threading.Thread(target=second)
        other.start()
        waiting = "select 1 from pg_stat_activity where wait_event_type = 'Lock' and datname = current_database()"
        eventually(lambda: run_sql(engine, waiting), "the other one to wait")
    other.join()
    assert len(refused) == 1


@pytest.mark.parametrize("order", [("first", "second"), ("second", "first")])
def test_of_two_that_share_an_alias_from_before_it_is_always_the_same(
    engine: Engine, described: dict[str, Any], order: tuple[str, ...]
) -> None:
    with engine.begin() as connection:
        # Read the rows in the table's order, not in an index's.
        for way in ("indexscan", "bitmapscan", "nestloop"):
            connection.execute(text(f"set local enable_{way} = off"))
        connection.execute(text("delete from vectormill.workspace_models"))
        for name in order:
            models.enable(connection, catalog.workspace_id(connection), name)
            connection.execute(text("update vectormill.models set aliases = '{both}' where name = :n"), {"n": name})
        found = models.find(connection, catalog.workspace_id(connection), "both")
    assert found
    assert found["name"] == "first"


def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], url: str, *words: str) -> tuple[int, str]:
    """Run a command and return its exit code and its output."""
    monkeypatch.setenv("VECTORMILL_DATABASE_URL", url)
    monkeypatch.setenv("VECTORMILL_REDIS_URL", "redis://127.0.0.1:1/0")
    monkeypatch.setattr("sys.argv", ["vectormill", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr()
    return int(ended.value.code or 0), said.out + said.err


def test_models_are_changed_and_listed(
    engine: Engine,
    database: str,
    described: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run(*words: str) -> tuple[int, str]:
        return cli(monkeypatch, capsys, database, "models", *words)

    def first() -> Any:
        query = "select aliases, matryoshka, price_per_million from vectormill.models where name = 'first'"
        return run_sql(engine, query)[0]

    assert run("set", "second", "--alias", "alias")[0] == 2
    assert run("set", "first", "--matryoshka", "64,128", "--price", "2")[0] == 0
    assert first() == (["alias"], [64, 128], 2)
    assert run("set", "first", "--clear", "price", "--clear", "alias")[0] == 0
    assert first() == ([], [64, 128], None)
    assert run("set", "first", "--clear", "matryoshka", "--price", "3")[0] == 0
    assert first() == ([], [], 3)
    assert run("set", "first", "--clear", "price", "--price", "3")[0] == 2
    assert run("set", "first")[0] == 2
    assert run("set", "first", "--replaced-by", "second")[0] == 2
    assert run("set", "first", "--deprecated-at", "2027-03-31", "--replaced-by", "nothing")[0] == 2
    assert run("set", "first", "--deprecated-at", "soon")[0] == 2
    assert run("set", "first", "--deprecated-at", "2027-03-31", "--replaced-by", "second")[0] == 0
    shown = {row["name"]: row for row in json.loads(run("list", "--json")[1])}
    assert (shown["first"]["deprecated_at"], shown["first"]["replaced_by"]) == ("2027-03-31", "second")
    assert run("set", "first", "--clear", "deprecation")[0] == 0
    with engine.begin() as connection:
        made = workspaces.create(connection, "search", 1.0)
        assert made
        workspaces.enable_models(connection, made, ["second"])

    def listed(*words: str) -> list[str]:
        return [row["name"] for row in json.loads(run("list", "--json", *words)[1])]

    assert listed("--workspace", "search") == ["second"]
    with engine.begin() as connection:
        workspaces.enable_models(connection, catalog.workspace_id(connection), [])
    assert listed() == ["first", "second"], "the whole catalogue"
    assert run("list", "--workspace", "none")[0] == 2
    with engine.begin() as connection:
        models.record_rate(connection, "second", "NVIDIA H200", "bfloat16", 890_000.0)
        models.record_rate(connection, "second", "cpu", "float32", 4_400.0)
    rows = {row["name"]: row["rates"] for row in json.loads(run("list", "--json")[1])}
    assert [each["device"] for each in rows["second"]] == ["NVIDIA H200", "cpu"], "the fastest first"
    table = run("list")[1]
    assert "NVIDIA H200, bfloat16: 890k tok/s" in table
    assert "cpu, float32: 4.4k tok/s" in table
