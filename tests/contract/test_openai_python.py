"""Gateway through openai-python."""

import asyncio
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import tiktoken
from openai import AsyncOpenAI, OpenAI
from tokenizers import Tokenizer

from tests.acceptance.fleet import eventually
from tests.contract.conftest import SIZES, Gateway
from tests.support.scripted_gateway import error, scripted_gateway

LONG = "The miller pays attention to the water, the wheel and both stones, which grind grain between them in autumn."
TEXTS = ["A mill grinds grain.", "Postgres keeps rows.", "naïve café 数学 🙂"]


@pytest.fixture(scope="module")
def client(gateway: Gateway) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{gateway.url}/v1", api_key=gateway.key, max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def failing(gateway: Gateway) -> Iterator[None]:
    """Add a model `failing`, whose upstream answers nothing but 500 afterwards."""
    with scripted_gateway() as upstream:
        where = ("--gateway", upstream.url, "--upstream-model", "embed-1", "--key-env", "FAR_KEY")
        gateway.fleet.cli("models", "add", "failing", *where)
        upstream.answer = lambda _: error(500)
        yield
    gateway.fleet.cli("models", "remove", "failing")


def vectors(reply: Any) -> "np.ndarray[Any, Any]":
    assert [row.index for row in reply.data] == list(range(len(reply.data)))
    return np.array([row.embedding for row in reply.data], np.float32)


@pytest.mark.parametrize("how", [{}, {"encoding_format": "float"}, {"encoding_format": "base64"}, {"user": "someone"}])
def test_vectors_are_the_librarys(client: OpenAI, by_library: Any, how: dict[str, Any]) -> None:
    reply = client.embeddings.create(model="text-embedding-3-small", input=TEXTS, **how)
    assert (reply.object, reply.model) == ("list", "text-embedding-3-small")
    assert reply.usage.prompt_tokens == reply.usage.total_tokens > 10
    assert {row.object for row in reply.data} == {"embedding"}
    found = [row.embedding for row in reply.data]
    if how.get("encoding_format") == "base64":
        import base64

        found = [np.frombuffer(base64.b64decode(str(row)), "<f4").tolist() for row in found]
    np.testing.assert_allclose(np.array(found, np.float32), by_library(TEXTS), atol=1e-6)


def test_one_string(client: OpenAI, by_library: Any) -> None:
    reply = client.embeddings.create(model="static", input=TEXTS[0])
    np.testing.assert_allclose(vectors(reply), by_library(TEXTS[:1]), atol=1e-6)


def test_as_many_as_openai_takes(client: OpenAI, by_library: Any) -> None:
    texts = [f"text number {number}" for number in range(2_048)]
    np.testing.assert_allclose(
        vectors(client.embeddings.create(model="static", input=texts)), by_library(texts), atol=1e-6
    )
    with pytest.raises(openai.BadRequestError, match="input has 2,049 texts; send at most 2,048"):
        client.embeddings.create(model="static", input=[*texts, "one more"])


def test_many_at_once(gateway: Gateway, by_library: Any) -> None:
    """Each request gets its own vectors: long and short ones, of two models, are mixed in the same batches."""
    texts = [f"request {number} " + "says much " * (number % 7 * 20) for number in range(64)]

    async def ask() -> list[Any]:
        async with AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key=gateway.key) as client:
            wishes = [client.embeddings.create(model="static", input=[text, text + "!"]) for text in texts]
            other = client.embeddings.create(model="minilm", input=texts[:4])
            *replies, last = await asyncio.gather(*wishes, other)
            assert vectors(last).shape == (4, 384)
            return replies

    for text, reply in zip(texts, asyncio.run(ask()), strict=True):
        np.testing.assert_allclose(vectors(reply), by_library([text, text + "!"]), atol=1e-6)


def test_dimensions(client: OpenAI, by_library: Any) -> None:
    for size in SIZES:
        found = vectors(client.embeddings.create(model="static", input=TEXTS, dimensions=size))
        cut = by_library(TEXTS)[:, :size]
        np.testing.assert_allclose(found, cut / np.linalg.norm(cut, axis=1, keepdims=True), atol=1e-6)
    assert vectors(client.embeddings.create(model="static", input="x", dimensions=256)).shape == (1, 256)
    with pytest.raises(openai.BadRequestError, match="static supports 64, 128, 256 dimensions, not 100"):
        client.embeddings.create(model="static", input="x", dimensions=100)
    with pytest.raises(openai.BadRequestError, match="minilm supports 384 dimensions, not 64"):
        client.embeddings.create(model="minilm", input="x", dimensions=64)


@pytest.fixture(scope="module")
def asymmetric(gateway: Gateway, static_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Add a model that brings prompts as `asymmetric`, and return it as the library loads it."""
    from sentence_transformers import SentenceTransformer

    folder = tmp_path_factory.mktemp("models") / "asymmetric"
    shutil.copytree(static_model, folder)
    config = folder / "config_sentence_transformers.json"
    prompts = {"query": "which text answers: ", "document": "some text: "}
    config.write_text(json.dumps(json.loads(config.read_text()) | {"prompts": prompts}))
    gateway.fleet.cli("models", "add", "asymmetric", "--path", str(folder))
    shown = "select 'asymmetric' = any(models) from vectormill.engines order by seen_at desc limit 1"
    eventually(lambda: gateway.fleet.scalar(shown), "an engine that serves the model")
    return SentenceTransformer(str(folder))


def test_queries_and_documents(client: OpenAI, asymmetric: Any, by_library: Any) -> None:
    def ask(model: str, input_type: str | None) -> "np.ndarray[Any, Any]":
        return vectors(client.embeddings.create(model=model, input=TEXTS, extra_body={"input_type": input_type}))

    documents, queries = asymmetric.encode_document(TEXTS), asymmetric.encode_query(TEXTS)
    assert np.abs(documents - queries).max() > 0.01
    np.testing.assert_allclose(vectors(client.embeddings.create(model="asymmetric", input=TEXTS)), documents, atol=1e-6)
    for called in (None, "document", "passage", "search_document"):
        np.testing.assert_allclose(ask("asymmetric", called), documents, atol=1e-6)
    for called in ("query", "search_query"):
        np.testing.assert_allclose(ask("asymmetric", called), queries, atol=1e-6)
        np.testing.assert_allclose(ask("static", called), by_library(TEXTS), atol=1e-6)
    for field, query, document in (
        ("task", "retrieval.query", "retrieval.passage"),
        ("task_type", "RETRIEVAL_QUERY", "RETRIEVAL_DOCUMENT"),
        ("prompt_name", "query", "document"),
    ):
        for called, wanted in ((query, queries), (document, documents)):
            made = client.embeddings.create(model="asymmetric", input=TEXTS, extra_body={field: called})
            np.testing.assert_allclose(vectors(made), wanted, atol=1e-6)
    found = client.models.retrieve("asymmetric").model_dump()
    assert (found["query_prompt"], found["document_prompt"]) == ("which text answers: ", "some text: ")


def test_a_text_that_is_too_long_is_refused_if_asked(client: OpenAI) -> None:
    texts = ["short", "a mill grinds " * 200]
    for fields in ({"truncate": "NONE"}, {"truncate": False}, {"truncation": False}):
        with pytest.raises(openai.BadRequestError, match=r"input\[1\] is longer than the 256 tokens") as refused:
            client.embeddings.create(model="minilm", input=texts, extra_body=fields)
        assert refused.value.param == "input"
    assert len(client.embeddings.create(model="minilm", input=texts[:1], extra_body={"truncate": "NONE"}).data) == 1
    assert len(client.embeddings.create(model="minilm", input=texts, extra_body={"truncate": "END"}).data) == 2


def test_elements_of_eight_bits(client: OpenAI, by_library: Any) -> None:
    from sentence_transformers.util import quantize_embeddings

    floats = by_library(TEXTS)
    for kind in ("ubinary", "binary"):
        made = client.embeddings.create(model="static", input=TEXTS, extra_body={"output_dtype": kind})
        assert [one.embedding for one in made.data] == quantize_embeddings(floats, kind).tolist()
    both = client.embeddings.create(
        model="static", input=TEXTS, encoding_format="float", extra_body={"embedding_types": ["float", "int8"]}
    )
    for one, wanted in zip(both.data, floats, strict=True):
        found: Any = one.embedding
        np.testing.assert_allclose(found["float"], wanted, atol=1e-6)
        cosine = np.dot(found["int8"], wanted) / np.linalg.norm(found["int8"]) / np.linalg.norm(wanted)
        assert cosine > 0.9999


def test_langchains_ids(client: OpenAI, by_library: Any, cl100k: tiktoken.Encoding, bundled_model: Path) -> None:
    """LangChain sends OpenAI's ids, cut within characters, which are read as such.

    A model's own ids are refused if they are marked by special tokens, or many.
    """
    ids = [cl100k.encode_ordinary(text) for text in TEXTS]
    for given in (ids, [ids[0], TEXTS[1], ids[2]]):
        raw = client.embeddings.with_raw_response.create(model="static", input=given)  # type: ignore[arg-type]
        assert raw.headers["x-vectormill-token-ids"] == "cl100k_base"
        np.testing.assert_allclose(vectors(raw.parse()), by_library(TEXTS), atol=1e-6)
    assert "x-vectormill-token-ids" not in client.embeddings.with_raw_response.create(model="static", input="x").headers
    tokenizer = Tokenizer.from_file(str(bundled_model / "tokenizer.json"))
    tokenizer.no_padding()
    long = tokenizer.encode(LONG, add_special_tokens=False).ids
    with pytest.raises(openai.BadRequestError, match=r"input\[1\] holds ids of the model's own vocabulary") as refused:
        client.embeddings.create(model="static", input=[ids[0], long])
    assert (refused.value.code, refused.value.param) == ("invalid_payload", "input")


def test_models(client: OpenAI) -> None:
    found = {model.id: model.model_dump() for model in client.models.list()}
    assert set(found) >= {"static", "minilm", "broken", "alone"}
    assert found["minilm"] | {"dimensions": 384, "max_tokens": 256, "price_per_million_tokens": None} == found["minilm"]
    assert found["static"]["price_per_million_tokens"] == 2
    assert (found["static"]["deprecated_at"], found["static"]["replaced_by"]) == (None, None)
    assert client.models.retrieve("text-embedding-3-small").model_dump()["dimensions"] == 256
    with pytest.raises(openai.NotFoundError) as refused:
        client.models.retrieve("gpt-4")
    assert refused.value.code == "model_not_found"


Ask = Callable[[OpenAI], object]


def _embed(**how: Any) -> Ask:
    return lambda client: client.embeddings.create(**{"model": "static", "input": "x", **how})


@pytest.mark.parametrize(
    ("ask", "kind", "status", "code", "said"),
    [
        (lambda c: c.post("/embeddings", body={"input": "x"}, cast_to=object), openai.BadRequestError, 400,
         "invalid_payload", "model is missing"),
        (lambda c: c.post("/embeddings", body={"model": "static"}, cast_to=object), openai.BadRequestError, 400,
         "invalid_payload", "input is missing"),
        (_embed(input=[]), openai.BadRequestError, 400, "invalid_payload", "input is an empty array"),
        (_embed(input=["a", ""]), openai.BadRequestError, 400, "invalid_payload", r"input\[1\] is an empty string"),
        (_embed(input=["a", "b" * 2**21]), openai.BadRequestError, 400, "invalid_payload", r"input\[1\] has 2,097,152"),
        (_embed(input=[[15339], [101, 7592, 2088, 102]]), openai.BadRequestError, 400, "invalid_payload",
         r"input\[1\] holds ids that aren't cl100k_base tokens"),
        (_embed(input=["a", "\u200b"], encoding_format="float"), openai.UnprocessableEntityError, 422, "bad_vector",
         r"input\[1\]: the model makes a vector of it that is zero"),
        (_embed(input=["a", "\u200b"]), openai.UnprocessableEntityError, 422, "bad_vector", r"input\[1\]: "),
        (_embed(extra_headers={"Authorization": "Basic eDp5"}), openai.AuthenticationError, 401, "unauthorized",
         "Authorization: Bearer"),
        (lambda c: _embed()(c.with_options(api_key="sk-nobody")), openai.AuthenticationError, 401, "invalid_api_key",
         "unknown, revoked or expired"),
        (_embed(model="gpt-4"), openai.NotFoundError, 404, "model_not_found", "gpt-4"),
        (_embed(model="failing"), openai.InternalServerError, 500, "internal_error", "The model failed"),
        (_embed(model="broken"), openai.InternalServerError, 503, "upstream_unavailable", "No engine"),
        (_embed(model="alone"), openai.InternalServerError, 503, "upstream_unavailable", "No engine"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("failing")
def test_errors_are_the_sdks_own(client: OpenAI, ask: Ask, kind: Any, status: int, code: str, said: str) -> None:
    with pytest.raises(kind, match=said) as refused:
        ask(client)
    assert (refused.value.status_code, refused.value.code) == (status, code)
    assert refused.value.request_id.startswith("req_")
    if status == 503:
        assert int(refused.value.response.headers["retry-after"]) >= 1


def test_a_model_of_another_workspace_is_not_found(gateway: Gateway) -> None:
    """The error doesn't reveal if it exists."""
    key = gateway.workspace("outsiders")
    with OpenAI(base_url=f"{gateway.url}/v1", api_key=key, max_retries=0) as client:
        client.embeddings.create(model="static", input="x")
        said = set()
        for name in ("minilm", "gpt-4"):
            with pytest.raises(openai.NotFoundError) as refused:
                client.embeddings.create(model=name, input="x")
            said.add(refused.value.message.replace(name, "…"))
        assert len(said) == 1
        assert [model.id for model in client.models.list()] == ["static"]


def test_rate_limits(gateway: Gateway) -> None:
    key = gateway.workspace("hasty", requests_per_minute=3)
    with OpenAI(base_url=f"{gateway.url}/v1", api_key=key, max_retries=0) as client:
        raw = client.embeddings.with_raw_response
        left = []
        for _ in range(3):
            headers = raw.create(model="static", input="x").headers
            left.append(headers["x-ratelimit-remaining-requests"])
            assert headers["x-ratelimit-limit-requests"] == "3"
            assert headers["x-ratelimit-reset-requests"].endswith("s")
        assert left == ["2", "1", "0"]
        with pytest.raises(openai.RateLimitError, match="limit of 3 requests a minute") as refused:
            client.embeddings.create(model="static", input="x")
    assert refused.value.code == "rate_limited"
    assert 1 <= int(refused.value.response.headers["retry-after"]) <= 60


def test_token_limits(gateway: Gateway) -> None:
    key = gateway.workspace("wordy", tokens_per_minute=200)
    with OpenAI(base_url=f"{gateway.url}/v1", api_key=key, max_retries=0) as client:
        with pytest.raises(openai.BadRequestError, match=r"about \S+ tokens; your workspace's limit is 200 a minute"):
            client.embeddings.create(model="static", input=["a few words " * 10] * 50)
        with pytest.raises(openai.RateLimitError, match="limit of 200 tokens a minute"):  # noqa: PT012
            while client.embeddings.create(model="static", input="ten words that take about as many tokens as this"):
                pass
