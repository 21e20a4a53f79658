"""The README's curl, as it stands there."""

import os
import re
import subprocess
from pathlib import Path

import orjson

from tests.contract.conftest import Gateway

_README = Path(__file__).resolve().parent.parent.parent / "README.md"


def test_the_readmes_curl(gateway: Gateway) -> None:
    commands = re.findall(r"^(curl .*?[^\\])$", _README.read_text(), re.DOTALL | re.MULTILINE)
    (command,) = (command for command in commands if "/v1/embeddings" in command)
    environment = {**os.environ, "VECTORMILL_API_URL": gateway.url, "VECTORMILL_API_KEY": gateway.key}
    command = command.replace("all-MiniLM-L6-v2", "minilm")
    done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, check=True)
    reply = orjson.loads(done.stdout)
    assert [(row["index"], len(row["embedding"])) for row in reply["data"]] == [(0, 384), (1, 384)]
