"""CSV and TSV with a header line."""

import csv
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain

from pipeline.core.errors import SourceError
from pipeline.core.options import Columns
from pipeline.sources.decode import BrokenStreamError, whole_lines
from pipeline.sources.source_file import SourceFile
from pipeline.sources.validation import (
    BLOCK_BYTES,
    BLOCK_ROWS,
    LongLine,
    Notices,
    Parsed,
    missing_column,
    shown,
    skipped,
    without_key,
)

_MIB = 1024 * 1024
_DIVIDERS = {"\t": "tabs", ";": "semicolons", "|": "bars", ",": "commas"}


#: Excel's first line, which names the delimiter.
_SEPARATOR_LINE = re.compile(rb'"?sep=([\t !#-~])"?(?:\r\n|\r|\n|\Z)', re.IGNORECASE)
_SEPARATOR_LINE_BYTES = 9


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    """The signs between fields and around them."""

    delimiter: str
    #: Empty: nothing quotes.
    quote: str
    #: Whether a person has chosen them; what wasn't chosen is a habit of files of this name.
    chosen_delimiter: bool = False
    chosen_quote: bool = False

    @classmethod
    def of(cls, file: SourceFile, columns: Columns) -> "Dialect":
        """The dialect of a file: CSV has commas and quotes, TSV tabs and no quoting, unless they are chosen."""
        delimiter, quote = ("\t", "") if file.format.name == "tsv" else (",", '"')
        return cls(
            delimiter=columns.delimiter or delimiter,
            quote=quote if columns.quote is None else columns.quote,
            chosen_delimiter=columns.delimiter is not None,
            chosen_quote=columns.quote is not None,
        )


class _Endless(csv.Error):
    """A row goes on past anything that is held."""


def read_csv(
    blocks: Iterator[bytes],
    name: str,
    dialect: Dialect,
    columns: Columns,
    item_bytes: int,
    notices: Notices,
) -> Iterator[Parsed]:
    """The rows of a CSV file; an empty line is no row, an empty key no key.

    Sets the process-wide `csv.field_size_limit`, in letters: `csv` has no other bound.

    Args:
        blocks: the file.
        name: what messages call the file.
        dialect: how fields are told apart.
        columns: the columns to read.
        item_bytes: a longer text is rejected.
        notices: gets what a person should know.

    Raises:
        SourceError: the header lacks a required column or has one twice, or a row doesn't fit the header.
    """
    reader = _Reader.at_start(blocks, name, dialect, item_bytes)
    return _parsed(reader, reader.header(columns, notices), columns, notices)


def read_part(
    blocks: Iterator[bytes], name: str, header: "Header", columns: Columns, item_bytes: int, first_line: int
) -> Iterator[Parsed]:
    """The rows of whole rows from amid a file, of which the first line has the number `first_line`. Raises as
    `read_csv`."""
    reader = _Reader(blocks, name, header.dialect, item_bytes, lines_before=first_line - 1)
    return _parsed(reader, header, columns, Notices())


def _parsed(reader: "_Reader", header: "Header", columns: Columns, notices: Notices) -> Iterator[Parsed]:
    feed = reader.feed
    numbers: list[int] = []
    rows: list[list[str]] = []
    block_start = feed.given
    for number, row in reader.rows(header, notices):
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


def read_header(
    blocks: Iterator[bytes], name: str, dialect: Dialect, columns: Columns, item_bytes: int, notices: Notices
) -> "Header":
    """The header of a CSV file.

    Raises:
        SourceError: it lacks a required column or has one twice.
    """
    return _Reader.at_start(blocks, name, dialect, item_bytes).header(columns, notices)


def csv_rows(
    blocks: Iterator[bytes], name: str, header: "Header", item_bytes: int, notices: Notices
) -> Iterator[tuple[int, int, int]]:
    """Where the rows below the header are: (first byte, bytes, line number).

    Raises:
        SourceError: a row doesn't fit the header, or can't be read.
    """
    # In Latin-1 each byte is a letter, and no letter of UTF-8 has a byte that means something to `csv`.
    reader = _Reader.at_start(blocks, name, header.dialect, item_bytes, encoding="latin-1")
    reader.row()
    for number, _ in reader.rows(header, notices):
        yield reader.start, reader.feed.given - reader.start, number


class _Reader:
    """`csv`, and where it stands."""

    def __init__(
        self,
        blocks: Iterator[bytes],
        name: str,
        dialect: Dialect,
        item_bytes: int,
        *,
        encoding: str = "utf-8",
        lines_before: int = 0,
        bytes_before: int = 0,
    ) -> None:
        self._row_bytes = 4 * (item_bytes * 4 + _MIB)
        csv.field_size_limit(self._row_bytes)
        self.feed = _Feed(blocks, name, self._row_bytes, encoding, dialect.quote, given=bytes_before)
        self._reader = csv.reader(
            self.feed.lines(),
            delimiter=dialect.delimiter,
            quotechar=dialect.quote or None,
            quoting=csv.QUOTE_MINIMAL if dialect.quote else csv.QUOTE_NONE,
            strict=True,
        )
        self._name = name
        self._dialect = dialect
        self._lines_before = lines_before
        self._number = lines_before + 1  # of the next row

    @classmethod
    def at_start(
        cls, blocks: Iterator[bytes], name: str, dialect: Dialect, item_bytes: int, encoding: str = "utf-8"
    ) -> "_Reader":
        """A reader of a whole file, whose first line may name the delimiter."""
        head, blocks = _begun(blocks, _SEPARATOR_LINE_BYTES)
        found = _SEPARATOR_LINE.match(head)
        if found is None:
            return cls(chain([head], blocks), name, dialect, item_bytes, encoding=encoding)
        named = found[1].decode()
        if dialect.chosen_delimiter and named != dialect.delimiter:
            raise SourceError(
                f'{name} line 1: it names "{named}" as delimiter, and the job another; leave one out.',
                field="delimiter",
            )
        return cls(
            chain([head[found.end() :]], blocks),
            name,
            replace(dialect, delimiter=named),
            item_bytes,
            encoding=encoding,
            lines_before=1,
            bytes_before=found.end(),
        )

    @property
    def start(self) -> int:
        """Letters before the row that came last."""
        return self.feed.row_start

    def header(self, columns: Columns, notices: Notices) -> "Header":
        """The first row as a header; `SourceError` where it can't be used."""
        row = self.row()
        place = f"{self._name} line {self._lines_before + 1}"
        if self.feed.take_long():
            raise SourceError(f"{place}: {_endless(self._row_bytes)}")
        header = Header(row, place, self._dialect, columns, notices)
        if header.hides_rows(None, self.feed.row_lines):
            notices.add("hidden rows", self._hidden())
        return header

    def row(self) -> list[str] | None:
        """The next row; `None` at the end, empty for an empty line."""
        self._number = self._lines_before + self._reader.line_num + 1
        self.feed.begin_row()
        try:
            return next(self._reader, None)
        except csv.Error as error:
            fault = _fault(error, self._row_bytes)
            raise SourceError(f"{self._name} line {self._number:,}: {fault}") from None

    def rows(self, header: "Header", notices: Notices) -> Iterator[tuple[int, list[str] | LongLine]]:
        """The rows that are left, each with the number of its first line; `SourceError` where one has another width."""
        watches_quotes = not self._dialect.quote and not self._dialect.chosen_quote
        while (row := self.row()) is not None:
            if len(row) == header.width:
                if len(self.feed.row_lines) > 1 and header.hides_rows(row, self.feed.row_lines):
                    notices.add("hidden rows", self._hidden())
                if watches_quotes and any(map(_is_quoted, row)):
                    notices.add("quotes", self._unread_quotes())
                    watches_quotes = False
                yield self._number, row
            elif row:
                raise SourceError(self._misfit(row, header.width))
            elif long := self.feed.take_long():
                yield self._number, long

    def _place(self) -> str:
        """The lines of the row at hand."""
        last = self._lines_before + self._reader.line_num
        if last == self._number:
            return f"{self._name} line {self._number:,}"
        return f"{self._name} lines {self._number:,} to {last:,}"

    def _misfit(self, row: list[str], width: int) -> str:
        fields = f"{len(row):,} field{'s' if len(row) > 1 else ''} where the header has {width:,}"
        quoted = not self._dialect.quote and any('"' in field for field in row)
        mend = "; if its quotes quote, set quote to '\"'" if quoted else ""
        return f"{self._place()}: {fields}{mend}."

    def _hidden(self) -> str:
        return (
            f"{self._place()}: a quoted field goes on over lines that look like rows, and is read as one text. If a "
            "quote was left open there, close it, or set quote to none where quotes are mere letters."
        )

    def _unread_quotes(self) -> str:
        return (
            f"{self._name}: fields stand in quotes, first on line {self._number:,}, and keep them, since TSV has no "
            "quoting; to read them without, set quote to '\"'."
        )


def _is_quoted(field: str) -> bool:
    return len(field) > 1 and field[0] == field[-1] == '"'


def _begun(blocks: Iterator[bytes], size: int) -> tuple[bytes, Iterator[bytes]]:
    """The first `size` bytes or some more, and what follows, be it that the data is broken."""

    def breaking(broken: BrokenStreamError) -> Iterator[bytes]:
        raise broken
        yield

    head = b""
    try:
        while len(head) < size and (block := next(blocks, b"")):
            head += block
    except BrokenStreamError as broken:
        return head, breaking(broken)
    return head, blocks


class _Feed:
    """Gives `csv` its lines, and counts what it takes."""

    def __init__(
        self, blocks: Iterator[bytes], name: str, row_bytes: int, encoding: str, quote: str, given: int
    ) -> None:
        self._runs = whole_lines(blocks, name, row_bytes, quote.encode() or b'"')
        self._row_bytes, self._encoding, self._quotes = row_bytes, encoding, bool(quote)
        self._long: LongLine | None = None
        #: Letters given, and how many of them before the row at hand, whose lines are held.
        self.given = given
        self.row_start = given
        self.row_lines: list[str] = []

    def begin_row(self) -> None:
        """Take what is given from now on for another row."""
        self.row_start = self.given
        self.row_lines.clear()

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
                if self.given > self.row_start or (self._quotes and run.quotes % 2):
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
                self.row_lines.append(line)
                yield line


class Header:
    """A header, and where in its rows the wanted columns stand."""

    def __init__(
        self, header: list[str] | None, place: str, dialect: Dialect, columns: Columns, notices: Notices
    ) -> None:
        """Raise `SourceError` where the header can't be used."""
        if header is None or not any(header):
            raise SourceError(f"{place}: no header; name the columns there.")
        twice = next((column for column in header if column and header.count(column) > 1), None)
        if twice is not None:
            raise SourceError(f'{place}: the column "{shown(twice)}" stands twice in the header; rename one.')
        for field, column in columns.required:
            if column not in header:
                _check_kind(header, place, dialect)
                candidates = [name for name in header if name != columns.key]
                raise missing_column(place, field, column, header, candidates)
        if columns.key not in header:
            notices.add("no key", without_key(place, columns.key, header))
        self.dialect = dialect
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

    def hides_rows(self, row: list[str] | None, lines: list[str]) -> bool:
        """Return whether a row on several lines, all of them given, holds lines that look like rows of their own: of as
        many fields, and a key of the same kinds of letters. `None` is the header, whose own lines have no key."""
        own = _kinds_of_letters(row[self._key]) if row and self._key is not None else frozenset()
        for line in lines[1:]:
            fields = line.rstrip("\r\n").split(self.dialect.delimiter)
            if len(fields) == self.width and (not own or _kinds_of_letters(fields[self._key or 0]) == own):
                return True
        return False


def _kinds_of_letters(key: str) -> frozenset[str]:
    """Letters, digits, and which signs a key has."""
    kinds = ("a" if letter.isalpha() or not letter.isascii() else "9" if letter.isdigit() else letter for letter in key)
    return frozenset(kinds) - {'"'}


def _check_kind(header: list[str], place: str, dialect: Dialect) -> None:
    """Raise `SourceError` where what should be a header shows that the file is of another kind."""
    if header[0].lstrip().startswith("{"):
        raise SourceError(f"{place}: a JSON object, not a header; name JSON lines with .jsonl at the end.")
    if not dialect.quote and any(map(_is_quoted, header)):
        raise SourceError(f"{place}: the names stand in quotes, which aren't read; set it to '\"'.", field="quote")
    divider = next((called for sign, called in _DIVIDERS.items() if sign in header[0]), None)
    if len(header) == 1 and divider:
        habit = ".csv is read with commas, and .tsv with tabs"
        raise SourceError(f"{place}: columns are divided by {divider}; {habit}, unless it is set.", field="delimiter")


def _fault(error: csv.Error, row_bytes: int) -> str:
    """What is wrong with the row, from the few words of `csv`."""
    if isinstance(error, _Endless) or "field limit" in str(error):
        return _endless(row_bytes)
    if "end of data" in str(error):
        return "a quote opened there is never closed."
    return 'a closing quote inside a field; write quotes within a field twice, as "".'


def _endless(row_bytes: int) -> str:
    return f"the row is longer than {row_bytes:,} bytes; is a quote there never closed?"
