"""Fuzzing of all operations in the OpenAPI description: no 500, and answers as described."""

from typing import Any

import httpx2 as httpx
import orjson
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.contract.conftest import Gateway

_CHECKS = [not_a_server_error, content_type_conformance, response_schema_conformance, status_code_conformance]


@pytest.fixture(scope="module")
def description(gateway: Gateway) -> Any:
    return schemathesis.openapi.from_url(f"{gateway.url}/openapi.json")


def test_described_requests(description: Any, gateway: Gateway) -> None:
    tried = 0
    for operation in (found.ok() for found in description.get_all_operations()):

        @settings(max_examples=60, derandomize=True, suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy())
        def answer(case: Any) -> None:
            case.call_and_validate(headers={"Authorization": f"Bearer {gateway.key}"}, checks=_CHECKS)

        answer()
        tried += 1
    assert tried == 48


_ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4),
    max_leaves=12,
)
_BODIES = st.fixed_dictionaries(
    {"model": st.just("static") | _ANYTHING, "input": st.text(max_size=300) | st.lists(st.text()) | _ANYTHING},
    optional={
        "encoding_format": st.sampled_from(["float", "base64"]) | _ANYTHING,
        "dimensions": st.sampled_from([64, 256]) | _ANYTHING,
        "user": st.text(max_size=600) | _ANYTHING,
        "anything": _ANYTHING,
    },
)


@settings(max_examples=300, derandomize=True, suppress_health_check=list(HealthCheck))
@given(body=_BODIES.map(lambda fields: orjson.dumps(fields)) | st.binary(max_size=200))
def test_any_body_is_answered(body: bytes, line: httpx.Client) -> None:
    reply = line.post("/v1/embeddings", content=body)
    assert reply.status_code in (200, 400, 404, 422), reply.text
    if reply.status_code == 200:
        given = orjson.loads(body)["input"]
        assert len(reply.json()["data"]) == (1 if isinstance(given, str) else len(given))
    else:
        assert reply.json()["error"]["code"] in ("invalid_payload", "model_not_found", "bad_vector")


@pytest.fixture(scope="module")
def line(gateway: Gateway) -> Any:
    with gateway.client() as made:
        yield made
