"""`vectormill submit`: a corpus becomes a job."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from pipeline.catalog import DEFAULT_WORKSPACE, as_model, find_model, find_row
from pipeline.cli.connect import Place, working
from pipeline.cli.jobs import Timeout, Workspace, watch_job
from pipeline.cli.look import duration, number, print_json, size, stderr, stdout
from pipeline.cli.oneshot import oneshot
from pipeline.cli.results import model_source
from pipeline.errors import UserError
from pipeline.estimate import estimate
from pipeline.parts import OUR_COLUMNS
from pipeline.settings import Settings
from pipeline.sources import Columns, Compression, Corpus, Source
from pipeline.sources.query import QueryCorpus
from pipeline.storage import is_remote
from pipeline.store import workers
from pipeline.submit import Options, Planning, Submission
from pipeline.submit import submit as submit_corpus


def submit(
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="SOURCE...",
            help=".jsonl, .csv, .parquet (.gz, .zst): files, folders, globs, s3://, gs://, az:// URIs, or -",
        ),
    ] = None,
    *,
    model: Annotated[str, typer.Option(help="The model, by name or alias.")],
    from_url: Annotated[
        str | None, typer.Option("--from", metavar="URL", help="A database to query: postgresql://…, duckdb:///file.")
    ] = None,
    query: Annotated[str | None, typer.Option(help="The query whose rows are the corpus.")] = None,
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
    by_reference: Annotated[
        bool | None,
        typer.Option(
            "--by-reference/--by-value",
            help="Workers read the files themselves, or their texts are copied to Postgres.  [default: by size]",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        str | None, typer.Option(metavar="URI", help="Write vectors as Parquet to this empty folder, not to Postgres.")
    ] = None,
    into: Annotated[
        str | None, typer.Option(metavar="TABLE", help="Also upsert each vector by key into this table of yours.")
    ] = None,
    hnsw: Annotated[bool, typer.Option("--hnsw", help="Index that table's vectors at the end.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Estimate tokens, time and size from a sample; submit nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what --dry-run finds as JSON.")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Stay until the job ends; the exit code says how.")] = False,
    timeout: Timeout = None,
    workspace: Workspace = DEFAULT_WORKSPACE,
) -> None:
    """Submit a corpus. Prints the job's id on standard output, all else on standard error.

    Examples:

        vectormill submit docs.jsonl --model all-MiniLM-L6-v2 --wait

        vectormill submit exports/ --model all-MiniLM-L6-v2 --text-column body --key-column doc_id --label team=search

        zcat dump.jsonl.gz | vectormill submit - --model all-MiniLM-L6-v2 --idempotency-key nightly-2026-11-23

        vectormill submit "s3://corpus/*.parquet" --model all-MiniLM-L6-v2 --by-reference --output s3://vectors/corpus

        vectormill submit --from duckdb:///shop.db --query "select id, text from items" --model all-MiniLM-L6-v2
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
        key_required=key_column is not None or into is not None,
        carry=tuple(carry or ()),
    )
    options = Options(
        name=name or (default_name(sources[0]) if sources else "query"),
        dimensions=dimensions,
        dtype=dtype,
        max_item_tokens=max_item_tokens,
        on_long=on_long,
        max_rejects=max_rejects,
        unique_keys=unique_keys,
        priority=priority,
        labels=_labels(label or []),
        idempotency_key=idempotency_key,
        output=output and _absolute(output),
        into=into,
        hnsw=hnsw,
    )
    with working(workspace) as place:
        corpus = _corpus(sources or [], from_url, query, columns, place.settings.item_bytes)
        if by_reference is None:
            by_reference = _by_reference(corpus, options)
        options = replace(options, by_reference=by_reference)
        if dry_run:
            _estimate(place, model, corpus, options, as_json=as_json)
            return
        job_id = _submit(place, model, corpus, options)
        sys.stdout.write(f"{job_id}\n")
        sys.stdout.flush()
        if wait:
            raise typer.Exit(watch_job(place, job_id, timeout))


def _corpus(sources: list[str], url: str | None, query: str | None, columns: Columns, item_bytes: int) -> Source:
    if (url is None) != (query is None):
        raise UserError("--from and --query go together: a database's URL, and what to select from it.")
    if url is not None and query is not None:
        if sources:
            raise UserError(f"{sources[0]}: give files, or --from and --query, not both.")
        return QueryCorpus(url, query, columns, item_bytes)
    if not sources:
        raise UserError("no source: give files, a folder, - for standard input, or --from and --query.")
    return Corpus(sources, columns, item_bytes)


def _by_reference(corpus: Source, options: Options) -> bool:
    """Whether a corpus is big enough, and such, that its workers should read it themselves."""
    if not isinstance(corpus, Corpus) or options.unique_keys:
        return False
    if any(file.uri is None or file.compression is not Compression.NONE for file in corpus.files):
        return False
    return sum(file.bytes or 0 for file in corpus.files) > _BY_REFERENCE_BYTES


def _absolute(folder: str) -> str:
    return folder if is_remote(folder) else str(Path(folder).absolute())


def _submit(place: Place, model: str, corpus: Source, options: Options) -> str:
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


def _estimate(place: Place, model: str, corpus: Source, options: Options, *, as_json: bool) -> None:
    with place.engine.begin() as connection:
        row = find_row(connection, place.workspace_id, model)
        slots = sum(worker["slots"] for worker in workers.live(connection, 30) if row["name"] in worker["models"])

    def tokenise(texts: Sequence[str], max_tokens: int | None) -> tuple[Sequence[int], Sequence[bool]]:
        if row["kind"] == "gateway":  # only it could tell
            stderr.print("Tokens are estimated: a gateway counts them itself, and four characters are about one.")
            return [len(text) // 4 + 1 for text in texts], [False] * len(texts)
        asked = {"prompt": row["document_prompt"], "texts": list(texts), "max_tokens": max_tokens}
        lengths, cut = oneshot(["tokens", *model_source(row)], asked)
        return lengths, cut

    found = estimate(corpus, as_model(row), options, slots, tokenise)
    if as_json:
        print_json(found)
    else:
        stdout.print(_estimate_table(found))


def _estimate_table(found: Mapping[str, Any]) -> Table:
    items, tokens, time = found["items"], found["tokens"], found["time"]
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bright_black")
    table.add_row("items", f"{items['total']:,}   about {items['rejected']:,} would be rejected")
    table.add_row("tokens", f"about {tokens['total']:,}   95 %: {tokens['low']:,} to {tokens['high']:,}")
    table.add_row("", f"{tokens['mean']:g} a text, measured on {tokens['sampled_items']:,} of them")
    duplicates = found["duplicates"]
    table.add_row("duplicates", f"{duplicates['share']:.1%} of {duplicates['compared_items']:,} texts compared")
    table.add_row("truncated", f"{found['truncated']['share']:.1%}")
    slots = f"{time['slots']} slots" if time["slots"] else "one slot; no worker serves this model now"
    table.add_row("time", f"about {duration(time['seconds'])} at {number(time['tokens_per_second'])} tok/s on {slots}")
    for where, name in (("postgres", "Postgres"), ("parquet", "Parquet")):
        if found["bytes"][where]:
            table.add_row("size", f"about {size(found['bytes'][where])} in {name}")
    return table


def planning(settings: Settings) -> Planning:
    """How the environment says that chunks are cut."""
    return Planning(
        chunk_seconds=settings.chunk_seconds,
        chunk_items=settings.chunk_items,
        chunk_bytes=settings.chunk_bytes,
        lease_seconds=settings.lease_seconds,
    )


def default_name(source: str) -> str:
    """A job's name from its first source: the file's name without its endings, or the folder that a glob begins in."""
    if source == "-":
        return "stdin"
    plain = (part for part in reversed(Path(source).parts) if not any(sign in part for sign in "*?["))
    return next(plain, source).split(".")[0] or source


#: Files that take more are read by their workers, unless --by-value says otherwise.
_BY_REFERENCE_BYTES = 1_000_000_000


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
