"""Batch request through LiteLLM's client."""

import json
from typing import Any

import numpy as np

from tests.ecosystem.conftest import Site, batch_lines

_PROGRAM = """
import json, os, time
import litellm

place = {"custom_llm_provider": "openai", "api_base": os.environ["BASE"], "api_key": os.environ["KEY"]}
with open(os.environ["FILE"], "rb") as stream:
    file = litellm.create_file(file=stream, purpose="batch", **place)
batch = litellm.create_batch(
    completion_window="24h", endpoint="/v1/embeddings", input_file_id=file.id, metadata={"by": "litellm"}, **place
)
while batch.status not in ("completed", "failed", "expired", "cancelled"):
    time.sleep(0.2)
    batch = litellm.retrieve_batch(batch_id=batch.id, **place)
content = litellm.file_content(file_id=batch.output_file_id, **place)
listed = [one.id for one in litellm.list_batches(limit=5, **place).data]
print("\\n" + json.dumps({"status": batch.status, "listed": batch.id in listed, "lines": content.text}))
"""


def test_a_batch_request(site: Site, by_library: Any) -> None:
    lines = batch_lines("litellm", 120)
    file = site.write("litellm.jsonl", lines)
    done = site.run(
        "python",
        *("-c", _PROGRAM),
        FILE=str(file),
        BASE=f"{site.gateway.url}/v1",
        KEY=site.gateway.key,
        # Without this, LiteLLM would fetch a list of prices.
        LITELLM_LOCAL_MODEL_COST_MAP="True",
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert (said["status"], said["listed"]) == ("completed", True)
    rows = [json.loads(line) for line in said["lines"].splitlines()]
    found = {row["custom_id"]: row["response"]["body"]["data"][0]["embedding"] for row in rows}
    whole = by_library([line["body"]["input"] for line in lines])
    np.testing.assert_allclose([found[line["custom_id"]] for line in lines], whole, atol=1e-5)
