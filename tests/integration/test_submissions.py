"""Moments of an upload that real processes meet by chance only."""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient
from pydantic import SecretStr
from sqlalchemy import Engine
from starlette.types import Message
from uuid_utils.compat import uuid7

from pipeline import keys
from pipeline.api import submissions
from pipeline.api.app import Bounded, make_app
from pipeline.catalog import workspace_id
from pipeline.errors import RequestStalled
from pipeline.jobs import Model
from pipeline.settings import Settings
from pipeline.submission import Submitted


@pytest.fixture
def line(engine: Engine, database: str, redis_url: str) -> Iterator[TestClient]:
    with engine.begin() as connection:
        key = keys.create(connection, workspace_id(connection), "test").token
    app = make_app(Settings(database_url=SecretStr(database)), database, redis_url)
    with TestClient(app, headers={"authorization": f"Bearer {key}"}) as made:
        yield made
    for held in (app.state.bulk.engine, app.state.database._engine):
        held.dispose()


def test_what_it_attached_to_is_undone_just_then(
    line: TestClient, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = Submitted(uuid7(), "job is being submitted right now")
    monkeypatch.setattr(submissions, "submit", lambda *_: gone)
    file = [("file", ("docs.jsonl", b'{"text": "sail"}\n'))]
    reply = line.post("/api/jobs", data={"model": model.name}, files=file, headers={"idempotency-key": "a"})
    assert (reply.status_code, reply.headers["retry-after"]) == (503, "1")
    assert reply.json()["title"] == "submission undone"
    assert reply.json()["detail"].endswith("send this one again.")


def test_a_body_that_stalls_is_given_up() -> None:
    """An upload holds a place meanwhile. Once the body is whole, what comes may take its time."""
    pieces: list[Message] = [
        {"type": "http.request", "body": b"a", "more_body": True},
        {"type": "http.request", "body": b"b", "more_body": False},
    ]
    held: list[Message] = []

    async def receive() -> Message:
        if pieces:
            return pieces.pop(0)
        await asyncio.sleep(0.5)
        return {"type": "http.disconnect"}

    async def read(scope: Any, receive: Any, send: Any) -> None:
        held.extend([await receive() for _ in range(3)])

    async def send(message: Message) -> None: ...

    scope = {"type": "http", "path": "/api/jobs", "headers": []}
    bounded = Bounded(read, 100, {}, stall_seconds=0.05)
    asyncio.run(bounded(scope, receive, send))
    assert [message["type"] for message in held] == ["http.request", "http.request", "http.disconnect"]
    pieces[:] = [{"type": "http.request", "body": b"a", "more_body": True}]
    with pytest.raises(RequestStalled, match=r"No piece of the body came for 0\.05 s"):
        asyncio.run(bounded(scope, receive, send))
