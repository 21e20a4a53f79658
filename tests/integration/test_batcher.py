"""Batcher of an engine: models on one device that can't be used, are replaced, or have much to read."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx2 as httpx
import numpy as np
import pytest
from pydantic import SecretStr
from sqlalchemy import Engine

import workers.engine.server
from pipeline.catalog import models
from pipeline.core.errors import BadVector, ModelError, ModelUnusable, UpstreamUnavailable, UserError
from pipeline.core.models import Model
from pipeline.core.options import Precision
from pipeline.db import engines
from pipeline.infra.settings import Settings, engine_authorization
from workers.encoders.local import LocalEncoder
from workers.encoders.model_cache import Loader, ModelCache
from workers.encoders.reading import Ids
from workers.engine import batcher as serving_module
from workers.engine.batcher import Batcher
from workers.engine.queue import Work
from workers.engine.server import ServedModels, main, make_app


@pytest.fixture
def model(engine: Engine, static_description: dict[str, Any]) -> Model:
    with engine.begin() as connection:
        models.add_model(connection, "static", static_description)
        return models.find_model(connection, models.workspace_id(connection), "static")


@contextmanager
def batcher_with(loader: Loader) -> Iterator[Batcher]:
    made = Batcher(ModelCache(loader, 2**32), queue_seconds=30)
    try:
        yield made
    finally:
        made.stop()


class Loads(Loader):
    """Loader of models that counts its calls, and fails when told to."""

    def __init__(self) -> None:
        super().__init__("cpu", None, "float32")
        self.asked = 0
        self.error: Exception | None = None
        self.encoders: list[LocalEncoder] = []

    def load(self, model: Model, precision: Precision = Precision.AUTO) -> LocalEncoder:
        self.asked += 1
        if self.error:
            raise self.error
        self.encoders.append(super().load(model, precision))
        return self.encoders[-1]


@pytest.fixture
def loads() -> Loads:
    return Loads()


@pytest.fixture
def batcher(loads: Loads) -> Iterator[Batcher]:
    with batcher_with(loads) as made:
        yield made


def embed(batcher: Batcher, model: Model, texts: Sequence[str] = ("x",)) -> Any:
    return asyncio.run(batcher.embed(model, texts))


# Models that can't be used


@pytest.mark.parametrize("error", [ModelError("not those files"), OSError("no such disk")])
def test_a_model_that_cant_be_loaded_is_left_alone_for_a_while(
    batcher: Batcher, loads: Loads, model: Model, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    loads.error = error
    for _ in range(3):
        with pytest.raises(ModelUnusable, match=str(error)):
            embed(batcher, model)
    assert loads.asked == 1
    assert not batcher.can_use(model)
    other = replace(model, weights_sha256="another")
    assert batcher.can_use(other), "added anew it is another one"
    monkeypatch.setattr(serving_module, "_UNUSABLE_SECONDS", 0.0)
    batcher._unusable.clear()
    with pytest.raises(ModelUnusable):
        embed(batcher, model)
    assert batcher.can_use(model), "the time is over"
    loads.error = None
    assert embed(batcher, model).vectors.shape == (1, 256)


def test_a_canary_tells_a_bad_device_from_a_bad_text(
    batcher: Batcher, loads: Loads, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    embed(batcher, model)
    (encoder,) = loads.encoders
    forward = encoder._forward
    poison = encoder.tokenise(["poison"]).ids[0].tolist()

    def chokes(ids: list[Ids]) -> Any:
        if poison in [each.tolist() for each in ids]:
            raise IndexError("out of range")
        return forward(ids)

    monkeypatch.setattr(encoder, "_forward", chokes)
    with pytest.raises(ModelError, match=r"input\[1\]: the model raised IndexError") as refused:
        embed(batcher, model, ["fine", "poison"])
    assert not isinstance(refused.value, ModelUnusable)
    with pytest.raises(BadVector, match=r"input\[1\]: .* zero"):
        embed(batcher, model, ["fine", "\u200b"])
    assert embed(batcher, model).vectors.shape == (1, 256)

    def broken(_: list[Ids]) -> Any:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(encoder, "_forward", broken)
    with pytest.raises(ModelUnusable):
        embed(batcher, model)
    assert not batcher.can_use(model)
    batcher._unusable[("static", model.weights_sha256)] = (0.0, "long ago")
    assert embed(batcher, model).vectors.shape == (1, 256)
    assert loads.asked == 2, "loaded anew"


def test_who_waited_for_a_load_that_fails_does_not_try_it_again(batcher: Batcher, loads: Loads, model: Model) -> None:
    loads.error = ModelError("not those files")

    async def ask() -> list[Any]:
        return await asyncio.gather(*(batcher.embed(model, ["x"]) for _ in range(5)), return_exceptions=True)

    assert [type(error) for error in asyncio.run(ask())] == [ModelUnusable] * 5
    assert loads.asked == 1


def test_an_engine_shows_what_it_can_use(
    engine: Engine, batcher: Batcher, loads: Loads, model: Model, static_description: dict[str, Any]
) -> None:
    """A request for a model that this engine can't use may go to another engine."""
    with engine.begin() as connection:
        models.add_model(connection, "other", static_description)
    catalogue = ServedModels(engine, Settings(), "http://here", uuid4(), batcher.can_use)

    def shown() -> Any:
        catalogue.read()
        catalogue.show()
        with engine.begin() as connection:
            return [row["models"] for row in engines.live(connection, 10)]

    assert shown() == [["other", "static"]]

    async def ask(name: str = "static", **more: str) -> httpx.Response:
        transport = httpx.ASGITransport(make_app(catalogue, batcher))
        async with httpx.AsyncClient(transport=transport, base_url="http://engine") as client:
            return await client.post("/embed", json={"model": name, "texts": ["x"], **more})

    catalogue.read()
    with engine.begin() as connection:
        models.add_model(connection, "late", static_description)
    assert asyncio.run(ask("late")).status_code == 200, "read anew, and loaded"
    assert asyncio.run(ask("never")).status_code == 404
    assert asyncio.run(ask("other", weights=model.weights_sha256)).status_code == 200
    assert asyncio.run(ask("other", weights="of a model that had this name")).status_code == 404
    loads.error = ModelError("not those files")
    assert asyncio.run(ask()).status_code == 424
    assert shown() == [["late", "other"]]


class _Unread(httpx.AsyncByteStream):
    """Request body that must not be read."""

    async def __aiter__(self) -> AsyncIterator[bytes]:
        raise AssertionError("the body was read")
        yield b""


class _Endless(httpx.AsyncByteStream):
    async def __aiter__(self) -> AsyncIterator[bytes]:
        while True:
            yield b" " * 65_536


@pytest.mark.parametrize(
    ("headers", "body", "status"),
    [
        ({}, _Unread(), 401),
        ({"authorization": "Bearer guess"}, _Unread(), 401),
        ({"authorization": engine_authorization(None)}, _Unread(), 401),
        ({"authorization": engine_authorization(SecretStr("a secret of both"))}, _Endless(), 413),
    ],
)
def test_an_engine_reads_no_strangers_body_and_none_without_end(
    engine: Engine, batcher: Batcher, headers: dict[str, str], body: httpx.AsyncByteStream, status: int
) -> None:
    catalogue = ServedModels(engine, Settings(), "http://here", uuid4(), batcher.can_use)

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(make_app(catalogue, batcher, SecretStr("a secret of both"), 1024))
        async with httpx.AsyncClient(transport=transport, base_url="http://engine") as client:
            return await client.post("/embed", content=body, headers=headers)

    reply = asyncio.run(asyncio.wait_for(ask(), 60))
    assert (reply.status_code, reply.headers["connection"]) == (status, "close")


def test_an_engine_beyond_this_machine_needs_a_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("DATABASE_URL", "postgresql://nobody@127.0.0.1:1/x"), ("ENGINE_HOST", "0.0.0.0")):
        monkeypatch.setenv(f"VECTORMILL_{name}", value)
    monkeypatch.setattr(workers.engine.server, "configure_logs", lambda _: None)  # its effect would outlast the test
    with pytest.raises(UserError, match=r"at 0\.0\.0\.0, beyond this machine, needs VECTORMILL_ENGINE_SECRET"):
        main()


# Models that are replaced


def _waiting(batcher: Batcher) -> int:
    """Return the number of texts that wait."""
    return sum(len(each.texts) for queue in batcher._queues._queues.values() for each in queue.waiting)


def test_texts_go_through_the_encoder_that_has_read_them(
    batcher: Batcher, loads: Loads, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model may have been removed, and added with other weights, meanwhile."""
    embed(batcher, model)
    (old,) = loads.encoders
    held, going = threading.Event(), threading.Event()
    batches = old.batches

    def slow(*what: Any) -> Any:
        held.set()
        going.wait(120)
        return batches(*what)

    monkeypatch.setattr(old, "batches", slow)
    seen: list[Any] = []
    replaced = replace(model, weights_sha256="others")

    def load_other(*_: Any) -> LocalEncoder:
        loads.encoders.append(LocalEncoder(Path(str(model.path)), "cpu"))
        other = loads.encoders[-1]
        other_batches = other.batches

        def noting(tokenised: Any, *what: Any) -> Any:
            seen.append([each.tolist() for each in tokenised.ids])
            return other_batches(tokenised, *what)

        monkeypatch.setattr(other, "batches", noting)
        return other

    monkeypatch.setattr(loads, "load", load_other)

    async def ask() -> list[Any]:
        first = asyncio.ensure_future(batcher.embed(model, ["under way"]))
        await asyncio.to_thread(held.wait, 120)
        queued = asyncio.ensure_future(batcher.embed(model, ["waits for the old one"]))
        while not _waiting(batcher):
            await asyncio.sleep(0.001)
        new = asyncio.ensure_future(batcher.embed(replaced, ["for the new one"]))
        while len(loads.encoders) < 2 or _waiting(batcher) < 2:
            await asyncio.sleep(0.001)
        seen.clear()  # of the canary
        going.set()
        return [await one for one in (first, queued, new)]

    replies = asyncio.run(asyncio.wait_for(ask(), 240))
    assert [reply.vectors.shape for reply in replies] == [(1, 256)] * 3
    assert seen == [[each.tolist() for each in loads.encoders[1].tokenise(["for the new one"]).ids]]


# Fairness


def test_a_text_alone_is_in_the_next_two_batches(
    batcher: Batcher, loads: Loads, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four requests with the most texts allowed may wait meanwhile, each text as long as the single one. The wait is
    counted in batches, not in seconds."""
    embed(batcher, model)
    (encoder,) = loads.encoders
    monkeypatch.setattr(encoder, "budget_tokens", 100)
    forward, under_way, going = encoder._forward, threading.Event(), threading.Event()
    alone, seen = encoder.tokenise(["the one alone"]).ids[0].tolist(), list[bool]()

    def noting(ids: list[Ids]) -> Any:
        under_way.set()
        going.wait(20)
        seen.append(alone in [each.tolist() for each in ids])
        return forward(ids)

    async def ask() -> None:
        large = [asyncio.ensure_future(batcher.embed(model, ["one of many"] * 2_048)) for _ in range(4)]
        while _waiting(batcher) < 4 * 2_000:
            await asyncio.sleep(0.001)
        await asyncio.to_thread(under_way.wait, 20)
        small = asyncio.ensure_future(batcher.embed(model, ["the one alone"]))
        while batcher._work and any(work.reading_seconds for work in batcher._work):
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.01)
        going.set()
        await small
        assert not any(request.done() for request in large)
        assert seen.index(True) <= 2, "after that which was under way"
        for request in large:
            request.cancel()
        await asyncio.gather(*large, return_exceptions=True)

    monkeypatch.setattr(encoder, "_forward", noting)
    asyncio.run(asyncio.wait_for(ask(), 60))


def test_what_is_refused_is_what_would_wait_too_long(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rate is the model's rate on this machine, not the one measured when the model was added. This model was
    added on a machine a thousand times slower."""
    slow = replace(model, tokens_per_second=1.0)
    with batcher_with(Loader("cpu", None, "float32")) as batcher:
        for _ in range(2):
            embed(batcher, slow, ["word " * 100] * 500)
        monkeypatch.setattr(batcher, "_queue_seconds", 3)

        async def ask() -> list[Any]:
            return await asyncio.gather(*(batcher.embed(slow, ["word " * 10] * 500) for _ in range(4)))

        assert [reply.vectors.shape for reply in asyncio.run(ask())] == [(500, 256)] * 4
        batcher._work.add(Work("", "static", 1e9, 0.0))
        monkeypatch.setattr(batcher, "_queue_seconds", 0.01)
        with pytest.raises(UpstreamUnavailable) as refused:
            embed(batcher, slow, ["word " * 10_000] * 500)
        assert refused.value.retry_after_seconds
        assert embed(batcher, slow, ["small"]).vectors.shape == (1, 256)


# Reading


def test_a_small_request_isnt_read_after_a_large_one(
    batcher: Batcher, loads: Loads, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    embed(batcher, model)
    (encoder,) = loads.encoders
    tokenise, read = encoder.tokenise, list[int]()

    def noting(texts: Sequence[str], **how: Any) -> Any:
        read.append(sum(map(len, texts)))
        time.sleep(0.005)
        return tokenise(texts, **how)

    monkeypatch.setattr(encoder, "tokenise", noting)
    large = ["word " * 8_000] * 40

    async def ask() -> tuple[Any, Any]:
        whole = asyncio.ensure_future(batcher.embed(model, large))
        while not read:
            await asyncio.sleep(0)
        small = await batcher.embed(model, ["one"])
        assert not whole.done()
        return small, await whole

    _, whole = asyncio.run(ask())
    assert read.index(3) <= 3, "between the slices of the large one"
    assert len(read) == 41
    assert whole.vectors.shape == (40, 256)
    np.testing.assert_allclose(whole.vectors, np.repeat(whole.vectors[:1], 40, axis=0), atol=1e-6)
    assert whole.prompt_tokens == int(tokenise(large).lengths.sum())


def test_reading_counts_as_work(model: Model) -> None:
    """Even a model that reads only 256 tokens has to look at more than that of a text of a million characters."""
    bounded = replace(model, max_item_tokens=256)
    assert serving_module._reading_seconds(["word " * 200_000] * 100, bounded) > 0.5
    endless = replace(model, max_item_tokens=None)
    assert serving_module._reading_seconds(["word " * 200_000] * 100, endless) > 20
