"""Whole jobs of the GPU's benchmark, tried out on a CPU with a tiny model."""

from pathlib import Path
from time import monotonic

import pytest

from pipeline.embedded.runtime import Running
from tests.benchmarks.gpu import texts
from tests.benchmarks.gpu.models import MINILM, make_model
from tests.benchmarks.gpu.pipeline import OUTPUTS, fleet

_SECONDS = 600.0


def test_whole_jobs_run_in_a_database_of_their_own(
    servers: Running, redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VECTORMILL_DATABASE_URL", servers.database_url)
    monkeypatch.setenv("VECTORMILL_REDIS_URL", redis_url)
    folder = make_model(MINILM.tiny(), tmp_path / "model", "cpu")
    some = texts.Texts().of(texts.SHORT, 1_000, 64)
    with fleet({"tiny": folder}, "cpu") as running:
        for output in OUTPUTS:
            assert running.rate("tiny", some, output, monotonic() + _SECONDS) > 0
