"""What a door is asked to make a job of: checked as far as it can be without a look at the corpus."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from pipeline.errors import UserError
from pipeline.parts import OUR_COLUMNS
from pipeline.sources import Columns
from pipeline.submission import Options

#: Of names, columns and labels. Postgres takes no NUL in a text.
Word = Annotated[str, StringConstraints(min_length=1, max_length=200, pattern="^[^\0]*$")]
_Address = Annotated[str, StringConstraints(min_length=1, max_length=2_000, pattern="^[^\0]*$")]
_MOST_SOURCES = 1_000
#: Clients and proxies take these for a way up, however they are written.
_UNADDRESSABLE = (".", "..")
_MOST_COLUMNS = 100
#: What is easier to type than a sign, and what says that there is none.
_SIGNS = {"tab": "\t", "\\t": "\t", "none": ""}


class JobRequest(BaseModel):
    """A job to make."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: Word = Field(description="The model, by name or alias.")
    name: Word | None = Field(default=None, description="The job's name. Default: the first source's.")
    sources: list[_Address] = Field(
        default=[],
        max_length=_MOST_SOURCES,
        description="Files, folders, globs or URIs that the operator allows, for a job without an upload.",
    )
    text_column: Word = Field(default="text", description="The column or field that holds the texts.")
    key_column: Word | None = Field(default=None, description="The column that holds your keys. Default: id.")
    carry: list[Word] = Field(default=[], max_length=_MOST_COLUMNS, description="Columns to carry into results.")
    quote: str | None = Field(
        default=None, description='Around fields of .csv and .tsv: a character, or `none`. Default: ", and none.'
    )
    delimiter: str | None = Field(
        default=None, description="Between fields of .csv and .tsv: a character, or `tab`. Default: comma, and tab."
    )
    labels: dict[Word, Word] = Field(default={}, max_length=_MOST_COLUMNS, description="Kept with job and usage.")
    priority: int = Field(default=0, ge=-100, le=100, description="Higher goes first.")
    dimensions: int | None = Field(default=None, ge=1, le=16_000, description="Size of the vectors.")
    dtype: Literal["float32", "float16"] = Field(default="float32", description="How vectors are kept.")
    max_item_tokens: int | None = Field(
        default=None, ge=1, le=1_000_000, description="Read at most so many tokens of a text."
    )
    on_long: Literal["truncate", "reject"] = Field(default="truncate", description="What becomes of a longer text.")
    max_rejects: str = Field(
        default="",
        max_length=30,
        description="Fail beyond so many rejects, `50` or `2.5%`. Default: 10 % from 100 items on.",
    )
    unique_keys: bool = Field(default=False, description="Refuse a corpus with a key twice, or an item without.")
    by_reference: bool = Field(default=False, description="Workers read the sources themselves.")
    output: _Address | None = Field(
        default=None, description="An empty folder or URI for Parquet files, which the operator allows."
    )
    webhook: _Address | None = Field(
        default=None, description="Where the job's end is told, an address that the operator allows."
    )

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str | None) -> str | None:
        if name in _UNADDRESSABLE:
            raise ValueError(f"\"{name}\" can't be a job's name: no path can hold it")
        return name

    @field_validator("delimiter", "quote")
    @classmethod
    def _read_sign(cls, given: str | None) -> str | None:
        sign = _SIGNS.get(given or "", given)
        if sign and (len(sign) > 1 or not sign.isascii() or sign.isalnum() or sign in "\0\r\n"):
            raise ValueError("give one sign of ASCII, tab, or, to quote, none")
        return sign

    @field_validator("delimiter")
    @classmethod
    def _check_delimiter(cls, delimiter: str | None, info: ValidationInfo) -> str | None:
        if delimiter == "":
            raise ValueError("give one sign of ASCII, or tab")
        quote = info.data.get("quote")  # validated before, as it stands before
        if delimiter is not None and delimiter == ('"' if quote is None else quote):
            raise ValueError("it can't be the quote too")
        return delimiter

    @field_validator("carry")
    @classmethod
    def _check_carry(cls, carry: list[str]) -> list[str]:
        if twice := next((name for name in carry if carry.count(name) > 1), None):
            raise ValueError(f'"{twice}" is given twice')
        if taken := sorted(set(carry) & set(OUR_COLUMNS)):
            raise ValueError(f'results have a column "{taken[0]}" already')
        return carry

    def columns(self, *, key_required: bool = False) -> Columns:
        """What is read of each row."""
        return Columns(
            text=self.text_column,
            key=self.key_column or "id",
            key_required=self.key_column is not None or self.unique_keys or key_required,
            carry=tuple(self.carry),
            delimiter=self.delimiter,
            quote=self.quote,
        )

    def options(self, default_name: str, idempotency_key: str | None = None, **more: Any) -> Options:
        """How the job runs; `more` are options that only operators have."""
        names = ("dimensions", "dtype", "max_item_tokens", "on_long", "max_rejects", "unique_keys", "priority")
        same = {name: getattr(self, name) for name in (*names, "labels", "by_reference", "output", "webhook")}
        return Options(name=self.name or default_name, idempotency_key=idempotency_key, **{**same, **more})


_AT_THE_DATABASE = "only vectormill submit takes it, with VECTORMILL_DATABASE_URL set"
#: Options of `vectormill submit` that aren't fields, and what to do instead.
_ELSEWHERE = {
    **dict.fromkeys(("from", "query", "into", "hnsw", "allow_empty", "dry_run"), _AT_THE_DATABASE),
    "by_value": "it is what happens without by_reference; leave it out",
    "idempotency_key": "send it as the header Idempotency-Key",
    "label": "write labels, an object",
    "file": "send it as a file, with a name that says what it is",
    "workspace": "send it in the address, as ?workspace=NAME",
}


def read_request(fields: Mapping[str, Any]) -> JobRequest:
    """A request as it was sent, or as a command's options say.

    Raises:
        UserError: a field is missing, unknown or wrong; the message names it.
    """
    try:
        return JobRequest.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        field = ".".join(str(part) for part in first["loc"]) or None
        told = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            told = _ELSEWHERE.get(str(field), "there is no such field")
        raise UserError(f"{told[:1].lower()}{told[1:]}.", field=field) from None


def default_name(source: str) -> str:
    """A job's name from its first source: the file's name without its endings, or the folder that a glob begins in."""
    if source == "-":
        return "stdin"
    plain = (part for part in reversed(Path(source).parts) if not any(sign in part for sign in "*?["))
    name = next(plain, source).split(".")[0] or source
    return name if name not in _UNADDRESSABLE else Path(source).absolute().resolve().name or "docs"
