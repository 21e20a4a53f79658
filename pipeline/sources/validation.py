"""Validation of rows, the same for every format: blocks of rows, and the one function that judges them."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, Final, NamedTuple

import orjson

from pipeline.core import exact_json, template
from pipeline.core.chunks import RejectCode
from pipeline.core.errors import SourceError
from pipeline.core.options import Columns
from pipeline.core.template import Template
from pipeline.sources.values import KEY_BYTES, BadKeyError, NotScalarError, as_key, kind_of, scalar

#: The most rows in a block.
BLOCK_ROWS: Final = 5_000
#: Approximate limit on the text in a block; one item may exceed it.
BLOCK_BYTES: Final = 8 * 1024 * 1024

#: A longer text isn't made of several columns, since no limit of texts would let it pass.
_MOST_CHARACTERS: Final = 64 * 1024 * 1024
_SHOWN_COLUMNS = 20
_SHOWN_LETTERS = 40
_ESCAPED_NUL = re.compile(rb"(?<!\\)(?:\\\\)*\\u0000")
#: Postgres accepts numbers of 131,072 digits; nobody writes such, and each would have to be held in memory.
_MOST_DIGITS, _MOST_EXPONENT_DIGITS = 1_000, 3


@dataclass(frozen=True, slots=True)
class Rows:
    """Block of consecutive validated rows of the corpus: at most 5,000, and about 8 MiB."""

    keys: list[str | None]
    #: UTF-8; `None` where the row is rejected.
    texts: list[bytes | None]
    #: Position in this block, code and message of each rejected row, in order. Never includes its text.
    problems: list[tuple[int, RejectCode, str]]
    #: JSON object per row; `None` unless the job carries columns.
    carried: list[bytes] | None
    #: UTF-8, empty where the row is rejected; `None` unless passages get titles.
    titles: list[bytes] | None = None

    def blank(self, at: int) -> None:
        """Empty a row, key and carried columns too."""
        self.keys[at] = self.texts[at] = None
        if self.carried is not None:
            self.carried[at] = b"null"
        if self.titles is not None:
            self.titles[at] = b""


@dataclass(frozen=True, slots=True)
class Parsed:
    """Rows as a format parses them, before validation. Invalid UTF-8 is held as surrogates."""

    #: Line or row numbers in the file, from 1.
    numbers: Sequence[int]
    texts: Sequence[object]
    keys: Sequence[object]
    carried: Sequence[dict[str, object]] | None
    titles: Sequence[object] | None = None


class Notices:
    """Notices about a corpus, though nothing is refused: the first lines of each kind, and a count of the others."""

    _MOST = 3

    def __init__(self) -> None:
        self._found: dict[str, list[str]] = {}
        self._more: Counter[str] = Counter()

    def add(self, kind: str, line: str) -> None:
        """Add a line, which must not quote a text."""
        lines = self._found.setdefault(kind, [])
        if len(lines) < self._MOST:
            lines.append(line)
        else:
            self._more[kind] += 1

    def __contains__(self, kind: str) -> bool:
        return kind in self._found

    def lines(self) -> list[str]:
        """Return all notices, in order."""
        found: list[str] = []
        for kind, lines in self._found.items():
            found += lines
            if more := self._more[kind]:
                found[-1] += f" There are {more:,} more like this."
        return found


class Missing:
    """Placeholder for the text of a row that has no such column."""


class LongLine(NamedTuple):
    """Placeholder for a line that was skipped because it is longer than the limit."""

    number: int
    size_bytes: int
    bound_bytes: int
    #: Number of its quotes, and True if it is only white space.
    quotes: int
    blank: bool


class BadRow(NamedTuple):
    """Placeholder for the text of a row that can't be read."""

    fault: str
    code: RejectCode = RejectCode.BAD_ROW


def skipped(line: LongLine, columns: Columns) -> Parsed:
    """Return the row that stands for a skipped line."""
    return Parsed([line.number], [line], [None], [{}] if columns.carry else None, [""] if columns.title else None)


def text_of(columns: Columns, row: Mapping[str, object]) -> object:
    """Return the text of a row, or what stands for it until `judge` rejects it."""
    if columns.template is None:
        return row.get(columns.text, Missing)
    return _composed(template.parse(columns.template), row)


def title_of(columns: Columns, row: Mapping[str, object]) -> object:
    """Return the title of a row, or what stands for it until `judge` rejects the row."""
    title = _composed(template.parse(columns.title), row) if columns.title else None
    return title or ""  # a row whose title is null has none


def compose(columns: Columns, rows: Sequence[Mapping[str, object]]) -> tuple[list[object], list[object] | None]:
    """Return the texts of rows, and their titles where passages get any."""
    titles = [title_of(columns, row) for row in rows] if columns.title else None
    return [text_of(columns, row) for row in rows], titles


def _composed(made: Template, row: Mapping[str, object]) -> object:
    """Fill a template with a row's values, null as empty; return `None` if all are null, a `BadRow` if one can't be
    written as text."""
    values = []
    for column in made.fields:
        value = row.get(column)
        try:
            values.append(value if type(value) is str else "" if value is None else scalar(value))
        except NotScalarError as error:
            return BadRow(f'column "{shown(column)}" is {error}', RejectCode.NOT_A_STRING)
    if (size := sum(map(len, values))) > _MOST_CHARACTERS:
        message = f"made of its columns it has {size:,} characters; at most {_MOST_CHARACTERS:,} are composed"
        return BadRow(message, RejectCode.TOO_LARGE)
    return made.fill(values) if any(row.get(column) is not None for column in made.fields) else None


class _OverlongNumberError(Exception):
    """A number is longer than we let Postgres keep."""


def judge(parsed: Parsed, item_bytes: int, place: str) -> Rows:
    """Validate rows: separate the good ones from the bad ones.

    Args:
        parsed: the rows.
        item_bytes: the longest text in bytes; a longer one is rejected.
        place: the prefix of a row's number in messages, such as `line `.
    """
    keys: list[str | None] = []
    texts: list[bytes | None] = []
    problems: list[tuple[int, RejectCode, str]] = []
    # Every row of every corpus passes here, so good rows take only calls of built-ins.
    for text, key in zip(parsed.texts, parsed.keys, strict=True):
        try:
            if type(key) is int:
                key = str(key)
            elif key is not None and not (
                type(key) is str and len(key) <= KEY_BYTES and key.isascii() and "\0" not in key
            ):
                key = as_key(key)
            data = text.encode()  # type: ignore[attr-defined]
            if 0 < len(data) <= item_bytes and b"\0" not in data and not text.isspace():  # type: ignore[attr-defined]
                keys.append(key)
                texts.append(data)
                continue
        except (AttributeError, UnicodeEncodeError, BadKeyError):
            pass
        at = len(keys)
        kept, (code, message) = _problem(text, key, item_bytes)
        problems.append((at, code, f"{place}{parsed.numbers[at]:,}: {message}"))
        keys.append(kept)
        texts.append(None)
    carried = titles = None
    if parsed.carried is not None:
        carried = _carry(parsed, texts, problems, place)
    if parsed.titles is not None:  # last, so that no rejected row has one
        titles = _titles(parsed, texts, problems, item_bytes, place)
    return Rows(keys, texts, problems, carried, titles)


def _problem(text: object, key: object, item_bytes: int) -> tuple[str | None, tuple[RejectCode, str]]:
    """Return the key to keep of a row that failed the fast test, and the row's fault; the text's fault comes first."""
    try:
        kept, fault = as_key(key), None
    except BadKeyError as error:
        kept, fault = None, (RejectCode.BAD_KEY, str(error))
    found = _text_problem(text, item_bytes) or fault
    assert found is not None, "only a row with a fault comes here"
    return kept, found


def _text_problem(text: object, item_bytes: int) -> tuple[RejectCode, str] | None:
    if isinstance(text, LongLine):
        return RejectCode.TOO_LARGE, (f"the line has {text.size_bytes:,} bytes; at most {text.bound_bytes:,} are read")
    if isinstance(text, BadRow):
        return text.code, text.fault
    if text is Missing:
        return RejectCode.MISSING_TEXT, "text is missing"
    if text is None:
        return RejectCode.MISSING_TEXT, "text is null"
    if not isinstance(text, str):
        return RejectCode.NOT_A_STRING, f"text is {kind_of(text)}, not a string"
    return _string_problem(text, item_bytes)


def _string_problem(text: str, item_bytes: int) -> tuple[RejectCode, str] | None:
    if not text:
        return RejectCode.EMPTY_TEXT, "text is empty"
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        return RejectCode.INVALID_UTF8, "text is not valid UTF-8"
    if size > item_bytes:
        return RejectCode.TOO_LARGE, f"text has {size:,} bytes; at most {item_bytes:,} are allowed"
    if "\0" in text:
        return RejectCode.NUL_CHARACTER, "text contains a NUL character"
    if text.isspace():
        return RejectCode.EMPTY_TEXT, "text is only white space"
    return None


def _titles(
    parsed: Parsed,
    texts: list[bytes | None],
    problems: list[tuple[int, RejectCode, str]],
    item_bytes: int,
    place: str,
) -> list[bytes]:
    """Return the titles; a row with a bad one becomes a reject."""
    assert parsed.titles is not None
    titles: list[bytes] = []
    for at, title in enumerate(parsed.titles):
        found = (_text_problem(title, item_bytes) if title else None) if texts[at] is not None else None
        if found and found[0] is not RejectCode.EMPTY_TEXT:
            texts[at] = None
            told = found[1] if isinstance(title, BadRow) else found[1].replace("text", "title", 1)
            problems.append((at, found[0], f"{place}{parsed.numbers[at]:,}: {told}"))
        titles.append(title.encode() if texts[at] is not None and isinstance(title, str) else b"")
    problems.sort(key=itemgetter(0))
    return titles


def _carry(
    parsed: Parsed, texts: list[bytes | None], problems: list[tuple[int, RejectCode, str]], place: str
) -> list[bytes]:
    """Return the carried columns as JSON; a row whose columns Postgres couldn't hold becomes a reject."""
    assert parsed.carried is not None
    carried: list[bytes] = []
    for at, row in enumerate(parsed.carried):
        found = None
        try:
            encoded = _to_json(row)
        except TypeError as error:
            encoded, found = b"{}", (RejectCode.INVALID_UTF8, "a carried column is not valid UTF-8")
            if isinstance(error.__cause__, _OverlongNumberError):
                found = (RejectCode.BAD_ROW, "a carried column holds a number that is too long")
        if b"\\u0000" in encoded and _ESCAPED_NUL.search(encoded):
            encoded, found = b"{}", (RejectCode.NUL_CHARACTER, "a carried column contains a NUL character")
        if found and texts[at] is not None:
            texts[at] = None
            problems.append((at, found[0], f"{place}{parsed.numbers[at]:,}: {found[1]}"))
        carried.append(encoded)
    problems.sort(key=itemgetter(0))
    return carried


def _to_json(row: dict[str, object]) -> bytes:
    """Serialise a row; raise `TypeError` for surrogates, or, caused by `_OverlongNumberError`, an overlong number."""
    return orjson.dumps(row, default=_bounded)


def _bounded(value: Any) -> orjson.Fragment:
    if isinstance(value, exact_json.Number):
        exponent = value.digits.lower().partition("e")[2].lstrip("+-0")
        if len(value.digits) > _MOST_DIGITS or len(exponent) > _MOST_EXPONENT_DIGITS:
            raise _OverlongNumberError
    return exact_json.as_it_stands(value)


def missing_column(place: str, field: str, column: str, names: Iterable[str], candidates: Sequence[str]) -> SourceError:
    """Return the error for a missing column: it lists the existing ones, and suggests a fix.

    Args:
        place: the file, and the line where there is one.
        field: the option that names the column.
        column: the column that is missing.
        names: the existing columns.
        candidates: the columns that could be meant; a single one is suggested.
    """
    names = list(names)
    near = _differing_in_case(column, names)
    sure = candidates if not near and field == "text_column" else near
    mend = f'Name "{shown(sure[0])}".' if len(sure) == 1 else "Name another."
    return SourceError(f'{place}: no column "{shown(column)}"; {_listed(names)}. {mend}', field=field)


def without_key(place: str, column: str, names: Iterable[str]) -> str:
    """Return the notice for a corpus without the optional key column: it lists the existing columns."""
    names = list(names)
    near = _differing_in_case(column, names)
    told = f'{place}: no column "{shown(column)}", so these items have no key'
    holds = f'"{shown(near[0])}"' if len(near) == 1 else "one"
    return f"{told}; {_listed(names)}. If {holds} holds keys, name it as the key column."


def _differing_in_case(column: str, names: Sequence[str]) -> list[str]:
    """Return the columns that differ from this one only in case or surrounding white space."""
    return [name for name in names if name.strip().casefold() == column.strip().casefold()]


def _listed(names: Sequence[str]) -> str:
    listed = [shown(name) for name in names]
    if len(listed) > _SHOWN_COLUMNS:
        listed[_SHOWN_COLUMNS:] = [f"and {len(listed) - _SHOWN_COLUMNS:,} more"]
    return f"columns are {', '.join(listed)}" if listed else "there is none at all"


def shown(name: str) -> str:
    """Return a column's name as a message shows it: printable, and truncated if it is long."""
    printable = "".join(letter if letter.isprintable() else "\ufffd" for letter in name)
    return printable if len(printable) <= _SHOWN_LETTERS else printable[:_SHOWN_LETTERS] + "…"
