"""Times of five readers, each of whom does one thing by commands that the README and docs have, as they stand there.

    python -m tests.deployment.five_tasks

Each goes on where the one before stopped, in one folder with an `up` of its own. The time is the machine's, without
that of the installation; a reader's own is for reading.
"""

import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from time import perf_counter

import polars

from tests.deployment.reader import CHECKOUT, Block, Reader, blocks_of, reading

#: Path of the export in the guide's line of cron.
_EXPORT = "/srv/export/tickets.parquet"


def _under(document: str, *headings: str) -> Iterator[Block]:
    """Yield the blocks below these headings of a document."""
    found = [block for block in blocks_of(CHECKOUT / document) if block.heading in headings]
    assert found, f"{document} has no block below {headings}"
    yield from found


def _run(reader: Reader, document: str, *headings: str) -> None:
    for block in _under(document, *headings):
        if not block.mark:
            reader.run(block)
            reader.load_environment()


def _first_vectors(reader: Reader) -> None:
    _run(reader, "README.md", "Your own texts")


def _own_parquet(reader: Reader) -> None:
    _run(reader, "docs/how-to/texts.md", "One column, a template, passages")


def _nightly(reader: Reader) -> None:
    _run(reader, "docs/how-to/nightly.md", "A table in step, every night")
    (line,) = [block for block in blocks_of(CHECKOUT / "docs/how-to/nightly.md") if block.code.startswith("15 2 * * *")]
    export = reader.folder / "tickets.parquet"
    tickets = {"id": [1, 3], "subject": ["Refund", "Lieferung"], "body": ["It came.", "Danke!"], "lang": ["en", "de"]}
    polars.DataFrame(tickets).write_parquet(export)
    # As cron runs it, with the reader's own path.
    command = line.code.split(maxsplit=5)[5].replace("\\%", "%").replace(_EXPORT, str(export))
    reader.run(replace(line, code=command))


def _from_python(reader: Reader) -> None:
    _run(reader, "README.md", "A table that changes", "From Python")


def _compose(reader: Reader) -> None:
    blocks = [block for block in _under("docs/how-to/deploy.md", "Servers of your own") if block.mark == "docker"]
    shutil.copytree(CHECKOUT, reader.folder / "checkout", ignore=shutil.ignore_patterns(".*", "tests"))
    for block in blocks:
        done = subprocess.run(["bash", "-euc", block.code], cwd=reader.folder / "checkout", check=False)
        assert done.returncode == 0, block.where


def _has_compose() -> bool:
    docker = shutil.which("docker")
    return (
        docker is not None
        and subprocess.run([docker, "compose", "ls"], capture_output=True, check=False).returncode == 0
    )


_TASKS: dict[str, Callable[[Reader], None]] = {
    "first vectors, from `up` to a file of them": _first_vectors,
    "their own Parquet with two text columns": _own_parquet,
    "a nightly sync by cron": _nightly,
    "search from Python": _from_python,
    "deploy by compose": _compose,
}


def main() -> None:
    """Do all tasks in order, and print the time of each."""
    with reading() as reader:
        for name, task in _TASKS.items():
            if task is _compose and not _has_compose():
                print(f"{name:50}  not run: no Docker engine with compose answers here")
                continue
            begin = perf_counter()
            task(reader)
            print(f"{name:50}  {perf_counter() - begin:5.1f} s", flush=True)


if __name__ == "__main__":
    main()
