"""Search for leaks: texts of documents, and keys, may be found nowhere outside of the database's tables."""

import base64
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import chain
from urllib.parse import quote, quote_plus, unquote, urlsplit
from uuid import UUID

import httpx2 as httpx
import redis

from tests.acceptance.counts import METRICS
from tests.acceptance.poison import Poison
from tests.chaos.site import FLOWER_PASSWORD, GATEWAY_KEY, Site

#: Words of every document.
CANARY = "nineteen vermilion herons"
#: Queries of the messages about a job, by the place's name.
_TOLD = {
    "a job's message": "select message as told from vectormill.jobs where id = :job",
    "a chunk's error": "select last_error as told from vectormill.chunks where job_id = :job",
    "a reject's message": "select message as told from vectormill.rejects where job_id = :job",
    "a loss' cause": "select cause as told from vectormill.claim_losses where job_id = :job",
}
_OF_WORKERS = "select dropped::text || coalesce(resting, '') as told from vectormill.workers"
_PAGES = ("/", "/tasks", "/workers", "/broker", "/api/workers", "/api/tasks?limit=10000", "/metrics")
_MOST_TASKS = 50
#: Number of characters that show a text to be quoted in part.
_QUOTED = 20
_BODY = re.compile(r'"body": "([A-Za-z0-9+/=]+)"')


def leaks(site: Site) -> list[str]:
    """Return the places where a document's text or a key is found, while the processes still run."""
    _provoke(site)
    planted = _plant(site)
    found = _found(site, _places(site))
    missed = planted - found
    return sorted(found - planted) + [f"the search doesn't see that {one}" for one in sorted(missed)]


def leaks_of_job(site: Site, job: UUID) -> list[str]:
    """Return such places among the messages about a job, and in Redis meanwhile."""
    told = ((table, str(row["told"])) for table, query in _TOLD.items() for row in site.rows(query, job=job))
    return sorted(_found(site, chain(told, _redis(site))))


def _found(site: Site, places: Iterable[tuple[str, str]]) -> set[str]:
    secrets = {(name, form) for name, secret in _secrets(site) for form in _forms(secret)}
    return {f"{name} is in {place}" for place, content in places for name, form in secrets if form in content}


def _forms(secret: str) -> tuple[str, ...]:
    """Return a secret as it is, and as it is escaped in URLs."""
    return secret, quote(secret, safe=""), quote(secret), quote_plus(secret)


def _secrets(site: Site) -> Iterator[tuple[str, str]]:
    yield "a document's text", CANARY
    for poison in Poison:  # a poison comes before the canary, and may be all that is quoted
        yield "a document's text", poison[:_QUOTED]
    yield "the upstream's key", GATEWAY_KEY
    yield "the api's key", site.api_key.split("_", 2)[2]
    yield "Flower's password", FLOWER_PASSWORD
    urls = {name: site.fleet.environment[f"VECTORMILL_{name}_URL"] for name in ("DATABASE", "REDIS")} | site.logins
    for name, url in urls.items():
        if password := urlsplit(url).password:
            yield f"the password of {name}", unquote(password)


def _plant(site: Site) -> set[str]:
    """Put a text, a key and passwords where the search must find them. Return its expected findings."""
    (site.folder / "logs" / "planted.log").write_text(f"{CANARY} {GATEWAY_KEY} {site.logins['worker']}")
    with redis.Redis.from_url(site.redis_url) as client:
        client.rpush("planted", json.dumps({"body": base64.b64encode(CANARY.encode()).decode()}))
    return {
        "a document's text is in the log planted.log",
        "the upstream's key is in the log planted.log",
        "the password of worker is in the log planted.log",
        "a document's text is in Redis' planted",
    }


def _provoke(site: Site) -> None:
    """Send the api requests that fail, each with a text or a key in it."""
    with httpx.Client(base_url=site.api_url, timeout=30) as client:
        for key in (site.api_key, f"{site.api_key}x", CANARY):
            client.headers["authorization"] = f"Bearer {key}"
            for body in (
                {"model": "minilm", "input": CANARY},
                {"model": CANARY, "input": CANARY},
                {"model": "minilm", "input": [CANARY, {CANARY: CANARY}]},
                {"model": "minilm", "input": CANARY, "dimensions": CANARY},
            ):
                client.post("/v1/embeddings", json=body)
            client.post("/v1/embeddings", content=f'{{"input": "{CANARY}')
            client.post("/v1/files", files={"file": (f"{CANARY}.jsonl", CANARY)}, data={"purpose": "batch"})
            for source in _sources(site):
                reply = client.post("/api/jobs", json={"model": "minilm", "sources": [source]})
                # The request must have reached the storage.
                assert key != site.api_key or source.rpartition("/")[2] in reply.json()["detail"], reply.text
            client.get(f"/api/jobs/{CANARY}")


def _sources(site: Site) -> Iterator[str]:
    """Yield files that don't exist, and a broken one, all of them where the api may read."""
    broken = site.folder / "parquet" / "broken.jsonl"
    broken.parent.mkdir(exist_ok=True)
    broken.write_text(f'{{"text": "{CANARY}')
    yield str(broken)
    for folder in site.sources:
        yield f"{folder}/{CANARY}.jsonl"


def _places(site: Site) -> Iterator[tuple[str, str]]:
    for folder in (site.folder / "logs", site.home / "logs"):
        for file in folder.rglob("*.log*"):
            yield f"the log {file.name}", file.read_text(encoding="utf-8", errors="replace")
    for row in site.rows(_OF_WORKERS):
        yield "what a worker tells", row["told"]
    yield from _redis(site)
    yield from _pages(site)


def _redis(site: Site) -> Iterator[tuple[str, str]]:
    """Yield all that Redis holds, with the bodies of messages decoded."""
    with suppress(redis.RedisError), redis.Redis.from_url(site.redis_url, decode_responses=True) as client:
        readers = {
            "list": lambda key: client.lrange(key, 0, -1),
            "hash": client.hgetall,
            "zset": lambda key: client.zrange(key, 0, -1),
            "set": client.smembers,
            "string": client.get,
        }
        for key in client.scan_iter(count=1_000):
            kind = client.type(key)
            if kind == "none":  # removed since the scan
                continue
            content = str(readers[kind](key))
            bodies = (base64.b64decode(body).decode() for body in _BODY.findall(content))
            yield f"Redis' {key}", " ".join((key, content, *bodies))


def _pages(site: Site) -> Iterator[tuple[str, str]]:
    with httpx.Client(base_url=site.flower_url, auth=("vectormill", FLOWER_PASSWORD), timeout=60) as flower:
        for page in _PAGES:
            yield f"Flower's {page}", _body(flower, page)
        failed = flower.get("/api/tasks", params={"state": "FAILURE", "limit": _MOST_TASKS}).json()
        for task in failed:
            yield "Flower's page of a task", _body(flower, f"/task/{task}")
    with httpx.Client(base_url=site.api_url, headers={"authorization": f"Bearer {site.api_key}"}, timeout=60) as api:
        for page in ("/metrics", "/api/jobs", "/readyz"):
            yield f"the api's {page}", _body(api, page)
    for name, port in site.metrics_ports.items():
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            yield f"the metrics of {name}", _body(client, "/metrics")
    for file in (*site.kept.values(), *site.folder.glob(f"tmp/{METRICS}")):
        with suppress(FileNotFoundError):  # the file's process has just ended
            yield "the workers' metrics", file.read_bytes().decode("utf-8", "replace")


def _body(client: httpx.Client, page: str) -> str:
    reply = client.get(page)
    assert reply.status_code == 200, f"{page}: {reply.status_code}"
    return reply.text
