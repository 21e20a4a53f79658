"""At-least-once webhook delivery, signed by the Standard Webhooks specification; id and body are the same each try."""

import hashlib
import hmac
import time
from base64 import b64decode, b64encode
from dataclasses import dataclass
from http import HTTPStatus

import httpcore2 as httpcore
import structlog
from sqlalchemy import Engine, RowMapping

from pipeline.core.errors import Waiting
from pipeline.core.requests import EventState
from pipeline.db import events
from pipeline.infra import metrics
from pipeline.infra.http import answered_status
from pipeline.infra.settings import Settings
from pipeline.webhooks.allowlist import is_allowed, shown

log = structlog.get_logger()

#: Backoff after the first failed try, the second, and so on; about a day in all.
WAITS_SECONDS = (5, 30, 120, 600, 1_800, 3_600, 7_200, 14_400, 28_800, 28_800)
_TRY_SECONDS = 10.0
#: Tries for one host before it is other hosts' turn.
_MOST_TRIES = 100
#: Time after which a try whose dispatcher died is repeated.
_LEASE_SECONDS = 60.0


def signatures(secrets: str, event_id: str, timestamp: int, body: str) -> str:
    """Return the header `webhook-signature`: `v1,` and base64 of HMAC-SHA256 over id, time and body, by each secret.

    Args:
        secrets: `whsec_…`, several separated by spaces.
    """
    signed = f"{event_id}.{timestamp}.{body}".encode()
    keys = (b64decode(secret.removeprefix("whsec_")) for secret in secrets.split())
    return " ".join(f"v1,{b64encode(hmac.digest(key, signed, hashlib.sha256)).decode()}" for key in keys)


@dataclass(frozen=True, slots=True)
class Verdict:
    """Decision after a try."""

    state: EventState
    #: Backoff until the next try, for an event that still waits.
    wait_seconds: float = 0


def judge(status: int | None, tries: int) -> Verdict:
    """Return the decision after so many tries, by the status of the last response, `None` if none came."""
    if status is not None and 200 <= status < 300:
        return Verdict(EventState.DELIVERED)
    if status == HTTPStatus.GONE or tries > len(WAITS_SECONDS):
        return Verdict(EventState.GIVEN_UP)
    return Verdict(EventState.WAITING, WAITS_SECONDS[tries - 1])


def deliver(engine: Engine, settings: Settings, host: str) -> None:
    """Deliver a host's due events, one after the other. A host that doesn't answer delays no other. No database
    connection is held during a request.

    Raises:
        Waiting: the host doesn't answer.
    """
    for _ in range(_MOST_TRIES):
        with engine.begin() as connection:
            event = events.take(connection, host, _LEASE_SECONDS)
        if event is None:
            return
        if not _try(engine, settings, event):
            raise Waiting(f"{host} did not respond; its other events stay queued.")


def _try(engine: Engine, settings: Settings, event: RowMapping) -> bool:
    """Try to deliver an event. Return True if a response came."""
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
    """Send an event. Return the response's status, if one came, and the outcome in words, for a person."""
    # Checked again, since the allowlist may have changed after the job was made.
    if not is_allowed(event["url"], settings.webhooks):
        return None, "not allowed by the dispatcher's VECTORMILL_WEBHOOKS"
    if settings.webhook_secret is None:
        return None, "no VECTORMILL_WEBHOOK_SECRET to sign with"
    now, body = int(time.time()), event["body"]
    headers = {
        "content-type": "application/json",
        "webhook-id": event["id"],
        "webhook-timestamp": str(now),
        "webhook-signature": signatures(settings.webhook_secret.get_secret_value(), event["id"], now, body),
    }
    try:
        status = answered_status(
            "POST", event["url"], seconds=_TRY_SECONDS, headers=headers.items(), content=body.encode()
        )
        return status, f"answers {status}"
    except httpcore.TimeoutException:
        return None, f"doesn't answer within {_TRY_SECONDS:g} s"
    except Exception as error:  # noqa: BLE001 - a host name that no resolver takes, a missing CA bundle
        return None, f"can't be reached ({type(error).__name__})"
