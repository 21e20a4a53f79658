"""What a worker reads when it has claimed a chunk."""

from sqlalchemy import Connection

from pipeline.jobs import Claim, Item
from pipeline.store import items


def read_chunk(connection: Connection, claim: Claim) -> list[Item]:
    """The chunk's items that have neither vector nor reject yet, in index order."""
    return items.read_unfinished(connection, claim.job_id, claim.first_index, claim.items)
