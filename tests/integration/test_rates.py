"""Rates of a model by kind of device: measured by the dispatcher, read by whatever plans."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine

from pipeline.catalog.models import add_model, find_model, workspace_id
from pipeline.catalog.rates import CUDA_PER_CPU, least_rate, slot_rates
from pipeline.core.models import Model, Upstream
from pipeline.core.options import JobOptions, Precision
from pipeline.db import models
from pipeline.dispatch.maintenance import measure_rates
from pipeline.dispatch.state import Dispatcher
from pipeline.ingest.submission import Planning, Submission
from pipeline.ingest.submit import submit
from pipeline.sources import Corpus
from tests.integration.dispatching import show_worker
from tests.support.jobs_made import chunk_rows, make_model, run_sql

H200, L4 = "NVIDIA H200", "NVIDIA L4"
AUTO, FLOAT32 = Precision.AUTO, Precision.FLOAT32


def worked(engine: Engine, model: str, device: str | None, precision: str | None, rate: int, minutes_ago: int) -> None:
    """Meter ten seconds of a job's work."""
    run_sql(
        engine,
        """
        insert into vectormill.usage
          (workspace_id, job_id, model, prompt_tokens, device_seconds, created_at, device, precision)
        values (1, gen_random_uuid(), :model, 10 * :rate, 10, now() - make_interval(mins => :age), :device, :precision)
        """,
        model=model,
        device=device,
        precision=precision,
        rate=rate,
        age=minutes_ago,
    )


def measured(engine: Engine, name: str, precision: Precision = AUTO) -> dict[str, float]:
    with engine.begin() as connection:
        return models.rates(connection, name, precision)


def planned(engine: Engine, model: Model, precision: Precision = AUTO) -> dict[str, float]:
    with engine.begin() as connection:
        return slot_rates(connection, model, precision)


@pytest.fixture
def record(engine: Engine) -> Callable[..., None]:
    """Return a function that records a measured rate of the model `small`."""

    def record(device: str, rate: float, precision: str = "float32") -> None:
        with engine.begin() as connection:
            models.record_rate(connection, "small", device, precision, rate)

    return record


def test_the_dispatcher_measures_each_kind_of_device(engine: Engine, model: Model, dispatcher: Dispatcher) -> None:
    worked(engine, "small", "cpu", "float32", 400, 3)
    worked(engine, "small", H200, "bfloat16", 90_000, 2)
    worked(engine, "small", H200, "float32", 30_000, 50)
    worked(engine, "small", L4, "bfloat16", 20_000, 61)
    worked(engine, "small", None, None, 7, 1)  # as a worker of a version before
    for _ in range(2):
        measure_rates(dispatcher)
    assert measured(engine, "small") == pytest.approx({H200: 90_000, "cpu": 400}), "what is older than an hour is out"
    assert list(measured(engine, "small")) == [H200, "cpu"], "the one measured last first"
    assert measured(engine, "small", FLOAT32) == pytest.approx({H200: 30_000, "cpu": 400})
    with engine.begin() as connection:
        assert find_model(connection, 1, "small").tokens_per_second == model.tokens_per_second, "as it was added"
    worked(engine, "small", "cpu", "float32", 100, 0)
    measure_rates(dispatcher)
    assert 200 < measured(engine, "small")["cpu"] < 400
    assert list(measured(engine, "small")) == ["cpu", H200]


def test_an_upstreams_rate_is_one_of_the_catalogue(engine: Engine, model: Model, dispatcher: Dispatcher) -> None:
    run_sql(
        engine,
        "update vectormill.models set kind = 'gateway', gateway_url = 'http://far', upstream_model = 'far', "
        "request_inputs = 1, request_tokens = 1",
    )
    worked(engine, "small", None, None, 5_000, 1)
    measure_rates(dispatcher)
    with engine.begin() as connection:
        assert find_model(connection, 1, "small").tokens_per_second == pytest.approx(5_000)
    assert measured(engine, "small") == {}


def test_a_model_brings_the_rate_of_the_device_that_it_was_added_on(
    engine: Engine, static_description: dict[str, Any]
) -> None:
    with engine.begin() as connection:
        add_model(connection, "static", {**static_description, "device": L4, "tokens_per_second": 70_000.0})
        (row,) = models.listed(connection, workspace_id(connection))
        found = find_model(connection, workspace_id(connection), "static")
    (rate,) = row["rates"]
    assert {**rate, "measured_at": None} == {
        "device": L4,
        "precision": "float32",
        "tokens_per_second": 70_000.0,
        "measured_at": None,
    }
    assert planned(engine, found) == {L4: 70_000.0}, "no worker is alive"
    show_worker(engine, "static", 1)
    assert planned(engine, found) == {"cpu": 70_000.0 / CUDA_PER_CPU}
    with engine.begin() as connection:
        assert models.remove(connection, "static")
    assert measured(engine, "static") == {}


def test_what_would_work_on_a_job_decides(engine: Engine, model: Model, record: Callable[..., None]) -> None:
    added = model.tokens_per_second
    assert planned(engine, model) == {"cpu": added}
    show_worker(engine, "small", 2, [H200, H200])
    show_worker(engine, "another", 2, [L4])
    assert planned(engine, model) == {H200: added * CUDA_PER_CPU}
    record("cpu", 400.0)
    assert planned(engine, model) == {H200: 400.0 * CUDA_PER_CPU}
    record(H200, 90_000.0, "bfloat16")
    assert planned(engine, model) == planned(engine, model, FLOAT32) == {H200: 90_000.0}
    record(H200, 30_000.0)
    assert (planned(engine, model), planned(engine, model, FLOAT32)) == ({H200: 90_000.0}, {H200: 30_000.0})
    run_sql(
        engine,
        "update vectormill.model_rates set measured_at = now() - interval '2 hours' where precision = 'bfloat16'",
    )
    assert planned(engine, model) == {H200: 30_000.0}, "workers have been set to float32 since"
    record(H200, 90_000.0, "bfloat16")
    show_worker(engine, "small", 1)
    assert planned(engine, model) == {H200: 90_000.0, "cpu": 400.0}
    run_sql(engine, "update vectormill.workers set seen_at = now() - interval '1 minute'")
    assert planned(engine, model) == {H200: 90_000.0}, "nobody is alive: the kind measured last"
    far = Upstream(
        url="http://far", model="far", reply_model=None, key_env=None, base64=True, request_inputs=1, request_tokens=1
    )
    assert list(planned(engine, replace(model, upstream=far)).values()) == [added]


def test_a_worker_of_a_version_before_has_the_kinds_of_its_devices_names(engine: Engine, model: Model) -> None:
    show_worker(engine, "small", 2, [])
    assert planned(engine, model) == {"cpu": model.tokens_per_second}


def test_a_hang_is_never_told_by_an_estimate_that_is_too_high(
    engine: Engine, model: Model, record: Callable[..., None]
) -> None:
    def least(kind: str) -> float:
        with engine.begin() as connection:
            return least_rate(connection, model, AUTO, kind)

    assert least(H200) == least("cpu") == model.tokens_per_second
    record(L4, 500.0)
    assert (least(H200), least("cpu")) == (500.0, 500.0 / CUDA_PER_CPU)
    record(H200, 90_000.0, "bfloat16")
    assert least(H200) == 90_000.0


@pytest.mark.parametrize(
    ("kinds", "precision", "rate"),
    [
        ([["cpu"]], AUTO, 800),
        ([[H200]], AUTO, 8_000),
        ([[H200]], FLOAT32, 2_400),
        ([[H200], ["cpu", H200]], AUTO, 800),
        ([[H200, L4]], AUTO, 4_000),
        ([], AUTO, 4_000),
    ],
)
def test_chunks_are_cut_for_the_slowest_kind_of_device(
    engine: Engine,
    model: Model,
    record: Callable[..., None],
    tmp_path: Path,
    kinds: list[list[str]],
    precision: Precision,
    rate: int,
) -> None:
    record("cpu", 800.0)
    record(H200, 8_000.0, "bfloat16")
    record(H200, 2_400.0)
    record(L4, 4_000.0, "bfloat16")
    for each in kinds:
        show_worker(engine, "small", 1, each)
    file = tmp_path / "docs.jsonl"
    file.write_text("".join(json.dumps({"text": "x" * 32}) + "\n" for _ in range(4_000)))  # ten tokens, by estimate
    done = submit(
        engine,
        Submission(
            workspace_id=1,
            model=model,
            corpus=Corpus([str(file)], JobOptions().columns, 1_000_000),
            planning=Planning(chunk_seconds=1, chunk_items=100_000, chunk_bytes=1_000_000, lease_seconds=30),
            name="docs",
            options=JobOptions(precision=precision),
        ),
    )
    assert chunk_rows(engine, done.job_id)[0]["items"] == rate / 10


def test_work_without_tokens_measures_nothing(engine: Engine, dispatcher: Dispatcher) -> None:
    make_model(engine, "idle")
    worked(engine, "idle", "cpu", "float32", 0, 1)
    measure_rates(dispatcher)
    assert measured(engine, "idle") == {}
