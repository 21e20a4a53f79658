"""`vectormill models`: the catalogue."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from pipeline import catalog
from pipeline.cli.connect import working
from pipeline.cli.look import number, print_json, stderr, stdout
from pipeline.cli.processes import oneshot
from pipeline.errors import UnknownModel, UserError
from pipeline.store import models

app = typer.Typer(help="What embeds: the catalogue of models.", no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
_SHOWN = ("name", "kind", "dimensions", "max_item_tokens", "tokens_per_second", "aliases", "path", "weights_sha256")


@app.command("list")
def list_models(as_json: Json = False) -> None:
    """List the models.

    Example: vectormill models list --json
    """
    with working() as place, place.engine.begin() as connection:
        rows = models.of_workspace(connection, place.workspace_id)
    if as_json:
        print_json([{name: row[name] for name in _SHOWN} for row in rows])
        return
    if not rows:
        stderr.print("No models yet. Add one: vectormill models add NAME --path DIR")
        return
    table = Table(box=None, padding=(0, 3, 0, 0), header_style="bright_black")
    for name in ("name", "dimensions", "max tokens", "rate on one slot"):
        table.add_column(name, justify="left" if name == "name" else "right")
    for row in rows:
        rate = f"{number(row['tokens_per_second'])} tok/s"
        table.add_row(row["name"], str(row["dimensions"]), f"{row['max_item_tokens'] or '–'}", rate)
    stdout.print(table)


@app.command()
def add(
    name: Annotated[str, typer.Argument(help="What jobs call it.")],
    path: Annotated[Path, typer.Option(help="Folder of a sentence-transformers model with safetensors weights.")],
    alias: Annotated[list[str] | None, typer.Option(help="Another name for it; may be repeated.")] = None,
) -> None:
    """Add a model. It is loaded once, to measure it and to keep its canary; workers pick it up while they run.

    Example: vectormill models add bge-small --path /models/bge-small-en-v1.5
    """
    if not path.is_dir():
        raise UserError(f"--path {path}: no such folder.")
    catalog.slug_of(name)
    with working() as place:
        with place.engine.begin() as connection:
            if models.by_name(connection, name):
                raise UserError(f'there is a model "{name}" already; vectormill models remove {name} makes room.')
        stderr.print(f"Loading {path} …")
        description = oneshot(["describe", str(path.absolute())])
        with place.engine.begin() as connection:
            catalog.add_model(connection, name, description, alias or ())
    rate = number(description["tokens_per_second"])
    stderr.print(f"Added {name}: {description['dimensions']} dimensions, {rate} tok/s on one slot here.")


@app.command()
def remove(name: Annotated[str, typer.Argument(help="The model.")]) -> None:
    """Remove a model from the catalogue. Its jobs and vectors stay.

    Example: vectormill models remove bge-small
    """
    with working() as place, place.engine.begin() as connection:
        if not models.remove(connection, name):
            raise UnknownModel(f'no model "{name}"; vectormill models list shows them.')
    stderr.print(f"Removed {name}.")
