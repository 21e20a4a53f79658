"""Examples in the OpenAPI description: each JSON request and response has one, which is valid by its schema."""

from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest

from pipeline.api.openapi_examples import EXAMPLES
from tests.contract.conftest import Gateway


@pytest.fixture(scope="module")
def description(gateway: Gateway) -> dict[str, Any]:
    with gateway.client() as line:
        found: dict[str, Any] = line.get("/openapi.json").json()
    return found


def _resolved(schema: dict[str, Any], description: dict[str, Any]) -> dict[str, Any]:
    if "$ref" in schema:
        return dict(description["components"]["schemas"][schema["$ref"].rpartition("/")[2]])
    if schema.get("type") == "array":
        return _resolved(schema["items"], description)
    return schema


def _bodies(description: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for path, operations in description["paths"].items():
        for method, operation in operations.items():
            spoken = {"request": operation.get("requestBody", {}), **operation["responses"]}
            for which, body in spoken.items():
                for kind, content in body.get("content", {}).items():
                    if kind.endswith("json") and content.get("schema") and which != "422":
                        yield f"{method} {path} {which}", _resolved(content["schema"], description)


def test_every_json_body_has_an_example_that_fits(description: dict[str, Any]) -> None:
    shown = set()
    for where, schema in _bodies(description):
        assert schema.get("examples"), where
        whole = {**schema, "components": description["components"]}
        for example in schema["examples"]:
            jsonschema.validate(example, whole)
        shown.add(schema["title"])
    assert shown == set(EXAMPLES)
