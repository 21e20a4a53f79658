"""Pagination of lists, as OpenAI's API has it."""

from collections.abc import Sequence
from typing import Annotated, Generic, Literal, Self, TypeVar

from fastapi import Query
from pydantic import BaseModel

from pipeline.core.errors import InvalidPayload

After = Annotated[str | None, Query(max_length=100, pattern="^[^\0]*$", description="The last id of the page before.")]


class Listed(BaseModel):
    """What is in a list."""

    id: str


def unknown_cursor(kind: str, after: str) -> InvalidPayload:
    """The error of a page that is to begin after what isn't there: where it would begin isn't known."""
    return InvalidPayload(f'after: no such {kind} "{after}"; send the last id of the page before.', param="after")


Shown = TypeVar("Shown", bound=Listed)


class Page(BaseModel, Generic[Shown]):
    """A part of a list."""

    object: Literal["list"] = "list"
    data: list[Shown]
    has_more: bool
    first_id: str | None
    last_id: str | None

    @classmethod
    def of(cls, found: Sequence[Shown], limit: int) -> Self:
        """The first `limit` of what was found; it was looked for one more."""
        page = list(found[:limit])
        return cls(
            data=page,
            has_more=len(found) > limit,
            first_id=page[0].id if page else None,
            last_id=page[-1].id if page else None,
        )
