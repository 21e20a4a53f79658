"""Gold queries: the keys that a search should find, and how many of them a collection's version does."""

from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, Field, ValidationError

from pipeline.cli.api_backend import ApiBackend
from pipeline.cli.database_backend import DatabaseBackend
from pipeline.cli.search import search_collection
from pipeline.core.collections import VersionState
from pipeline.core.errors import UserError
from pipeline.jobs.search import MOST_PASSAGES, NEIGHBOURS, SearchRequest, nearest_distinct

_MOST_QUERIES = 10_000
_MOST_LINE = 1_000_000


class Gold(BaseModel):
    """Query, and the keys that it should find."""

    query: str = Field(min_length=1, max_length=100_000)
    keys: list[str | int] = Field(min_length=1, max_length=1_000)


def read_gold(path: Path) -> list[Gold]:
    """Return the queries of a file of JSON lines.

    Raises:
        UserError: it can't be read, has none or too many, or a line isn't a query with its keys.
    """
    found: list[Gold] = []
    try:
        with path.open("rb") as file:
            number = 0
            while line := file.readline(_MOST_LINE):
                number += 1
                if line.strip():
                    found.append(_read(line, f"{path}, line {number}"))
                if len(found) > _MOST_QUERIES:
                    raise UserError(f"--gold: {path} has more than {_MOST_QUERIES:,} queries; give fewer.")
    except OSError as error:
        raise UserError(f"--gold {path}: {error.strerror or error}.") from error
    if not found:
        raise UserError(f"--gold: {path} has no query.")
    return found


def _read(line: bytes, where: str) -> Gold:
    try:
        return Gold.model_validate_json(line)
    except ValidationError as error:
        wrong = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(map(str, wrong["loc"])) or "line"
        raise UserError(f'--gold: {where}: {field}: {wrong["msg"]}; write {{"query": "…", "keys": ["…"]}}.') from None


def recall(
    backend: DatabaseBackend | ApiBackend, collection: str, version: VersionState, gold: Sequence[Gold], workspace: str
) -> float:
    """Return the share of the keys that are among each query's ten nearest, on average over the queries."""
    wishes = [SearchRequest(query=each.query, limit=MOST_PASSAGES, version=version) for each in gold]
    shares = []
    for each, hits in zip(gold, search_collection(backend, wishes, collection, workspace), strict=True):
        wanted = {str(key) for key in each.keys}
        shares.append(
            len(wanted.intersection(nearest_distinct(hit.key for hit in hits))) / min(len(wanted), NEIGHBOURS)
        )
    return sum(shares) / len(shares)
