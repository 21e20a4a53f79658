"""Reader of CSV and TSV files with a header line."""

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
    compose,
    missing_column,
    shown,
    skipped,
    without_key,
)

_MIB = 1024 * 1024
_DIVIDERS = {"\t": "tabs", ";": "semicolons", "|": "bars", ",": "commas"}


#: Excel's optional first line, which names the delimiter.
_SEPARATOR_LINE = re.compile(rb'"?sep=([\t !#-~])"?(?:\r\n|\r|\n|\Z)', re.IGNORECASE)
_SEPARATOR_LINE_BYTES = 9


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    """CSV dialect: the signs between fields and around them."""

    delimiter: str
    #: Empty: no quoting.
    quote: str
    #: True if a person has chosen the sign; otherwise it is the default for the file's name.
    chosen_delimiter: bool = False
    chosen_quote: bool = False

    @classmethod
    def of(cls, file: SourceFile, columns: Columns) -> "Dialect":
        """Return a file's dialect: commas and quotes for CSV, tabs and no quoting for TSV, unless they are chosen."""
        delimiter, quote = ("\t", "") if file.format.name == "tsv" else (",", '"')
        return cls(
            delimiter=columns.delimiter or delimiter,
            quote=quote if columns.quote is None else columns.quote,
            chosen_delimiter=columns.delimiter is not None,
            chosen_quote=columns.quote is not None,
        )


class _Endless(csv.Error):
    """Row that is longer than the limit, probably for want of a closing quote."""


def read_csv(
    blocks: Iterator[bytes],
    name: str,
    dialect: Dialect,
    columns: Columns,
    item_bytes: int,
    notices: Notices,
) -> Iterator[Parsed]:
    """Yield the rows of a CSV file. An empty line is no row, and an empty key no key.

    Sets the process-wide `csv.field_size_limit`, in characters: `csv` has no other limit.

    Args:
        blocks: the file's bytes.
        name: what messages call the file.
        dialect: the signs between fields and around them.
        columns: the columns to read.
        item_bytes: the longest text in bytes; a longer one is rejected.
        notices: collects the notices for a person.

    Raises:
        SourceError: the header lacks a required column or has a column twice, or a row doesn't fit the header.
    """
    reader = _Reader.at_start(blocks, name, dialect, item_bytes)
    return _parsed(reader, reader.header(columns, notices), columns, notices)


def read_part(
    blocks: Iterator[bytes], name: str, header: "Header", columns: Columns, item_bytes: int, first_line: int
) -> Iterator[Parsed]:
    """Yield the rows of a part of a file that holds whole rows. `first_line` is the number of its first line. Raises as
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
    """Read the header of a CSV file.

    Raises:
        SourceError: the header lacks a required column or has a column twice.
    """
    return _Reader.at_start(blocks, name, dialect, item_bytes).header(columns, notices)


def csv_rows(
    blocks: Iterator[bytes], name: str, header: "Header", item_bytes: int, notices: Notices
) -> Iterator[tuple[int, int, int]]:
    """Locate the rows below the header: yield (first byte, bytes, line number) of each.

    Raises:
        SourceError: a row doesn't fit the header, or can't be read.
    """
    # In Latin-1 each byte is a character, and no multi-byte character of UTF-8 has a byte with a meaning for `csv`.
    reader = _Reader.at_start(blocks, name, header.dialect, item_bytes, encoding="latin-1")
    reader.row()
    for number, _ in reader.rows(header, notices):
        yield reader.start, reader.feed.given - reader.start, number


class _Reader:
    """Reader around `csv` that keeps track of line numbers and offsets."""

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
        """Return a reader of a whole file, whose first line may name the delimiter."""
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
        """Offset of the row that was read last, in characters."""
        return self.feed.row_start

    def header(self, columns: Columns, notices: Notices) -> "Header":
        """Read the first row as the header; raise `SourceError` if it can't be used."""
        row = self.row()
        place = f"{self._name} line {self._lines_before + 1}"
        if self.feed.take_long():
            raise SourceError(f"{place}: {_endless(self._row_bytes)}")
        header = Header(row, place, self._dialect, columns, notices)
        if header.hides_rows(None, self.feed.row_lines):
            notices.add("hidden rows", self._hidden())
        return header

    def row(self) -> list[str] | None:
        """Return the next row: `None` at the end, empty for an empty line."""
        self._number = self._lines_before + self._reader.line_num + 1
        self.feed.begin_row()
        try:
            return next(self._reader, None)
        except csv.Error as error:
            fault = _fault(error, self._row_bytes)
            raise SourceError(f"{self._name} line {self._number:,}: {fault}") from None

    def rows(self, header: "Header", notices: Notices) -> Iterator[tuple[int, list[str] | LongLine]]:
        """Yield the remaining rows with their first line numbers; raise `SourceError` if one differs in width."""
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
        """Return the file and the line numbers of the current row, for messages."""
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
    """Return at least the first `size` bytes if there are as many, and the blocks or the error that follow."""

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
    """Feeder of lines to `csv`, which counts the characters given."""

    def __init__(
        self, blocks: Iterator[bytes], name: str, row_bytes: int, encoding: str, quote: str, given: int
    ) -> None:
        self._runs = whole_lines(blocks, name, row_bytes, quote.encode() or b'"')
        self._row_bytes, self._encoding, self._quotes = row_bytes, encoding, bool(quote)
        self._long: LongLine | None = None
        #: Characters given so far, those given before the current row, and the lines of that row.
        self.given = given
        self.row_start = given
        self.row_lines: list[str] = []

    def begin_row(self) -> None:
        """Count the characters given from now on for a new row."""
        self.row_start = self.given
        self.row_lines.clear()

    def take_long(self) -> LongLine | None:
        """Return the line that was just skipped, for which `csv` got an empty one; `None` if there was none."""
        long, self._long = self._long, None
        return long

    def lines(self) -> Iterator[str]:
        """Yield lines with their ends; invalid UTF-8 becomes surrogates."""
        bound = self._row_bytes
        for run in self._runs:
            if isinstance(run, LongLine):
                # A long line is a row by itself, unless a quote is open in it or before it.
                if self.given > self.row_start or (self._quotes and run.quotes % 2):
                    raise _Endless
                self._long = run
                self.given += run.size_bytes + 1
                yield "\n"
                continue
            # Splits at CR, LF and CRLF, as `csv` expects, and nowhere else.
            for line in io.StringIO((run[1] + b"\n").decode(self._encoding, "surrogateescape"), newline=""):
                if self.given - self.row_start > bound:
                    raise _Endless
                self.given += len(line)
                self.row_lines.append(line)
                yield line


class Header:
    """Header of a CSV file, with the positions of the wanted columns."""

    def __init__(
        self, header: list[str] | None, place: str, dialect: Dialect, columns: Columns, notices: Notices
    ) -> None:
        """Find the wanted columns; raise `SourceError` if the header can't be used."""
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
        self._columns = columns
        self._texts = {column: header.index(column) for _, column in columns.texts}
        self._key = header.index(columns.key) if columns.key in header else None
        self._carry = {column: header.index(column) for column in columns.carry}

    def parsed(self, numbers: list[int], rows: list[list[str]]) -> Parsed:
        """Return the wanted columns of the rows."""
        columns, key, carry = self._columns, self._key, self._carry
        texts: list[object]
        titles = None
        if columns.composed:
            named = [{column: row[at] for column, at in self._texts.items()} for row in rows]
            texts, titles = compose(columns, named)
        else:
            text = self._texts[columns.text]
            texts = [row[text] for row in rows]
        return Parsed(
            numbers,
            texts,
            [None] * len(rows) if key is None else [row[key] or None for row in rows],
            [{column: row[at] for column, at in carry.items()} for row in rows] if carry else None,
            titles,
        )

    def hides_rows(self, row: list[str] | None, lines: list[str]) -> bool:
        """Return True if a row over several `lines` holds lines that look like rows of their own.

        Such a line has as many fields, and a key with the same kinds of characters. A `row` of `None` is the header,
        which has no key.
        """
        own = _kinds_of_letters(row[self._key]) if row and self._key is not None else frozenset()
        for line in lines[1:]:
            fields = line.rstrip("\r\n").split(self.dialect.delimiter)
            if len(fields) == self.width and (not own or _kinds_of_letters(fields[self._key or 0]) == own):
                return True
        return False


def _kinds_of_letters(key: str) -> frozenset[str]:
    """Return the kinds of characters in a key: letters, digits, and each sign by itself."""
    kinds = ("a" if letter.isalpha() or not letter.isascii() else "9" if letter.isdigit() else letter for letter in key)
    return frozenset(kinds) - {'"'}


def _check_kind(header: list[str], place: str, dialect: Dialect) -> None:
    """Raise `SourceError` if the supposed header shows that the file is of another kind."""
    if header[0].lstrip().startswith("{"):
        raise SourceError(f"{place}: a JSON object, not a header; name JSON lines with .jsonl at the end.")
    if not dialect.quote and any(map(_is_quoted, header)):
        raise SourceError(
            f"{place}: the column names are quoted, but quoting is off for this file; set the option to '\"'.",
            field="quote",
        )
    divider = next((called for sign, called in _DIVIDERS.items() if sign in header[0]), None)
    if len(header) == 1 and divider:
        habit = ".csv is read with commas, and .tsv with tabs"
        raise SourceError(f"{place}: columns are divided by {divider}; {habit}, unless it is set.", field="delimiter")


def _fault(error: csv.Error, row_bytes: int) -> str:
    """Return the fault of the row, derived from the terse message of `csv`."""
    if isinstance(error, _Endless) or "field limit" in str(error):
        return _endless(row_bytes)
    if "end of data" in str(error):
        return "a quote opened there is never closed."
    return 'a closing quote inside a field; write quotes within a field twice, as "".'


def _endless(row_bytes: int) -> str:
    return f"the row is longer than {row_bytes:,} bytes; is a quote there never closed?"
