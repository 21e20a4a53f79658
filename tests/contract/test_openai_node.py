"""Gateway through openai-node, which by default asks for base64 and would misread floats."""

import json
import os
import subprocess
from typing import Any

import numpy as np

from tests.contract.conftest import _NODE_FOLDER, Gateway

_SCRIPT = """
import OpenAI from "openai";
const client = new OpenAI({ maxRetries: 0 });
const texts = JSON.parse(process.env.TEXTS);
const byDefault = await client.embeddings.create({ model: "static", input: texts });
const floats = await client.embeddings.create({ model: "static", input: texts, encoding_format: "float" });
const refused = [];
for (const [key, wish] of [
  [undefined, { model: "static", input: [] }],
  [undefined, { model: "nothing", input: "x" }],
  ["sk-nobody", { model: "static", input: "x" }],
  [undefined, { model: "alone", input: "x" }],
]) {
  try {
    await client.withOptions(key ? { apiKey: key } : {}).embeddings.create(wish);
  } catch (error) {
    refused.push([error.constructor.name, error.status, error.code, error.requestID.slice(0, 4)]);
  }
}
console.log(JSON.stringify({ byDefault, floats, refused }));
"""


def test_the_node_client(gateway: Gateway, by_library: Any, node: list[str]) -> None:
    texts = ["A mill grinds grain.", "naïve café 数学 🙂"]
    script = _NODE_FOLDER / "client.mjs"
    script.write_text(_SCRIPT)
    environment = {
        **os.environ,
        "OPENAI_BASE_URL": f"{gateway.url}/v1",
        "OPENAI_API_KEY": gateway.key,
        "TEXTS": json.dumps(texts),
    }
    done = subprocess.run([*node, str(script)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    for reply in (said["byDefault"], said["floats"]):
        found = np.array([row["embedding"] for row in reply["data"]], np.float32)
        np.testing.assert_allclose(found, by_library(texts), atol=1e-6)
        assert reply["model"] == "static"
    assert said["refused"] == [
        ["BadRequestError", 400, "invalid_payload", "req_"],
        ["NotFoundError", 404, "model_not_found", "req_"],
        ["AuthenticationError", 401, "invalid_api_key", "req_"],
        ["InternalServerError", 503, "upstream_unavailable", "req_"],
    ]
