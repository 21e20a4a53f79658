"""Texts to measure with, the same at every run on the same installation."""

from itertools import islice
from pathlib import Path

import orjson

from pipeline.cli.demo import docstrings

_WORDS = (
    *("amber", "basin", "cedar", "delta", "ember", "fjord", "grove", "heron", "inlet", "jetty", "kelp", "larch"),
    *("maple", "north", "orchid", "pebble", "quartz", "river", "slate", "tidal", "umber", "valley", "willow"),
)


def distinct_docstrings(count: int) -> list[str]:
    """Return the first `count` distinct docstrings of the installed packages."""
    texts = [text for _, text in islice(docstrings(), count)]
    assert len(texts) == count, f"only {len(texts):,} distinct docstrings are installed"
    return texts


def short_rows(count: int) -> list[tuple[str, str]]:
    """Return rows of a key and a text of 50 to 80 bytes, all distinct."""
    return [(f"row-{n}", f"{n} {' '.join(_WORDS[(n * step) % 23] for step in range(1, 10))}") for n in range(count)]


def write_rows(path: Path, rows: list[tuple[str, str]]) -> Path:
    """Write rows as JSON lines with `id` and `text`; return the path."""
    with path.open("wb") as file:
        file.writelines(orjson.dumps({"id": key, "text": text}) + b"\n" for key, text in rows)
    return path


def write_tiny_rows(path: Path, count: int) -> Path:
    """Write rows of a text alone, about 30 bytes a line, without holding them in memory; return the path."""
    with path.open("wb") as file:
        file.writelines(b'{"text":"the row of number %d"}\n' % n for n in range(count))
    return path
