"""Lines of a batch request's input file, each a request for embeddings: `{custom_id, method, url, body}`."""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO, Final

import orjson

from pipeline.core.chunks import RejectCode
from pipeline.core.errors import InvalidPayload, SourceError
from pipeline.core.openai import PURPOSE_FIELDS, PURPOSES, EmbeddingOptions
from pipeline.core.options import Columns
from pipeline.sources.decode import PACKED, read_blocks, whole_lines, without_mark
from pipeline.sources.jsonl import line_bytes, object_or_fault
from pipeline.sources.validation import (
    BLOCK_BYTES,
    BLOCK_ROWS,
    BadRow,
    LongLine,
    Missing,
    Notices,
    Parsed,
    Rows,
    judge,
    shown,
)

ENDPOINT: Final = "/v1/embeddings"
#: Fields carried along with a line's text: its number, and the encoding of its vector.
CARRIED: Final = ("line", "encoding_format")
_MOST_FAULTS = 100


@dataclass(frozen=True, slots=True)
class Fault:
    """Reason why a file can't be a batch request, or a line a part of one."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


@dataclass(frozen=True, slots=True)
class Wish:
    """Model and dimensions, on which all lines of a file must agree, since a job has one vector space."""

    model: str
    dimensions: int | None

    def differs(self, other: "Wish", line: int) -> Fault | None:
        """Return the fault of a line that asks for something else; `None` if it agrees."""
        if other.model != self.model:
            message = f'the model is "{shown(other.model)}", and "{shown(self.model)}" on lines before; use one a file'
            return Fault("mismatched_model", message, line, "body.model")
        if other.dimensions != self.dimensions:
            said = self.dimensions or "none"
            message = f"dimensions is {other.dimensions or 'none'}, and {said} on lines before; use one size a file"
            return Fault("mismatched_dimensions", message, line, "body.dimensions")
        return None


@dataclass(slots=True)
class Survey:
    """Survey of a file, made before anything is created from it."""

    lines: int = 0
    wish: Wish | None = None
    #: Reasons to refuse the whole file; at most a hundred.
    faults: list[Fault] = field(default_factory=list)
    #: Faults of bad lines, for the case that no line is good; at most a hundred.
    bad_lines: list[Fault] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Line:
    number: int
    #: The text, or a placeholder for a bad one.
    text: object
    custom_id: object = None
    encoding_format: str | None = None
    wish: Wish | None = None


class BatchLines:
    """Rows of a batch request's file. A line that isn't a valid request becomes a reject, and the rest goes on."""

    columns = Columns(text="input", key="custom_id", key_required=True, carry=CARRIED)

    def __init__(
        self, name: str, uri: str, sha256: str, size_bytes: int, open_file: Callable[[], BinaryIO], item_bytes: int
    ) -> None:
        """Keep the parameters; nothing is read yet.

        Args:
            name: the file's name, as its submitter calls it.
            uri: the URI that the job records for it.
            sha256: the SHA-256 of its bytes.
            size_bytes: the number of its bytes.
            open_file: a function that opens it at its beginning.
            item_bytes: the longest text in bytes; a longer one is rejected.
        """
        self.name = name
        self.item_bytes = item_bytes
        self.notices = Notices()
        self._uri, self._sha256, self._size_bytes, self._open = uri, sha256, size_bytes, open_file

    def inputs(self) -> list[dict[str, Any]]:
        """Return the one input that the job records."""
        return [{"uri": self._uri, "etag": self._sha256, "bytes": self._size_bytes}]

    def fingerprint(self) -> str:
        """Return the SHA-256 over the file's hash and the endpoint, which decides how its lines are read."""
        return hashlib.sha256(json.dumps([self._sha256, ENDPOINT]).encode()).hexdigest()

    def read_fingerprint(self) -> str:
        """Return the fingerprint, for which nothing needs to be read."""
        return self.fingerprint()

    def survey(self, most_lines: int) -> Survey:
        """Survey the file: count its lines, find their model, and collect the reasons to refuse it.

        Raises:
            SourceError: the file is compressed, or isn't UTF-8 by its mark.
        """
        found = Survey()
        for line in self._lines():
            found.lines += 1
            if found.lines > most_lines:
                message = f"the file has more than {most_lines:,} lines; split it, or ask the operator for more"
                found.faults = [Fault("too_many_lines", message)]
                break
            if line.wish is None:
                if len(found.bad_lines) < _MOST_FAULTS:
                    found.bad_lines.append(_fault_of(line))
            elif found.wish is None:
                found.wish = line.wish
            elif (fault := found.wish.differs(line.wish, line.number)) and len(found.faults) < _MOST_FAULTS:
                found.faults.append(fault)
        return found

    def blocks(self) -> Iterator[Rows]:
        """Yield every line once, in order.

        Raises:
            SourceError: the file is compressed, isn't UTF-8 by its mark, or has changed since it was uploaded.
        """
        #: Line numbers by a hash of the custom_id: a file of a million lines must not hold a million strings.
        seen: dict[bytes, int] = {}
        gathered: list[_Line] = []
        size = 0
        for line in self._lines():
            line = _unless_twice(line, seen)
            gathered.append(line)
            size += len(line.text) if isinstance(line.text, str) else 0
            if len(gathered) >= BLOCK_ROWS or size >= BLOCK_BYTES:
                yield self._judged(gathered)
                gathered, size = [], 0
        if gathered:
            yield self._judged(gathered)

    def _judged(self, lines: list[_Line]) -> Rows:
        parsed = Parsed(
            [line.number for line in lines],
            [line.text for line in lines],
            [line.custom_id for line in lines],
            [{"line": line.number, "encoding_format": line.encoding_format} for line in lines],
        )
        return judge(parsed, self.item_bytes, "line ")

    def _lines(self) -> Iterator[_Line]:
        with self._open() as file:
            blocks = without_mark(self._unpacked(read_blocks(file)), self.name)
            for run in whole_lines(blocks, self.name, line_bytes(self.item_bytes)):
                if isinstance(run, LongLine):
                    if not run.blank:
                        yield _Line(run.number, run)
                    continue
                first, data = run
                for number, line in enumerate(data.split(b"\n"), first):
                    row = self._row(line, number)
                    if row is not None:
                        yield _read(row, number)

    def _unpacked(self, blocks: Iterator[bytes]) -> Iterator[bytes]:
        first = next(blocks, b"")
        if first.startswith(PACKED):
            raise SourceError(f"{self.name}: the file is packed; send it unpacked.")
        yield first
        yield from blocks

    def _row(self, line: bytes, number: int) -> dict[str, object] | BadRow | None:
        try:
            row = orjson.loads(line)
        except orjson.JSONDecodeError:
            row = None
        return row if isinstance(row, dict) else object_or_fault(line, self.name, number)


def _fault_of(line: _Line) -> Fault:
    if isinstance(line.text, BadRow):
        return Fault(line.text.code, line.text.fault, line.number)
    return Fault(RejectCode.TOO_LARGE, "the line is longer than is ever read", line.number)


def _read(row: dict[str, object] | BadRow, number: int) -> _Line:
    if isinstance(row, BadRow):
        return _Line(number, row)
    custom_id = row.get("custom_id")
    if fault := _envelope_fault(row) or _body_fault(row["body"]):
        return _Line(number, BadRow(fault, RejectCode.BAD_REQUEST), custom_id if isinstance(custom_id, str) else None)
    body: Any = row["body"]
    text = body.get("input", Missing)
    if isinstance(text, list):
        (text,) = text
    return _Line(number, text, custom_id, body.get("encoding_format"), Wish(body["model"], body.get("dimensions")))


def _envelope_fault(row: dict[str, object]) -> str | None:
    custom_id, method, url = row.get("custom_id"), row.get("method"), row.get("url")
    if custom_id is None:
        return "custom_id is missing"
    if not isinstance(custom_id, str) or not custom_id:
        return "custom_id isn't a string with letters in it"
    if method != "POST":
        return f"method is {_quoted(method)}; it must be POST"
    if url != ENDPOINT:
        return f"url is {_quoted(url)}; this batch request is for {ENDPOINT}"
    if not isinstance(row.get("body"), dict):
        return "body is missing" if row.get("body") is None else "body isn't a JSON object"
    return None


def _body_fault(body: Any) -> str | None:
    model, given = body.get("model"), body.get("input")
    if not isinstance(model, str) or not model or not model.isprintable():  # Postgres takes no NUL in a text
        return "body.model is missing" if model is None else "body.model isn't a model's name"
    if isinstance(given, list) and [type(one) for one in given] != [str]:
        if given and all(isinstance(one, str) for one in given):
            return f"body.input is an array of {len(given):,} texts; write a line for each"
        return "body.input is an array; send one text, as a string"
    for name in PURPOSE_FIELDS:
        if (purpose := body.get(name)) is not None and PURPOSES.get(str(purpose).lower()) is not False:
            return f"body.{name} is {_quoted(purpose)}; a batch request embeds documents"
    try:
        options = EmbeddingOptions.model_validate({name: body[name] for name in _CHECKED if name in body})
    except InvalidPayload as error:
        return f"body.{error}".removesuffix(".")
    if not options.truncates:
        name = "truncation" if options.truncate else "truncate"
        return f"body.{name} is false; a batch request truncates texts that are too long"
    if options.output_types != ["float"]:
        name = "output_dtype" if options.output_dtype else "embedding_types"
        return f"body.{name} isn't float; a batch request makes floats"
    return None


_CHECKED = (
    *("model", "encoding_format", "dimensions"),
    *("truncate", "truncation", "output_dtype", "embedding_types"),
)


def _quoted(given: object) -> str:
    if given is None:
        return "missing"
    return f'"{shown(given)}"' if isinstance(given, str) else "not a string"


def _unless_twice(line: _Line, seen: dict[bytes, int]) -> _Line:
    if not isinstance(line.custom_id, str):
        return line
    mark = hashlib.blake2b(line.custom_id.encode("utf-8", "surrogatepass"), digest_size=16).digest()
    first = seen.setdefault(mark, line.number)
    if first == line.number or isinstance(line.text, BadRow):
        return line
    fault = f"custom_id comes twice, first on line {first:,}"
    return _Line(line.number, BadRow(fault, RejectCode.BAD_REQUEST), line.custom_id)
