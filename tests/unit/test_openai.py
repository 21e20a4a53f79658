"""OpenAI's wire format, without a network."""

import base64
import json
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.errors import BadReply, InvalidPayload
from pipeline.core.models import Upstream
from pipeline.core.openai import Asked, Embedded, make_error, make_reply, pack_vectors, parse_request, unpack_vectors
from pipeline.core.openai_client import make_request, parse_reply, told_wait_seconds
from pipeline.core.vectors import quantised, shortened

_MOST = 1_000


def ask(**fields: Any) -> Asked:
    return parse_request(orjson.dumps({"model": "m", "input": "x", **fields}), _MOST)


def refusal(**fields: Any) -> tuple[str, str | None]:
    with pytest.raises(InvalidPayload) as refused:
        ask(**fields)
    return str(refused.value), refused.value.param


def test_a_request_with_everything() -> None:
    asked = ask(input=["a", "b"], encoding_format="base64", dimensions=64, user="u", input_type="query", truncate="END")
    assert asked == Asked(model="m", texts=["a", "b"], base64=True, dimensions=64, user="u", queries=True)
    assert ask() == Asked(model="m", texts=["x"], base64=False, dimensions=None, user=None)
    assert ask(encoding_format=None, dimensions=None, user=None, input_type=None) == ask(input_type="document") == ask()


@pytest.mark.parametrize(
    ("fields", "queries"),
    [
        ({"input_type": "search_query"}, True),
        ({"task": "retrieval.query"}, True),
        ({"task_type": "RETRIEVAL_QUERY"}, True),
        ({"prompt_name": "query", "input_type": "query"}, True),
        ({"prompt_name": "document"}, False),
        ({"task": "retrieval.passage", "input_type": "passage"}, False),
        ({"task_type": "RETRIEVAL_DOCUMENT"}, False),
    ],
)
def test_purposes_as_others_call_them(fields: dict[str, str], queries: bool) -> None:
    assert ask(**fields).queries is queries


def test_truncation_and_types_of_elements_as_others_call_them() -> None:
    for fields in ({"truncate": "NONE"}, {"truncate": False}, {"truncation": False}, {"truncate": "none"}):
        assert not ask(**fields).truncates
    assert ask(truncate="END", truncation=True).truncates
    assert ask(output_dtype="int8").output_types == ("int8",)
    assert ask(embedding_types=["float", "ubinary", "float"]).output_types == ("float", "ubinary")


_SMALL = np.array([[0.5, -0.25, 0.0, 1.0, -1.0, 0.1, 0.2, 0.3, 0.4], [1e-3, -2e-3, 0, 0, 0, 0, 0, 0, 1e-3]], np.float32)


def test_elements_of_eight_bits() -> None:
    whole = quantised(_SMALL, "int8")
    assert whole.dtype == np.int8
    assert whole.tolist() == [[64, -32, 0, 127, -127, 13, 25, 38, 51], [64, -127, 0, 0, 0, 0, 0, 0, 64]]
    assert (quantised(_SMALL, "uint8").astype(int) - 128).tolist() == whole.tolist()
    signs = quantised(_SMALL, "ubinary")
    assert signs.tolist() == [[0b10010111, 0b10000000], [0b10000000, 0b10000000]]
    assert (quantised(_SMALL, "binary").astype(int) + 128).tolist() == signs.tolist()
    made = np.random.default_rng(1).standard_normal((50, 64)).astype(np.float32)
    kept = quantised(made, "int8").astype(np.float32)
    cosines = (made * kept).sum(1) / np.linalg.norm(made, axis=1) / np.linalg.norm(kept, axis=1)
    assert cosines.min() > 0.9999


def test_a_reply_of_several_types() -> None:
    embedded = Embedded(vectors=_SMALL, prompt_tokens=3)
    (one, _) = orjson.loads(make_reply(ask(output_dtype="int8", encoding_format="base64"), embedded))["data"]
    assert one["embedding"] == quantised(_SMALL, "int8")[0].tolist(), "OpenAI's SDK takes base64 for floats"
    both = ask(output_dtype=["float", "binary"], encoding_format="base64")
    (one, _) = orjson.loads(make_reply(both, embedded))["data"]
    assert np.frombuffer(base64.b64decode(one["embedding"]["float"]), "<f4").tolist() == _SMALL[0].tolist()
    assert one["embedding"]["binary"] == quantised(_SMALL, "binary")[0].tolist()


_PURPOSE = '{} must be "query" or "document", or a synonym of one.'
_TYPES = "{} must be one or several of float, int8, uint8, binary, ubinary."


@pytest.mark.parametrize(
    ("fields", "said", "param"),
    [
        ({"model": None}, "model is missing from the request body.", "model"),
        ({"model": 3}, "model must be a string of at most 256 characters.", "model"),
        ({"model": ""}, "model must be a string of at most 256 characters.", "model"),
        ({"input": None}, "input is missing from the request body.", "input"),
        ({"input": {}}, "input must be a string or an array of strings.", "input"),
        ({"input_type": "question"}, _PURPOSE.format("input_type"), "input_type"),
        ({"input_type": ["query"]}, _PURPOSE.format("input_type"), "input_type"),
        ({"task": "text-matching"}, _PURPOSE.format("task"), "task"),
        ({"task_type": "CLUSTERING"}, _PURPOSE.format("task_type"), "task_type"),
        ({"prompt_name": 1}, _PURPOSE.format("prompt_name"), "prompt_name"),
        (
            {"input_type": "query", "task_type": "RETRIEVAL_DOCUMENT"},
            "input_type and task_type contradict each other; send one of them.",
            "task_type",
        ),
        ({"truncate": "START"}, 'truncate must be true or "END", or false or "NONE".', "truncate"),
        ({"truncate": 0}, 'truncate must be true or "END", or false or "NONE".', "truncate"),
        ({"truncation": 1}, 'truncation must be true or "END", or false or "NONE".', "truncation"),
        ({"output_dtype": "float16"}, _TYPES.format("output_dtype"), "output_dtype"),
        ({"output_dtype": []}, _TYPES.format("output_dtype"), "output_dtype"),
        ({"embedding_types": ["int8", 8]}, _TYPES.format("embedding_types"), "embedding_types"),
        ({"input": 7}, "input must be a string or an array of strings.", "input"),
        ({"input": []}, "input is an empty array.", "input"),
        ({"input": ""}, "input[0] is an empty string.", "input"),
        ({"input": ["a", "b", ""]}, "input[2] is an empty string.", "input"),
        ({"input": ["a", None]}, "input[1] isn't a string.", "input"),
        ({"input": ["a", []]}, "input[1] isn't a string.", "input"),
        ({"input": ["a", [1.5]]}, "input[1] isn't a string.", "input"),
        ({"input": [True]}, "input[0] isn't a string.", "input"),
        ({"input": ["a", "数" * 334]}, "input[1] has 1,002 bytes; send at most 1,000.", "input"),
        ({"input": ["a"] * 2_049}, "input has 2,049 texts; send at most 2,048.", "input"),
        ({"encoding_format": "int8"}, 'encoding_format must be "float" or "base64".', "encoding_format"),
        ({"encoding_format": []}, 'encoding_format must be "float" or "base64".', "encoding_format"),
        ({"dimensions": 0}, "dimensions must be a whole number above 0.", "dimensions"),
        ({"dimensions": "64"}, "dimensions must be a whole number above 0.", "dimensions"),
        ({"dimensions": True}, "dimensions must be a whole number above 0.", "dimensions"),
        ({"user": 1}, "user must be a string of at most 512 characters.", "user"),
        ({"user": "u" * 513}, "user must be a string of at most 512 characters.", "user"),
    ],
)
def test_what_is_no_request(fields: dict[str, Any], said: str, param: str) -> None:
    assert refusal(**fields) == (said, param)


@pytest.mark.parametrize(
    "body", [b"", b"{", b"\xef\xbb\xbf", b"[" * 2_000, b"[" * 2_000_000, b"NaN", b'{"model": NaN}']
)
def test_what_is_no_json(body: bytes) -> None:
    with pytest.raises(InvalidPayload, match="isn't valid JSON"):
        parse_request(body, _MOST)


@pytest.mark.parametrize(
    ("body", "at"),
    [(b"\xff", 0), ('{"model": "m", "input": "\xe9"}'.encode("latin-1"), 25), ('{"input": "x"}'.encode("utf-16"), 0)],
)
def test_what_isnt_utf_8(body: bytes, at: int) -> None:
    with pytest.raises(InvalidPayload, match=rf"isn't UTF-8 \(at byte {at}\)"):
        parse_request(body, _MOST)


@pytest.mark.parametrize(
    ("fields", "where", "param"),
    [
        ('"input": "a\\ud800"', "input[0] holds half a character (a lone surrogate, at character 1)", "input"),
        (
            '"input": ["a", "b", "\\udfff!"]',
            "input[2] holds half a character (a lone surrogate, at character 0)",
            "input",
        ),
        ('"input": ["a", "\\ud83d\\ude42", "\\ude42\\ud83d"]', "input[2]", "input"),
        ('"input": ["a", "\udced"]', "input[1]", "input"),
        ('"input": "a", "user": "\\ud800"', "user holds half a character", "user"),
        ('"input": "a", "model": "\\ud800"', "model holds half a character", "model"),
    ],
)
def test_half_a_character_is_named_by_its_place(fields: str, where: str, param: str) -> None:
    with pytest.raises(InvalidPayload) as refused:
        parse_request(('{"model": "m", ' + fields + "}").encode("utf-8", "surrogatepass"), _MOST)
    assert str(refused.value).startswith(where)
    assert refused.value.param == param


def test_a_byte_order_mark_goes_before_a_body() -> None:
    assert parse_request(b"\xef\xbb\xbf" + orjson.dumps({"model": "m", "input": "x"}), _MOST) == ask()


@pytest.mark.parametrize("body", [b"[]", b'"x"', b"null", b"1"])
def test_what_is_no_object(body: bytes) -> None:
    with pytest.raises(InvalidPayload, match="must be a JSON object"):
        parse_request(body, _MOST)


def test_the_largest_texts() -> None:
    assert ask(input=["数" * 333, "a" * 1_000]).texts[1] == "a" * 1_000


def test_token_ids_are_texts_where_they_can_be_read() -> None:
    def decode(tokens: list[int]) -> str:
        if 9 in tokens:
            raise ValueError
        return "".join(map(chr, tokens))

    def parse(given: Any) -> list[str]:
        return parse_request(orjson.dumps({"model": "m", "input": given}), _MOST, decode).texts

    assert parse([104, 105]) == ["hi"]
    assert parse([[104], [105, 33], "yes"]) == ["h", "i!", "yes"]
    mixed = parse_request(orjson.dumps({"model": "m", "input": [[104], "yes", [105]]}), _MOST, decode)
    assert mixed.token_ids == {0: [104], 2: [105]}
    assert not ask(input=["a", "b"]).token_ids
    with pytest.raises(InvalidPayload, match=r"input\[1\] holds ids that aren't cl100k_base tokens"):
        parse([[104], [9]])
    assert "check_embedding_ctx_length=False" in refusal(input=[[104]])[0]


_ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4),
    max_leaves=12,
)


@given(
    st.fixed_dictionaries(
        {}, optional=dict.fromkeys(("model", "input", "encoding_format", "dimensions", "input_type"), _ANYTHING)
    )
)
def test_any_json_is_a_request_or_refused(fields: dict[str, Any]) -> None:
    with suppress(InvalidPayload):
        assert all(parse_request(json.dumps(fields).encode(), _MOST).texts)


@given(st.binary(max_size=60))
def test_any_bytes_are_a_request_or_refused(body: bytes) -> None:
    with pytest.raises(InvalidPayload):
        parse_request(body, _MOST)


_VECTORS = np.array([[0.1, -2.5e-8, 3.0], [1.0, 0.0, -1.0]], np.float32)


def test_replies() -> None:
    embedded = Embedded(vectors=_VECTORS, prompt_tokens=7)
    floats = orjson.loads(make_reply(ask(input=["a", "b"]), embedded))
    packed = orjson.loads(make_reply(ask(input=["a", "b"], encoding_format="base64"), embedded))
    assert floats["usage"] == {"prompt_tokens": 7, "total_tokens": 7}
    assert [row["index"] for row in packed["data"]] == [0, 1]
    assert (np.array([row["embedding"] for row in floats["data"]], np.float32) == _VECTORS).all()
    unpacked = [np.frombuffer(base64.b64decode(row["embedding"]), "<f4") for row in packed["data"]]
    assert (np.array(unpacked) == _VECTORS).all()


def test_the_engines_answer() -> None:
    sent = Embedded(vectors=_VECTORS[:, ::-1], prompt_tokens=7, truncated=[1])
    found = unpack_vectors(pack_vectors(sent))
    assert (found.prompt_tokens, found.truncated) == (7, [1])
    assert (found.vectors == _VECTORS[:, ::-1]).all()


_UPSTREAM = Upstream(
    url="http://localhost/v1",
    model="m",
    reply_model=None,
    key_env=None,
    base64=True,
    request_inputs=8,
    request_tokens=1_000,
)


@pytest.mark.parametrize("packed", [True, False])
def test_the_client_reads_what_the_server_writes(packed: bool) -> None:
    asked = parse_request(make_request(replace(_UPSTREAM, base64=packed), ["a", "b"]), _MOST)
    assert (asked.model, asked.texts, asked.base64) == ("m", ["a", "b"], packed)
    found = parse_reply(
        make_reply(asked, Embedded(vectors=_VECTORS, prompt_tokens=7, truncated=[1])), len(_VECTORS), asked_bytes=100
    )
    assert (found.vectors == _VECTORS).all()
    assert (found.prompt_tokens, found.model, found.truncated) == (7, "m", [1])


def test_vectors_are_placed_by_index_and_the_rest_is_optional() -> None:
    body = orjson.dumps({"data": [{"index": 1, "embedding": [3, 4.5]}, {"index": 0, "embedding": [1, 2]}]})
    found = parse_reply(body, 2, asked_bytes=100)
    assert found.vectors.tolist() == [[1, 2], [3, 4.5]]
    assert (found.prompt_tokens, found.model, found.truncated) == (None, None, [])


def _reply(**last: Any) -> dict[str, Any]:
    rows = [{"index": at, "embedding": [0.5, 1.0, 2.0]} for at in range(3)]
    rows[-1].update(last)
    return {"data": rows, "model": "m", "usage": {"prompt_tokens": 7}}


BROKEN: dict[str, bytes] = {
    "a missing vector": orjson.dumps({"data": _reply()["data"][:2]}),
    "a vector too many": orjson.dumps({"data": [*_reply()["data"], {"index": 3, "embedding": [1, 2, 3]}]}),
    "a double index": orjson.dumps(_reply(index=0)),
    "an index of none": orjson.dumps(_reply(index=3)),
    "an index below": orjson.dumps(_reply(index=-1)),
    "an index that is text": orjson.dumps(_reply(index="2")),
    "an index that is true": orjson.dumps(_reply(index=True)),
    "another size": orjson.dumps(_reply(embedding=[0.5, 1.0])),
    "an empty vector": orjson.dumps(_reply(embedding=[])),
    "no vector": orjson.dumps(_reply(embedding=None)),
    "nested vectors": orjson.dumps(_reply(embedding=[[0.5], [1.0], [2.0]])),
    "words for numbers": orjson.dumps(_reply(embedding=["0.5", "1", "2"])),
    "a huge number": orjson.dumps(_reply(embedding=[0.5, 1.0, "x"])).replace(b'"x"', b"9" * 400),
    "half a base64": orjson.dumps(_reply(embedding="AAA")),
    "base64 of other size": orjson.dumps(_reply(embedding="AAAA")),
    "nothing but nulls of another size": orjson.dumps(_reply(embedding=[None, None])),
    "a null and a word": orjson.dumps(_reply(embedding=[None, "x", 1.0])),
    "endless arrays": b"[" * 2_000_000,
    "no data": b"{}",
    "data that is a number": b'{"data": 3}',
    "rows that are none": b'{"data": [1, 2, 3]}',
    "no object": b"[1]",
    "no JSON": b"<html>",
    "nothing": b"",
}


@pytest.mark.parametrize("written", ["NaN", "Infinity", "-Infinity", "null", "1e999", "1e39"])
def test_what_isnt_finite_is_read_so_that_its_text_can_be_named(written: str) -> None:
    body = json.dumps(_reply(embedding=[0.5, 1.0, "here"])).replace('"here"', written).encode()
    found = parse_reply(body, 3, 3, asked_bytes=100).vectors
    assert np.isfinite(found).tolist() == [[True] * 3, [True] * 3, [True, True, False]]


@pytest.mark.parametrize("how", BROKEN)
def test_a_reply_that_is_not_what_was_asked_for_is_refused(how: str) -> None:
    with pytest.raises(BadReply):
        parse_reply(BROKEN[how], 3, 3, asked_bytes=100)


@pytest.mark.parametrize(("said", "read"), [(0, 0), (432, 432), (433, None), (-1, None), (2**52, None), (1.5, None)])
def test_a_count_of_tokens_that_no_request_has_is_not_said(said: object, read: int | None) -> None:
    row = {"index": 0, "embedding": [1.0]}
    body = orjson.dumps({"data": [row, {**row, "index": 1}], "usage": {"prompt_tokens": said}})
    assert parse_reply(body, 2, asked_bytes=100).prompt_tokens == read


@given(
    body=st.recursive(
        st.none() | st.booleans() | st.floats(allow_nan=False) | st.integers(-(2**60), 2**60) | st.text(),
        lambda inner: (
            st.lists(inner)
            | st.dictionaries(
                st.sampled_from(["data", "index", "embedding", "usage", "model", "prompt_tokens", "truncated"]), inner
            )
        ),
    )
)
def test_whatever_a_gateway_says_is_a_reply_or_a_bad_one(body: Any) -> None:
    with suppress(BadReply):
        found = parse_reply(orjson.dumps(body), 1, asked_bytes=100)
        assert found.vectors.shape[0] == 1


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "3"}, 3),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after": "3", "retry-after-ms": "1500"}, 1.5),
        ({"retry-after": "Tue, 24 Nov 2026 00:01:40 GMT"}, 100),
        ({"retry-after": "Mon, 23 Nov 2026 00:00:00 GMT"}, 0),
        ({"retry-after": "-5"}, 0),
        ({"retry-after": "soon", "retry-after-ms": "later"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "inf"}, None),
        ({"retry-after": "1764000000"}, 3_600),
        ({"retry-after-ms": "1e12"}, 3_600),
        ({"retry-after": "Tue, 24 Nov 2099 00:00:00 GMT"}, 3_600),
        ({"retry-after": "Tue, 24 Nov 99999999999999999999 00:00:00 GMT"}, None),
        ({}, None),
    ],
)
def test_how_long_a_reply_says_to_wait(headers: dict[str, str], seconds: float | None) -> None:
    now = datetime(2026, 11, 24, tzinfo=UTC).timestamp()
    assert told_wait_seconds(headers, now) == seconds


def test_shortened_vectors_have_length_one() -> None:
    found = shortened(_VECTORS, 2)
    assert found.shape == (2, 2)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    assert shortened(np.zeros((1, 3), np.float32), 2).tolist() == [[0, 0]]


def test_errors() -> None:
    assert orjson.loads(make_error("Too fast.", "rate_limited", 429))["error"] == {
        "message": "Too fast.",
        "type": "rate_limit_error",
        "param": None,
        "code": "rate_limited",
    }
