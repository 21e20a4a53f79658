"""CSV and TSV with a header line."""

import csv
import io
from collections.abc import Iterator

from pipeline.errors import SourceError
from pipeline.sources.open import whole_lines
from pipeline.sources.rows import BLOCK_BYTES, BLOCK_ROWS, Columns, LongLine, Parsed, missing_column, shown

_MIB = 1024 * 1024


class _Endless(csv.Error):
    """A row goes on past anything that is held."""


def read_csv(
    blocks: Iterator[bytes],
    name: str,
    delimiter: str,
    columns: Columns,
    item_bytes: int,
    *,
    header: "Header | None" = None,
    first_line: int = 1,
) -> Iterator[Parsed]:
    """The rows of a CSV file; an empty line is no row, an empty key no key.

    Sets the process-wide `csv.field_size_limit`, in letters: `csv` has no other bound.

    Args:
        blocks: the file, or with a `header` whole rows of it.
        name: what messages call the file.
        delimiter: between fields.
        columns: the columns to read.
        item_bytes: a longer text is rejected.
        header: the file's header, if the rows come without.
        first_line: number of the first line of `blocks`.

    Raises:
        SourceError: the header lacks a required column or has one twice, or a row doesn't fit the header.
    """
    reader = _Reader(blocks, name, delimiter, _field_bytes(item_bytes), "utf-8", first_line)
    if header is None:
        header = Header(reader.row(), f"{name} line 1", columns)
    numbers: list[int] = []
    rows: list[list[str]] = []
    for number, row in reader.rows(header.width):
        numbers.append(number)
        rows.append(row)
        if len(rows) >= BLOCK_ROWS or reader.feed.held >= BLOCK_BYTES:
            yield header.parsed(numbers, rows)
            numbers, rows, reader.feed.held = [], [], 0
    if rows:
        yield header.parsed(numbers, rows)


def read_header(blocks: Iterator[bytes], name: str, delimiter: str, columns: Columns, item_bytes: int) -> "Header":
    """The header of a CSV file.

    Raises:
        SourceError: it lacks a required column or has one twice.
    """
    reader = _Reader(blocks, name, delimiter, _field_bytes(item_bytes), "utf-8", 1)
    return Header(reader.row(), f"{name} line 1", columns)


def csv_rows(
    blocks: Iterator[bytes], name: str, delimiter: str, width: int, item_bytes: int
) -> Iterator[tuple[int, int, int]]:
    """Where the rows below the header are: (first byte, bytes, line number).

    Raises:
        SourceError: a row doesn't have `width` fields, or can't be read.
    """
    # In Latin-1 each byte is a letter, and no letter of UTF-8 has a byte that means something to `csv`.
    reader = _Reader(blocks, name, delimiter, 4 * _field_bytes(item_bytes), "latin-1", 1)
    reader.row()
    start = reader.feed.given
    for number, _ in reader.rows(width):
        # Empty lines before the row belong to it: they are none when it is read.
        yield start, reader.feed.given - start, number
        start = reader.feed.given


def _field_bytes(item_bytes: int) -> int:
    return item_bytes * 4 + _MIB


class _Reader:
    """`csv`, and where it stands."""

    def __init__(
        self, blocks: Iterator[bytes], name: str, delimiter: str, field_bytes: int, encoding: str, first_line: int
    ) -> None:
        csv.field_size_limit(field_bytes)
        self.feed = _Feed(blocks, name, field_bytes * 4, encoding)
        self._reader = csv.reader(self.feed.lines(), delimiter=delimiter, strict=True)
        self._name = name
        self._field_bytes = field_bytes
        self._lines_before = first_line - 1
        self._number = first_line  # of the next row

    def row(self) -> list[str] | None:
        """The next row; `None` at the end."""
        self._number = self._lines_before + self._reader.line_num + 1
        self.feed.unclaimed = 0
        try:
            return next(self._reader, None)
        except csv.Error as error:
            fault = _fault(error, self._field_bytes)
            raise SourceError(f"{self._name} line {self._number:,}: {fault}") from None

    def rows(self, width: int) -> Iterator[tuple[int, list[str]]]:
        """The rows that are left, each with the number of its first line; `SourceError` where one has another width."""
        while (row := self.row()) is not None:
            if len(row) == width:
                yield self._number, row
            elif row:
                raise SourceError(_misfit(f"{self._name} line {self._number:,}", len(row), width))


class _Feed:
    """Gives `csv` its lines, and counts what it takes."""

    def __init__(self, blocks: Iterator[bytes], name: str, bound_bytes: int, encoding: str) -> None:
        self._runs = whole_lines(blocks, name, bound_bytes)
        self._bound_bytes = bound_bytes
        self._encoding = encoding
        #: Letters given since the last row, and since the last block of rows; the reader of rows resets both.
        self.unclaimed = 0
        self.held = 0
        #: Letters given.
        self.given = 0

    def lines(self) -> Iterator[str]:
        """Lines with their ends; invalid UTF-8 becomes surrogates."""
        for text in self._texts():
            for line in text:
                self.given += len(line)
                yield line

    def _texts(self) -> Iterator[io.StringIO]:
        for run in self._runs:
            if isinstance(run, LongLine) or self.unclaimed > self._bound_bytes:
                raise _Endless
            data = run[1] + b"\n"
            self.unclaimed += len(data)
            self.held += len(data)
            # Splits at CR, LF and CRLF as `csv` wants it, and nowhere else.
            yield io.StringIO(data.decode(self._encoding, "surrogateescape"), newline="")


class Header:
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
