"""Commands of vectormill run in the tests' own process, since starting a process takes longer than most commands.

Many can also run in one process of their own:

    python -m tests.support.commands '[["jobs"], ["status", "docs"]]'

prints the exit code and the standard error of each, as JSON on its own standard error.
"""

import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from unittest.mock import patch

import structlog

from pipeline.cli import main


def run_command(
    *arguments: str, environment: Mapping[str, str], stdin: bytes = b""
) -> "subprocess.CompletedProcess[str]":
    """Run a command to its end. It alters state of the whole process, so only the main thread may call this."""
    assert threading.current_thread() is threading.main_thread()
    out, err = _pipe(), _pipe()
    logging_as_before = structlog.get_config()
    try:
        with (
            patch.dict(os.environ, environment, clear=True),
            patch.object(sys, "argv", ["vectormill", *arguments]),
            patch.object(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8")),
            redirect_stdout(out),
            redirect_stderr(err),
        ):
            main()
    except SystemExit as end:
        code = end.code
    finally:
        structlog.configure(**logging_as_before)
    assert isinstance(code, int)
    return subprocess.CompletedProcess(arguments, code, _written(out), _written(err))


def _pipe() -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)


def _written(pipe: io.TextIOWrapper) -> str:
    buffer = pipe.buffer
    assert isinstance(buffer, io.BytesIO)
    return buffer.getvalue().decode()


if __name__ == "__main__":
    done = [run_command(*arguments, environment=dict(os.environ)) for arguments in json.loads(sys.argv[1])]
    json.dump([(each.returncode, each.stderr) for each in done], sys.stderr)
