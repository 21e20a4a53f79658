"""Subprocess with torch, for the parts of a command that need it."""

import json
import subprocess
from typing import Any

from pipeline.core.errors import ModelError
from pipeline.embedded.processes import our_environment, our_module

#: Nothing but errors on standard error, and a thread for each tokeniser, as in workers.
_CALM = {
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def oneshot(arguments: list[str], payload: Any = None) -> Any:
    """Run workers/oneshot.py, a process that may import torch, and return its answer. Payload and answer are JSON.

    Raises:
        ModelError: the process failed; the message is its last line on standard error.
    """
    done = subprocess.run(
        our_module("workers.oneshot", *arguments),
        input=json.dumps(payload),
        capture_output=True,
        text=True,
        env=our_environment(_CALM),
        check=False,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"the process ended with code {done.returncode}"]
        raise ModelError(lines[-1])
    return json.loads(done.stdout)
