"""Transactional outbox of webhook events. An event is written in the transaction in which it happens, and kept until it
is delivered or given up. Its receiver is the host of its URL, with the port."""

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, RowMapping, text
from uuid_utils.compat import uuid7

from pipeline.core.requests import EventState


def add(
    connection: Connection, workspace_id: int, kind: str, data: Mapping[str, Any], *, url: str | None = None
) -> None:
    """Add an event for a webhook. Nothing is added if neither `url` nor the workspace names a webhook.

    Args:
        kind: such as `job.completed`.
        data: the payload, with `id`; no texts.
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
    """Return the hosts with events due for a try, the longest due first. Only one event of each host is looked at."""
    rows = connection.execute(
        text("""
            with recursive hosts (host) as (
              select min(split_part(url, '/', 3)) from vectormill.events where state = 'waiting'
              union all
              select (select min(split_part(url, '/', 3)) from vectormill.events
                      where state = 'waiting' and split_part(url, '/', 3) > hosts.host)
              from hosts where host is not null
            )
            select host from hosts cross join lateral (
              select min(next_try_at) as first from vectormill.events
              where state = 'waiting' and split_part(url, '/', 3) = host
            ) due
            where first <= clock_timestamp() order by first limit :limit
        """),
        {"limit": limit},
    )
    return list(rows.scalars())


def take(connection: Connection, host: str, lease_seconds: float) -> RowMapping | None:
    """Begin a try of a host's longest due event: `id, type, url, body, tries`, this one counted. For `lease_seconds`
    nobody else begins a try of this event. Return None if none is due."""
    return (
        connection.execute(
            text("""
            update vectormill.events
            set tries = tries + 1, next_try_at = clock_timestamp() + make_interval(secs => :lease)
            where id = (select id from vectormill.events
                        where state = 'waiting' and split_part(url, '/', 3) = :host
                          and next_try_at <= clock_timestamp()
                        order by next_try_at limit 1 for update skip locked)
            returning id, type, url, body, tries
        """),
            {"host": host, "lease": lease_seconds},
        )
        .mappings()
        .one_or_none()
    )


def try_again(connection: Connection, event_id: str, answer: str, wait_seconds: float) -> None:
    """Record a failed try; the next one is due in `wait_seconds`."""
    connection.execute(
        text("""
            update vectormill.events
            set answer = :answer, next_try_at = clock_timestamp() + make_interval(secs => :wait)
            where id = :id and state = 'waiting'
        """),
        {"id": event_id, "answer": answer, "wait": wait_seconds},
    )


def end(connection: Connection, event_id: str, state: EventState, answer: str) -> None:
    """End an event, so that it is never tried again."""
    connection.execute(
        text("""
            update vectormill.events set state = :state, answer = :answer, finished_at = clock_timestamp()
            where id = :id and state = 'waiting'
        """),
        {"id": event_id, "state": state, "answer": answer},
    )


def backlog(connection: Connection, given_up_within_seconds: float) -> RowMapping:
    """Count events: `waiting`; `late`, those among them that have failed before; `given_up` within the given
    seconds."""
    return (
        connection.execute(
            text("""
            select count(*) as waiting, count(answer) as late,
                   (select count(*) from vectormill.events
                    where state = 'given_up' and finished_at > now() - make_interval(secs => :age)) as given_up
            from vectormill.events where state = 'waiting'
        """),
            {"age": given_up_within_seconds},
        )
        .mappings()
        .one()
    )


def forget_old(connection: Connection, days: float) -> None:
    """Delete events that ended more than `days` ago."""
    connection.execute(
        text("""
            delete from vectormill.events
            where state in ('delivered', 'given_up') and finished_at < now() - make_interval(secs => 86400 * :days)
        """),
        {"days": days},
    )
