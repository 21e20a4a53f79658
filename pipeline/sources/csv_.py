"""CSV and TSV with a header line."""

import csv
import io
from collections.abc import Iterator

from pipeline.errors import SourceError
from pipeline.sources.open import whole_lines
from pipeline.sources.rows import (
    BLOCK_BYTES,
    BLOCK_ROWS,
    Columns,
    LongLine,
    Parsed,
    missing_column,
    shown,
    skipped,
)

_MIB = 1024 * 1024
_DIVIDERS = {"\t": "tabs", ";": "semicolons", "|": "bars", ",": "commas"}


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
    reader = _Reader(blocks, name, delimiter, item_bytes, first_line=first_line)
    header = header or reader.header(columns)
    feed = reader.feed
    numbers: list[int] = []
    rows: list[list[str]] = []
    block_start = feed.given
    for number, row in reader.rows(header.width):
        if isinstance(row, LongLine):
            if rows:
                yield header.parsed(numbers, rows)
            yield skipped(row._replace(number=number), columns)
        else:
            numbers.append(number)
            rows.append(row)
            if len(rows) < BLOCK_ROWS and feed.given - block_start < BLOCK_BYTES:
                continue
            yield header.parsed(numbers, rows)
        numbers, rows, block_start = [], [], feed.given
    if rows:
        yield header.parsed(numbers, rows)


def read_header(blocks: Iterator[bytes], name: str, delimiter: str, columns: Columns, item_bytes: int) -> "Header":
    """The header of a CSV file.

    Raises:
        SourceError: it lacks a required column or has one twice.
    """
    return _Reader(blocks, name, delimiter, item_bytes).header(columns)


def csv_rows(
    blocks: Iterator[bytes], name: str, delimiter: str, width: int, item_bytes: int
) -> Iterator[tuple[int, int, int]]:
    """Where the rows below the header are: (first byte, bytes, line number).

    Raises:
        SourceError: a row doesn't have `width` fields, or can't be read.
    """
    # In Latin-1 each byte is a letter, and no letter of UTF-8 has a byte that means something to `csv`.
    reader = _Reader(blocks, name, delimiter, item_bytes, encoding="latin-1")
    reader.row()
    for number, _ in reader.rows(width):
        yield reader.start, reader.feed.given - reader.start, number


class _Reader:
    """`csv`, and where it stands."""

    def __init__(
        self,
        blocks: Iterator[bytes],
        name: str,
        delimiter: str,
        item_bytes: int,
        *,
        encoding: str = "utf-8",
        first_line: int = 1,
    ) -> None:
        self._row_bytes = 4 * (item_bytes * 4 + _MIB)
        csv.field_size_limit(self._row_bytes)
        self.feed = _Feed(blocks, name, self._row_bytes, encoding)
        self._reader = csv.reader(self.feed.lines(), delimiter=delimiter, strict=True)
        self._name = name
        self._lines_before = first_line - 1
        self._number = first_line  # of the next row

    @property
    def start(self) -> int:
        """Letters before the row that came last."""
        return self.feed.row_start

    def header(self, columns: Columns) -> "Header":
        """The first row as a header; `SourceError` where it can't be used."""
        row = self.row()
        if self.feed.take_long():
            raise SourceError(f"{self._name} line 1: {_endless(self._row_bytes)}")
        return Header(row, f"{self._name} line 1", columns)

    def row(self) -> list[str] | None:
        """The next row; `None` at the end, empty for an empty line."""
        self._number = self._lines_before + self._reader.line_num + 1
        self.feed.row_start = self.feed.given
        try:
            return next(self._reader, None)
        except csv.Error as error:
            fault = _fault(error, self._row_bytes)
            raise SourceError(f"{self._name} line {self._number:,}: {fault}") from None

    def rows(self, width: int) -> Iterator[tuple[int, list[str] | LongLine]]:
        """The rows that are left, each with the number of its first line; `SourceError` where one has another width."""
        while (row := self.row()) is not None:
            if len(row) == width:
                yield self._number, row
            elif row:
                raise SourceError(_misfit(f"{self._name} line {self._number:,}", len(row), width))
            elif long := self.feed.take_long():
                yield self._number, long


class _Feed:
    """Gives `csv` its lines, and counts what it takes."""

    def __init__(self, blocks: Iterator[bytes], name: str, row_bytes: int, encoding: str) -> None:
        self._runs = whole_lines(blocks, name, row_bytes)
        self._row_bytes, self._encoding = row_bytes, encoding
        self._long: LongLine | None = None
        #: Letters given, and how many of them before the row at hand; the reader of rows sets the latter.
        self.given = 0
        self.row_start = 0

    def take_long(self) -> LongLine | None:
        """The line that was skipped just now, where an empty one was given."""
        long, self._long = self._long, None
        return long

    def lines(self) -> Iterator[str]:
        """Lines with their ends; invalid UTF-8 becomes surrogates."""
        bound = self._row_bytes
        for run in self._runs:
            if isinstance(run, LongLine):
                # A row by itself, unless a quote that is open there or before says otherwise.
                if self.given > self.row_start or run.quotes % 2:
                    raise _Endless
                self._long = run
                self.given += run.size_bytes + 1
                yield "\n"
                continue
            # Splits at CR, LF and CRLF as `csv` wants it, and nowhere else.
            for line in io.StringIO((run[1] + b"\n").decode(self._encoding, "surrogateescape"), newline=""):
                if self.given - self.row_start > bound:
                    raise _Endless
                self.given += len(line)
                yield line


class Header:
    """A header, and where in its rows the wanted columns stand."""

    def __init__(self, header: list[str] | None, place: str, columns: Columns) -> None:
        """Raise `SourceError` where the header can't be used."""
        if header is None or not any(header):
            raise SourceError(f"{place}: no header; name the columns there.")
        twice = next((column for column in header if column and header.count(column) > 1), None)
        if twice is not None:
            raise SourceError(f'{place}: the column "{shown(twice)}" stands twice in the header; rename one.')
        for option, column in columns.required:
            if column not in header:
                _check_kind(header, place)
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


def _check_kind(header: list[str], place: str) -> None:
    """Raise `SourceError` where what should be a header shows that the file is of another kind."""
    if header[0].lstrip().startswith("{"):
        raise SourceError(f"{place}: a JSON object, not a header; name JSON lines with .jsonl at the end.")
    divider = next((called for sign, called in _DIVIDERS.items() if sign in header[0]), None)
    if len(header) == 1 and divider:
        raise SourceError(f"{place}: columns are divided by {divider}; .csv is read with commas, and .tsv with tabs.")


def _misfit(place: str, fields: int, width: int) -> str:
    return f"{place}: {fields:,} field{'s' if fields > 1 else ''} where the header has {width:,}."


def _fault(error: csv.Error, row_bytes: int) -> str:
    """What is wrong with the row, from the few words of `csv`."""
    if isinstance(error, _Endless) or "field limit" in str(error):
        return _endless(row_bytes)
    if "end of data" in str(error):
        return "a quote opened there is never closed."
    return 'a closing quote inside a field; write quotes within a field twice, as "".'


def _endless(row_bytes: int) -> str:
    return f"the row is longer than {row_bytes:,} bytes; is a quote there never closed?"
