"""Commands `vectormill models`: the catalogue of models."""

import re
from collections.abc import Mapping
from dataclasses import asdict
from datetime import date, datetime
from decimal import Decimal
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.catalog import models as catalog
from pipeline.catalog.models import DEFAULT_WORKSPACE
from pipeline.cli.backends import open_backend
from pipeline.cli.context import working
from pipeline.cli.once import App
from pipeline.cli.oneshot import oneshot
from pipeline.cli.options import Json
from pipeline.cli.output import Column, print_json, print_list, stderr
from pipeline.core import humanize
from pipeline.core.errors import ModelError, UnknownModel, UserError
from pipeline.core.models import MOST_INPUTS, Upstream
from pipeline.db import models

app = App(help="Manage the catalogue of models.", no_args_is_help=True)

Aliases = Annotated[list[str] | None, typer.Option(help="Another name for it; may be repeated.")]
Sizes = Annotated[
    str | None,
    typer.Option(metavar="SIZES", help="Sizes to which its vectors may be shortened, if trained for that: 64,128,256."),
]
Price = Annotated[float | None, typer.Option(min=0, help="Price of a million tokens, for the cost of usage.")]


class Pooling(StrEnum):
    """Pooling methods, which make one vector of those of a text's tokens."""

    CLS = "cls"
    MEAN = "mean"
    LASTTOKEN = "lasttoken"


class Clearable(StrEnum):
    """Settings of a model that `--clear` can empty."""

    ALIAS = "alias"
    MATRYOSHKA = "matryoshka"
    PRICE = "price"
    DEPRECATION = "deprecation"


#: Columns of each setting, with their empty values.
_NOTHING: dict[Clearable, dict[str, Any]] = {
    Clearable.ALIAS: {"aliases": []},
    Clearable.MATRYOSHKA: {"matryoshka": []},
    Clearable.PRICE: {"price_per_million": None},
    Clearable.DEPRECATION: {"deprecated_at": None, "replaced_by": None},
}
_SHOWN = (
    *("name", "kind", "dimensions", "matryoshka", "max_item_tokens", "tokens_per_second", "rates"),
    *("deprecated_at", "replaced_by"),
    *("price_per_million", "aliases", "path", "pooling", "gateway_url", "upstream_model", "key_env", "weights_sha256"),
)


@app.command("list")
def list_models(
    workspace: Annotated[
        str | None, typer.Option(help="Only models that this workspace may use. Default: the whole catalogue.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List the catalogue's models.

    Examples:

        vectormill models list --json

        vectormill models list --workspace search
    """
    with open_backend(workspace or DEFAULT_WORKSPACE) as backend:
        rows = backend.models(everything=workspace is None)
    if as_json:
        print_json([{name: _plain(row[name]) for name in _SHOWN if name in row} for row in rows])
        return
    if not rows:
        stderr.print("No models yet. Add one: vectormill models add NAME --path DIR")
        return
    print_list(
        [
            Column("name", flexible=True),
            Column("dimensions", right=True),
            Column("max tokens", right=True),
            Column("rate on one slot", right=True),
        ],
        [[row["name"], str(row["dimensions"]), f"{row['max_item_tokens'] or '–'}", _rates(row)] for row in rows],
    )


def _rates(row: Mapping[str, Any]) -> str:
    """Return a model's rates, a line for each kind of device and precision."""
    if not row.get("rates"):
        return f"{humanize.short(row['tokens_per_second'])} tok/s"
    return "\n".join(
        f"{each['device']}, {each['precision']}: {humanize.short(each['tokens_per_second'])} tok/s"
        for each in row["rates"]
    )


def _plain(value: Any) -> Any:
    if isinstance(value, date):
        return value.isoformat()
    return float(value) if isinstance(value, Decimal) else value


@app.command()
def add(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name that jobs use for it.")],
    path: Annotated[
        Path | None, typer.Option(help="Folder of a sentence-transformers model with safetensors weights.")
    ] = None,
    hub: Annotated[
        str | None, typer.Option(metavar="ID", help="A model on the Hugging Face hub, instead of a folder.")
    ] = None,
    revision: Annotated[
        str | None, typer.Option(metavar="SHA", help="The commit of --hub: its full hash, 40 hex digits.")
    ] = None,
    pooling: Annotated[
        Pooling | None,
        typer.Option(help="Pooling, if the folder has no modules.json; see the model's page."),
    ] = None,
    gateway: Annotated[
        str | None, typer.Option(metavar="URL", help="An OpenAI-compatible API that serves it, up to its /v1.")
    ] = None,
    upstream_model: Annotated[
        str | None, typer.Option(metavar="ID", help="Its name at that API. Default: NAME.", show_default=False)
    ] = None,
    key_env: Annotated[
        str | None,
        typer.Option(
            metavar="VAR",
            help="Variable of workers and api with the API's key; VAR_FILE may name a file that holds it.",
        ),
    ] = None,
    request_inputs: Annotated[
        int, typer.Option(min=1, help="The most texts that API takes in a request.")
    ] = MOST_INPUTS,
    request_tokens: Annotated[int, typer.Option(min=1, help="The most tokens it takes in a request.")] = 300_000,
    alias: Aliases = None,
    matryoshka: Sizes = None,
    price: Price = None,
) -> None:
    """Add a model: a dense text encoder in a folder or on the Hugging Face hub, or one of an upstream. Workers pick
    it up while they run.

    A model in a folder or on the hub is checked first: all its weights must be there, and its vectors must match those
    of sentence-transformers alone, for documents and queries, short and longer than the model reads. A model that fails
    is refused with the reason. Then its rate is measured.

    Examples:

        vectormill models add bge-small --path /models/bge-small-en-v1.5

        vectormill models add bge --hub BAAI/bge-small-en-v1.5 --revision 5c38ec7c405ec4b44b94cc5a9bb96e735b38267a

        vectormill models add openai-small --gateway https://api.openai.com/v1 \\
            --upstream-model text-embedding-3-small --key-env OPENAI_API_KEY
    """
    upstream, asked = None, list[str]()
    if gateway and not (path or hub or revision):
        upstream = Upstream(
            url=catalog.gateway_url(gateway),
            model=upstream_model or name,
            reply_model=None,
            key_env=_variable(key_env),
            base64=True,
            request_inputs=request_inputs,
            request_tokens=request_tokens,
        )
    else:
        asked = _source(path, hub, revision, others=bool(gateway or upstream_model or key_env))
    if upstream and pooling:
        raise UserError("--pooling goes with --path or --hub; an upstream pools by itself.")
    catalog.slug_of(name)
    sizes = _sizes(matryoshka)
    with working() as place:
        with place.engine.begin() as connection:
            if models.by_name(connection, name):
                raise UserError(f'model "{name}" exists already; remove it first: vectormill models remove {name}')
        stderr.print(f"Asking {upstream.url} …" if upstream else f"Loading and proving {path or hub} …")
        try:
            if upstream:
                description = oneshot(["gateway"], asdict(upstream))
            else:
                description = oneshot(["describe", *(("--pooling", pooling) if pooling else ()), *asked])
        except ModelError as error:
            raise UserError(str(error)) from None
        _check_sizes(sizes, description["dimensions"])
        with place.engine.begin() as connection:
            if upstream:
                catalog.add_gateway(connection, name, upstream, description, alias or ())
            else:
                catalog.add_model(connection, name, description, alias or ())
            models.change(connection, name, matryoshka=sizes or [], price_per_million=price)
    rate = humanize.short(description["tokens_per_second"])
    how = "by one request at a time" if upstream else "on one slot here"
    stderr.print(f"Added {name}: {description['dimensions']} dimensions, {rate} tok/s {how}.")
    for note in description.get("notes", ()):
        stderr.print(note, markup=False)


@app.command("set")
def change(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The model.")],
    alias: Aliases = None,
    matryoshka: Sizes = None,
    price: Price = None,
    deprecated_at: Annotated[
        datetime | None,
        typer.Option(metavar="DATE", formats=["%Y-%m-%d"], help="The day by which clients should use another model."),
    ] = None,
    replaced_by: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The model to use instead; with --deprecated-at.")
    ] = None,
    clear: Annotated[
        list[Clearable] | None,
        typer.Option(metavar="SETTING", help=f"Clear this: {', '.join(Clearable)}; may be repeated."),
    ] = None,
) -> None:
    """Change a model's aliases, sizes, price or deprecation. The named aliases replace all earlier ones.

    Examples:

        vectormill models set all-MiniLM-L6-v2 --alias text-embedding-3-small --price 0.02

        vectormill models set all-MiniLM-L6-v2 --clear alias

        vectormill models set old-model --deprecated-at 2027-03-31 --replaced-by all-MiniLM-L6-v2
    """
    sizes = _sizes(matryoshka)
    if replaced_by is not None and deprecated_at is None:
        raise UserError("--replaced-by goes with --deprecated-at.")
    given = {
        "aliases": alias,
        "matryoshka": sizes,
        "price_per_million": price,
        "deprecated_at": deprecated_at and deprecated_at.date(),
    }
    changes: dict[str, Any] = {column: value for column, value in given.items() if value is not None}
    if deprecated_at:  # an earlier deprecation may have named another model
        changes["replaced_by"] = replaced_by
    for what in clear or []:
        if _NOTHING[what].keys() & changes.keys():
            raise UserError(f"--clear {what}: it is set, too; give one of them.")
        changes |= _NOTHING[what]
    if not changes:
        raise UserError("nothing to change; give --alias, --matryoshka, --price, --deprecated-at or --clear.")
    with working() as place, place.engine.begin() as connection:
        row = models.by_name(connection, name)
        if row is None:
            raise UnknownModel(f'no model "{name}"; vectormill models list shows them.')
        _check_sizes(sizes, row["dimensions"])
        catalog.check_names(connection, name, alias or ())
        if replaced_by is not None and (replaced_by == name or models.by_name(connection, replaced_by) is None):
            raise UnknownModel(f'--replaced-by "{replaced_by}": name another model of the catalogue.')
        models.change(connection, name, **changes)
    stderr.print(f"Changed {name}.")


def _sizes(given: str | None) -> list[int] | None:
    if given is None:
        return None
    if not re.fullmatch(r"[1-9]\d{0,4}(,[1-9]\d{0,4})*", given):
        raise UserError(f'--matryoshka "{given}": write sizes with commas, such as 64,128,256.')
    return sorted({int(size) for size in given.split(",")})


def _check_sizes(sizes: list[int] | None, dimensions: int) -> None:
    if sizes and sizes[-1] > dimensions:
        raise UserError(f"--matryoshka {sizes[-1]}: the model gives {dimensions} dimensions; name smaller sizes.")


def _variable(name: str | None) -> str | None:
    if name is not None and not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", name):
        raise UserError("--key-env takes the name of a variable, such as OPENAI_API_KEY; never a key itself.")
    return name


def _source(path: Path | None, hub: str | None, revision: str | None, *, others: bool) -> list[str]:
    if others:
        raise UserError("--upstream-model and --key-env go with --gateway URL, and that without --path and --hub.")
    if path and not hub:
        if not path.is_dir():
            raise UserError(f"--path {path}: no such folder.")
        return [str(path.absolute())]
    if hub and not path:
        if not re.fullmatch("[0-9a-f]{40}", revision or ""):
            raise UserError("--hub needs --revision, the commit as 40 digits: a name such as main may change.")
        return [hub, str(revision)]
    raise UserError("give --path DIR, or --hub ID with --revision SHA, or --gateway URL.")


@app.command()
def remove(name: Annotated[str, typer.Argument(metavar="NAME", help="The model.")]) -> None:
    """Remove a model from the catalogue. Its jobs and vectors stay.

    Example: vectormill models remove bge-small
    """
    with working() as place, place.engine.begin() as connection:
        if unfinished := models.unfinished_jobs(connection, name):
            raise UserError(f"{name} has {unfinished:,} jobs that haven't ended; cancel them first: vectormill jobs.")
        if not models.remove(connection, name):
            raise UnknownModel(f'no model "{name}"; vectormill models list shows them.')
    stderr.print(f"Removed {name}.")
