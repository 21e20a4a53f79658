"""Gateway, with api and engine as `up` runs them, against the bare encoder with as many texts at a time; and the cost
of making a reply."""

import asyncio
import json
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

import aiohttp
import numpy as np
import orjson

from pipeline.cli.bootstrap import BUNDLED_MODEL
from pipeline.core.openai import Asked, Embedded, make_reply
from pipeline.embedded.runtime import Running
from tests.benchmarks.bare import bare_engine, turn
from tests.benchmarks.corpus import distinct_docstrings
from tests.benchmarks.harness import Benchmark, Rounds, Values
from tests.benchmarks.machine import whole_machine

_CLIENTS = 16
_TEXTS = {1: 512, 64: 2_048}
_DIMENSIONS = 1_024
_REPLIES = 200


def measure_requests(texts_each: int, rounds: Rounds) -> Values:
    """Return texts per second, in requests of `texts_each` texts by 16 clients with one request each under way."""
    texts = distinct_docstrings(_TEXTS[texts_each])
    with whole_machine() as running, TemporaryDirectory() as folder:
        batch = _CLIENTS * texts_each
        with bare_engine(Path(folder, "texts.json"), texts, at_a_time=batch) as engine:
            asyncio.run(_post_all(running, texts[:batch], texts_each))
            return rounds.interleave(
                {
                    "gateway": lambda _: len(texts) / asyncio.run(_post_all(running, texts, texts_each)),
                    "bare encoder": lambda _: len(texts) / turn(engine),
                }
            )


async def _post_all(running: Running, texts: list[str], texts_each: int) -> float:
    """Return the seconds until the last answer."""
    bodies = [
        orjson.dumps({"model": BUNDLED_MODEL, "input": texts[at : at + texts_each], "encoding_format": "base64"})
        for at in range(0, len(texts), texts_each)
    ]
    headers = {"authorization": f"Bearer {running.api_key}", "content-type": "application/json"}
    waiting = iter(bodies)

    async def client(session: aiohttp.ClientSession) -> None:
        for body in waiting:
            async with session.post(f"{running.api_url}/v1/embeddings", data=body) as reply:
                answer = await reply.read()
                if not reply.ok:
                    raise RuntimeError(f"{reply.status} {answer.decode()}")

    async with aiohttp.ClientSession(headers=headers, timeout=aiohttp.ClientTimeout(600)) as session:
        start = perf_counter()
        await asyncio.gather(*(client(session) for _ in range(_CLIENTS)))
        return perf_counter() - start


def measure_reply(rounds: Rounds) -> Values:
    """Return replies per second, each of one embedding with 1,024 elements."""
    vectors = np.random.default_rng(0).normal(size=(1, _DIMENSIONS)).astype(np.float32)
    asked = Asked(model="m", texts=["x"], base64=True, dimensions=None, user=None)
    embedded = Embedded(vectors=vectors, prompt_tokens=1)
    listed = {
        "object": "list",
        "data": [{"object": "embedding", "index": 0, "embedding": vectors[0].tolist()}],
        "model": "m",
        "usage": {"prompt_tokens": 1, "total_tokens": 1},
    }

    def base64_reply(_: int) -> float:
        start = perf_counter()
        for _ in range(_REPLIES):
            make_reply(asked, embedded)
        return _REPLIES / (perf_counter() - start)

    def by_json(_: int) -> float:
        start = perf_counter()
        for _ in range(_REPLIES):
            json.dumps(listed).encode()
        return _REPLIES / (perf_counter() - start)

    base64_reply(0)
    by_json(0)
    return rounds.interleave({"base64 reply": base64_reply, "json.dumps": by_json})


BENCHMARKS = (
    *(
        Benchmark(
            name=f"gateway_{name}_vs_bare_engine",
            target=0.8,
            unit="items/s",
            measure=partial(measure_requests, texts_each),
        )
        for name, texts_each in (("single_text", 1), ("64_texts", 64))
    ),
    Benchmark(name="base64_reply_vs_json_dumps", target=10, unit="replies/s", measure=measure_reply),
)
