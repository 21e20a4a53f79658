"""Gateway guarantees beyond the shape of its replies."""

import asyncio
import gzip
import json
import select
import socket
import threading
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from typing import Any

import aiohttp
import httpx2 as httpx
import numpy as np
import psutil
import pytest
import zstandard

from pipeline.api.transfers import BODIES_OF_ONE
from pipeline.catalog import keys as api_keys
from pipeline.catalog import models
from tests.acceptance.fleet import eventually
from tests.contract.conftest import ORIGIN, SERVED, Gateway
from tests.support.jobs_made import run_sql


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
    assert wrong.headers["allow"] == "POST, OPTIONS"
    assert client.put("/v1/files").headers["allow"] == "GET, POST, HEAD, OPTIONS"
    nothing = client.get("/nothing")
    assert nothing.headers["content-type"] == "application/problem+json"
    assert nothing.json()["status"] == 404


def test_methods_of_probes_and_browsers(client: httpx.Client) -> None:
    alive = client.head("/healthz")
    assert (alive.status_code, alive.content) == (200, b"")
    for path in ("/v1/models", "/v1/models/static", "/v1/files", "/api/models"):
        there, asked = client.head(path), client.get(path)
        assert (there.status_code, there.content) == (200, b"")
        for name in ("content-type", "content-length"):
            assert there.headers[name] == asked.headers[name]
        assert there.headers["x-request-id"]
    assert client.head("/v1/nothing").status_code == 404
    assert client.head("/v1/embeddings").status_code == 405
    for path, allowed in (
        ("/v1/embeddings", "POST, OPTIONS"),
        ("/v1/models/static", "GET, HEAD, OPTIONS"),
        ("/v1/files", "GET, POST, HEAD, OPTIONS"),
        ("/v1/files/one", "GET, DELETE, HEAD, OPTIONS"),
    ):
        reply = client.options(path)
        assert (reply.status_code, reply.content, reply.headers["allow"]) == (204, b"", allowed)
        assert reply.headers["x-request-id"]
    assert client.options("/v1/nothing").status_code == 404


@pytest.mark.parametrize("path", ["/v1/embeddings/", "/v1//embeddings", "//v1/embeddings//"])
def test_a_slash_too_many(client: httpx.Client, gateway: Gateway, path: str) -> None:
    url = httpx.URL(gateway.url).copy_with(raw_path=path.encode())
    assert client.post(url, json={"model": "static", "input": "x"}).status_code == 200


def test_scripts_of_an_origin_that_may(client: httpx.Client) -> None:
    """A browser sends a preflight request without a key, and may read the text of errors."""
    wish = {"access-control-request-method": "POST", "access-control-request-headers": "authorization, x-stainless-os"}
    for origin, allowed in ((ORIGIN, ORIGIN), ("https://example.org", None)):
        asked = httpx.options(client.base_url.join("/v1/embeddings"), headers={"origin": origin, **wish})
        assert asked.headers.get("access-control-allow-origin") == allowed
        for reply in (
            client.post("/v1/embeddings", json={"model": "static", "input": "x"}, headers={"origin": origin}),
            client.post("/v1/embeddings", json={}, headers={"origin": origin}),
            client.post("/v1/embeddings", json={}, headers={"origin": origin, "authorization": "Bearer x"}),
        ):
            assert reply.headers.get("access-control-allow-origin") == allowed
            assert "access-control-allow-credentials" not in reply.headers
        if allowed:
            assert asked.status_code == 200
            assert "x-stainless-os" in asked.headers["access-control-allow-headers"]
            assert "retry-after-ms" in reply.headers["access-control-expose-headers"]
    assert "access-control-allow-origin" not in client.get("/api/models", headers={"origin": ORIGIN}).headers


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


@pytest.mark.parametrize("told", [True, False])
def test_a_client_that_writes_all_before_it_reads_learns_why(gateway: Gateway, told: bool) -> None:
    host, port = gateway.url.removeprefix("http://").split(":")
    body = b" " * 2**25
    kind = f"Content-Length: {len(body)}" if told else "Transfer-Encoding: chunked"
    head = f"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {gateway.key}\r\n{kind}\r\n\r\n"
    with socket.create_connection((host, int(port)), timeout=60) as line:
        line.sendall(head.encode() + (body if told else b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)))
        answer = b"".join(iter(lambda: line.recv(4_096), b""))
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"invalid_payload" in answer


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
        pass  # the server had closed the connection while we were still sending
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
    """A permitted body is read only up to a limit, which every route has."""
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


_BODY = json.dumps({"model": "static", "input": ["a mill", "a wheel"]}).encode()
_PACKED = {
    "gzip": gzip.compress(_BODY),
    "X-GZIP": gzip.compress(_BODY[:20]) + gzip.compress(_BODY[20:]),
    "deflate": zlib.compress(_BODY),
    "zstd": zstandard.compress(_BODY),
    "identity": _BODY,
}


@pytest.mark.parametrize("coding", _PACKED)
def test_a_packed_body(client: httpx.Client, coding: str) -> None:
    reply = client.post("/v1/embeddings", content=_PACKED[coding], headers={"content-encoding": coding})
    assert reply.json()["data"] == client.post("/v1/embeddings", content=_BODY).json()["data"]


@pytest.mark.parametrize(
    ("headers", "status", "said"),
    [
        ({"content-encoding": "br"}, 415, "It may be one of gzip, deflate, zstd."),
        ({"content-encoding": "gzip, gzip"}, 415, "gzip, gzip"),
        ({"content-encoding": "gzip"}, 400, "isn't the gzip that its content-encoding says"),
        ({"content-type": "application/json; charset=utf-16"}, 415, 'charset is "utf-16"; send UTF-8'),
        ({"content-type": 'application/json; charset="UTF-8"'}, 200, ""),
        ({"content-type": "application/x-www-form-urlencoded"}, 200, ""),
    ],
)
def test_how_a_body_may_come(client: httpx.Client, headers: dict[str, str], status: int, said: str) -> None:
    reply = client.post("/v1/embeddings", content=_BODY, headers=headers)
    assert (reply.status_code, said in reply.text.replace('\\"', '"')) == (status, True)
    if status == 415:
        assert reply.json()["error"]["code"] == "unsupported_media_type"
        assert "content-encoding" not in headers or reply.headers["accept-encoding"] == "gzip, deflate, zstd"


def test_a_packed_body_is_bounded_and_nobodys_is_unpacked(gateway: Gateway, client: httpx.Client) -> None:
    bomb = {"gzip": gzip.compress(bytes(2**25)), "zstd": zstandard.compress(bytes(2**25))}
    for coding, body in bomb.items():
        assert code(client.post("/v1/embeddings", content=body, headers={"content-encoding": coding})) == (
            413,
            "invalid_payload",
        )
    with gateway.client("sk-nobody") as stranger:
        for coding in ("gzip", "br"):
            refused = stranger.post("/v1/embeddings", content=bomb["gzip"], headers={"content-encoding": coding})
            assert code(refused) == (401, "invalid_api_key")


def test_bodies_over_a_plain_line(gateway: Gateway) -> None:
    """Bodies may come in pieces after `100 Continue`, and by HTTP/1.0."""
    host, port = gateway.url.removeprefix("http://").split(":")
    head = f"Host: x\r\nAuthorization: bearer {gateway.key}\r\n"
    with socket.create_connection((host, int(port)), timeout=20) as line:
        asked = f"POST /v1/embeddings HTTP/1.1\r\n{head}Expect: 100-continue\r\nTransfer-Encoding: chunked\r\n\r\n"
        line.sendall(asked.encode())
        assert line.recv(100).startswith(b"HTTP/1.1 100 ")
        for piece in (_BODY[:9], _BODY[9:], b""):
            line.sendall(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
        assert line.recv(100).startswith(b"HTTP/1.1 200 ")
    with socket.create_connection((host, int(port)), timeout=20) as line:
        line.sendall(f"POST /v1/embeddings HTTP/1.0\r\n{head}Content-Length: {len(_BODY)}\r\n\r\n".encode() + _BODY)
        assert b" 200 " in line.recv(100)


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


def test_large_bodies_that_hardly_come_hold_up_no_other_workspace(gateway: Gateway) -> None:
    """A key's bodies are asked for up to its limit; the next one waits, and another workspace's goes through."""
    head = (
        "POST /v1/embeddings HTTP/1.1\r\nhost: here\r\nexpect: 100-continue\r\ncontent-type: application/json\r\n"
        f"authorization: Bearer {gateway.workspace('hardly')}\r\ncontent-length: 1000000\r\n\r\n"
    ).encode()
    host, port = gateway.url.removeprefix("http://").split(":")
    with ExitStack() as opened:

        def begin() -> socket.socket:
            made = opened.enter_context(socket.create_connection((host, int(port)), timeout=60))
            made.sendall(head)
            return made

        for _ in range(BODIES_OF_ONE):
            holding = begin()
            assert holding.recv(100).startswith(b"HTTP/1.1 100 ")
        waiting = begin()
        large = {"model": "static", "input": ["a mill " * 3_000] * 5}
        with gateway.client(gateway.workspace("beside-large")) as theirs:
            assert theirs.post("/v1/embeddings", json=large).status_code == 200
        assert select.select([waiting], [], [], 0)[0] == []
        holding.close()
        assert waiting.recv(100).startswith(b"HTTP/1.1 100 ")


def test_a_crowd_with_invented_keys_holds_up_nobody(gateway: Gateway) -> None:
    """Six hundred connections send invented keys again and again. A valid key that isn't cached yet is found meanwhile,
    and no failure of the database is counted."""
    before = counted(gateway)
    key = gateway.new_key()

    async def body() -> list[int]:
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(gateway.url, connector=connector) as session:
            answers: list[int] = []

            async def ask(number: int) -> None:
                for again in range(3):
                    invented = f"vm_{number:08x}{again:08x}_{'a' * 43}"
                    async with session.get("/v1/models", headers={"authorization": f"Bearer {invented}"}) as reply:
                        answers.append(reply.status)

            crowd = asyncio.gather(*map(ask, range(600)))
            served = 0
            while not crowd.done() or not served:
                async with session.get("/v1/models", headers={"authorization": f"Bearer {key}"}) as reply:
                    assert reply.status == 200
                served += 1
            await crowd
            return answers

    began = time.perf_counter()
    assert Counter(asyncio.run(asyncio.wait_for(body(), 240))) == {401: 1_800}
    assert time.perf_counter() - began > (1_800 - 51) / 200, "strangers are answered one after the other"
    after = counted(gateway)
    assert after["unknown_keys"] - before["unknown_keys"] == 1_800
    assert after["database_failures"] == before["database_failures"]


def counted(gateway: Gateway) -> dict[str, float]:
    """Return the api's counters of unknown keys and of database failures."""
    lines = httpx.get(f"{gateway.url}/metrics").text.splitlines()
    return {
        name: float(line.rpartition(" ")[2])
        for name in ("unknown_keys", "database_failures")
        for line in lines
        if line.startswith(f"vectormill_api_{name}_total ")
    }


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
    """Return a request with over a minute's work, more than an engine's queue may hold of large requests."""
    with gateway.engine.begin() as connection:
        rate = models.find_model(connection, models.workspace_id(connection), "minilm").tokens_per_second
    return {"model": "minilm", "input": ["word " * 250] * min(2_048, int(60 * rate / 250) + 1)}


def test_short_texts_pass_long_ones_and_a_full_queue_answers_at_once(gateway: Gateway) -> None:
    """A client that disconnects makes room for others."""
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
    """Send a request that stays in flight until the block ends, when its client disconnects."""
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
        gateway.fleet.kill_tree("engine")
        assert code(embed(client)) == (503, "upstream_unavailable")
        gateway.fleet.start("engine", "workers.engine.server", VECTORMILL_WORKER_MODELS=SERVED)
        eventually(lambda: embed(client).status_code == 200, "the new engine")
        found = embed(client, ["back again"]).json()["data"][0]["embedding"]
        np.testing.assert_allclose(np.array([found], np.float32), by_library(["back again"]), atol=1e-6)


def test_an_engine_whose_process_is_killed_is_replaced(gateway: Gateway, by_library: Any) -> None:
    """No request is refused: those in flight, and those that arrive meanwhile, wait for the next process."""
    parent = psutil.Process(gateway.fleet.processes["engine"].pid)
    with gateway.client() as client:
        for text in ("the first", "the second"):
            (child,) = parent.children()
            child.kill()
            reply = embed(client, [text])
            assert reply.status_code == 200, reply.text
            found = np.array([reply.json()["data"][0]["embedding"]], np.float32)
            np.testing.assert_allclose(found, by_library([text]), atol=1e-6)
    (last,) = parent.children()
    assert last.pid != child.pid


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
