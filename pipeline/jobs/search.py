"""Search in a job or a collection: the model that embeds its queries, and what is nearest to them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Protocol
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field, StringConstraints
from sqlalchemy import Connection, RowMapping

from pipeline.core.collections import VersionState
from pipeline.core.errors import UnknownModel, UserError
from pipeline.core.options import MOST_COLUMNS, JobOptions, VectorType, Word
from pipeline.db import jobs, models, search
from pipeline.jobs import status
from pipeline.jobs.collections import find_collection, find_version

#: Keys that count as near in comparisons, and passages that are looked at for them, since a key may have several.
NEIGHBOURS, MOST_PASSAGES = 10, 50


def nearest_distinct(keys: Iterable[str | None]) -> list[str]:
    """Return the first ten different keys."""
    return list(dict.fromkeys(key for key in keys if key is not None))[:NEIGHBOURS]


class SearchRequest(BaseModel):
    """Search: a query in words, and the values that results must carry."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    query: str = Field(min_length=1, max_length=100_000, description="What to look for, in words.")
    limit: int = Field(default=10, ge=1, le=100, description="How many results.")
    version: VersionState = Field(
        default=VersionState.CURRENT,
        description="Of a collection: the version to search: current, next before a swap, or previous after one.",
    )
    where: dict[Word, Annotated[str, StringConstraints(max_length=2_000, pattern="^[^\0]*$")]] = Field(
        default={}, max_length=MOST_COLUMNS, description="Only results that carry these values, by column."
    )


class Hit(BaseModel):
    """Item or passage that a search found."""

    key: str | None
    similarity: float = Field(description="Cosine similarity, at most 1.")
    index: int | None = Field(default=None, description="Of a job: the item's index.")
    text: str | None = Field(default=None, description="Of a job: the text, while it is kept.")
    carried: dict[str, Any] | None = Field(default=None, description="The columns that are carried.")
    passage: int | None = Field(default=None, description="Number of the passage; null: the whole text.")
    start: int | None = Field(default=None, description="First character of the passage.")
    stop: int | None = Field(default=None, description="Character after its last one.")


class Hits(BaseModel):
    """Results of a search, the nearest first."""

    data: list[Hit]


class Searchable(Protocol):
    """Vectors that can be searched."""

    @property
    def workspace_id(self) -> int:
        """Workspace that they belong to."""

    @property
    def model(self) -> RowMapping:
        """Row of the model that made them, which embeds queries."""

    @property
    def dimensions(self) -> int:
        """Size of the vectors."""

    def nearest(self, connection: Connection, query: Sequence[float], wish: SearchRequest) -> list[Hit]:
        """Return what is nearest to a query's vector of that size."""


@dataclass(frozen=True, slots=True)
class SearchableJob:
    """Job whose vectors are in Postgres."""

    job_id: UUID
    workspace_id: int
    model: RowMapping
    dimensions: int
    passages: bool
    carried: Sequence[str]

    def nearest(self, connection: Connection, query: Sequence[float], wish: SearchRequest) -> list[Hit]:
        """Return the items nearest to a query's vector, by comparing all."""
        if wish.version is not VersionState.CURRENT:
            raise UserError("a job has no versions; leave it out.", field="version")
        _check_columns(wish.where, self.carried)
        found = search.nearest_items(
            connection, self.job_id, query, wish.limit, passages=self.passages, where=wish.where
        )
        return [_as_hit(near) for near in found]


@dataclass(frozen=True, slots=True)
class SearchableCollection:
    """Collection, in one of its versions."""

    version_id: int
    workspace_id: int
    model: RowMapping
    dimensions: int
    dtype: VectorType
    carried: Sequence[str]

    def nearest(self, connection: Connection, query: Sequence[float], wish: SearchRequest) -> list[Hit]:
        """Return the keys nearest to a query's vector, by the index."""
        _check_columns(wish.where, self.carried)
        found = search.nearest_keys(
            connection, self.version_id, query, wish.limit, kept_as=self.dtype, where=wish.where
        )
        return [_as_hit(near) for near in found]


def _check_columns(where: Mapping[str, str], carried: Sequence[str]) -> None:
    if unknown := sorted(where.keys() - set(carried)):
        known = f"columns are {', '.join(carried)}" if carried else "there is none"
        raise UserError(f'no carried column "{unknown[0]}"; {known}.', field="where")


def _as_hit(near: search.NearItem | search.NearKey) -> Hit:
    found = near._asdict() | {"similarity": round(near.similarity, 4)}
    if near.start is None:
        del found["passage"]
    return Hit(**found)


def job_to_search(connection: Connection, job_id: UUID) -> SearchableJob:
    """Return a job to search in.

    Raises:
        UnknownModel: its model is no longer in the catalogue as it was.
        UserError: its vectors aren't in Postgres.
    """
    job, model = status.known_job(connection, job_id), models.of_job(connection, job_id)
    if job.options.output:
        raise UserError(
            f"the vectors of job {job_id} are Parquet files at {job.options.output}; query them there, with DuckDB say."
        )
    return SearchableJob(
        job_id,
        job.workspace_id,
        _known(model, f"job {job_id}"),
        jobs.vector_space(connection, job_id)["dimensions"],
        job.options.splits,
        job.options.columns.carry,
    )


def collection_to_search(
    connection: Connection, workspace_id: int, name: str, version: VersionState = VersionState.CURRENT
) -> SearchableCollection:
    """Return a collection to search in.

    Raises:
        UnknownCollection: there is none of this name.
        UnknownModel: its model is no longer in the catalogue as it was.
        UserError: it has no such version.
    """
    found = find_version(connection, find_collection(connection, workspace_id, name), version)
    options = JobOptions.model_validate(dict(found.options))
    model = models.of_space(connection, found.model, found.vector_space_id)
    return SearchableCollection(
        found.version_id,
        workspace_id,
        _known(model, f"collection {name}"),
        found.dimensions,
        options.dtype,
        options.carry,
    )


def _known(model: RowMapping | None, whose: str) -> RowMapping:
    if model is None:
        raise UnknownModel(f"the model of {whose} is no longer in the catalogue as it was; a query can't be embedded.")
    return model
