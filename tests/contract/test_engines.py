"""Client of engines in the api, against servers that answer as engines may."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from typing import Any

import numpy as np
import pytest

from pipeline.api.gateway import engines as engines_module
from pipeline.api.gateway.engines import Engines
from pipeline.core.errors import ApiError, BadVector, InternalError, ModelsOwnTokens, UpstreamUnavailable
from pipeline.core.openai import Embedded, pack_vectors
from tests.support.ports import free_port
from tests.support.scripted_gateway import Answer, ScriptedGateway, scripted_gateway

GOOD: Answer = (200, {}, pack_vectors(Embedded(vectors=np.ones((1, 4), np.float32), prompt_tokens=3)))
FULL: Answer = (503, {"retry-after": "7"}, b"full")
UNKNOWN: Answer = (404, {}, b"unknown")
CANT_LOAD: Answer = (424, {}, b"can't load it")
FAILED: Answer = (500, {}, b"failed")
BAD: Answer = (422, {}, b"3")
OWN: Answer = (400, {}, b"3")
LOST = None
NOBODY = "nobody listens"


@pytest.fixture
def servers() -> Iterator[list[ScriptedGateway]]:
    with ExitStack() as stack:
        yield [stack.enter_context(scripted_gateway()) for _ in range(3)]


def ask(servers: list[ScriptedGateway], *answers: Any) -> tuple[Embedded | ApiError, int]:
    """Return the outcome of a request to engines that give these answers, and the number of requests they received."""
    urls = []
    for server, answer in zip(servers, answers, strict=False):
        server.answer = lambda _, answer=answer: answer  # type: ignore[misc]
        url = server.url.removesuffix("/v1")
        urls.append(f"http://127.0.0.1:{free_port()}" if answer == NOBODY else url)
    rows: Any = [{"url": url, "models": ["m"]} for url in urls]

    async def body() -> Embedded | ApiError:
        engines = Engines()
        try:
            return await engines.embed(rows, "m", ["x"], weights="w", caller="1")
        except ApiError as error:
            return error
        finally:
            await engines.close()

    return asyncio.run(body()), sum(len(server.requests) for server in servers)


def test_a_model_that_was_just_added_is_asked_of_engines_that_dont_say_so_yet(servers: list[ScriptedGateway]) -> None:
    servers[0].answer = lambda _: GOOD
    rows: Any = [{"url": servers[0].url.removesuffix("/v1"), "models": ["other"]}]

    async def body(*, just_added: bool) -> Embedded:
        engines = Engines()
        try:
            return await engines.embed(rows, "m", ["x"], weights="w", caller="1", just_added=just_added)
        finally:
            await engines.close()

    assert asyncio.run(body(just_added=True)).prompt_tokens == 3
    with pytest.raises(UpstreamUnavailable, match="No engine serves the model") as refused:
        asyncio.run(body(just_added=False))
    assert refused.value.retry_after_seconds == 10, "an engine takes about so long to start"


def test_an_engine_that_is_replaced_is_asked_again(servers: list[ScriptedGateway]) -> None:
    answers = iter([LOST, GOOD])
    servers[0].answer = lambda _: next(answers)
    rows: Any = [{"url": servers[0].url.removesuffix("/v1"), "models": ["m"]}]

    async def body() -> Embedded:
        engines = Engines()
        try:
            return await engines.embed(rows, "m", ["x"], weights="w", caller="1")
        finally:
            await engines.close()

    assert asyncio.run(body()).prompt_tokens == 3


def test_while_an_engine_comes_back_another_one_is_asked_first(servers: list[ScriptedGateway]) -> None:
    back, other = servers[:2]
    answers = iter([LOST])
    back.answer = lambda _: next(answers, GOOD)
    other.answer = lambda _: GOOD
    rows: Any = [{"url": server.url.removesuffix("/v1"), "models": ["m"]} for server in (back, other)]

    async def body() -> None:
        engines = Engines()
        try:
            for asked in range(1, 6):
                await engines.embed(rows, "m", ["x"], weights="w", caller="1")
                assert (len(back.requests), len(other.requests)) == (1, asked)
            back.healthy.set()
            async with asyncio.timeout(60):
                while len(back.requests) == 1:
                    await engines.embed(rows, "m", ["x"], weights="w", caller="1")
        finally:
            await engines.close()

    asyncio.run(body())


@pytest.mark.parametrize("is_patient", [True, False])
def test_those_that_were_lost_are_asked_again_one_at_a_time_but_not_for_ever(
    servers: list[ScriptedGateway], monkeypatch: pytest.MonkeyPatch, is_patient: bool
) -> None:
    """The first retry hangs. Another model's request doesn't wait for it; its own model's do until patience ends."""
    monkeypatch.setattr(engines_module, "_ALONE_SECONDS", 3_600.0 if is_patient else 0.1)
    both_lost, is_over = threading.Barrier(2), threading.Event()

    def lose() -> Iterator[bytes]:
        both_lost.wait(60)
        yield b""

    def hang() -> Iterator[bytes]:
        is_over.wait(60)
        yield b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(GOOD[2]), GOOD[2])

    answers: dict[str, Iterator[Any]] = {"m": iter([lose(), lose(), hang()]), "other": iter([LOST])}
    server = servers[0]
    server.answer = lambda asked: next(answers[asked["model"]], GOOD)
    rows: Any = [{"url": server.url.removesuffix("/v1"), "models": ["m", "other"]}]

    def had() -> int:
        return [request["model"] for request in server.requests].count("m")

    async def body() -> None:
        engines = Engines()

        def ask(model: str) -> asyncio.Task[Embedded]:
            return asyncio.create_task(engines.embed(rows, model, ["x"], weights="w", caller="1"))

        try:
            async with asyncio.timeout(60):
                two = [ask("m"), ask("m")]
                while had() < 3:
                    await asyncio.sleep(0.01)
                await ask("other")
                if is_patient:
                    assert had() == 3
                else:
                    await asyncio.wait(two, return_when=asyncio.FIRST_COMPLETED)
                is_over.set()
                await asyncio.gather(*two)
        finally:
            is_over.set()
            await engines.close()

    asyncio.run(body())


@pytest.mark.parametrize("before", [FULL, UNKNOWN, CANT_LOAD, LOST, NOBODY])
def test_another_engine_is_asked(servers: list[ScriptedGateway], before: Any) -> None:
    found, _ = ask(servers, before, GOOD)
    assert isinstance(found, Embedded)
    assert found.prompt_tokens == 3


@pytest.mark.parametrize(
    ("answers", "kind", "said", "asked"),
    [
        ((), UpstreamUnavailable, "No engine serves the model", 0),
        ((UNKNOWN, UNKNOWN), UpstreamUnavailable, "No engine serves the model", 2),
        ((NOBODY, NOBODY), UpstreamUnavailable, "can be reached", 0),
        ((FULL, NOBODY), UpstreamUnavailable, "at capacity", 1),
        ((CANT_LOAD, FULL), UpstreamUnavailable, "at capacity", 2),
        ((CANT_LOAD, CANT_LOAD, CANT_LOAD), InternalError, "can't be loaded", 3),
        ((FAILED, GOOD), InternalError, "The model failed", 1),
        ((LOST, LOST, GOOD), UpstreamUnavailable, "was lost", 2),
        ((BAD, GOOD), BadVector, "input[3]: the model makes a vector of it that is zero or not finite", 1),
        ((OWN, GOOD), ModelsOwnTokens, "input[3] holds ids of the model's own vocabulary", 1),
    ],
)
def test_what_is_told_is_true(
    servers: list[ScriptedGateway], answers: tuple[Any, ...], kind: type[ApiError], said: str, asked: int
) -> None:
    found, had = ask(servers, *answers)
    assert isinstance(found, kind)
    assert said in str(found)
    assert had == asked
    if FULL in answers:
        assert found.retry_after_seconds == 7


def test_what_was_lost_is_asked_anew_and_not_on_a_connection_to_the_same_dead_process() -> None:
    """Peers of a killed process notice its death one connection at a time."""
    serving: list[Any] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        serving.append(asyncio.current_task())
        with suppress(asyncio.IncompleteReadError), closing(writer):
            for answers in (True, False):
                head = await reader.readuntil(b"\r\n\r\n")
                _, _, size = head.lower().partition(b"content-length:")  # a health check has none
                await reader.readexactly(int(size.partition(b"\r\n")[0] or 0))
                if answers:
                    writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(GOOD[2]), GOOD[2]))
                    await asyncio.sleep(0.1)  # so that simultaneous requests have a connection each

    async def run() -> list[Embedded]:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        engines = Engines()
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        rows: Any = [{"url": url, "models": ["m"]}]
        try:
            ask = [engines.embed(rows, "m", ["x"], weights="w", caller="1") for _ in range(3)]
            return [*await asyncio.gather(*ask), await engines.embed(rows, "m", ["x"], weights="w", caller="1")]
        finally:
            await engines.close()
            server.close()
            await asyncio.gather(*serving)

    assert len(asyncio.run(run())) == 4
