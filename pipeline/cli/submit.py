"""`vectormill submit`: a corpus becomes a job."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.live import Live
from rich.text import Text

from pipeline.catalog import DEFAULT_WORKSPACE, find_model
from pipeline.cli.connect import Place, working
from pipeline.cli.jobs import Timeout, Workspace, watch_job
from pipeline.cli.look import stderr
from pipeline.errors import UserError
from pipeline.results import OUR_COLUMNS
from pipeline.settings import Settings
from pipeline.sources import Columns, Corpus
from pipeline.submit import Options, Planning, Submission
from pipeline.submit import submit as submit_corpus


def submit(
    sources: Annotated[
        list[str], typer.Argument(metavar="SOURCE...", help=".jsonl, .csv, .parquet (.gz, .zst), a folder, or -")
    ],
    model: Annotated[str, typer.Option(help="The model, by name or alias.")],
    text_column: Annotated[str, typer.Option(help="The column or field that holds the texts.")] = "text",
    key_column: Annotated[str | None, typer.Option(help="The column that holds your keys.  [default: id]")] = None,
    carry: Annotated[list[str] | None, typer.Option(help="A column to carry into results; may be repeated.")] = None,
    name: Annotated[str | None, typer.Option(help="The job's name.  [default: the first source's]")] = None,
    label: Annotated[list[str] | None, typer.Option(metavar="K=V", help="A label; may be repeated.")] = None,
    idempotency_key: Annotated[
        str | None, typer.Option(help="Submitting again with this key attaches to the same job.")
    ] = None,
    priority: Annotated[int, typer.Option(min=-100, max=100, help="Higher goes first.")] = 0,
    dimensions: Annotated[
        int | None, typer.Option(min=1, help="Size of the vectors, if the model has several.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="How vectors are kept: float32 or float16.")] = "float32",
    max_item_tokens: Annotated[
        int | None, typer.Option(min=1, max=1_000_000, help="Read at most so many tokens of a text.")
    ] = None,
    on_long: Annotated[str, typer.Option(help="What happens to a longer text: truncate or reject.")] = "truncate",
    max_rejects: Annotated[
        str, typer.Option(metavar="N|P%", help="Fail the job beyond this.  [default: 10% from 100 items on]")
    ] = "",
    unique_keys: Annotated[bool, typer.Option("--unique-keys", help="Refuse a corpus with a key twice.")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Stay until the job ends; the exit code says how.")] = False,
    timeout: Timeout = None,
    workspace: Workspace = DEFAULT_WORKSPACE,
) -> None:
    """Submit a corpus. Prints the job's id on standard output, all else on standard error.

    Examples:

        vectormill submit docs.jsonl --model all-MiniLM-L6-v2 --wait

        vectormill submit exports/ --model all-MiniLM-L6-v2 --text-column body --key-column doc_id --label team=search

        zcat dump.jsonl.gz | vectormill submit - --model all-MiniLM-L6-v2 --idempotency-key nightly-2026-11-23
    """
    _one_of("--dtype", dtype, "float32", "float16")
    _one_of("--on-long", on_long, "truncate", "reject")
    if not max_rejects == max_rejects.strip():
        raise UserError("--max-rejects: give a count such as 50, or a share such as 2.5%.")
    if taken := set(carry or ()) & set(OUR_COLUMNS):
        raise UserError(f"--carry {sorted(taken)[0]}: results have a column of this name already.")
    columns = Columns(
        text=text_column,
        key=key_column or "id",
        key_required=key_column is not None,
        carry=tuple(carry or ()),
    )
    options = Options(
        name=name or default_name(sources[0]),
        dimensions=dimensions,
        dtype=dtype,
        max_item_tokens=max_item_tokens,
        on_long=on_long,
        max_rejects=max_rejects,
        unique_keys=unique_keys,
        priority=priority,
        labels=_labels(label or []),
        idempotency_key=idempotency_key,
    )
    with working(workspace) as place:
        job_id = _submit(place, model, sources, columns, options)
        sys.stdout.write(f"{job_id}\n")
        sys.stdout.flush()
        if wait:
            raise typer.Exit(watch_job(place, job_id, timeout))


def _submit(place: Place, model: str, sources: list[str], columns: Columns, options: Options) -> str:
    corpus = Corpus(sources, columns, place.settings.item_bytes)
    with place.engine.begin() as connection:
        found = find_model(connection, place.workspace_id, model)
    with _Counter(stderr) as counter:
        done = submit_corpus(
            place.engine,
            Submission(
                workspace_id=place.workspace_id,
                model=found,
                corpus=corpus,
                options=options,
                planning=planning(place.settings),
                on_items=counter.show,
            ),
        )
    if done.attached:
        stderr.print(f"{done.attached}.")
    return str(done.job_id)


def planning(settings: Settings) -> Planning:
    """How the environment says that chunks are cut."""
    return Planning(
        chunk_seconds=settings.chunk_seconds,
        chunk_items=settings.chunk_items,
        chunk_bytes=settings.chunk_bytes,
        lease_seconds=settings.lease_seconds,
    )


def default_name(source: str) -> str:
    """A job's name from its first source: the file's name without its endings."""
    return "stdin" if source == "-" else Path(source).name.split(".")[0] or source


class _Counter:
    """A line that counts what is committed, on a terminal only."""

    def __init__(self, console: Console) -> None:
        self._live = Live(console=console, transient=True, refresh_per_second=4)
        self._shown = console.is_terminal

    def __enter__(self) -> "_Counter":
        if self._shown:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._shown:
            self._live.stop()

    def show(self, items: int) -> None:
        self._live.update(Text(f"submitting  {items:,} items"))


def _one_of(option: str, value: str, *choices: str) -> None:
    if value not in choices:
        raise UserError(f'{option} "{value}": choose {" or ".join(choices)}.')


def _labels(pairs: list[str]) -> dict[str, str]:
    labels = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not key or not equals:
            raise UserError(f'--label "{pair}": write it as key=value.')
        labels[key] = value
    return labels
