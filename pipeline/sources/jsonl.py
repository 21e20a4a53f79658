"""JSON lines reader: one object per line."""

import json
from collections.abc import Iterator
from typing import Final

import orjson

from pipeline.core.errors import SourceError
from pipeline.core.exact_json import NoNumberError, decode, may_be_inexact
from pipeline.core.options import Columns
from pipeline.sources.decode import whole_lines
from pipeline.sources.validation import (
    BLOCK_ROWS,
    BadRow,
    LongLine,
    Notices,
    Parsed,
    missing_column,
    skipped,
    text_of,
    title_of,
    without_key,
)

#: A column that is missing in all of a file's first rows is a wrong name, not a fault of the rows.
HEAD_ROWS: Final = 1_000


def read_jsonl(
    blocks: Iterator[bytes], name: str, columns: Columns, item_bytes: int, notices: Notices
) -> Iterator[Parsed]:
    """Yield the rows of JSON lines; empty lines are skipped.

    Raises:
        SourceError: a line isn't a JSON object, or no row among the first has a required column.
    """
    watch = _ColumnWatch(name, columns, notices)
    for run in whole_lines(_no_array(blocks, name), name, line_bytes(item_bytes)):
        if isinstance(run, LongLine):
            if not run.blank:
                yield skipped(run, columns)
            continue
        first, data = run
        lines = data.split(b"\n")
        watch.look(first, lines)
        for start in range(0, len(lines), BLOCK_ROWS):
            yield _parse(lines[start : start + BLOCK_ROWS], first + start, name, columns)
    watch.end()


def check_columns(blocks: Iterator[bytes], name: str, columns: Columns, item_bytes: int, notices: Notices) -> None:
    """Look for the columns among a file's first rows.

    Raises:
        SourceError: a line there isn't a JSON object, or none has a required column.
    """
    watch = _ColumnWatch(name, columns, notices)
    for run in whole_lines(_no_array(blocks, name), name, line_bytes(item_bytes)):
        if not isinstance(run, LongLine):
            watch.look(run[0], run[1].split(b"\n"))
        if watch.content:
            return
    watch.end()


def read_part(
    blocks: Iterator[bytes], name: str, columns: Columns, item_bytes: int, first_line: int
) -> Iterator[Parsed]:
    """Yield the rows of a part of a file that holds whole lines. A line that isn't a JSON object becomes a `BadRow`."""
    for run in whole_lines(blocks, name, line_bytes(item_bytes)):
        if isinstance(run, LongLine):
            if not run.blank:
                yield skipped(run._replace(number=run.number + first_line - 1), columns)
            continue
        lines = run[1].split(b"\n")
        for start in range(0, len(lines), BLOCK_ROWS):
            first = first_line + run[0] - 1 + start
            yield _parse(lines[start : start + BLOCK_ROWS], first, name, columns, bad_rows=True)


def line_bytes(item_bytes: int) -> int:
    """Return the longest line that is read, in bytes."""
    # An escaped character takes up to six times its bytes; the rest is for the other columns.
    return item_bytes * 6 + 1024 * 1024


def _no_array(blocks: Iterator[bytes], name: str) -> Iterator[bytes]:
    first = next(blocks, b"")
    if first.lstrip()[:1] == b"[":
        raise SourceError(f"{name}: a JSON array, not JSON lines; write each object on a line of its own.")
    yield first
    yield from blocks


def _parse(lines: list[bytes], first: int, name: str, columns: Columns, *, bad_rows: bool = False) -> Parsed:
    numbers: list[int] = []
    texts: list[object] = []
    keys: list[object] = []
    carried: list[dict[str, object]] = []
    titles: list[object] = []
    loads, text_column, key_column, carry = orjson.loads, columns.text, columns.key, columns.carry
    plain, entitled, exact = columns.template is None, columns.title is not None, (*carry, *columns.composed)
    # The hot loop of most corpora: names are bound locally, and unusual rows leave by an exception.
    for number, line in enumerate(lines, first):
        try:
            row = loads(line)
            text = row[text_column] if plain else text_of(columns, row)
            key = row.get(key_column)
            if type(key) is float or key == 0 or (exact and any(may_be_inexact(row.get(column)) for column in exact)):
                raise ValueError("to be read exactly")
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            found = object_or_fault(line, name, number) if bad_rows else _object(line, name, number)
            if found is None:
                continue
            row = {} if isinstance(found, BadRow) else found
            text = found if isinstance(found, BadRow) else text_of(columns, row)
            key = row.get(key_column)
        numbers.append(number)
        texts.append(text)
        keys.append(key)
        if carry:
            carried.append({column: row.get(column) for column in carry})
        if entitled:
            titles.append(title_of(columns, row))
    return Parsed(numbers, texts, keys, carried if carry else None, titles if entitled else None)


def _object(line: bytes, name: str, number: int) -> dict[str, object] | None:
    """Parse a line slowly and exactly: return its object, or `None` if the line is empty.

    Raises:
        SourceError: the line isn't JSON, or isn't an object.
    """
    if not line or line.isspace():
        return None
    place = f"{name} line {number:,}"
    try:
        row = _decode(line)
    except json.JSONDecodeError as error:
        if line.strip() == b"{":
            raise SourceError(f"{place}: an object that goes on over the next lines; write each on one line.") from None
        fault = error.msg[0].lower() + error.msg[1:].removesuffix(" at")
        raise SourceError(f"{place}: not valid JSON ({fault} at column {error.colno:,}).") from None
    except RecursionError:
        raise SourceError(f"{place}: not valid JSON (nested too deeply).") from None
    except NoNumberError as error:
        raise SourceError(f"{place}: not valid JSON ({error} is no JSON; write null).") from None
    if not isinstance(row, dict):
        raise SourceError(f"{place}: not a JSON object; write one object per line.")
    return row


def object_or_fault(line: bytes, name: str, number: int) -> dict[str, object] | BadRow | None:
    """Return a line's object, or its fault as a `BadRow`; `None` for an empty line."""
    try:
        return _object(line, name, number)
    except SourceError as error:
        return BadRow(str(error).removeprefix(f"{name} line {number:,}: ").removesuffix("."))


def _decode(line: bytes) -> dict[str, object]:
    """Parse a line slowly but exactly, with surrogates for invalid UTF-8."""
    row: dict[str, object] = decode(line.decode("utf-8", "surrogateescape"))
    return row


class _ColumnWatch:
    """Check that tells a misnamed column from rows that merely lack the column."""

    def __init__(self, name: str, columns: Columns, notices: Notices) -> None:
        self._name = name
        self._key = columns.key
        self._unseen = list(columns.required)
        self._keyless = not columns.key_required
        self._notices = notices
        self._left = HEAD_ROWS
        self._first_row: tuple[int, dict[str, object]] | None = None

    @property
    def content(self) -> bool:
        """True if no further row can change the result."""
        return not (self._unseen or self._keyless) or not self._left

    def look(self, first: int, lines: list[bytes]) -> None:
        """Note which columns the next lines have, as long as they are among the file's first rows."""
        for number, line in enumerate(lines, first):
            if self.content:
                return
            row = _object(line, self._name, number)
            if row is None:
                continue
            self._first_row = self._first_row or (number, row)
            self._unseen = [(option, column) for option, column in self._unseen if column not in row]
            self._keyless = self._keyless and self._key not in row
            self._left -= 1
            if not self._left:
                self.end()

    def end(self) -> None:
        """Raise `SourceError` if all rows so far lack a required column; add a notice if they lack an optional key."""
        if not self._first_row:
            return
        number, row = self._first_row
        if not self._unseen:
            if self._keyless:
                self._notices.add("no key", without_key(f"{self._name} line {number:,}", self._key, row))
            self._keyless = False
            return
        candidates = [name for name, value in row.items() if isinstance(value, str) and name != self._key]
        place = f"{self._name} line {number:,}"
        raise missing_column(place, *self._unseen[0], row, candidates)
