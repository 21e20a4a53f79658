"""Models that the api serves from an upstream."""

import base64
from collections.abc import Iterator
from typing import Any

import httpx2 as httpx
import numpy as np
import pytest

from tests.contract.conftest import Gateway
from tests.support.scripted_gateway import DIMENSIONS, Answer, ScriptedGateway, error, good, scripted_gateway, vector_of


@pytest.fixture(scope="module")
def far(gateway: Gateway) -> Iterator[ScriptedGateway]:
    with scripted_gateway() as made:
        where = ("--gateway", made.url, "--upstream-model", "embed-1", "--key-env", "FAR_KEY")
        added = gateway.fleet.cli("models", "add", "far", *where, "--matryoshka", "4")
        assert "Added far: 8 dimensions" in added.stderr
        yield made


@pytest.fixture
def client(gateway: Gateway, far: ScriptedGateway) -> Iterator[httpx.Client]:
    far.answer = good
    far.requests.clear()
    far.keys.clear()
    with gateway.client() as made:
        yield made


def embed(client: httpx.Client, texts: list[str], **fields: object) -> httpx.Response:
    return client.post("/v1/embeddings", json={"model": "far", "input": texts, **fields})


def test_vectors_come_from_the_upstream(client: httpx.Client, far: ScriptedGateway) -> None:
    reply = embed(client, ["one text", "and another"], input_type="query").json()
    found = np.array([row["embedding"] for row in reply["data"]])
    np.testing.assert_allclose(found, [vector_of("one text"), vector_of("and another")], atol=1e-6)
    assert (reply["model"], reply["usage"]["prompt_tokens"]) == ("far", 4)
    assert [request["model"] for request in far.requests] == ["embed-1"]
    assert "input_type" not in far.requests[0], "OpenAI refuses what it doesn't know"
    assert far.keys == ["Bearer sk-operator"], "the operator's key, not the caller's"


def test_sizes_are_cut_here(client: httpx.Client) -> None:
    (row,) = embed(client, ["one text"], dimensions=4).json()["data"]
    cut = np.array(vector_of("one text")[:4])
    np.testing.assert_allclose(row["embedding"], cut / np.linalg.norm(cut), atol=1e-6)


def test_more_texts_than_the_upstream_takes_go_in_several_requests(
    client: httpx.Client, gateway: Gateway, far: ScriptedGateway
) -> None:
    def answer(asked: dict[str, Any]) -> Answer:
        if len(asked["input"]) > 3:
            return error(413)
        status, headers, body = good(asked)
        for row, text in zip(body["data"], asked["input"], strict=True):
            row["truncated"] = text in ("text 1", "text 5")
        return status, headers, body

    where = ("--gateway", far.url, "--upstream-model", "embed-1", "--key-env", "FAR_KEY", "--request-inputs", "3")
    gateway.fleet.cli("models", "add", "narrow", *where)
    far.requests.clear()
    far.answer = answer
    texts = [f"text {at}" for at in range(8)]
    reply = client.post("/v1/embeddings", json={"model": "narrow", "input": texts})
    found = [row["embedding"] for row in reply.json()["data"]]
    np.testing.assert_allclose(found, [vector_of(text) for text in texts], atol=1e-6)
    assert sorted(len(request["input"]) for request in far.requests) == [2, 3, 3]
    assert reply.json()["usage"]["prompt_tokens"] == 16
    assert [row["index"] for row in reply.json()["data"] if row.get("truncated")] == [1, 5]
    assert reply.headers["x-vectormill-truncated"] == "2"
    far.answer = lambda asked: error(429, retry_after="7") if "text 7" in asked["input"] else good(asked)
    refused = client.post("/v1/embeddings", json={"model": "narrow", "input": texts})
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "7")


@pytest.mark.parametrize(
    ("answer", "status", "code"),
    [
        (error(429, retry_after="7"), 503, "upstream_unavailable"),
        (error(503), 503, "upstream_unavailable"),
        (error(504), 503, "upstream_unavailable"),
        (None, 503, "upstream_unavailable"),
        (error(500), 500, "internal_error"),
        (error(401), 500, "internal_error"),
        (error(404), 500, "internal_error"),
        ((302, {"location": "http://127.0.0.1:1"}, {}), 500, "internal_error"),
        ((200, {}, b"<html>"), 500, "internal_error"),
        ((200, {}, b"[" * 2_000_000), 500, "internal_error"),
        (good({"input": ["a"], "model": "embed-2"}), 500, "internal_error"),
        (good({"input": ["a", "b"], "model": "embed-1"}), 500, "internal_error"),
        (error(400), 400, "invalid_payload"),
        (error(422), 400, "invalid_payload"),
    ],
    ids=lambda value: str(value[0]) if isinstance(value, tuple) else None,
)
def test_its_failures_are_ours(
    client: httpx.Client, far: ScriptedGateway, answer: Answer | None, status: int, code: str
) -> None:
    far.answer = lambda _: answer
    reply = embed(client, ["one text"])
    assert (reply.status_code, reply.json()["error"]["code"]) == (status, code)
    assert "quotes" not in reply.text
    assert "sk-operator" not in reply.text
    if status == 503:
        assert int(reply.headers["retry-after"]) == (7 if answer and answer[0] == 429 else 1)


@pytest.mark.parametrize("encoding", ["float", "base64"])
@pytest.mark.parametrize("element", [float("nan"), float("inf"), 0.0, None])
@pytest.mark.parametrize("packed", [True, False])
def test_a_vector_that_is_none_names_its_text(
    client: httpx.Client, far: ScriptedGateway, encoding: str, element: float | None, packed: bool
) -> None:
    def answer(asked: dict[str, Any]) -> Answer:
        status, headers, body = good(asked)
        bad = [element] * DIMENSIONS
        row = base64.b64encode(np.array(bad, "<f4").tobytes()).decode() if packed else bad
        body["data"][2]["embedding"] = row
        return status, headers, body

    far.answer = answer
    reply = embed(client, ["a", "b", "c", "d"], encoding_format=encoding)
    error = reply.json()["error"]
    assert (reply.status_code, error["code"], error["param"]) == (422, "bad_vector", "input")
    assert error["message"].startswith("input[2]: ")


def test_a_vector_that_is_none_only_where_it_is_cut(client: httpx.Client, far: ScriptedGateway) -> None:
    def answer(asked: dict[str, Any]) -> Answer:
        status, headers, body = good(asked)
        late = np.array([0] * (DIMENSIONS - 1) + [1], "<f4")
        body["data"][1]["embedding"] = base64.b64encode(late.tobytes()).decode()
        return status, headers, body

    far.answer = answer
    assert embed(client, ["a", "b"]).status_code == 200
    assert embed(client, ["a", "b"], dimensions=4).json()["error"]["message"].startswith("input[1]: ")


def test_an_address_that_is_none(gateway: Gateway) -> None:
    for url in ("example.org/v1", "ftp://example.org", "https://user:secret@example.org/v1"):
        refused = gateway.fleet.cli("models", "add", "none", "--gateway", url, check=False)
        assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    refused = gateway.fleet.cli("models", "add", "none", "--gateway", "http://127.0.0.1:1/v1", check=False)
    assert refused.returncode == 2
    assert "can't be reached" in refused.stderr


def test_it_is_listed_with_its_address(gateway: Gateway, far: ScriptedGateway) -> None:
    listed = gateway.fleet.cli("models", "list", "--json").stdout
    assert far.url in listed
    assert "sk-operator" not in listed
    assert DIMENSIONS == 8
