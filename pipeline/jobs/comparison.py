"""Comparison of a collection's next version with the current one, before readers are given it."""

import orjson
from sqlalchemy import Connection

from pipeline.core.collection_status import Comparison
from pipeline.core.collections import VersionState
from pipeline.core.options import JobOptions
from pipeline.db import collection_keys, collection_versions, models, search
from pipeline.db.collections import Collection
from pipeline.jobs.collections import find_version

_NEIGHBOURS = 10
#: Passages of one key may be near to each other, so more are looked at.
_PASSAGES = 50
_SAMPLED = 100


def compare(connection: Connection, collection: Collection) -> Comparison:
    """Compare the sizes of both versions, and what is near to keys drawn at random.

    Raises:
        UserError: the collection has no next version.
    """
    following = find_version(connection, collection, VersionState.NEXT)
    model = models.by_name(connection, following.model)
    price = model and model["price_per_million"]
    tokens = collection_versions.tokens(connection, following.version_id)
    drawn = collection_versions.sample(connection, collection.version_id, following.version_id, _SAMPLED)
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
        keys=collection_keys.count_keys(connection, collection.version_id),
        next_keys=collection_keys.count_keys(connection, following.version_id),
        tokens=tokens,
        cost=None if price is None else float(price) * tokens / 1e6,
        sampled=len(drawn),
        overlap_at_10=sum(shares) / len(shares) if shares else None,
    )


def _nearest(connection: Connection, version: Collection, key: str, vector: str) -> set[str]:
    options = JobOptions.model_validate(dict(version.options))
    limit = _PASSAGES if options.splits else _NEIGHBOURS + 1
    found = search.nearest_keys(
        connection, version.version_id, orjson.loads(vector), limit, kept_as=options.dtype, where={}
    )
    others = dict.fromkeys(near.key for near in found if near.key != key)
    return set(list(others)[:_NEIGHBOURS])
