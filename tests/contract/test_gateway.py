"""The gateway's own promises, beyond the shape of its replies."""

import json
import select
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import httpx2 as httpx
import numpy as np
import pytest

from pipeline import catalog
from pipeline import keys as api_keys
from tests.acceptance.fleet import eventually
from tests.contract.conftest import SERVED, Gateway
from tests.jobs_made import run_sql


@pytest.fixture
def client(gateway: Gateway) -> Iterator[httpx.Client]:
    with gateway.client() as made:
        yield made


def embed(client: httpx.Client, texts: Any = "x", model: str = "static", **fields: Any) -> httpx.Response:
    return client.post("/v1/embeddings", json={"model": model, "input": texts, **fields})


def code(reply: httpx.Response) -> tuple[int, str]:
    return reply.status_code, reply.json()["error"]["code"]


def test_every_answer_has_an_id_of_its_own(client: httpx.Client) -> None:
    paths = ("/v1/models", "/v1/nothing", "/healthz", "/api/usage", "/")
    ids = {client.get(path).headers["x-request-id"] for path in paths}
    assert len(ids) == len(paths)


def test_what_isnt_there(client: httpx.Client) -> None:
    assert code(client.get("/v1/nothing")) == (404, "not_found")
    wrong = client.get("/v1/embeddings")
    assert code(wrong) == (405, "method_not_allowed")
    assert wrong.headers["allow"] == "POST"
    assert code(client.post("/v1/embeddings/", json={})) == (404, "not_found"), "no redirect that a POST would lose"
    nothing = client.get("/nothing")
    assert nothing.headers["content-type"] == "application/problem+json"
    assert nothing.json()["status"] == 404


def test_methods_of_probes_and_browsers(client: httpx.Client) -> None:
    alive = client.head("/healthz")
    assert (alive.status_code, alive.content) == (200, b"")
    for method in ("HEAD", "OPTIONS", "PUT"):
        reply = client.request(method, "/v1/models")
        assert (reply.status_code, reply.headers["allow"]) == (405, "GET")
        assert reply.headers["x-request-id"]


@pytest.mark.parametrize("name", ["\0", "gpt\0-4", "gpt-4"])
def test_a_name_that_no_model_has(client: httpx.Client, name: str) -> None:
    for reply in (embed(client, model=name), client.get("/v1/models/" + name.replace("\0", "%00"))):
        assert code(reply) == (404, "model_not_found")


# Bodies


def test_a_large_body_is_refused_before_it_is_sent(gateway: Gateway) -> None:
    host, port = gateway.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as line:
        head = f"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {gateway.key}\r\n"
        line.sendall(f"{head}Content-Length: {2**34}\r\n\r\n".encode())
        assert line.recv(64).startswith(b"HTTP/1.1 413 ")


def test_a_body_that_doesnt_tell_its_length_is_cut_off(client: httpx.Client) -> None:
    sent = 0

    def pieces() -> Iterator[bytes]:
        nonlocal sent
        while sent < 2**28:
            sent += 2**20
            yield b" " * 2**20

    try:
        reply = client.post("/v1/embeddings", content=pieces())
    except httpx.TransportError:
        pass  # the server had closed the line while we were still sending
    else:
        assert code(reply) == (413, "invalid_payload")
    assert sent < 2**27


@pytest.mark.parametrize(
    ("key", "path", "status"),
    [
        ("nobody's", "/v1/embeddings", 401),
        ("nobody's", "/api/keys", 401),
        ("admin's", "/api/keys", 413),
        ("admin's", "/api/keys/none/rotate", 413),
        ("plain", "/api/keys", 403),
    ],
)
def test_a_body_is_read_for_those_who_may_send_it(gateway: Gateway, key: str, path: str, status: int) -> None:
    """And only up to the limit, which every route has."""
    token = {"admin's": gateway.key, "plain": gateway.new_key(), "nobody's": "x"}[key]
    host, port = gateway.url.removeprefix("http://").split(":")
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\nTransfer-Encoding: chunked\r\n\r\n"
    piece = b"100000\r\n" + b" " * 2**20 + b"\r\n"
    with socket.create_connection((host, int(port)), timeout=20) as line:
        line.sendall(head.encode())
        sent = 0
        while not select.select([line], [], [], 0.05)[0]:
            assert sent < 40, "an answer was due"
            line.sendall(piece)
            sent += 1
        answer = line.recv(4_096).decode()
    assert answer.startswith(f"HTTP/1.1 {status} ")
    assert sent <= (25 if status == 413 else 3)


# Keys


def test_a_key_lives_until_it_is_revoked(gateway: Gateway) -> None:
    made = gateway.fleet.cli("keys", "create", "--name", "mortal", "--expires", "90d")
    token = made.stdout.strip()
    assert token not in gateway.fleet.cli("keys", "list").stdout
    listed = json.loads(gateway.fleet.cli("keys", "list", "--json").stdout)
    (row,) = [row for row in listed if row["name"] == "mortal"]
    assert row["live"]
    stored = run_sql(gateway.engine, "select secret_sha256 from vectormill.api_keys where id = :id", id=row["id"])
    assert token.encode() not in bytes(stored[0][0])
    with gateway.client(token) as client:
        assert embed(client).status_code == 200
        with gateway.client(token[:-2] + "AA") as stranger:
            assert code(embed(stranger)) == (401, "invalid_api_key")
        gateway.fleet.cli("keys", "revoke", row["id"])
        refused = eventually(lambda: _if_refused(embed(client)), "a refusal")
        assert code(refused) == (401, "invalid_api_key")
    again = gateway.fleet.cli("keys", "revoke", row["id"], check=False)
    assert (again.returncode, again.stderr.count("\n")) == (2, 1)


def test_a_key_that_is_over(gateway: Gateway) -> None:
    token = gateway.new_key(lives=timedelta(seconds=1))
    with gateway.client(token) as client:
        eventually(lambda: client.get("/v1/models").status_code == 401, "its end")


def test_a_rotated_key_overlaps_with_the_old_one(gateway: Gateway) -> None:
    old = gateway.new_key()
    new = gateway.fleet.cli("keys", "rotate", str(api_keys.id_of(old)), "--overlap", "1s").stdout.strip()
    with gateway.client(old) as before, gateway.client(new) as after:
        assert after.get("/v1/models").status_code == 200
        eventually(lambda: before.get("/v1/models").status_code == 401, "the old key's end")
        assert after.get("/v1/models").status_code == 200


def test_a_rotated_key_lives_as_long_as_it_was_made_to(gateway: Gateway) -> None:
    old = api_keys.id_of(gateway.new_key(lives=timedelta(days=90), admin=True))
    mortal = str(api_keys.id_of(gateway.fleet.cli("keys", "rotate", str(old), "--overlap", "1h").stdout.strip()))
    again = str(api_keys.id_of(gateway.fleet.cli("keys", "rotate", str(old), "--overlap", "1m").stdout.strip()))
    forever = str(api_keys.id_of(gateway.new_key()))
    immortal = str(api_keys.id_of(gateway.fleet.cli("keys", "rotate", forever).stdout.strip()))
    query = "select admin, expires_at - created_at from vectormill.api_keys where id = :id"
    for key in (mortal, again):
        assert run_sql(gateway.engine, query, id=key) == [(True, timedelta(days=90))]
    assert run_sql(gateway.engine, query, id=immortal) == [(False, None)]


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"{", b'{"name": ""}', b'{"name": "\\ud800"}', b'{"name": "x", "admin": 7}']
)
def test_a_key_that_cant_be_made(client: httpx.Client, body: bytes) -> None:
    refused = client.post("/api/keys", content=body)
    assert (refused.status_code, refused.json()["title"]) == (400, "invalid payload")


def test_keys_by_http(gateway: Gateway, client: httpx.Client) -> None:
    made = client.post("/api/keys", json={"name": "by http", "expires_in_days": 1})
    assert made.status_code == 201
    token, key_id = made.json()["token"], made.json()["id"]
    with gateway.client(token) as plain:
        assert embed(plain).status_code == 200
        refused = plain.post("/api/keys", json={"name": "more"})
        assert (refused.status_code, refused.json()["title"]) == (403, "forbidden")
        assert plain.get("/api/keys").status_code == 403
    assert key_id in [row["id"] for row in client.get("/api/keys").json()]
    assert token not in client.get("/api/keys").text
    rotated = client.post(f"/api/keys/{key_id}/rotate", json={"overlap_hours": 1}).json()
    assert client.delete(f"/api/keys/{rotated['id']}").status_code == 204
    assert client.delete(f"/api/keys/{rotated['id']}").status_code == 404
    assert client.delete("/api/keys/nothing").status_code == 404


def test_a_key_of_another_workspace_cant_be_touched(gateway: Gateway, client: httpx.Client) -> None:
    other = api_keys.id_of(gateway.workspace("neighbours"))
    assert client.delete(f"/api/keys/{other}").status_code == 404
    assert client.post(f"/api/keys/{other}/rotate", json={}).status_code == 404


# Usage


def test_usage(gateway: Gateway) -> None:
    key = gateway.workspace("metered")
    with gateway.client(key) as client:
        first = embed(client, ["a short text", "word " * 3_000], model="text-embedding-3-small", user="u-1")
        assert first.headers["x-vectormill-truncated"] == "1"
        second = embed(client, "another")
        assert "x-vectormill-truncated" not in second.headers
        tokens = [reply.json()["usage"]["total_tokens"] for reply in (first, second)]
        assert embed(client, []).status_code == 400

        def both() -> Any:
            (row,) = client.get("/api/usage?by=model").json()["data"] or [{}]
            return row if row.get("requests") == 2 else None

        row = eventually(both, "two requests' usage")
        assert (row["group"], row["items"], row["total_tokens"], row["truncated"]) == ("static", 3, sum(tokens), 1)
        assert float(row["cost"]) == pytest.approx(sum(tokens) * 2 / 1e6)
        by_key = client.get("/api/usage?by=key").json()["data"]
        assert [(row["group"], row["requests"]) for row in by_key] == [(api_keys.id_of(key), 2)]
        assert [row["group"] for row in client.get("/api/usage?by=job").json()["data"]] == [None]
        assert client.get("/api/usage?by=day&end=2020-01-01").json()["data"] == []
        assert client.get("/api/usage?by=label").json()["title"] == "invalid payload"
        assert client.get("/api/usage?by=colour").status_code == 400
    rows = run_sql(gateway.engine, "select end_user, request_id from vectormill.usage where end_user = 'u-1'")
    assert rows == [("u-1", first.headers["x-request-id"])]


def test_a_months_cap(gateway: Gateway) -> None:
    key = gateway.workspace("capped", monthly_tokens=3)
    with gateway.client(key) as client:
        assert embed(client, "a text of more than three tokens").status_code == 200
        refused = eventually(lambda: _if_refused(embed(client)), "the cap")
    assert code(refused) == (429, "rate_limited")
    assert "cap of 3 tokens a month" in refused.json()["error"]["message"]


def _if_refused(reply: httpx.Response) -> httpx.Response | None:
    return None if reply.status_code == 200 else reply


# The engine


def _long_request(gateway: Gateway) -> dict[str, Any]:
    """More than an engine's queue may hold of large requests: a minute's work and more."""
    with gateway.engine.begin() as connection:
        rate = catalog.find_model(connection, catalog.workspace_id(connection), "minilm").tokens_per_second
    return {"model": "minilm", "input": ["word " * 250] * min(2_048, int(60 * rate / 250) + 1)}


def test_short_texts_pass_long_ones_and_a_full_queue_answers_at_once(gateway: Gateway) -> None:
    """And a client that goes away makes room for others."""
    long = _long_request(gateway)
    with gateway.client() as client:
        embed(client, "load it", model="minilm")
        with _sent(gateway, long) as leaving:
            refused = eventually(lambda: _refused_at_once(client, long), "a full queue")
            assert code(refused) == (503, "upstream_unavailable")
            assert int(refused.headers["retry-after"]) >= 1
            assert embed(client, "a short one", model="minilm").status_code == 200
            assert not select.select([leaving], [], [], 0)[0], "the short one has passed a minute's work"
        few = {**long, "input": long["input"][:40]}
        eventually(lambda: client.post("/v1/embeddings", json=few).status_code == 200, "room")


@contextmanager
def _sent(gateway: Gateway, body: dict[str, Any]) -> Iterator[socket.socket]:
    """A request that is under way until the block ends; then its client goes away."""
    host, port = gateway.url.removeprefix("http://").split(":")
    content = json.dumps(body).encode()
    head = f"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {gateway.key}\r\n"
    with socket.create_connection((host, int(port)), timeout=20) as line:
        line.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        assert not select.select([line], [], [], 1)[0], "it wasn't let in"
        yield line


def _refused_at_once(client: httpx.Client, body: dict[str, Any]) -> httpx.Response | None:
    try:
        reply = client.post("/v1/embeddings", json=body, timeout=1)
    except httpx.TimeoutException:
        return None
    return reply if reply.status_code == 503 else None


def test_an_engine_that_dies_and_one_that_comes(gateway: Gateway, by_library: Any) -> None:
    with gateway.client() as client:
        gateway.fleet.kill("engine")
        assert code(embed(client)) == (503, "upstream_unavailable")
        gateway.fleet.start("engine", "workers.engine", VECTORMILL_WORKER_MODELS=SERVED)
        eventually(lambda: embed(client).status_code == 200, "the new engine")
        found = embed(client, ["back again"]).json()["data"][0]["embedding"]
        np.testing.assert_allclose(np.array([found], np.float32), by_library(["back again"]), atol=1e-6)


def test_what_is_in_flight_is_finished_when_the_api_stops(gateway: Gateway) -> None:
    texts = ["a text that takes its time, " * 30] * 100
    replies: list[httpx.Response] = []
    with gateway.client() as client:
        embed(client, "load it", model="minilm")
        asked = threading.Thread(target=lambda: replies.append(embed(client, texts, model="minilm")))
        asked.start()
        time.sleep(0.3)
        gateway.fleet.processes["api"].terminate()
        asked.join()
        assert gateway.fleet.processes["api"].wait(60) == 0
    assert len(replies[0].json()["data"]) == 100
    query = "select count(*) from vectormill.usage where request_id = :id"
    assert run_sql(gateway.engine, query, id=replies[0].headers["x-request-id"]) == [(1,)]
    gateway.start_api()


def test_limits_hold_without_redis(gateway: Gateway) -> None:
    key = gateway.workspace("lonely", requests_per_minute=2)
    gateway.stop_api()
    gateway.start_api(VECTORMILL_REDIS_URL="redis://127.0.0.1:1/0")
    with gateway.client(key) as client:
        assert [embed(client).status_code for _ in range(3)] == [200, 200, 429]
    gateway.stop_api()
    gateway.start_api()
