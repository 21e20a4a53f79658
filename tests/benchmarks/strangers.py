"""Requests of a workspace while a stranger attacks the api or the engine, against a calm time."""

import asyncio
import multiprocessing
import os
import socket
from collections.abc import Callable, Coroutine, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from multiprocessing.synchronize import Event
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter, sleep
from unittest.mock import patch

import aiohttp
import httpx2 as httpx

from pipeline.catalog import keys, models
from pipeline.cli.bootstrap import BUNDLED_MODEL
from pipeline.db import engines, workspaces
from pipeline.embedded.runtime import Running
from tests.benchmarks.harness import Benchmark, Rounds, Values
from tests.benchmarks.machine import connected, whole_machine

_SECONDS = 4.0
_UPLOADS, _SUBMITTERS, _HEADS, _CONNECTIONS = 6, 8, 1_500, 600
_ENGINE_BODY_BYTES = 600 * 1024**2
_PIECE_SECONDS = 1.0
#: Pause of the sender, which otherwise would itself take up the processor.
_PAUSE_SECONDS = 0.05

#: Attack on (URL of the api, URL of the engine, key, folder), which runs until it is killed. It sets the event when it
#: has begun.
Attack = Callable[[str, str, str, Path, Event], None]


def slow_uploads(api: str, _: str, key: str, __: Path, begun: Event) -> None:
    """Send uploads with one key, a byte at a time."""
    head = (
        f"POST /api/jobs HTTP/1.1\r\nhost: here\r\nauthorization: Bearer {key}\r\n"
        "content-type: multipart/form-data; boundary=x\r\ncontent-length: 1000\r\n\r\n"
    )
    _drip(api, _UPLOADS, head.encode(), b"-", begun)


def half_heads(api: str, _: str, __: str, ___: Path, begun: Event) -> None:
    """Send heads of requests without an end, for as long as the server allows."""
    _drip(api, _HEADS, b"POST /v1/embeddings HTTP/1.1\r\nhost: here\r\n", b"x: y\r\n", begun)


def many_stars(api: str, _: str, key: str, folder: Path, begun: Event) -> None:
    """Send patterns that a regular expression would try for half a minute, from several clients."""
    below = folder.joinpath(*"a" * 40)
    below.mkdir(parents=True, exist_ok=True)
    (below / "x.jsonl").write_text('{"text": "a"}\n', encoding="utf-8")
    pattern = f"{folder}/{'**/a/' * 30}{'*a' * 100}b.jsonl"

    async def ask(session: aiohttp.ClientSession) -> None:
        while True:
            async with session.post("/api/jobs", json={"model": BUNDLED_MODEL, "sources": [pattern]}) as reply:
                assert reply.status in (400, 404, 503), await reply.text()

    asyncio.run(_together(api, key, begun, _SUBMITTERS, ask))


def invented_keys(api: str, _: str, __: str, ___: Path, begun: Event) -> None:
    """Send requests on many connections, each with another key that nobody made."""
    numbers = iter(range(10**9))

    async def ask(session: aiohttp.ClientSession) -> None:
        while True:
            invented = {"authorization": f"Bearer vm_{next(numbers):016x}_{'a' * 43}"}
            async with session.get("/v1/models", headers=invented) as reply:
                assert reply.status == 401, await reply.text()

    asyncio.run(_together(api, "", begun, _CONNECTIONS, ask))


def one_key(api: str, _: str, key: str, __: Path, begun: Event) -> None:
    """Send requests on as many connections with one key."""

    async def ask(session: aiohttp.ClientSession) -> None:
        while True:
            async with session.get("/v1/models") as reply:
                assert reply.status in (200, 429), await reply.text()

    asyncio.run(_together(api, key, begun, _CONNECTIONS, ask))


def open_pages(api: str, _: str, __: str, ___: Path, begun: Event) -> None:
    """Request a page that is open to anybody, on as many connections."""

    async def ask(session: aiohttp.ClientSession) -> None:
        while True:
            async with session.get("/login") as reply:
                assert reply.status == 200, await reply.text()

    asyncio.run(_together(api, "", begun, _CONNECTIONS, ask))


def large_engine_bodies(_: str, engine: str, __: str, ___: Path, begun: Event) -> None:
    """Send bodies of 600 MB to the engine, without knowing its secret."""
    head = f"POST /embed HTTP/1.1\r\nhost: here\r\ncontent-length: {_ENGINE_BODY_BYTES}\r\n\r\n".encode()
    piece = bytes(1024**2)
    begun.set()
    while True:
        with _connected(engine, 1, head) as (line,):
            while _send(line, piece):
                pass
        sleep(_PAUSE_SECONDS)


def _drip(url: str, count: int, head: bytes, piece: bytes, begun: Event) -> None:
    with _connected(url, count, head) as lines:
        begun.set()
        while True:
            sleep(_PIECE_SECONDS)
            for line in lines:
                _send(line, piece)


async def _together(
    api: str, key: str, begun: Event, count: int, ask: Callable[[aiohttp.ClientSession], Coroutine[None, None, None]]
) -> None:
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(api, connector=connector, headers={"authorization": f"Bearer {key}"}) as session:
        begun.set()
        await asyncio.gather(*(ask(session) for _ in range(count)))


@contextmanager
def _connected(url: str, count: int, head: bytes) -> Iterator[list[socket.socket]]:
    host, port = url.removeprefix("http://").split(":")
    with ExitStack() as opened:
        lines = [opened.enter_context(socket.create_connection((host, int(port)), timeout=30)) for _ in range(count)]
        for line in lines:
            _send(line, head)
        yield lines


def _send(line: socket.socket, data: bytes) -> bool:
    """Send to a server that may have closed the connection. Return False if it had."""
    try:
        line.sendall(data)
    except OSError:
        return False
    return True


def measure(attack: Attack, rounds: Rounds) -> Values:
    """Return the requests per second that one client gets answered: a vector of one text and an upload, in turn."""
    with (
        TemporaryDirectory() as folder,
        patch.dict(os.environ, VECTORMILL_API_SOURCES=folder),
        whole_machine() as running,
    ):
        arguments = (running.api_url, _engine_url(running), _key_of_a_stranger(running), Path(folder))
        _ask(running, 5.0)

        def beside(_: int) -> float:
            spawn = multiprocessing.get_context("spawn")
            begun = spawn.Event()
            process = spawn.Process(target=attack, args=(*arguments, begun), daemon=True)
            process.start()
            try:
                assert begun.wait(60)
                sleep(1)
                served = _ask(running, _SECONDS)
                assert process.is_alive(), "the attack has ended"
                return served
            finally:
                process.kill()
                process.join()

        return rounds.interleave({"beside it": beside, "calm": lambda _: _ask(running, _SECONDS)})


def _ask(running: Running, seconds: float) -> float:
    headers, asked = {"authorization": f"Bearer {running.api_key}"}, 0
    began = perf_counter()
    with httpx.Client(base_url=running.api_url, headers=headers, timeout=60) as client:
        while (passed := perf_counter() - began) < seconds:
            client.post("/v1/embeddings", json={"model": BUNDLED_MODEL, "input": "A mill."}).raise_for_status()
            client.post("/v1/files", data={"purpose": "batch"}, files={"file": b"{}\n"}).raise_for_status()
            asked += 2
    return asked / passed


def _engine_url(running: Running) -> str:
    with connected(running) as where, where.engine.begin() as connection:
        return str(engines.live(connection, 60)[0]["url"])


def _key_of_a_stranger(running: Running) -> str:
    with connected(running) as where, where.engine.begin() as connection:
        made = workspaces.create(connection, "strangers", 1.0)
        assert made
        workspaces.enable_models(connection, made, [BUNDLED_MODEL])
        return keys.create(connection, models.workspace_id(connection, "strangers"), "attack").token


BENCHMARKS = [
    Benchmark(name=f"beside_{attack.__name__}_vs_calm", target=0.5, unit="requests/s", measure=partial(measure, attack))
    for attack in (slow_uploads, half_heads, many_stars, invented_keys, one_key, open_pages, large_engine_bodies)
]
