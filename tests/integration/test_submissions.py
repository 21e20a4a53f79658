"""Timing of an upload that real processes meet only by chance."""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient
from pydantic import SecretStr
from sqlalchemy import Engine
from starlette.types import Message
from uuid_utils.compat import uuid7

from pipeline.api.app import Bounded, make_app
from pipeline.api.status import submissions
from pipeline.catalog import keys
from pipeline.catalog.models import workspace_id
from pipeline.core.errors import RequestStalled
from pipeline.core.models import Model
from pipeline.infra.settings import Settings
from pipeline.ingest.submission import Submitted


@pytest.fixture
def line(engine: Engine, database: str, redis_url: str) -> Iterator[TestClient]:
    with engine.begin() as connection:
        key = keys.create(connection, workspace_id(connection), "test").token
    app = make_app(Settings(database_url=SecretStr(database)), database, redis_url)
    with TestClient(app, headers={"authorization": f"Bearer {key}"}) as made:
        yield made
    for held in (app.state.transfers.engine, app.state.database._engine):
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


def test_a_body_may_wait_for_its_answer() -> None:
    """Once the body is whole, the next message may take its time."""
    pieces = [_piece(b"a"), _piece(b"b", more=False), {"type": "http.disconnect"}]
    waits = [0.0, 0.0, 0.5]
    assert len(_read(pieces, waits, patience_seconds=0.1)) == 3


@pytest.mark.parametrize(
    ("pieces", "bounds"),
    [
        ([b"a"], {"patience_seconds": 0.05}),
        # A byte now and then.
        ([b"a"] * 1_000, {"patience_seconds": 0.2}),
        # Fast enough, but too long in all.
        ([b"a" * 65_536] * 1_000, {"most_seconds": 0.2}),
    ],
)
def test_a_body_that_comes_too_slowly(pieces: list[bytes], bounds: dict[str, float]) -> None:
    waits = [0.0, *[0.02] * len(pieces)]
    with pytest.raises(RequestStalled, match="came too slowly: at least 16 KiB/s"):
        _read([_piece(piece) for piece in pieces], waits, **bounds)


def test_a_slow_reader_of_ours_isnt_the_clients_fault() -> None:
    """The reader may be slow, as an upload that waits for its place."""
    pieces = [_piece(b"a") for _ in range(20)] + [_piece(b"b", more=False)]
    assert len(_read(pieces, [0.0] * len(pieces), between=0.02, patience_seconds=0.2)) == len(pieces)


def _piece(body: bytes, *, more: bool = True) -> Message:
    return {"type": "http.request", "body": body, "more_body": more}


def _read(pieces: list[Message], waits: list[float], between: float = 0.0, **bounds: float) -> list[Message]:
    """Send a route a body whose pieces come after these waits in seconds, and nothing after the last. Return the
    messages that it read."""
    got: list[Message] = []

    async def receive() -> Message:
        number = len(got)
        await asyncio.sleep(waits[number] if number < len(pieces) else 3600)
        return pieces[number]

    async def read(scope: Any, receive: Any, send: Any) -> None:
        while len(got) < len(pieces) or got[-1].get("more_body"):
            got.append(await receive())
            await asyncio.sleep(between)

    async def send(message: Message) -> None: ...

    bounded = Bounded(read, 1024**3, {}, **{"most_seconds": 3600, **bounds})
    asyncio.run(bounded({"type": "http", "path": "/api/jobs", "headers": []}, receive, send))
    return got
