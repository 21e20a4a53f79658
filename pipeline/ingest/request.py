"""Validation of a request for a job, as far as possible without reading the corpus."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, Field, ValidationError, field_validator

from pipeline.core.errors import UserError
from pipeline.core.models import Model
from pipeline.core.options import MOST_COLUMNS, Address, JobOptions, Word
from pipeline.sources import Source

Request = TypeVar("Request", bound=BaseModel)

MOST_SOURCES = 1_000
#: Clients and proxies resolve these as relative path segments, however they are escaped.
_UNADDRESSABLE = (".", "..")


class JobRequest(JobOptions):
    """Request for a new job."""

    model: Word | None = Field(
        default=None, description="The model, by name or alias. Default: the only one that you may use."
    )
    name: Word | None = Field(default=None, description="The job's name. Default: the first source's.")
    sources: list[Address] = Field(
        default=[],
        max_length=MOST_SOURCES,
        description="Files, folders, globs or URIs that the operator allows, for a job without an upload.",
    )
    labels: dict[Word, Word] = Field(default={}, max_length=MOST_COLUMNS, description="Kept with job and usage.")
    priority: int = Field(default=0, ge=-100, le=100, description="Higher goes first.")

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str | None) -> str | None:
        if name in _UNADDRESSABLE:
            raise ValueError(f"\"{name}\" can't be a job's name: no path can hold it")
        return name


_AT_THE_DATABASE = "only vectormill submit takes it, with VECTORMILL_DATABASE_URL set"
#: Options of `vectormill submit` that aren't fields of a request over HTTP → advice on the alternative.
ELSEWHERE = {
    **dict.fromkeys(("from", "query", "into", "hnsw", "allow_empty", "dry_run", "at"), _AT_THE_DATABASE),
    "by_value": "it is what happens without by_reference; leave it out",
    "idempotency_key": "send it as the header Idempotency-Key",
    "label": "write labels, an object",
    "file": "send it as a file, with a name that says what it is",
    "workspace": "send it in the address, as ?workspace=NAME",
}


def read_sent(fields: Mapping[str, Any]) -> JobRequest:
    """Validate a request that was sent over HTTP, where options that need the database itself are refused.

    Raises: as `read_request`.
    """
    if elsewhere := sorted(fields.keys() & ELSEWHERE.keys()):
        raise UserError(f"{ELSEWHERE[elsewhere[0]]}.", field=elsewhere[0])
    return read_request(fields)


def read_request(fields: Mapping[str, Any]) -> JobRequest:
    """Validate a request given as fields, such as a command's options.

    Raises:
        UserError: a field is missing, unknown or wrong; the message names it.
    """
    return read_fields(JobRequest, fields)


def read_fields(kind: type[Request], fields: Mapping[str, Any]) -> Request:
    """Validate fields as a request of this kind.

    Raises:
        UserError: a field is missing, unknown or wrong; the message names it.
    """
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        field = ".".join(str(part) for part in first["loc"]) or None
        told = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            told = "there is no such field"
        raise UserError(f"{told[:1].lower()}{told[1:]}.", field=field) from None


def labels_of(pairs: Iterable[str]) -> dict[str, str]:
    """Return labels that are written as `key=value`.

    Raises:
        UserError: one isn't, or a key is given twice.
    """
    labels = dict[str, str]()
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not key or not equals:
            raise UserError("write it as key=value.", field="label", given=f'"{pair}"')
        if key in labels:
            raise UserError(f"{key} is given twice.", field="label", given=f'"{pair}"')
        labels[key] = value
    return labels


def tell_model(wish: JobRequest, model: Model, corpus: Source) -> None:
    """Add a notice if no model is named."""
    if wish.model is None:
        corpus.notices.add("model", f"no model is named, so it is {model.name}, the only one there is")


def default_name(source: str) -> str:
    """Return a job's name from its first source: a file name without extensions, or the folder where a glob begins."""
    if source == "-":
        return "stdin"
    plain = (part for part in reversed(Path(source).parts) if not any(sign in part for sign in "*?["))
    name = next(plain, source).split(".")[0] or source
    return name if name not in _UNADDRESSABLE else Path(source).absolute().resolve().name or "docs"
