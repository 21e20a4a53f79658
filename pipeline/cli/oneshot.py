"""How commands ask for what only a process with torch can do."""

import json
import os
import subprocess
import sys
from typing import Any

from pipeline.errors import ModelError


def oneshot(arguments: list[str], payload: Any = None) -> Any:
    """Ask a process that may import torch; see workers/oneshot.py.

    Raises:
        ModelError: it can't do what was asked, in its own words.
    """
    done = subprocess.run(
        [sys.executable, "-m", "workers.oneshot", *arguments],
        input=json.dumps(payload),
        capture_output=True,
        text=True,
        env={
            **os.environ,
            # Our generic module names must not be looked for where the user happens to stand.
            "PYTHONSAFEPATH": "1",
            "TRANSFORMERS_VERBOSITY": "error",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        },
        check=False,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"the process ended with code {done.returncode}"]
        raise ModelError(lines[-1])
    return json.loads(done.stdout)
