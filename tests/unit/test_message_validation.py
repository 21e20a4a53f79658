"""Validation of messages that arrive through Redis."""

import base64
import json
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from tests.support.messages_made import MARK, QUEUE, command, head, message, no_calls, no_commands
from workers.runner import message_validation

_NOWHERE = Path("/nonexistent/unpickled")


def body_of(made: dict[str, Any]) -> Any:
    return json.loads(base64.b64decode(made["body"]))


@pytest.mark.parametrize("what", no_calls(_NOWHERE))
def test_what_isnt_a_call_of_ours_is_refused(what: str) -> None:
    given, reason = no_calls(_NOWHERE)[what]
    with pytest.raises(message_validation.Refused, match=reason) as caught:
        message_validation.call(given, QUEUE)
    assert MARK not in str(caught.value)


def test_of_a_call_ids_are_believed_and_nothing_else() -> None:
    job, task = str(uuid4()), str(uuid4())
    more: dict[str, Any] = {"callbacks": [], "errbacks": None, "chain": None, "chord": None}
    headers = head(id=task, timelimit=[0.001, 0.001], eta="2999-01-01T00:00:00", retries="x", argsrepr=MARK, group=MARK)
    made = message_validation.call(message([[job, 7], {}, more], headers=headers, properties=7, more=MARK), QUEUE)
    assert body_of(made)[0] == [job, 7]
    assert MARK not in json.dumps(made)
    assert set(made["headers"]) == {"lang", "task", "id", "root_id", "shadow", "argsrepr", "kwargsrepr"}
    assert (made["headers"]["shadow"], made["headers"]["argsrepr"]) == (None, f"(job={job}, chunk=7)")
    assert made["headers"]["id"] == made["properties"]["correlation_id"] == task
    assert made["properties"]["delivery_info"]["routing_key"] == QUEUE


@pytest.mark.parametrize("ending", ["", " ", "x" * 300, "\n", "\x1b[31m"])
def test_what_flower_shows_is_ours_or_left_out(ending: str) -> None:
    job = str(uuid4())
    body = [[job, 7], {}, {"callbacks": None}]
    name, shown = f"docs:model{ending}", f"chunk 1/2, 8 items, docs{ending} (job={job}, chunk=7)"
    made = message_validation.call(message(body, headers=head(shadow=name, argsrepr=shown)), QUEUE)["headers"]
    kept = ending in ("", " ")
    assert made["shadow"] == (name if kept else None)
    assert made["argsrepr"] == (shown if kept else f"(job={job}, chunk=7)")


def test_a_call_of_another_chunk_is_not_shown_as_this_one() -> None:
    job = str(uuid4())
    given = message([[job, 7], {}, {"callbacks": None}], headers=head(argsrepr=f"chunk 8/8 (job={job}, chunk=8)"))
    assert message_validation.call(given, QUEUE)["headers"]["argsrepr"] == f"(job={job}, chunk=7)"


@pytest.mark.parametrize("what", no_commands())
def test_what_isnt_a_command_that_workers_do_is_refused(what: str) -> None:
    given, reason = no_commands()[what]
    with pytest.raises(message_validation.Refused, match=reason) as caught:
        message_validation.command(given, "mailbox")
    assert MARK not in str(caught.value)


@pytest.mark.parametrize("method", ["add_consumer", "cancel_consumer"])
def test_a_worker_is_told_to_listen_to_a_models_queue(method: str) -> None:
    asked = {"queue": "embed.all-minilm-l6-v2.1", "exchange": MARK, "exchange_type": "topic", "x": 1}
    reply_to = {"exchange": "reply.celery.pidbox", "routing_key": "me"}
    given = command(method, asked, destination=["a@b"], pattern=None, ticket="7", reply_to=reply_to)
    assert body_of(message_validation.command(given, "mailbox")) == {
        "method": method,
        "arguments": {"queue": "embed.all-minilm-l6-v2.1"},
        "destination": ["a@b"],
        "ticket": "7",
        "reply_to": reply_to,
    }


@pytest.mark.parametrize("method", ["ping", "stats", "active", "conf", "registered", "enable_events"])
def test_whoever_asks_may_look(method: str) -> None:
    made = body_of(message_validation.command(command(method, {"taskinfoitems": [MARK]}), "mailbox"))
    assert (made["method"], made["arguments"]) == (method, {})
