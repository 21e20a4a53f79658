"""Bare encoder in a process that works on request."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tests.benchmarks.machine import model_folder


@contextmanager
def bare_engine(
    path: Path, texts: list[str], at_a_time: int | None = None, environment: Mapping[str, str] | None = None
) -> Iterator["subprocess.Popen[str]"]:
    """Run the encoder in a process of its own, loaded and warm, with as many threads as there are cores. It gets
    `at_a_time` texts at a time, or all at once."""
    path.write_text(json.dumps(texts), encoding="utf-8")
    command = [sys.executable, "-m", "tests.benchmarks.bare_engine", str(path), str(model_folder())]
    with subprocess.Popen(
        [*command, str(os.cpu_count() or 1), str(at_a_time or len(texts))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **(environment or {})},
    ) as process:
        try:
            assert process.stdout
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


def turn(engine: "subprocess.Popen[str]") -> float:
    """Let the bare encoder embed all texts once; return the seconds that it took."""
    assert engine.stdin
    assert engine.stdout
    engine.stdin.write("\n")
    engine.stdin.flush()
    return float(engine.stdout.readline())
