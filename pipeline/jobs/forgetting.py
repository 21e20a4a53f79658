"""Requests to forget keys: a tombstone each at once; `pipeline.jobs.erasure` erases what is there."""

from collections.abc import Iterable
from itertools import islice
from uuid import UUID

from sqlalchemy import Connection, Engine
from uuid_utils.compat import uuid7

from pipeline.core.errors import UnknownForget, UserError
from pipeline.core.forget_status import ForgetStatus
from pipeline.core.tombstones import digest
from pipeline.db import forgets
from pipeline.db.collections import Collection

_KEYS_AT_ONCE = 10_000
_SHOWN_PLACES = 20


def forget_keys(
    engine: Engine, workspace_id: int, keys: Iterable[str], *, by: str, collection: Collection | None
) -> UUID:
    """Request that keys of a workspace, or of one of its collections, are forgotten. Return the request's id.

    From then on nothing with such a key comes in; the dispatcher erases what is there. All keys are taken, or none.

    Raises:
        UserError: there is no key.
    """
    given, forget_id = iter(keys), uuid7()
    scope = collection.id if collection else None
    with engine.begin() as connection:
        secret = forgets.tombstone_key(connection, workspace_id)
        forgets.add(connection, forget_id, workspace_id, scope, by)
        taken = False
        while page := list(islice(given, _KEYS_AT_ONCE)):
            forgets.add_keys(connection, forget_id, page, [digest(secret, key, scope) for key in page])
            taken = True
        if not taken:
            raise UserError("no key: give at least one.", field="keys")
        forgets.begin(connection, forget_id)
    return forget_id


def allow_keys(engine: Engine, workspace_id: int, keys: Iterable[str], *, collection: Collection | None) -> int:
    """Let forgotten keys come in again. Return how many of them were forgotten."""
    given, lifted = iter(keys), 0
    scope = collection.id if collection else None
    with engine.begin() as connection:
        secret = forgets.tombstone_key(connection, workspace_id)
        while page := list(islice(given, _KEYS_AT_ONCE)):
            forgets.keep(connection, workspace_id, scope, page)
            lifted += forgets.lift(connection, workspace_id, [digest(secret, key, scope) for key in page])
    return lifted


def forget_status(connection: Connection, workspace_id: int, forget_id: UUID) -> ForgetStatus:
    """Return how far a request of a workspace is.

    Raises:
        UnknownForget: there is none.
    """
    found = forgets.by_id(connection, forget_id)
    if found is None or found.workspace_id != workspace_id:
        raise UnknownForget(f'no request "{forget_id}" to forget keys.')
    tables = list[str]()
    if found.finished_at and found.collection_id is None:
        tables = forgets.tables_of_jobs(connection, workspace_id, _SHOWN_PLACES)
    return ForgetStatus(
        id=found.id,
        keys=found.keys,
        items=found.items,
        collected=found.collected,
        requested_by=found.requested_by,
        waits_for=found.waits_for[0] if found.waits_for else None,
        problem=found.problem,
        created_at=found.created_at,
        finished_at=found.finished_at,
        outputs=list(found.unseen[:_SHOWN_PLACES]),
        more_outputs=max(0, len(found.unseen) - _SHOWN_PLACES),
        tables=tables,
    )
