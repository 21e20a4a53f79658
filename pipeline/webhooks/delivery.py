"""Delivery of events: signed as the Standard Webhooks specification says, at least once, with the same id and body each
time."""

import hashlib
import hmac
import time
from base64 import b64decode, b64encode
from dataclasses import dataclass
from http import HTTPStatus
from urllib.parse import urlsplit

import httpcore2 as httpcore
import structlog
from sqlalchemy import Engine, RowMapping

from pipeline.core.errors import Waiting
from pipeline.core.requests import EventState
from pipeline.db import events
from pipeline.infra import metrics
from pipeline.infra.http import Deadlines
from pipeline.infra.settings import Settings
from pipeline.webhooks.allowlist import is_allowed, shown

log = structlog.get_logger()

#: After the first try that fails, the second, and so on; a day in all.
WAITS_SECONDS = (5, 30, 120, 600, 1_800, 3_600, 7_200, 14_400, 28_800, 28_800)
_TRY_SECONDS = 10.0
#: Of one host before others' turn.
_MOST_TRIES = 100
#: A try whose dispatcher died is made again after so long.
_LEASE_SECONDS = 60.0


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
    tell(f"webhook_{outcome}", event_id=event["id"], kind=event["type"], to=shown(event["url"]), answer=answer)
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
