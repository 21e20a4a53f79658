"""Commands for workspaces."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine

from pipeline.catalog.models import find_model, workspace_id
from pipeline.cli import main
from pipeline.core.errors import UnknownModel
from pipeline.core.models import Model
from tests.support.jobs_made import make_job, make_model

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(
    database: str,
    redis_url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Run:
    """Return a function that runs `vectormill workspaces` and returns its exit code, output and error output."""
    for name, value in (("DATABASE_URL", database), ("REDIS_URL", redis_url), ("HOME", str(tmp_path))):
        monkeypatch.setenv(f"VECTORMILL_{name}", value)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["vectormill", "workspaces", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        return int(str(ended.value.code)), printed.out, printed.err

    return run


def listed(run: Run) -> list[dict[str, Any]]:
    code, out, err = run("list", "--json")
    assert (code, err) == (0, "")
    found: list[dict[str, Any]] = json.loads(out)
    return found


_NO_LIMITS: dict[str, Any] = {
    **dict.fromkeys(("requests_per_minute", "tokens_per_minute", "monthly_tokens", "monthly_cost")),
    "sql_roles": [],
}


def test_a_workspace_is_made_with_its_weight_and_models(engine: Engine, model: Model, run: Run) -> None:
    make_model(engine, "large")
    assert run("create", "search", "--weight", "3", "--model", "small", "--model", "large") == (
        0,
        "",
        "Workspace search added.\n",
    )
    with engine.begin() as connection:
        search = workspace_id(connection, "search")
        assert find_model(connection, search, "large").name == "large"
    make_job(engine, model, workspace=search)
    assert listed(run) == [
        {"name": "default", "weight": 1.0, "models": ["large", "small"], "jobs": 0, **_NO_LIMITS, "webhook": None},
        {"name": "search", "weight": 3.0, "models": ["large", "small"], "jobs": 1, **_NO_LIMITS, "webhook": None},
    ]
    code, out, _ = run("list")
    assert (code, [line.split() for line in out.splitlines()][2]) == (0, ["search", "3", "1", "large,", "small"])


def test_a_new_workspace_may_use_no_model(engine: Engine, model: Model, run: Run) -> None:
    code, out, err = run("create", "search")
    assert (code, out) == (0, "")
    assert "vectormill workspaces set search --model NAME" in err
    with engine.begin() as connection, pytest.raises(UnknownModel):
        find_model(connection, workspace_id(connection, "search"), "small")


def test_set_changes_what_is_named_and_nothing_else(engine: Engine, model: Model, run: Run) -> None:
    make_model(engine, "large")
    run("create", "search", "--weight", "2", "--model", "small")
    assert run("set", "search", "--weight", "0.5") == (0, "", "Workspace search changed.\n")
    search = {"name": "search", "weight": 0.5, "models": ["small"], "jobs": 0, **_NO_LIMITS, "webhook": None}
    assert listed(run)[1] == search
    assert run("set", "search", "--model", "large")[0] == 0
    search["models"] = ["large"]
    assert listed(run)[1] == search
    limits = {"requests_per_minute": 60, "tokens_per_minute": 9_000, "monthly_tokens": 10**9, "monthly_cost": 12.5}
    for name, limit in limits.items():
        assert run("set", "search", f"--{name.replace('_', '-')}", str(limit))[0] == 0
    assert listed(run)[1] == search | limits
    assert run("set", "search", "--requests-per-minute", "0")[0] == 0
    assert listed(run)[1] == search | limits | {"requests_per_minute": None}
    assert run("set", "search", "--sql-role", "etl", "--sql-role", "dbt")[0] == 0
    assert listed(run)[1]["sql_roles"] == ["etl", "dbt"]
    assert run("set", "search", "--clear", "sql-roles")[0] == 0
    assert listed(run)[1]["sql_roles"] == []


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("create", "default"), 'workspace "default": this name is taken.'),
        (("create", "My Team"), 'workspace "My Team": use lower-case letters, digits, - and _.'),
        (("create", "search", "--weight", "0"), "--weight 0: give a number above 0."),
        (("create", "search", "--weight", "-1"), "--weight -1: give a number above 0."),
        (("create", "search", "--weight", "nan"), "--weight nan: give a number above 0."),
        (("create", "search", "--model", "none"), 'no model "none"; vectormill models list shows them.'),
        (("set", "search", "--weight", "1"), 'no workspace "search".'),
        (("set", "default"), "nothing to change; give --weight, --model, --webhook, --sql-role or a limit."),
        (("set", "default", "--weight", "0"), "--weight 0: give a number above 0."),
        (("set", "default", "--weight", "2", "--model", "none"), 'no model "none"; vectormill models list shows them.'),
    ],
)
def test_a_mistake_is_one_clear_line_and_changes_nothing(
    model: Model, run: Run, arguments: tuple[str, ...], sentence: str
) -> None:
    before = listed(run)
    assert run(*arguments) == (2, "", f"error {sentence}\n")
    assert listed(run) == before


def test_a_webhook_is_set_and_taken_away(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def webhooks() -> dict[str, Any]:
        return {row["name"]: row["webhook"] for row in json.loads(run("list", "--json")[1])}

    allowed, elsewhere = "https://etl.example.com/hooks/nightly", "https://evil.test/hooks"
    code, _, told = run("set", "default", "--webhook", allowed)
    assert code == 2
    assert "VECTORMILL_WEBHOOKS lists them" in told
    monkeypatch.setenv("VECTORMILL_WEBHOOKS", "https://etl.example.com/hooks")
    assert run("create", "search", "--webhook", elsewhere)[0] == 2
    assert run("create", "search", "--webhook", allowed)[0] == 0
    assert run("set", "default", "--webhook", allowed)[0] == 0
    assert webhooks() == {"default": allowed, "search": allowed}
    assert run("set", "default", "--webhook", elsewhere)[0] == 2
    assert run("set", "default", "--webhook", allowed, "--clear", "webhook")[0] == 2
    assert run("set", "search", "--clear", "webhook")[0] == 0
    assert webhooks() == {"default": allowed, "search": None}
