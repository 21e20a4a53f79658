"""Commands `vectormill keys`: API keys of a workspace."""

import sys
from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Any

import typer
from rich.text import Text

from pipeline.catalog.keys import NewKey
from pipeline.catalog.models import DEFAULT_WORKSPACE
from pipeline.cli.backends import open_backend
from pipeline.cli.once import App
from pipeline.cli.options import Json, Workspace
from pipeline.cli.output import Column, age, print_json, print_list, stderr
from pipeline.cli.spans import read_span

app = App(help="Manage API keys.", no_args_is_help=True)

KeyId = Annotated[str, typer.Argument(metavar="ID", help="The key's id, as list shows it.")]


@app.command()
def create(
    name: Annotated[str, typer.Option(help="Name that tells its purpose.")] = "cli",
    workspace: Workspace = DEFAULT_WORKSPACE,
    expires: Annotated[str | None, typer.Option(metavar="SPAN", help="Lifetime: 12h, 90d. Default: unlimited.")] = None,
    admin: Annotated[bool, typer.Option("--admin", help="Make it an admin's: it may create and revoke keys.")] = False,
) -> None:
    """Create a key. It is printed only once; only its hash is stored.

    Examples:

        vectormill keys create --name search-service --expires 90d

        export OPENAI_API_KEY=$(vectormill keys create)
    """
    lives = None if expires is None else read_span("--expires", expires)
    with open_backend(workspace) as backend:
        made = backend.create_key(name, admin=admin, lives=lives)
    _show(made)


@app.command("list")
def list_keys(workspace: Workspace = DEFAULT_WORKSPACE, as_json: Json = False) -> None:
    """List a workspace's keys, without their secrets.

    Example: vectormill keys list --json
    """
    with open_backend(workspace) as backend:
        rows = backend.keys()
    if as_json:
        print_json(rows)
        return
    if not rows:
        stderr.print("No keys yet. Make one: vectormill keys create")
        return
    print_list(
        [
            Column("id"),
            Column("name", flexible=True),
            Column("state"),
            Column("made", right=True),
            Column("expires", flexible=True),
        ],
        map(_listed, rows),
    )


def _listed(row: Mapping[str, Any]) -> list[str | Text]:
    state = Text("revoked" if row["revoked_at"] else "live" if row["live"] else "expired")
    state.stylize("green" if row["live"] else "bright_black")
    name = row["name"] + (" (admin)" if row["admin"] else "")
    return [row["id"], name, state, age(datetime.fromisoformat(row["created_at"])), row["expires_at"] or "–"]


@app.command()
def rotate(
    key: KeyId,
    workspace: Workspace = DEFAULT_WORKSPACE,
    overlap: Annotated[str, typer.Option(metavar="SPAN", help="How long the old key stays valid.")] = "24h",
) -> None:
    """Create a key that replaces another one, which stays valid for a while. The new key keeps the old key's lifetime.

    Example: vectormill keys rotate 3f0c9a7be1d2c4a8 --overlap 2h
    """
    with open_backend(workspace) as backend:
        made = backend.rotate_key(key, read_span("--overlap", overlap))
    _show(made)
    stderr.print(f"The old key {key} ends in {overlap}.")


@app.command()
def revoke(key: KeyId, workspace: Workspace = DEFAULT_WORKSPACE) -> None:
    """Revoke a key. It stops working within two seconds.

    Example: vectormill keys revoke 3f0c9a7be1d2c4a8
    """
    with open_backend(workspace) as backend:
        backend.revoke_key(key)
    stderr.print(f"Key {key} revoked.")


def _show(made: NewKey) -> None:
    sys.stdout.write(made.token + "\n")
    stderr.print(f"Key {made.id}: keep it now, it isn't shown again.")
