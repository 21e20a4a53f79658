"""What may be found nowhere outside of the database's tables: texts of documents, and keys."""

from collections.abc import Iterator
from urllib.parse import urlsplit

import httpx2 as httpx
import redis

from tests.acceptance.faults.site import FLOWER_PASSWORD, GATEWAY_KEY, Site

#: Words of every document.
CANARY = "nineteen vermilion herons"
_ERRORS = (
    "select message from vectormill.jobs",
    "select last_error from vectormill.chunks",
    "select message from vectormill.rejects",
    "select cause from vectormill.claim_losses",
    "select dropped::text || coalesce(resting, '') from vectormill.workers",
)
_PAGES = ("/", "/tasks", "/workers", "/broker", "/api/workers", "/api/tasks?limit=10000", "/metrics")
_MOST_TASKS = 50


def leaks(site: Site) -> list[str]:
    """Where a document's text or a key is found, while the processes still run."""
    _provoke(site)
    found = {
        f"{name} is in {place}"
        for place, content in _places(site)
        for name, secret in _secrets(site)
        if secret in content
    }
    return sorted(found)


def _secrets(site: Site) -> Iterator[tuple[str, str]]:
    yield "a document's text", CANARY
    yield "the gateway's key", GATEWAY_KEY
    yield "the api's key", site.api_key.rpartition("_")[2]
    yield "Flower's password", FLOWER_PASSWORD
    for name in ("DATABASE", "REDIS"):
        if password := urlsplit(site.fleet.environment[f"VECTORMILL_{name}_URL"]).password:
            yield f"the password of VECTORMILL_{name}_URL", password


def _provoke(site: Site) -> None:
    """Ask the api in ways that fail, each of which holds a text or a key."""
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
            client.post("/api/jobs", json={"model": "minilm", "source": f"s3://nowhere/{CANARY}"})
            client.get(f"/api/jobs/{CANARY}")


def _places(site: Site) -> Iterator[tuple[str, str]]:
    for folder in (site.folder / "logs", site.home / "logs"):
        for file in folder.rglob("*.log*"):
            yield f"the log {file.name}", file.read_text(encoding="utf-8", errors="replace")
    for query in _ERRORS:
        for row in site.rows(query):
            yield query.removeprefix("select "), str(next(iter(row.values())))
    with redis.Redis.from_url(site.redis_url) as client:
        for key in client.scan_iter(count=1_000):
            yield "Redis", f"{key!r} {client.dump(key)!r}"
    yield from _pages(site)


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
    for file in site.kept.values():
        yield "the workers' metrics", file.read_bytes().decode("utf-8", "replace")


def _body(client: httpx.Client, page: str) -> str:
    reply = client.get(page)
    assert reply.status_code == 200, f"{page}: {reply.status_code}"
    return reply.text
