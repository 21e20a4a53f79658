"""Command `vectormill submit`: a job from a corpus."""

import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, BinaryIO
from uuid import UUID

import typer
from rich.console import Console
from rich.live import Live
from rich.text import Text

from pipeline.catalog.models import DEFAULT_WORKSPACE, find_model
from pipeline.cli import options
from pipeline.cli.api_backend import ApiBackend
from pipeline.cli.backends import open_backend
from pipeline.cli.context import CommandContext, submitter
from pipeline.cli.dry_run import estimate_job, print_estimate, read_count
from pipeline.cli.jobs import watch_job
from pipeline.cli.output import stderr, tell
from pipeline.core.errors import EmptySource, UserError
from pipeline.core.options import Columns, JobOptions, OnLong, Precision, SplitBy, VectorType
from pipeline.infra.storage import absolute, is_remote
from pipeline.ingest.request import JobRequest, default_name, labels_of, read_request, tell_model
from pipeline.ingest.submission import Submission, planning
from pipeline.ingest.submit import submit as submit_corpus
from pipeline.sources import Compression, Corpus, Source
from pipeline.sources.discovery import find_files
from pipeline.sources.query import QueryCorpus
from pipeline.webhooks import allowlist


def submit(
    sources: options.Sources = None,
    *,
    model: options.Model = None,
    text: options.Text = None,
    key_column: options.KeyColumn = None,
    output: Annotated[
        str | None,
        typer.Option(
            metavar="URI",
            help="Write vectors as Parquet to this empty folder, not to Postgres.",
            rich_help_panel=options.USUAL,
        ),
    ] = None,
    wait: options.Wait = False,
    from_url: options.FromUrl = None,
    query: Annotated[
        str | None, typer.Option(help="The query whose rows are the corpus.", rich_help_panel=options.SOURCE)
    ] = None,
    delimiter: options.Delimiter = None,
    quote: options.Quote = None,
    by_reference: Annotated[
        bool | None,
        typer.Option(
            "--by-reference/--by-value",
            help="Workers read the files themselves, or their texts are copied to Postgres. Default: by size.",
            show_default=False,
            rich_help_panel=options.SOURCE,
        ),
    ] = None,
    unique_keys: Annotated[
        bool,
        typer.Option(
            "--unique-keys",
            help="Refuse a corpus with a duplicate or missing key.",
            rich_help_panel=options.SOURCE,
        ),
    ] = False,
    allow_empty: Annotated[
        bool,
        typer.Option(
            "--allow-empty",
            help="If there are no rows, make no job and exit with 0.",
            rich_help_panel=options.SOURCE,
        ),
    ] = False,
    text_column: options.TextColumn = "text",
    max_item_tokens: options.MaxItemTokens = None,
    on_long: options.OnLong = OnLong.TRUNCATE,
    split: options.Split = None,
    overlap: options.Overlap = 0,
    split_by: options.SplitBy = SplitBy.PARAGRAPH,
    title: options.Title = None,
    dimensions: options.Dimensions = None,
    dtype: Annotated[
        VectorType, typer.Option(help="Element type of the stored vectors.", rich_help_panel=options.MODEL)
    ] = VectorType.FLOAT32,
    precision: options.Precision = Precision.AUTO,
    no_reuse: options.NoReuse = False,
    carry: Annotated[
        list[str] | None,
        typer.Option(help="A column to carry into results; may be repeated.", rich_help_panel=options.OUTPUT),
    ] = None,
    into: Annotated[
        str | None,
        typer.Option(
            metavar="TABLE",
            help="Also upsert each vector by key into this table of yours.",
            rich_help_panel=options.OUTPUT,
        ),
    ] = None,
    hnsw: Annotated[
        bool, typer.Option("--hnsw", help="Index that table's vectors at the end.", rich_help_panel=options.OUTPUT)
    ] = False,
    name: Annotated[
        str | None,
        typer.Option(help="The job's name. Default: the first source's.", rich_help_panel=options.JOB),
    ] = None,
    label: options.Label = None,
    idempotency_key: Annotated[
        str | None,
        typer.Option(help="Submitting again with this key attaches to the same job.", rich_help_panel=options.JOB),
    ] = None,
    priority: options.Priority = 0,
    max_rejects: Annotated[
        str,
        typer.Option(
            metavar="N|P%",
            help="Fail if more items than this are rejected. Default: 10% from 100 items on.",
            rich_help_panel=options.JOB,
        ),
    ] = "",
    webhook: options.Webhook = None,
    workspace: Annotated[str, typer.Option(help="The workspace.", rich_help_panel=options.JOB)] = DEFAULT_WORKSPACE,
    timeout: options.Timeout = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Estimate tokens, time, size and cost from a sample; submit nothing.",
            rich_help_panel=options.WAITING,
        ),
    ] = False,
    at: Annotated[
        str | None,
        typer.Option(
            metavar="N",
            help="Estimate as if the corpus had N items, such as 1e9.",
            rich_help_panel=options.WAITING,
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print what --dry-run finds as JSON.", rich_help_panel=options.WAITING)
    ] = False,
) -> None:
    """Submit a corpus as a job. Prints the job's id on standard output, everything else on standard error.

    Examples:

        vectormill submit docs.jsonl --model all-MiniLM-L6-v2 --wait

        vectormill submit exports/ --model all-MiniLM-L6-v2 --text-column body --key-column doc_id --label team=search

        vectormill submit tickets.csv --model all-MiniLM-L6-v2 --text "{subject}\\n\\n{body}" --split 256

        zcat dump.jsonl.gz | vectormill submit - --model all-MiniLM-L6-v2 --idempotency-key nightly-2026-11-23

        vectormill submit export.csv --model all-MiniLM-L6-v2 --delimiter ";" --key-column sku

        vectormill submit "s3://corpus/*.parquet" --model all-MiniLM-L6-v2 --by-reference --output s3://vectors/corpus

        vectormill submit --from duckdb:///shop.db --query "select id, text from items" --model all-MiniLM-L6-v2

        vectormill submit sample.jsonl --model all-MiniLM-L6-v2 --dry-run --at 1e9
    """
    if max_rejects != max_rejects.strip():
        raise UserError("--max-rejects: give a count such as 50, or a share such as 2.5%.")
    items = read_count(at)
    needs("--json", as_json, "--dry-run", dry_run)
    needs("--at", at is not None, "--dry-run", dry_run)
    needs("--timeout", timeout is not None, "--wait", wait)
    if wait and dry_run:
        raise UserError("--wait has no effect with --dry-run, which submits nothing; leave one of them out.")
    wish = read_request(
        {
            "model": model,
            "name": name,
            "text_column": text_column,
            "text": text,
            "key_column": key_column,
            "delimiter": delimiter,
            "quote": quote,
            "carry": carry or [],
            "labels": labels_of(label or []),
            "priority": priority,
            "dimensions": dimensions,
            "dtype": dtype,
            "precision": precision,
            "max_item_tokens": max_item_tokens,
            "on_long": on_long,
            "split": split,
            "overlap": overlap,
            "split_by": split_by,
            "title": title,
            "max_rejects": max_rejects,
            "unique_keys": unique_keys,
            "by_reference": bool(by_reference),
            "output": output and absolute(output),
            "reuse": not no_reuse,
            "webhook": webhook,
            "into": into,
            "hnsw": hnsw,
        },
    )
    with open_backend(workspace) as backend:
        if isinstance(backend, ApiBackend):
            given = {"--from": from_url, "--query": query, "--into": into, "--hnsw": hnsw}
            refuse_at_api({**given, "--allow-empty": allow_empty, "--dry-run": dry_run})
            job_id = _submit_to_api(backend, wish, sources or [], idempotency_key)
        else:
            if webhook:
                allowlist.check(webhook, backend.place.settings.webhooks)
            corpus = corpus_of(sources or [], from_url, query, wish.columns, backend.place)
            wish = wish.model_copy(update={"name": wish.name or (default_name(sources[0]) if sources else "query")})
            if by_reference is None:
                wish = wish.model_copy(update={"by_reference": _by_reference(corpus, wish)})
            if dry_run:
                print_estimate(estimate_job(backend.place, wish, corpus, items), as_json=as_json)
                return
            try:
                job_id = _submit(backend.place, wish, corpus, idempotency_key, query)
            except EmptySource as error:
                if not allow_empty:
                    raise
                stderr.print(str(error), markup=False)
                return
        sys.stdout.write(f"{job_id}\n")
        sys.stdout.flush()
        if wait:
            raise typer.Exit(watch_job(backend, job_id, timeout))


def refuse_at_api(given: Mapping[str, Any]) -> None:
    for option, value in given.items():
        if value:
            raise UserError(f"{option} needs the database itself: set VECTORMILL_DATABASE_URL.")


def _submit_to_api(backend: ApiBackend, wish: JobRequest, sources: list[str], idempotency_key: str | None) -> UUID:
    """Upload local files and standard input to the api. URIs are left for the api to read."""
    if not sources:
        raise UserError("no source: give files, a folder, or - for standard input.")
    wish = wish.model_copy(update={"name": wish.name or default_name(sources[0])})
    remote = [source for source in sources if is_remote(source)]
    with TemporaryDirectory() as folder:
        if remote:
            if len(remote) < len(sources):
                raise UserError("an api takes files to upload or URIs, not both in one job.")
            made = backend.submit(wish.model_copy(update={"sources": remote}), [], idempotency_key)
        else:
            if wish.by_reference:
                raise UserError("--by-reference: an api can't read files of this machine; leave it out.")
            made = backend.submit(wish, files_of(sources, Path(folder)), idempotency_key)
    if made.attached:
        stderr.print(f"{made.attached}.")
    tell(made.notices)
    return made.job_id


def files_of(sources: list[str], folder: Path) -> list[Path]:
    paths = []
    for file in find_files(sources):
        if file.uri is None:
            paths.append(folder / "stdin.jsonl")
            with paths[-1].open("wb") as kept:
                shutil.copyfileobj(sys.stdin.buffer, kept)
        else:
            paths.append(Path(file.name))
    return paths


def corpus_of(
    sources: list[str],
    url: str | None,
    query: str | None,
    columns: Columns,
    place: CommandContext,
    stdin: BinaryIO | None = None,
) -> Corpus | QueryCorpus:
    item_bytes = place.settings.item_bytes
    if (url is None) != (query is None):
        raise UserError("--from and --query go together: a database's URL, and what to select from it.")
    if url is not None and query is not None:
        if sources:
            raise UserError(f"{sources[0]}: give files, or --from and --query, not both.")
        return QueryCorpus(url, query, columns, item_bytes)
    if not sources:
        raise UserError("no source: give files, a folder, - for standard input, or --from and --query.")
    return Corpus(sources, columns, item_bytes, stdin)


def _by_reference(corpus: Source, options: JobOptions) -> bool:
    """Return True if workers should read the corpus themselves: large uncompressed files, without unique keys."""
    if not isinstance(corpus, Corpus) or options.unique_keys:
        return False
    if any(file.uri is None or file.compression is not Compression.NONE for file in corpus.files):
        return False
    return sum(file.bytes or 0 for file in corpus.files) > _BY_REFERENCE_BYTES


def _submit(
    place: CommandContext, wish: JobRequest, corpus: Source, idempotency_key: str | None, query: str | None
) -> UUID:
    with place.engine.begin() as connection:
        found = find_model(connection, place.workspace_id, wish.model)
    tell_model(wish, found, corpus)
    with Counter(stderr) as counter:
        done = submit_corpus(
            place.engine,
            Submission(
                workspace_id=place.workspace_id,
                model=found,
                corpus=corpus,
                planning=planning(place.settings),
                name=str(wish.name),
                options=wish,
                priority=wish.priority,
                labels=wish.labels,
                idempotency_key=idempotency_key,
                submitted_by=submitter(),
                query=query,
                on_items=counter.show,
            ),
        )
    if done.attached:
        stderr.print(f"{done.attached}.")
    tell(done.notices)
    return done.job_id


#: Files of more bytes together are read by the workers themselves, unless --by-value is given.
_BY_REFERENCE_BYTES = 1_000_000_000


class Counter:
    """Progress line that counts committed items, on a terminal only."""

    def __init__(self, console: Console) -> None:
        self._live = Live(console=console, transient=True, refresh_per_second=4)
        self._shown = console.is_terminal

    def __enter__(self) -> "Counter":
        if self._shown:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._shown:
            self._live.stop()

    def show(self, items: int) -> None:
        self._live.update(Text(f"submitting  {items:,} items"))


def needs(option: str, given: bool, other: str, also: bool) -> None:
    if given and not also:
        raise UserError(f"{option} has no effect without {other}; leave it out, or give both.")
