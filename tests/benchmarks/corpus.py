"""Texts to measure with, the same at every run on the same installation."""

import re
from collections.abc import Iterable, Iterator
from importlib.metadata import distributions
from itertools import cycle, islice
from pathlib import Path
from pydoc_data.topics import topics

import orjson

from pipeline.cli.demo import docstrings

_WORDS = (
    *("amber", "basin", "cedar", "delta", "ember", "fjord", "grove", "heron", "inlet", "jetty", "kelp", "larch"),
    *("maple", "north", "orchid", "pebble", "quartz", "river", "slate", "tidal", "umber", "valley", "willow"),
)
#: Characters of a paragraph, and the share of letters and spaces, that make running text.
_PARAGRAPH, _LETTERS = 200, 0.85


def distinct_docstrings(count: int) -> list[str]:
    """Return the first `count` distinct docstrings of the installed packages."""
    texts = [text for _, text in islice(docstrings(), count)]
    assert len(texts) == count, f"only {len(texts):,} distinct docstrings are installed"
    return texts


def running_texts(least: int) -> list[str]:
    """Return all running texts, of one to four paragraphs, in Python's manual and the installed packages' descriptions
    of themselves. There are at least so many."""
    documents = [*topics.values(), *(body for _, body in sorted(_descriptions()))]
    texts = list(dict.fromkeys(text for document in documents for text in _grouped(_paragraphs(document))))
    assert len(texts) >= least, f"only {len(texts):,} running texts are installed"
    return texts


def _descriptions() -> Iterator[tuple[str, str]]:
    for package in distributions():
        _, _, body = (package.read_text("METADATA") or "").partition("\n\n")
        yield package.name, body


def _paragraphs(document: str) -> list[str]:
    """Return a document's paragraphs on one line each, without headings, code and tables."""
    paragraphs = (" ".join(block.split()) for block in re.split(r"\n\s*\n", document))
    return [text for text in paragraphs if len(text) >= _PARAGRAPH and _letters(text) >= _LETTERS * len(text)]


def _letters(text: str) -> int:
    return sum(sign.isalpha() or sign == " " for sign in text)


def _grouped(paragraphs: list[str]) -> Iterator[str]:
    left = iter(paragraphs)
    for size in cycle((1, 2, 3, 4)):
        group = list(islice(left, size))
        if not group:
            return
        yield "\n\n".join(group)


def short_rows(count: int) -> list[tuple[str, str]]:
    """Return rows of a key and a text of 50 to 80 bytes, all distinct."""
    return [(f"row-{n}", f"{n} {' '.join(_WORDS[(n * step) % 23] for step in range(1, 10))}") for n in range(count)]


def numbered_words(count: int) -> Iterator[tuple[str, str]]:
    """Yield rows of a key and a text of a few tokens, all distinct."""
    return ((f"row-{n}", f"{_WORDS[n % 23]} {n}") for n in range(count))


def numbered_docstrings(count: int) -> Iterator[tuple[str, str]]:
    """Yield rows of a key and a docstring, made distinct by a number."""
    texts = distinct_docstrings(3_000)
    return ((f"row-{n}", f"{n}: {texts[n % len(texts)]}") for n in range(count))


def write_rows(path: Path, rows: Iterable[tuple[str, str]]) -> Path:
    """Write rows as JSON lines with `id` and `text`; return the path."""
    with path.open("wb") as file:
        file.writelines(orjson.dumps({"id": key, "text": text}) + b"\n" for key, text in rows)
    return path


def write_tiny_rows(path: Path, count: int) -> Path:
    """Write rows of a text alone, about 30 bytes a line, without holding them in memory; return the path."""
    with path.open("wb") as file:
        file.writelines(b'{"text":"the row of number %d"}\n' % n for n in range(count))
    return path
