"""Pagination of lists by a cursor, as in OpenAI's API."""

from collections.abc import Sequence
from typing import Annotated, Generic, Literal, Self, TypeVar

from fastapi import Query
from pydantic import BaseModel

from pipeline.core.errors import InvalidPayload

After = Annotated[
    str | None, Query(max_length=100, pattern="^[^\0]*$", description="The last id of the previous page.")
]


class Listed(BaseModel):
    """Entry of a list."""

    id: str


def unknown_cursor(kind: str, after: str) -> InvalidPayload:
    """Return the error for a cursor that names no entry: the page's first entry can't be determined."""
    return InvalidPayload(f'after: no such {kind} "{after}"; send the last id of the previous page.', param="after")


Shown = TypeVar("Shown", bound=Listed)


class Page(BaseModel, Generic[Shown]):
    """Page of a list."""

    object: Literal["list"] = "list"
    data: list[Shown]
    has_more: bool
    first_id: str | None
    last_id: str | None

    @classmethod
    def of(cls, found: Sequence[Shown], limit: int) -> Self:
        """Return the first `limit` entries as a page. `found` holds one more if another page follows."""
        page = list(found[:limit])
        return cls(
            data=page,
            has_more=len(found) > limit,
            first_id=page[0].id if page else None,
            last_id=page[-1].id if page else None,
        )
