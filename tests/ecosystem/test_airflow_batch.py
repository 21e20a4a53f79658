"""Batch requests by the stock operators of Airflow's OpenAI provider: in ops/schedulers/airflow/batch_request.py as
Airflow runs it, and on their own."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from openai import OpenAI

from tests.acceptance.fleet import eventually
from tests.ecosystem.conftest import Airflow, Site, batch_lines

_TEXTS = [{"id": f"a{n}", "text": f"in December the mill grinds {n} sacks"} for n in range(120)]
#: Program that uploads a file, triggers a batch request over it and waits, `TIMES` times. It prints ids, or the name
#: of the error that was raised.
_PROGRAM = """
import json, os
from airflow.providers.openai.hooks.openai import OpenAIHook
from airflow.providers.openai.operators.openai import OpenAITriggerBatchOperator

done = []
for attempt in range(int(os.environ["TIMES"])):
    file = OpenAIHook().upload_file(os.environ["FILE"], purpose="batch")
    operator = OpenAITriggerBatchOperator(
        task_id=f"embed-{attempt}",
        file_id=file.id,
        endpoint="/v1/embeddings",
        wait_seconds=0.5,
        timeout=float(os.environ["SECONDS"]),
    )
    try:
        done.append({"returned": operator.execute({})})
    except Exception as error:
        done.append({"raised": type(error).__name__, "batch": operator.batch_id})
print("\\n" + json.dumps(done))
"""


@pytest.fixture(scope="module")
def client(site: Site) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{site.gateway.url}/v1", api_key=site.gateway.key) as made:
        yield made


def _operate(airflow: Airflow, file: Path, times: int = 1, seconds: float = 120) -> list[dict[str, Any]]:
    done = airflow.python(_PROGRAM, FILE=str(file), TIMES=str(times), SECONDS=str(seconds))
    assert done.returncode == 0, _told(done)
    said: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return said


def _told(done: subprocess.CompletedProcess[str]) -> str:
    return done.stdout[-3000:] + done.stderr[-3000:]


def test_the_dag_completes_and_a_second_run_attaches(airflow: Airflow, by_library: Any) -> None:
    site = airflow.site
    site.write("2026-12-24.jsonl", [*_TEXTS, {"id": 7, "text": " "}])
    before = site.embedded()
    for _ in range(2):
        done = airflow.run("batch_request", "2026-12-24")
        assert done.returncode == 0, _told(done)
    lines = (site.folder / "2026-12-24-vectors.jsonl").read_text().splitlines()
    found = {row["custom_id"]: row["response"]["body"]["data"][0]["embedding"] for row in map(json.loads, lines)}
    assert found.keys() == {row["id"] for row in _TEXTS}
    (error,) = map(json.loads, (site.folder / "2026-12-24-errors.jsonl").read_text().splitlines())
    assert (error["custom_id"], error["error"]["code"]) == ("7", "empty_text")
    whole = by_library([row["text"] for row in _TEXTS])
    np.testing.assert_allclose([found[row["id"]] for row in _TEXTS], whole, atol=1e-5)
    assert site.jobs("articles-2026-12-24") == ["completed"]
    assert site.embedded() == before + len(_TEXTS)


def test_a_bad_upstream_fails_the_dag(airflow: Airflow) -> None:
    rows = [row if n % 5 else {"id": row["id"], "text": ""} for n, row in enumerate(_TEXTS)]
    airflow.site.write("2026-12-25.jsonl", rows)
    done = airflow.run("batch_request", "2026-12-25")
    assert done.returncode != 0
    assert "OpenAIBatchJobException" in done.stdout + done.stderr
    assert not (airflow.site.folder / "2026-12-25-vectors.jsonl").exists()


def test_it_completes_and_attaches(airflow: Airflow, client: OpenAI) -> None:
    file = airflow.site.write("completes.jsonl", batch_lines("completes", 120))
    before = airflow.site.embedded()
    first, again = _operate(airflow, file, times=2)
    batches = [client.batches.retrieve(done["returned"]) for done in (first, again)]
    assert [batch.status for batch in batches] == ["completed", "completed"]
    assert batches[0].id != batches[1].id
    assert len({batch.job_id for batch in batches}) == 1  # type: ignore[attr-defined]
    assert airflow.site.embedded() == before + 120


def test_it_fails_on_a_failed_batch_request(airflow: Airflow, client: OpenAI) -> None:
    lines = batch_lines("fails", 120)
    for line in lines[::5]:
        line["url"] = "/v1/chat/completions"
    for rows in (lines, []):
        (done,) = _operate(airflow, airflow.site.write("fails.jsonl", rows))
        assert done["raised"] == "OpenAIBatchJobException"
        batch = client.batches.retrieve(done["batch"])
        assert (batch.status, batch.output_file_id) == ("failed", None)
        assert batch.errors
        assert batch.errors.data


def test_it_times_out_and_cancels(airflow: Airflow, client: OpenAI) -> None:
    fleet = airflow.site.gateway.fleet
    fleet.processes["worker"].terminate()
    fleet.processes["worker"].wait(60)
    try:
        file = airflow.site.write("late.jsonl", batch_lines("late", 120))
        (done,) = _operate(airflow, file, seconds=3)
        assert done["raised"] == "OpenAIBatchTimeout"
        eventually(lambda: client.batches.retrieve(done["batch"]).status == "cancelled", "the batch request's end")
        assert airflow.site.jobs("late") == ["cancelled"]
    finally:
        fleet.start_worker(replicas=1)
