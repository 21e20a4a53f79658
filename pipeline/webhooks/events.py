"""Webhook events: a job's end, or that of an SQL request that never became a job."""

from typing import Any

import orjson
from sqlalchemy import Connection, RowMapping

from pipeline.core.job_status import Account
from pipeline.core.jobs import Job, JobState
from pipeline.db import events


def job_ended(
    connection: Connection,
    job: Job,
    state: JobState,
    account: Account,
    *,
    reason: str | None,
    message: str | None,
) -> None:
    """Add the event of a job's end, in the transaction that ends it. A job that is retried ends again, with another
    event."""
    data = {
        "id": str(job.id),
        "name": job.name,
        "state": state.value,
        "reason": reason,
        "message": message,
        "model": job.model,
        "labels": job.labels,
        "items": account.items.model_dump(by_alias=True),
        "tokens": {"prompt": account.tokens.prompt},
    }
    events.add(connection, job.workspace_id, f"job.{state}", data, url=job.options.webhook)


def request_ended(connection: Connection, request: RowMapping, state: JobState, reason: str, message: str) -> None:
    """Add the event of an SQL request that failed or was cancelled before it became a job."""
    # Invalid options may be the reason for the failure.
    try:
        options: dict[str, Any] = orjson.loads(request["options"])
    except ValueError:
        options = {}
    labels, webhook = options.get("labels"), options.get("webhook")
    data = {
        "id": str(request["job_id"]),
        "name": request["name"] or "query",
        "state": state.value,
        "reason": reason,
        "message": message,
        "model": request["model"],
        "labels": labels if isinstance(labels, dict) else {},
        "items": {"in": 0, "embedded": 0, "reused": 0, "rejected": 0, "cancelled": 0},
        "tokens": {"prompt": 0},
    }
    url = webhook if isinstance(webhook, str) else None
    events.add(connection, request["workspace_id"], f"job.{state}", data, url=url)
