"""CSV and TSV with a header line."""

import csv
import io
from collections.abc import Iterator
from itertools import chain

from pipeline.errors import SourceError
from pipeline.sources.open import whole_lines
from pipeline.sources.rows import BLOCK_BYTES, BLOCK_ROWS, Columns, LongLine, Parsed, missing_column, shown

_MIB = 1024 * 1024


class _Endless(csv.Error):
    """A row goes on past anything that is held."""


def read_csv(blocks: Iterator[bytes], name: str, delimiter: str, columns: Columns, item_bytes: int) -> Iterator[Parsed]:
    """The rows of a CSV file; an empty line is no row, an empty key no key.

    Sets the process-wide `csv.field_size_limit`, in letters: `csv` has no other bound.

    Raises:
        SourceError: the header lacks a required column or has one twice, or a row doesn't fit the header.
    """
    field_bytes = item_bytes * 4 + _MIB
    csv.field_size_limit(field_bytes)
    feed = _Feed(blocks, name, field_bytes * 4)
    reader = csv.reader(feed.lines(), delimiter=delimiter, strict=True)
    line = 0  # the last one of the row before
    numbers: list[int] = []
    rows: list[list[str]] = []
    try:
        header = next(reader, None)
        table = _Table(header, f"{name} line 1", columns)
        line = reader.line_num
        for row in reader:
            if len(row) == table.width:
                numbers.append(line + 1)
                rows.append(row)
            elif row:
                raise SourceError(_misfit(f"{name} line {line + 1:,}", len(row), table.width))
            line = reader.line_num
            feed.unclaimed = 0
            if len(rows) >= BLOCK_ROWS or feed.held >= BLOCK_BYTES:
                yield table.parsed(numbers, rows)
                numbers, rows, feed.held = [], [], 0
    except csv.Error as error:
        raise SourceError(f"{name} line {line + 1:,}: {_fault(error, field_bytes)}") from None
    if rows:
        yield table.parsed(numbers, rows)


class _Feed:
    """Gives `csv` its lines, and counts what it takes."""

    def __init__(self, blocks: Iterator[bytes], name: str, bound_bytes: int) -> None:
        self._runs = whole_lines(blocks, name, bound_bytes)
        self._bound_bytes = bound_bytes
        #: Bytes given since the last row, and since the last block of rows; the reader of rows resets both.
        self.unclaimed = 0
        self.held = 0

    def lines(self) -> Iterator[str]:
        """Lines with their ends; invalid UTF-8 becomes surrogates."""
        return chain.from_iterable(self._texts())

    def _texts(self) -> Iterator[io.StringIO]:
        for run in self._runs:
            if isinstance(run, LongLine) or self.unclaimed > self._bound_bytes:
                raise _Endless
            data = run[1] + b"\n"
            self.unclaimed += len(data)
            self.held += len(data)
            # Splits at CR, LF and CRLF as `csv` wants it, and nowhere else.
            yield io.StringIO(data.decode("utf-8", "surrogateescape"), newline="")


class _Table:
    """A header, and where in its rows the wanted columns stand."""

    def __init__(self, header: list[str] | None, place: str, columns: Columns) -> None:
        """Raise `SourceError` where the header can't be used."""
        if header is None or not any(header):
            raise SourceError(f"{place}: no header; name the columns there.")
        twice = next((column for column in header if header.count(column) > 1), None)
        if twice is not None:
            raise SourceError(f'{place}: the column "{shown(twice)}" stands twice in the header; rename one.')
        for option, column in columns.required:
            if column not in header:
                candidates = [name for name in header if name != columns.key]
                raise missing_column(place, option, column, header, candidates)
        self.width = len(header)
        self._text = header.index(columns.text)
        self._key = header.index(columns.key) if columns.key in header else None
        self._carry = {column: header.index(column) for column in columns.carry}

    def parsed(self, numbers: list[int], rows: list[list[str]]) -> Parsed:
        """The wanted columns of rows."""
        text, key, carry = self._text, self._key, self._carry
        return Parsed(
            numbers,
            [row[text] for row in rows],
            [None] * len(rows) if key is None else [row[key] or None for row in rows],
            [{column: row[at] for column, at in carry.items()} for row in rows] if carry else None,
        )


def _misfit(place: str, fields: int, width: int) -> str:
    return f"{place}: {fields:,} field{'s' if fields > 1 else ''} where the header has {width:,}."


def _fault(error: csv.Error, field_bytes: int) -> str:
    """What is wrong with the row, from the few words of `csv`."""
    if isinstance(error, _Endless) or "field limit" in str(error):
        return f"a field is longer than {field_bytes:,} letters; is a quote there never closed?"
    if "end of data" in str(error):
        return "a quote opened there is never closed."
    return 'a closing quote inside a field; write quotes within a field twice, as "".'
