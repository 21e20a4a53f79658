"""Fairness of a gateway shared by clients of one text and clients of 512: latency of the former, lost throughput of the
latter."""

import asyncio
from dataclasses import dataclass, field
from statistics import quantiles
from time import perf_counter

import aiohttp
import orjson
from rich.console import Console

from pipeline.cli.bootstrap import BUNDLED_MODEL
from pipeline.embedded.runtime import Running
from tests.benchmarks.harness import Benchmark, Rounds, Values
from tests.benchmarks.machine import whole_machine

_LARGE_CLIENTS, _SMALL_CLIENTS = 4, 16
_TEXTS = 512
_SECONDS = 30.0
#: Texts of equal length, 18 tokens.
_TEXT = "A mill grinds grain, and the stream that turns its wheel never rests, number {}."


@dataclass
class _Seen:
    """Answers and refusals that the clients of a round saw."""

    #: Duration of each answered request for one text.
    seconds: list[float] = field(default_factory=list)
    #: Number of texts embedded, for both kinds of clients.
    texts: int = 0
    refused: int = 0


def measure(rounds: Rounds) -> Values:
    """Return texts per second of both kinds of clients together, against the large ones alone."""
    console = Console(stderr=True, highlight=False)
    with whole_machine() as running:
        asyncio.run(_round(running, large=1, small=1, seconds=5))

        def together(_: int) -> float:
            began = perf_counter()
            seen = asyncio.run(_round(running, large=_LARGE_CLIENTS, small=_SMALL_CLIENTS, seconds=_SECONDS))
            cuts = quantiles(seen.seconds, n=100, method="inclusive")
            console.print(
                f"    one text: {len(seen.seconds)} answers, p50 {cuts[49]:.2f} s, p95 {cuts[94]:.2f} s; "
                f"{seen.refused} requests refused",
                style="dim",
            )
            return seen.texts / (perf_counter() - began)

        def alone(_: int) -> float:
            began = perf_counter()
            seen = asyncio.run(_round(running, large=_LARGE_CLIENTS, small=0, seconds=_SECONDS))
            return seen.texts / (perf_counter() - began)

        return rounds.interleave({"large and small": together, "large alone": alone})


async def _round(running: Running, *, large: int, small: int, seconds: float) -> _Seen:
    """Send requests for so many seconds, one at a time per client; then await the last ones, so that every request is
    counted."""
    seen, until = _Seen(), perf_counter() + seconds
    headers = {"authorization": f"Bearer {running.api_key}", "content-type": "application/json"}
    async with aiohttp.ClientSession(headers=headers, timeout=aiohttp.ClientTimeout(600)) as session:

        async def client(texts: list[str]) -> None:
            body = orjson.dumps({"model": BUNDLED_MODEL, "input": texts, "encoding_format": "base64"})
            while perf_counter() < until:
                began = perf_counter()
                async with session.post(f"{running.api_url}/v1/embeddings", data=body) as reply:
                    await reply.read()
                if reply.ok:
                    seen.texts += len(texts)
                    if len(texts) == 1:
                        seen.seconds.append(perf_counter() - began)
                else:
                    seen.refused += 1
                    await asyncio.sleep(float(reply.headers.get("retry-after", 1)))

        texts = [_TEXT.format(number) for number in range(_TEXTS)]
        await asyncio.gather(*(client(texts) for _ in range(large)), *(client(texts[:1]) for _ in range(small)))
    return seen


BENCHMARK = Benchmark(name="gateway_shared_vs_large_alone", target=0.95, unit="texts/s", measure=measure)
