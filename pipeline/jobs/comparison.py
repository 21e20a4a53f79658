"""Comparison of a collection's next version with the current one, before readers are given it."""

import orjson
from sqlalchemy import Connection

from pipeline.core.collection_status import Comparison
from pipeline.core.collections import VersionState
from pipeline.core.options import JobOptions
from pipeline.db import collection_versions, collections, models, search
from pipeline.db.collections import Collection
from pipeline.jobs.collections import find_version
from pipeline.jobs.search import MOST_PASSAGES, NEIGHBOURS, nearest_distinct

_SAMPLED = 100
#: Keys whose pages are enough to draw from.
_LOOKED_AT = 20_000
#: Keys up to which vectors without an index are compared one by one.
_WITHOUT_INDEX = 100_000


def compare(connection: Connection, collection: Collection) -> Comparison:
    """Compare the sizes of both versions, and what is near to keys drawn at random.

    Raises:
        UserError: the collection has no next version.
    """
    following = find_version(connection, collection, VersionState.NEXT)
    keys, next_keys = (collections.about_keys(connection, each.version_id) for each in (collection, following))
    model = models.by_name(connection, following.model)
    price = model and model["price_per_million"]
    tokens = round(next_keys * collection_versions.mean_tokens(connection, following.version_id, _percent(next_keys)))
    drawn = []
    if all(_is_searched_soon(connection, *each) for each in ((collection, keys), (following, next_keys))):
        drawn = collection_versions.sample(
            connection, collection.version_id, following.version_id, _SAMPLED, _percent(keys)
        )
    shares = []
    for each in drawn:
        near, other = (
            _nearest(connection, version, each.key, vector)
            for version, vector in zip((collection, following), each.vectors, strict=True)
        )
        if near:
            shares.append(len(near & other) / len(near))
    return Comparison(
        model=collection.model,
        next_model=following.model,
        keys=keys,
        next_keys=next_keys,
        tokens=tokens,
        cost=None if price is None else float(price) * tokens / 1e6,
        sampled=len(drawn),
        overlap_at_10=sum(shares) / len(shares) if shares else None,
    )


def _percent(keys: int) -> float:
    return min(100.0, 100.0 * _LOOKED_AT / max(keys, 1))


def _is_searched_soon(connection: Connection, version: Collection, keys: int) -> bool:
    return keys <= _WITHOUT_INDEX or collections.has_index(connection, version.version_id)


def _nearest(connection: Connection, version: Collection, key: str, vector: str) -> set[str]:
    options = JobOptions.model_validate(dict(version.options))
    limit = MOST_PASSAGES if options.splits else NEIGHBOURS + 1
    found = search.nearest_keys(
        connection, version.version_id, orjson.loads(vector), limit, kept_as=options.dtype, where={}
    )
    return set(nearest_distinct(near.key for near in found if near.key != key))
