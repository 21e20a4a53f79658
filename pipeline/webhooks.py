"""Webhooks: where jobs' ends are told, and how: signed as the Standard Webhooks specification says, at least once, with
the same id and body each time."""

import hashlib
import hmac
import time
from base64 import b64decode, b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any
from urllib.parse import urlsplit

import httpcore2 as httpcore
import orjson
import structlog
from sqlalchemy import Connection, Engine, RowMapping

from pipeline import metrics
from pipeline.deadlines import Deadlines
from pipeline.errors import UserError, Waiting
from pipeline.job_status import Account
from pipeline.jobs import EventState, Job, JobState
from pipeline.settings import Settings
from pipeline.store import events

log = structlog.get_logger()

#: After the first try that fails, the second, and so on; a day in all.
WAITS_SECONDS = (5, 30, 120, 600, 1_800, 3_600, 7_200, 14_400, 28_800, 28_800)
_TRY_SECONDS = 10.0
#: Of one host before others' turn.
_MOST_TRIES = 100
#: A try whose dispatcher died is made again after so long.
_LEASE_SECONDS = 60.0
_PORTS = {"http": 80, "https": 443}
#: Dots, slashes and backslashes that a receiver may unpack into another path.
_PACKED = ("%2e", "%2f", "%5c")


def check(url: str, allowed: Sequence[str]) -> None:
    """Refuse an address that isn't below one of `allowed`.

    Raises:
        UserError: it isn't. The message leaves out what may be secret of it.
    """
    if not is_allowed(url, allowed):
        raise UserError(
            f"{_shown(url)} isn't below an address that the operator allows; VECTORMILL_WEBHOOKS lists them.",
            field="webhook",
        )


def is_allowed(url: str, allowed: Sequence[str]) -> bool:
    """Whether an address has the scheme, host and port of an allowed one, and its path begins with that one's, segment
    by segment."""
    asked = _parts(url)
    if asked is None:
        return False
    known = [parts for parts in map(_parts, allowed) if parts]
    return any(asked[0] == place and asked[1][: len(path)] == path for place, path in known)


def _parts(url: str) -> tuple[tuple[str, str, int], list[str]] | None:
    """(scheme, host, port) and the path's segments; None where it is no address that means the same to everybody."""
    try:
        parts = urlsplit(url)
        port = _PORTS[parts.scheme] if parts.port is None else parts.port
    except (ValueError, KeyError):
        return None
    plain = url.isascii() and url.isprintable() and not set(url) & set(' \\#"<>')
    if not plain or not parts.hostname or "@" in parts.netloc or not port:
        return None
    segments = [segment for segment in parts.path.split("/") if segment]
    if {".", ".."} & set(segments) or any(packed in parts.path.lower() for packed in _PACKED):
        return None
    return (parts.scheme, parts.hostname, port), segments


def _shown(url: str) -> str:
    """An address without its path, which may hold a token."""
    parts = _parts(url)
    return "it" if parts is None else f"{parts[0][0]}://{parts[0][1]}"


def job_ended(
    connection: Connection,
    job: Job,
    state: JobState,
    account: Account,
    *,
    reason: str | None,
    message: str | None,
) -> None:
    """Tell of a job's end, in the transaction that ends it. A job that is retried ends again, and it is told again."""
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
    """Tell that what was asked for in SQL has failed, or was cancelled, before it was a job."""
    try:
        options: dict[str, Any] = orjson.loads(request["options"])
    except ValueError:  # that may be why it has failed
        options = {}
    data = {
        "id": str(request["job_id"]),
        "name": request["name"] or "query",
        "state": state.value,
        "reason": reason,
        "message": message,
        "model": request["model"],
        "labels": options.get("labels", {}),
        "items": {"in": 0, "embedded": 0, "reused": 0, "rejected": 0, "cancelled": 0},
        "tokens": {"prompt": 0},
    }
    events.add(connection, request["workspace_id"], f"job.{state}", data, url=options.get("webhook"))


def signatures(secrets: str, event_id: str, timestamp: int, body: str) -> str:
    """The header `webhook-signature`: `v1,` and base64 of HMAC-SHA256 over id, time and body, by each secret.

    Args:
        secrets: `whsec_…`, with spaces between several.
    """
    signed = f"{event_id}.{timestamp}.{body}".encode()
    keys = (b64decode(secret.removeprefix("whsec_")) for secret in secrets.split())
    return " ".join(f"v1,{b64encode(hmac.digest(key, signed, hashlib.sha256)).decode()}" for key in keys)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a try means."""

    state: EventState
    #: Until the next try, of an event that still waits.
    wait_seconds: float = 0


def judge(status: int | None, tries: int) -> Verdict:
    """What an answer's status, or none, means after so many tries."""
    if status is not None and 200 <= status < 300:
        return Verdict(EventState.DELIVERED)
    if status == HTTPStatus.GONE or tries > len(WAITS_SECONDS):
        return Verdict(EventState.GIVEN_UP)
    return Verdict(EventState.WAITING, WAITS_SECONDS[tries - 1])


def deliver(engine: Engine, settings: Settings, host: str) -> None:
    """Tell the webhooks of a host of the events that are due, one after the other: who doesn't answer keeps nobody else
    waiting. No connection of the database is held meanwhile.

    Raises:
        Waiting: it doesn't answer.
    """
    for _ in range(_MOST_TRIES):
        with engine.begin() as connection:
            event = events.take(connection, host, _LEASE_SECONDS)
        if event is None:
            return
        if not _try(engine, settings, event):
            raise Waiting(f"{host} gave no answer; its other events wait.")


def _try(engine: Engine, settings: Settings, event: RowMapping) -> bool:
    """Tell of an event. Returns whether an answer came."""
    status, answer = _send(event, settings)
    verdict = judge(status, event["tries"])
    with engine.begin() as connection:
        if verdict.state is EventState.WAITING:
            events.try_again(connection, event["id"], answer, verdict.wait_seconds)
        else:
            events.end(connection, event["id"], verdict.state, answer)
    outcome = "failed" if verdict.state is EventState.WAITING else verdict.state.value
    metrics.DISPATCHER_WEBHOOK_TRIES.labels(outcome).inc()
    tell = log.warning if verdict.state is EventState.GIVEN_UP else log.info
    tell(f"webhook_{outcome}", event_id=event["id"], kind=event["type"], to=_shown(event["url"]), answer=answer)
    return status is not None


def _send(event: RowMapping, settings: Settings) -> tuple[int | None, str]:
    """A try: the answer's status, if one came, and what happened, for a person."""
    # Looked at again: what was allowed when the job was made may be so no more.
    if not is_allowed(event["url"], settings.webhooks):
        return None, "not below an address in VECTORMILL_WEBHOOKS of the dispatcher"
    if settings.webhook_secret is None:
        return None, "no VECTORMILL_WEBHOOK_SECRET to sign with"
    now, body = int(time.time()), event["body"]
    headers = {
        "host": urlsplit(event["url"]).netloc,
        "content-type": "application/json",
        "user-agent": "vectormill",
        "webhook-id": event["id"],
        "webhook-timestamp": str(now),
        "webhook-signature": signatures(settings.webhook_secret.get_secret_value(), event["id"], now, body),
    }
    deadlines = Deadlines()
    deadlines.end_at(time.monotonic() + _TRY_SECONDS)
    try:
        # No proxy and no redirection: the operator has said which addresses there are. Only the status is read.
        with (
            httpcore.ConnectionPool(network_backend=deadlines) as pool,
            pool.stream("POST", event["url"], headers=list(headers.items()), content=body.encode()) as response,
        ):
            return response.status, f"answers {response.status}"
    except httpcore.TimeoutException:
        return None, f"doesn't answer within {_TRY_SECONDS:g} s"
    except Exception as error:  # noqa: BLE001 - an address that no name server takes, a missing file of authorities
        return None, f"can't be reached ({type(error).__name__})"
