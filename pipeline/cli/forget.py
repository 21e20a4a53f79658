"""Command `vectormill forget`: keys erased for good, and kept from coming back."""

import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Annotated

import typer

from pipeline.catalog.models import DEFAULT_WORKSPACE
from pipeline.cli import output
from pipeline.cli.backends import Backend, open_backend
from pipeline.cli.options import Json, Timeout, Workspace
from pipeline.core.errors import UserError, WaitTimedOut
from pipeline.core.forget_status import ForgetStatus
from pipeline.core.options import Columns

_POLL_SECONDS = 0.5


def forget(
    key: Annotated[list[str] | None, typer.Option(metavar="KEY", help="A key; may be repeated.")] = None,
    keys_file: Annotated[Path | None, typer.Option(metavar="FILE", help="A file with one key a line.")] = None,
    *,
    collection: Annotated[
        str | None, typer.Option(help="Only from this collection and its syncs. Default: from all of the workspace.")
    ] = None,
    allow: Annotated[
        bool,
        typer.Option(
            "--allow",
            help="Let keys come in again that were forgotten with the same --collection, or without; "
            "nothing is brought back.",
        ),
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Don't ask.")] = False,
    timeout: Timeout = None,
    as_json: Json = False,
    workspace: Workspace = DEFAULT_WORKSPACE,
) -> None:
    """Erase keys from jobs, their files, and collections, with texts, vectors, rejects and columns, and keep them out.

    A tombstone, a hash of each key, turns rows with that key into rejects (forgotten) from then on. Tables of yours
    that jobs wrote to aren't changed; the command names them.

    Examples:

        vectormill forget --key customer-4711 --collection tickets

        vectormill forget --keys-file erase.txt --yes

        vectormill forget --key customer-4711 --allow
    """
    if not key and not keys_file:
        raise UserError("give keys: --key, or --keys-file.")
    with open_backend(workspace) as backend:
        if allow:
            allowed = backend.allow(_keys(key or [], keys_file), collection)
            if as_json:
                output.print_json({"allowed": allowed})
            output.stderr.print(f"{allowed:,} forgotten keys may come in again.")
            return
        count = sum(1 for _ in _keys(key or [], keys_file))
        if not yes:
            where = f"the collection {collection}" if collection else f"all jobs and collections of {workspace}"
            typer.confirm(f"Erase {count:,} keys from {where}, for good?", abort=True, err=True)
        done = _wait(backend, backend.forget(_keys(key or [], keys_file), collection), timeout)
    if as_json:
        output.print_json(done.model_dump(mode="json"))
    erased = f"{done.items:,} items of jobs erased, and {done.collected:,} keys of collections"
    output.stderr.print(f"{done.keys:,} keys forgotten: {erased}.")
    output.tell(_left(done))


def _keys(given: list[str], file: Path | None) -> Iterator[str]:
    from pipeline.sources.removed_keys import RemovedKeys

    of_file = RemovedKeys(file, Columns()).blocks() if file else iter(())
    return chain(map(_checked, given), (key for rows in of_file for key in rows.keys if key))


def _checked(key: str) -> str:
    from pipeline.sources.values import BadKeyError, as_key

    try:
        return as_key(key) or ""
    except BadKeyError as error:
        raise UserError(f"--key: {error}.") from None


def _wait(backend: Backend, made: ForgetStatus, timeout: float | None) -> ForgetStatus:
    deadline, told = time.monotonic() + (timeout or float("inf")), ""
    output.stderr.print(f"Nothing with these keys comes in any more. The dispatcher erases what is there ({made.id}).")
    while made.finished_at is None:
        waits = made.problem
        if made.waits_for and not waits:
            waits = f"the end of job {made.waits_for}, which may still write them"
        if waits and waits != told:
            output.stderr.print(f"waiting: {waits}", markup=False)
            told = waits
        if time.monotonic() > deadline:
            raise WaitTimedOut(f"request {made.id} isn't finished; the dispatcher goes on with it.")
        time.sleep(_POLL_SECONDS)
        made = backend.forget_status(made.id)
    return made


def _left(done: ForgetStatus) -> Iterator[str]:
    for place in done.outputs:
        yield f"Parquet files that can't be found here any more aren't changed: {place}"
    if done.more_outputs:
        yield f"nor are those of {done.more_outputs:,} more places"
    for table in done.tables:
        yield f"a table of yours that jobs wrote to isn't changed: {table}"
