"""Outcome of a task, as Flower shows it: the result of one that is done, or the typed reason why it isn't."""

from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.chunk_io.commit import Commit

#: Characters of a reason; a gateway's own words may be long.
_MOST_CHARACTERS = 500


@dataclass(slots=True)
class Tally:
    """Items that a claim has committed, and their tokens."""

    embedded: int = 0
    reused: int = 0
    rejected: int = 0
    tokens: int = 0
    seconds: float = 0.0
    #: Why the rest of the chunk was given back; `None`: it wasn't.
    given_back: str | None = None
    #: The rest of the chunk was cancelled.
    cancelled: bool = False

    def add(self, commit: Commit) -> None:
        """Add the items of a commit."""
        self.embedded += commit.rows.items
        self.reused += commit.copies.items
        self.rejected += len(commit.rejects)
        self.tokens += int(commit.rows.tokens.sum())

    def __str__(self) -> str:
        return ", ".join(self._parts())

    def _parts(self) -> Iterator[str]:
        yield f"{self.embedded:,} embedded"
        if self.reused:
            yield f"{self.reused:,} reused"
        if self.rejected:
            yield f"{self.rejected:,} rejected"
        yield f"{self.tokens:,} tokens"
        yield f"{self.seconds:,.1f} s"
        if self.cancelled:
            yield "the rest was cancelled"


@dataclass(frozen=True, slots=True)
class Result:
    """Text that Flower shows as a task's result, without the quotes of a string."""

    text: str

    def __repr__(self) -> str:
        return self.text


class NotDone(Exception):
    """Reason why a task didn't end its chunk. What the claim has committed stays."""

    @classmethod
    def of(cls, error: Exception) -> "NotDone":
        """Return the reason that an error tells, with its type."""
        return cls(f"{type(error).__name__}: {error}"[:_MOST_CHARACTERS])


class GivenBack(NotDone):
    """The chunk, or the rest of it, waits for another claim."""


class Lost(NotDone):
    """The claim was lost: another one may have the chunk already."""


class Refused(NotDone):
    """The chunk can't be embedded until a person has mended what the reason says."""
