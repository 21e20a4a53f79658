"""Reading by reference: workers read a chunk's rows from the source file itself."""

from collections.abc import Iterator

from pipeline.core.chunks import Extent
from pipeline.core.errors import SourceError
from pipeline.core.options import Columns
from pipeline.sources.discovery import source_file
from pipeline.sources.source_file import SourceFile
from pipeline.sources.validation import Rows, judge


def check_referable(file: SourceFile) -> None:
    """Raise `SourceError` if workers can't read this source themselves."""
    if file.uri is None:
        raise SourceError(
            "the standard input can't be read by reference; leave the option out, or give files.", field="by_reference"
        )


def read_extent(extent: Extent, rows: int, columns: Columns, item_bytes: int) -> Iterator[Rows]:
    """Yield the rows of a chunk, validated, in bounded memory.

    Raises:
        SourceChanged: the file is no longer the one that was planned.
        SourceError: the file is damaged, or holds another number of rows there than planned.
    """
    file = source_file(extent.uri, extent.etag, extent.bytes)
    left = rows
    for parsed in file.format.read_extent(file, extent, rows, columns, item_bytes):
        block = judge(parsed, item_bytes, f"{file.name} {file.format.unit} ")
        left -= len(block.keys)
        yield block
    if left:
        raise SourceError(f"{file.name}: {abs(left):,} rows {'fewer' if left > 0 else 'more'} than were planned.")
