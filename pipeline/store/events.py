"""Events that webhooks are told of. An event is written in the transaction in which it happens, and kept until it is
delivered or given up."""

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, RowMapping, text
from uuid_utils.compat import uuid7

from pipeline.jobs import EventState


def add(
    connection: Connection, workspace_id: int, kind: str, data: Mapping[str, Any], *, url: str | None = None
) -> None:
    """Let a webhook be told of an event; nothing happens where neither `url` nor the workspace names one.

    Args:
        kind: such as `job.completed`.
        data: what is told, with `id`; no texts.
    """
    event_id = f"evt_{uuid7().hex}"
    body = {"id": event_id, "object": "event", "created_at": int(time.time()), "type": kind, "data": dict(data)}
    connection.execute(
        text("""
            insert into vectormill.events (id, workspace_id, type, url, body)
            select :id, w.id, :type, coalesce(:url, w.webhook), :body from vectormill.workspaces w
            where w.id = :workspace and coalesce(:url, w.webhook) is not null
        """),
        {"id": event_id, "workspace": workspace_id, "type": kind, "url": url, "body": json.dumps(body)},
    )


def due(connection: Connection, limit: int) -> Sequence[str]:
    """Ids of events that are to be tried, the longest due first."""
    rows = connection.execute(
        text("""
            select id from vectormill.events where state = 'waiting' and next_try_at <= clock_timestamp()
            order by next_try_at limit :limit
        """),
        {"limit": limit},
    )
    return list(rows.scalars())


def take(connection: Connection, event_id: str, lease_seconds: float) -> RowMapping | None:
    """Begin a try: `id, type, url, body, tries`, this one counted. Nobody else begins one for so long. None: it isn't
    due."""
    return (
        connection.execute(
            text("""
            update vectormill.events
            set tries = tries + 1, next_try_at = clock_timestamp() + make_interval(secs => :lease)
            where id = :id and state = 'waiting' and next_try_at <= clock_timestamp()
            returning id, type, url, body, tries
        """),
            {"id": event_id, "lease": lease_seconds},
        )
        .mappings()
        .one_or_none()
    )


def try_again(connection: Connection, event_id: str, answer: str, wait_seconds: float) -> None:
    """A try has failed; the next one is in so long."""
    connection.execute(
        text("""
            update vectormill.events
            set answer = :answer, next_try_at = clock_timestamp() + make_interval(secs => :wait)
            where id = :id and state = 'waiting'
        """),
        {"id": event_id, "answer": answer, "wait": wait_seconds},
    )


def end(connection: Connection, event_id: str, state: EventState, answer: str) -> None:
    """Try an event no more."""
    connection.execute(
        text("""
            update vectormill.events set state = :state, answer = :answer, finished_at = clock_timestamp()
            where id = :id and state = 'waiting'
        """),
        {"id": event_id, "state": state, "answer": answer},
    )


def standing(connection: Connection, given_up_within_seconds: float) -> RowMapping:
    """How events stand: `waiting`; of them `late`, which have failed before; `given_up` lately."""
    return (
        connection.execute(
            text("""
            select count(*) filter (where state = 'waiting') as waiting,
                   count(*) filter (where state = 'waiting' and answer is not null) as late,
                   count(*) filter (where state = 'given_up'
                                    and finished_at > now() - make_interval(secs => :age)) as given_up
            from vectormill.events where state <> 'delivered'
        """),
            {"age": given_up_within_seconds},
        )
        .mappings()
        .one()
    )


def forget_old(connection: Connection, days: float) -> None:
    """Forget events that ended so long ago."""
    connection.execute(
        text("delete from vectormill.events where finished_at < now() - make_interval(secs => 86400 * :days)"),
        {"days": days},
    )
