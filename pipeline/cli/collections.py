"""Commands `vectormill collections`: tables that syncs bring up to their sources."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from pipeline.catalog.models import DEFAULT_WORKSPACE
from pipeline.cli import options, output
from pipeline.cli.backends import open_backend
from pipeline.cli.once import App
from pipeline.cli.output import Column
from pipeline.cli.spans import read_span
from pipeline.core import humanize
from pipeline.core.collection_status import CollectionStatus, Comparison, FilesStatus, VersionStatus
from pipeline.core.collections import VersionState
from pipeline.core.errors import UserError
from pipeline.core.options import JobOptions, OnLong, Precision, SplitBy, VectorType
from pipeline.infra.storage import absolute
from pipeline.ingest.request import read_fields

app = App(help="Manage collections, which syncs keep up with their sources.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(metavar="NAME", help="Its name.")]


@app.command()
def create(
    name: Name,
    *,
    model: options.Model = None,
    text_column: options.TextColumn = "text",
    text: options.Text = None,
    key_column: options.KeyColumn = None,
    carry: Annotated[list[str] | None, typer.Option(help="A column to show beside vectors; may be repeated.")] = None,
    dimensions: options.Dimensions = None,
    dtype: Annotated[VectorType, typer.Option(help="Element type of the vectors.")] = VectorType.FLOAT32,
    precision: options.Precision = Precision.AUTO,
    max_item_tokens: options.MaxItemTokens = None,
    on_long: options.OnLong = OnLong.TRUNCATE,
    split: options.Split = None,
    overlap: options.Overlap = 0,
    split_by: options.SplitBy = SplitBy.PARAGRAPH,
    title: options.Title = None,
    max_rejects: Annotated[
        str,
        typer.Option(metavar="N|P%", help="Fail a sync with more rejects. Default: 10% from 100 rows on."),
    ] = "",
    into: Annotated[
        str | None, typer.Option(metavar="TABLE", help="Keep the vectors in this empty table of yours, too.")
    ] = None,
    hnsw: Annotated[bool, typer.Option("--hnsw", help="With --into: index its vectors.")] = False,
    folder: Annotated[
        str | None,
        typer.Option(
            "--output",
            metavar="URI",
            help="Write them as Parquet to this empty folder, too: all, then what each sync changes.",
        ),
    ] = None,
    no_reuse: options.NoReuse = False,
    expect_every: Annotated[
        str | None, typer.Option(metavar="SPAN", help="Call it stale this long after its last sync: 24h, 7d.")
    ] = None,
    workspace: options.Workspace = DEFAULT_WORKSPACE,
) -> None:
    """Create an empty collection, and the view that shows its vectors. Syncs fill it.

    Examples:

        vectormill collections create tickets --model all-MiniLM-L6-v2 --text "{subject}\\n\\n{body}" --carry lang

        vectormill collections create docs --model all-MiniLM-L6-v2 --split 256 --expect-every 24h

        vectormill collections create lake --model all-MiniLM-L6-v2 --output s3://vectors/lake
    """
    wish = {
        "text_column": text_column,
        "text": text,
        "key_column": key_column,
        "carry": carry or [],
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
        "into": into,
        "hnsw": hnsw,
        "output": folder and absolute(folder),
        "reuse": not no_reuse,
    }
    every = None if expect_every is None else read_span("--expect-every", expect_every)
    with open_backend(workspace) as backend:
        made = backend.create_collection(name, model, read_fields(JobOptions, wish), every)
    output.stderr.print(f"Collection {name} made. Fill it: vectormill sync {name} SOURCE", markup=False)
    output.stderr.print(f"Its vectors are in the view {made.view}, made by {made.model}.", markup=False)


@app.command("list")
def list_collections(as_json: options.Json = False, workspace: options.Workspace = DEFAULT_WORKSPACE) -> None:
    """List collections with their size and age.

    Example: vectormill collections list --json
    """
    with open_backend(workspace) as backend:
        rows = backend.collections()
    if as_json:
        output.print_json([row.model_dump(mode="json") for row in rows])
        return
    if not rows:
        output.stderr.print("No collections yet. Make one: vectormill collections create NAME --model MODEL")
        return
    output.print_list(
        [
            Column("name", flexible=True),
            Column("model", flexible=True),
            Column("keys", right=True),
            Column("synced"),
        ],
        [[Text(row.name, "bold"), row.model, f"{row.keys:,}", _freshness(row)] for row in rows],
    )


def _freshness(row: CollectionStatus) -> Text:
    if row.running:
        return Text("▸ syncing", "blue")
    told = output.age(row.synced_at) if row.synced_at else "never"
    return Text(f"‖ {told}, stale", "yellow") if row.stale_seconds else Text(told)


@app.command()
def show(name: Name, as_json: options.Json = False, workspace: options.Workspace = DEFAULT_WORKSPACE) -> None:
    """Show a collection: its model, options, size and last sync.

    Example: vectormill collections show tickets
    """
    with open_backend(workspace) as backend:
        row = backend.collection(name)
    if as_json:
        output.print_json(row.model_dump(mode="json"))
        return
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bright_black")
    table.add_row("name", Text(row.name, style="bold"))
    table.add_row("model", Text(f"{row.model}, {row.dimensions:,} dimensions"))
    table.add_row("keys", f"{row.keys:,}")
    table.add_row("view", Text(row.view))
    if row.output:
        table.add_row("files", _files(row.output))
    table.add_row("synced", _freshness(row))
    if row.expect_every_seconds:
        table.add_row("expected", f"every {humanize.duration(row.expect_every_seconds)}")
    if row.running:
        table.add_row("running", f"job {row.running}")
    for version in row.versions:
        table.add_row(version.state, _version(version))
    for option, value in row.options.items():
        table.add_row(option.replace("_", " "), Text(_shown(value)))
    output.stdout.print(table)


def _version(version: VersionStatus) -> Text:
    told = [f"{version.model}, {version.dimensions:,} dimensions", f"{version.keys:,} keys"]
    if version.running:
        told.append(f"filled by job {version.running}")
    elif version.differs:
        told.append(version.differs)
    if version.kept_until:
        told.append(f"kept until {version.kept_until:%Y-%m-%d %H:%M}")
    if version.output:
        told.append(f"files in {version.output.uri}")
    return Text("; ".join(told))


def _files(files: FilesStatus) -> Text:
    told = f"{files.uri}: version {files.version}, {files.files:,} files, {humanize.size(files.bytes)}"
    if files.problem:
        return Text(f"{told}; not written: {files.problem}", "yellow")
    return Text(f"{told}; changes are being written" if files.behind else told)


def _shown(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, Sequence) and not isinstance(value, str) else repr(value)


@app.command()
def history(
    name: Name,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="How many, newest first.")] = 20,
    as_json: options.Json = False,
    workspace: options.Workspace = DEFAULT_WORKSPACE,
) -> None:
    """List a collection's syncs, newest first, with what each changed.

    Example: vectormill collections history tickets
    """
    with open_backend(workspace) as backend:
        rows = backend.history(name, limit)
    if as_json:
        output.print_json([row.model_dump(mode="json") for row in rows])
        return
    if not rows:
        output.stderr.print(f"No syncs yet. Begin: vectormill sync {name} SOURCE", markup=False)
        return
    several = len({row.model for row in rows}) > 1
    output.print_list(
        [
            Column("job"),
            Column("state", flexible=True),
            *(Column(name, right=True) for name in ("new", "changed", "unchanged", "removed", "rejected")),
            Column("took", right=True, from_width=100),
            Column("age", right=True),
            *([Column("model", flexible=True, from_width=100)] if several else []),
        ],
        [
            [
                output.short(row.job_id),
                output.state(row.state) if row.state else Text("purged", "bright_black"),
                *map(_count, (row.added, row.changed, row.unchanged, row.removed, row.rejected)),
                humanize.duration(row.seconds),
                output.age(row.created_at, humanize.about),
                *([row.model or "?"] if several else []),
            ]
            for row in rows
        ],
    )


def _count(count: int) -> str:
    return humanize.short(count) if count >= 1_000_000 else f"{count:,}"


@app.command()
def upgrade(
    name: Name,
    *,
    model: Annotated[str | None, typer.Option(help="The model of the next version: name or alias.")] = None,
    dimensions: options.Dimensions = None,
    into: Annotated[
        str | None, typer.Option(metavar="TABLE", help="The version's own table of yours, if the current one has one.")
    ] = None,
    folder: Annotated[
        str | None,
        typer.Option("--output", metavar="URI", help="The version's own empty folder, if the current one has one."),
    ] = None,
    abandon: Annotated[bool, typer.Option("--abandon", help="Let the next version go instead.")] = False,
    workspace: options.Workspace = DEFAULT_WORKSPACE,
) -> None:
    """Begin a next version with another model, beside the one that readers see. The next whole sync fills it.

    Example: vectormill collections upgrade tickets --model bge-small-en-v1.5
    """
    if abandon == (model is not None):
        raise UserError("give either --model, or --abandon.")
    with open_backend(workspace) as backend:
        if model is None:
            backend.abandon_upgrade(name)
            output.stderr.print(f"The next version of {name} goes.", markup=False)
            return
        place = folder and absolute(folder)
        versions = backend.upgrade_collection(name, model, dimensions, into, place).versions
    made = next(each for each in versions if each.state is VersionState.NEXT)
    output.stderr.print(
        f"Next version: {made.model}, {made.dimensions:,} dimensions. "
        f"The next whole sync fills it beside the current version: vectormill sync {name} SOURCE\n"
        f"Then look at it, and give it to readers: vectormill collections swap {name}",
        markup=False,
    )


@app.command()
def swap(
    name: Name,
    *,
    gold: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help='Lines {"query": …, "keys": […]}: how much of it both versions find.'),
    ] = None,
    keep: Annotated[str | None, typer.Option(metavar="SPAN", help="How long it can be undone. Default: 7d.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Don't ask.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the comparison as JSON; swap only with --yes.")
    ] = False,
    workspace: options.Workspace = DEFAULT_WORKSPACE,
) -> None:
    """Compare the next version with the current one, and give it to readers: view, searches, and /v1/embeddings.

    Example: vectormill collections swap tickets --gold gold.jsonl
    """
    from pipeline.cli.gold import read_gold, recall  # which import what runs a model here

    kept = None if keep is None else read_span("--keep", keep)
    wanted = read_gold(gold) if gold else []
    with open_backend(workspace) as backend:
        following = next((each for each in backend.collection(name).versions if each.state is VersionState.NEXT), None)
        if following and following.differs:
            output.tell([f"the next version isn't ready yet: {following.differs}"])
        compared = backend.compare_versions(name)
        found = {
            version: recall(backend, name, version, wanted, workspace)
            for version in (VersionState.CURRENT, VersionState.NEXT)
            if wanted
        }
        if as_json:
            recalls = {"recall_at_10": {version.value: share for version, share in found.items()}} if wanted else {}
            output.print_json(compared.model_dump(mode="json") | recalls)
        else:
            output.stderr.print(_comparison(compared, found))
        if not yes:
            if as_json:
                return
            if following and not following.differs:  # otherwise it is refused
                typer.confirm("Give the next version to readers?", abort=True, err=True)
        row = backend.swap(name, kept)
    until = next(each.kept_until for each in row.versions if each.kept_until)
    output.stderr.print(
        f"Readers of {name} see the vectors of {row.model}. "
        f"Until {until:%Y-%m-%d %H:%M} this can be undone: vectormill collections swap-back {name}",
        markup=False,
    )


def _comparison(compared: Comparison, recalls: Mapping[VersionState, float]) -> Table:
    table = Table(box=None, padding=(0, 3, 0, 0), header_style="bright_black")
    table.add_column("")
    table.add_column("current", justify="right")
    table.add_column("next", justify="right")
    table.add_row("model", Text(compared.model), Text(compared.next_model))
    table.add_row("keys", f"{compared.keys:,}", f"{compared.next_keys:,}")
    cost = "" if compared.cost is None else f", {compared.cost:,.2f}"
    table.add_row("tokens, cost" if cost else "tokens", "", f"{compared.tokens:,}{cost}")
    if recalls:
        shares = (f"{recalls[version]:.0%}" for version in (VersionState.CURRENT, VersionState.NEXT))
        table.add_row("recall at 10", *shares)
    if compared.overlap_at_10 is not None:
        table.add_row(f"overlap at 10 of {compared.sampled} keys", "", f"{compared.overlap_at_10:.0%}")
    return table


@app.command("swap-back")
def swap_back(
    name: Name,
    yes: Annotated[bool, typer.Option("--yes", help="Don't ask.")] = False,
    workspace: options.Workspace = DEFAULT_WORKSPACE,
) -> None:
    """Undo a swap: readers see the previous version again, and the current one becomes the next.

    Example: vectormill collections swap-back tickets --yes
    """
    with open_backend(workspace) as backend:
        versions = backend.collection(name).versions
        before = next((version for version in versions if version.state is VersionState.PREVIOUS), None)
        if before and before.differs:
            output.tell([f"the previous version lacks something: {before.differs}; sync the collection afterwards"])
        if before and not yes:
            typer.confirm(f"Give the vectors of {before.model} to readers again?", abort=True, err=True)
        row = backend.swap_back(name)
    output.stderr.print(f"Readers of {name} see the vectors of {row.model} again.", markup=False)


@app.command()
def compact(name: Name, workspace: options.Workspace = DEFAULT_WORKSPACE) -> None:
    """Write a collection's Parquet files anew, as one full set without what later ones replace. Earlier sets go.

    Example: vectormill collections compact tickets
    """
    with open_backend(workspace) as backend:
        backend.compact(name)
    output.stderr.print(f"The files of {name} are being written anew: vectormill collections show {name}", markup=False)


@app.command()
def drop(
    name: Name,
    yes: Annotated[bool, typer.Option("--yes", help="Don't ask.")] = False,
    workspace: options.Workspace = DEFAULT_WORKSPACE,
) -> None:
    """Drop a collection with its view, vectors and history. Its jobs stay.

    Example: vectormill collections drop tickets --yes
    """
    with open_backend(workspace) as backend:
        row = backend.collection(name)
        if not yes:
            typer.confirm(f"The collection {name} has {row.keys:,} keys. Drop it?", abort=True, err=True)
        backend.drop_collection(name)
    output.stderr.print(f"Collection {name} dropped.", markup=False)
