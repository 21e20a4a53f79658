"""Commands `vectormill workspaces`: workspaces with their weights, limits and rights."""

import re
from enum import StrEnum
from typing import Annotated

import typer
from sqlalchemy import Connection

from pipeline.catalog.models import workspace_id
from pipeline.cli.context import working
from pipeline.cli.once import App
from pipeline.cli.output import Column, print_json, print_list, stderr
from pipeline.core.errors import UnknownModel, UserError
from pipeline.db import models, workspaces
from pipeline.webhooks import allowlist

app = App(help="Manage workspaces, their weights and limits.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(metavar="NAME", help="Its name.")]
_WEIGHT = "Its share of the workers: weight 2 gets twice the tokens in flight of 1."
Weight = Annotated[float, typer.Option(help=_WEIGHT)]
Models = Annotated[list[str] | None, typer.Option("--model", help="A model it may use; may be repeated.")]
RequestsPerMinute = Annotated[int | None, typer.Option(min=0, help="Requests to the api a minute; 0: no limit.")]
TokensPerMinute = Annotated[int | None, typer.Option(min=0, help="Tokens through the api a minute; 0: no limit.")]
MonthlyTokens = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="Monthly cap on tokens. Jobs' tokens count, but only /v1 requests are refused. 0: no cap.",
    ),
]
MonthlyCost = Annotated[float | None, typer.Option(min=0, help="Monthly cap on cost, by models' prices. 0: no cap.")]
Webhook = Annotated[
    str | None,
    typer.Option(metavar="URL", help="URL to notify when its jobs end; the operator must allow it."),
]
SqlRoles = Annotated[
    list[str] | None,
    typer.Option(
        "--sql-role",
        metavar="ROLE",
        help="Postgres role that may request its jobs by vectormill.submit; may be repeated. Without any: in the "
        "workspace default every role that may execute the function, elsewhere none.",
    ),
]
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")


class Clearable(StrEnum):
    """Settings of a workspace that `--clear` can remove."""

    WEBHOOK = "webhook"
    SQL_ROLES = "sql-roles"


@app.command()
def create(
    name: Name,
    weight: Weight = 1.0,
    model: Models = None,
    requests_per_minute: RequestsPerMinute = None,
    tokens_per_minute: TokensPerMinute = None,
    monthly_tokens: MonthlyTokens = None,
    monthly_cost: MonthlyCost = None,
    webhook: Webhook = None,
    sql_role: SqlRoles = None,
) -> None:
    """Create a workspace. It may use only the models named here.

    Example: vectormill workspaces create search --weight 3 --model all-MiniLM-L6-v2
    """
    if not _NAME.fullmatch(name):
        raise UserError(f'workspace "{name}": use lower-case letters, digits, - and _.')
    _check(weight)
    limits = _limits(requests_per_minute, tokens_per_minute, monthly_tokens, monthly_cost)
    with working() as place, place.engine.begin() as connection:
        made = workspaces.create(connection, name, weight)
        if made is None:
            raise UserError(f'workspace "{name}": this name is taken.')
        _enable(connection, made, model or [])
        if limits:
            workspaces.set_limits(connection, made, limits)
        if webhook:
            allowlist.check(webhook, place.settings.webhooks)
            workspaces.set_webhook(connection, made, webhook)
        if sql_role:
            workspaces.set_sql_roles(connection, made, sql_role)
    stderr.print(f"Workspace {name} added.")
    if not model:
        stderr.print(f"It may use no model yet: vectormill workspaces set {name} --model NAME")


@app.command("set")
def change(
    name: Name,
    weight: Annotated[float | None, typer.Option(help=_WEIGHT)] = None,
    model: Models = None,
    requests_per_minute: RequestsPerMinute = None,
    tokens_per_minute: TokensPerMinute = None,
    monthly_tokens: MonthlyTokens = None,
    monthly_cost: MonthlyCost = None,
    webhook: Webhook = None,
    sql_role: SqlRoles = None,
    clear: Annotated[
        list[Clearable] | None,
        typer.Option(metavar="SETTING", help="Clear this: webhook or sql-roles; may be repeated."),
    ] = None,
) -> None:
    """Change a workspace's weight, limits, webhook, models or SQL roles.

    The named models replace those that it could use, and the named roles those that could request its jobs in SQL.

    Examples:

        vectormill workspaces set search --weight 2

        vectormill workspaces set search --requests-per-minute 600 --tokens-per-minute 1000000

        vectormill workspaces set search --webhook https://etl.example.com/hooks/vectormill

        vectormill workspaces set search --sql-role etl
    """
    limits = _limits(requests_per_minute, tokens_per_minute, monthly_tokens, monthly_cost)
    gone = set(clear or ())
    if weight is None and not (model or limits or webhook or sql_role or gone):
        raise UserError("nothing to change; give --weight, --model, --webhook, --sql-role or a limit.")
    _check_cleared(gone, webhook=webhook, sql_roles=sql_role)
    if weight is not None:
        _check(weight)
    with working() as place, place.engine.begin() as connection:
        found = workspace_id(connection, name)
        if weight is not None:
            workspaces.set_weight(connection, found, weight)
        if limits:
            workspaces.set_limits(connection, found, limits)
        if webhook:
            allowlist.check(webhook, place.settings.webhooks)
        if webhook or Clearable.WEBHOOK in gone:
            workspaces.set_webhook(connection, found, webhook)
        if model:
            _enable(connection, found, model)
        if sql_role or Clearable.SQL_ROLES in gone:
            workspaces.set_sql_roles(connection, found, sql_role or [])
    stderr.print(f"Workspace {name} changed.")


@app.command("list")
def list_workspaces(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List the workspaces.

    Example: vectormill workspaces list --json
    """
    with working() as place, place.engine.begin() as connection:
        rows = [dict(row) for row in workspaces.every(connection)]
    if as_json:
        print_json(rows)
        return
    print_list(
        [
            Column("name", flexible=True),
            Column("weight", right=True),
            Column("jobs", right=True),
            Column("models", flexible=True),
        ],
        [[row["name"], f"{row['weight']:g}", str(row["jobs"]), ", ".join(row["models"])] for row in rows],
    )


def _limits(
    requests_per_minute: int | None,
    tokens_per_minute: int | None,
    monthly_tokens: int | None,
    monthly_cost: float | None,
) -> dict[str, float | None]:
    given = {
        "requests_per_minute": requests_per_minute,
        "tokens_per_minute": tokens_per_minute,
        "monthly_tokens": monthly_tokens,
        "monthly_cost": monthly_cost,
    }
    return {name: value or None for name, value in given.items() if value is not None}


def _check(weight: float) -> None:
    if not 0 < weight <= 1_000_000:
        raise UserError(f"--weight {weight:g}: give a number above 0.")


def _check_cleared(gone: set[Clearable], *, webhook: str | None, sql_roles: list[str] | None) -> None:
    if webhook and Clearable.WEBHOOK in gone:
        raise UserError("--webhook and --clear webhook: give one of them.")
    if sql_roles and Clearable.SQL_ROLES in gone:
        raise UserError("--sql-role and --clear sql-roles: give one of them.")


def _enable(connection: Connection, workspace: int, names: list[str]) -> None:
    known = {row["name"] for row in models.every(connection)}
    for name in names:
        if name not in known:
            raise UnknownModel(f'no model "{name}"; vectormill models list shows them.')
    workspaces.enable_models(connection, workspace, sorted(set(names)))
