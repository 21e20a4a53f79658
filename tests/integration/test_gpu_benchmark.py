"""Benchmark of the GPU, tried out on a CPU with tiny models."""

import os
import subprocess
import sys

from tests.support.ports import free_port

_COMMAND = [sys.executable, "-m", "tests.benchmarks.gpu", "--device", "cpu", "--quick", "--minutes", "30"]
_MODELS = ("bge-large", "MiniLM")
_KINDS = ("short texts", "mixed texts", "256 tokens", "512 tokens")
_SIDES = (
    "ours, bfloat16, tokenised ahead",
    "ours, bfloat16 ",
    *(f"encode, {dtype}, batches of {size} " for dtype in ("float32", "float16", "bfloat16") for size in (32, 256)),
    "tokenising alone, on one core",
)


def test_every_row_is_printed_and_says_why_if_it_cannot_be_measured() -> None:
    """One thread, since tiny models are no faster with more, and other tests run beside it."""
    nobody = f"redis://127.0.0.1:{free_port()}/0"
    done = subprocess.run(
        _COMMAND,
        env={**os.environ, "OMP_NUM_THREADS": "1", "VECTORMILL_REDIS_URL": nobody},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    head, *rows = done.stdout.split("\n\n")
    assert "TFLOP/s" in head
    found = {name: row for name, _, row in (row.partition("\n") for row in rows)}
    assert "can't reach the Redis of VECTORMILL_REDIS_URL" in found.pop("whole jobs of mixed texts")
    assert found.keys() == {f"{model}, {kind}" for model in _MODELS for kind in _KINDS}
    for row in found.values():
        for side in _SIDES:
            assert row.count(f"\n  {side}") == 1, row
        assert row.count("least cosine") == 4
