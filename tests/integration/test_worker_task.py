"""Celery task of a worker, called without Celery's queue in a process of its own."""

import os
import subprocess
import sys
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import Engine

from pipeline.catalog.models import add_model, find_model, workspace_id
from pipeline.core.models import Model
from pipeline.jobs import status
from tests.support.jobs_made import chunk_ids, make_job, run_sql

#: Program of a worker's child that embeds the chunks named as job:chunk, on a CPU that computes like a GPU.
_CHILD = """
import sys
import torch
from billiard import current_process
from workers.encoders import library
library.dtype_on = lambda _, precision: torch.bfloat16 if precision == "auto" else getattr(torch, precision)
from workers.runner.tasks import run_chunk_task
current_process().index = 0
for pair in sys.argv[1:]:
    job, chunk = pair.split(":")
    run_chunk_task.apply(args=(job, int(chunk)), throw=True)
"""


@pytest.fixture
def model(engine: Engine, bundled_description: dict[str, Any]) -> Model:
    with engine.begin() as connection:
        add_model(connection, "minilm", bundled_description)
        return find_model(connection, workspace_id(connection), "minilm")


def embed(database: str, redis_url: str, *chunks: tuple[UUID, int]) -> None:
    servers = {"VECTORMILL_DATABASE_URL": database, "VECTORMILL_REDIS_URL": redis_url}
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, *(f"{job}:{chunk}" for job, chunk in chunks)],
        env=dict(os.environ) | servers,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()[-2_000:]


def embedded_on(engine: Engine, job_id: UUID) -> list[tuple[str, str, int, int]]:
    with engine.begin() as connection:
        parts = status.receipt(connection, job_id).embedded_on
    return [(part.device, part.precision, part.items, part.tokens) for part in parts]


def test_a_job_is_embedded_in_the_precision_that_it_demands(
    engine: Engine, database: str, redis_url: str, model: Model
) -> None:
    usual = make_job(engine, model, 8, per_chunk=8)
    demanding = make_job(engine, model, 8, per_chunk=4, options={"precision": "float32"})
    chunks = [(job, chunk) for job in (usual, demanding) for chunk in chunk_ids(engine, job)]
    embed(database, redis_url, *chunks)
    assert embedded_on(engine, usual) == [("cpu", "bfloat16", 8, 32)]
    assert embedded_on(engine, demanding) == [("cpu", "float32", 8, 32)]
    tokens = "select sum(tokens) from vectormill.embeddings where job_id = :job"
    assert run_sql(engine, tokens, job=usual) == run_sql(engine, tokens, job=demanding) == [(32,)]
    differing = """
        select count(*) from vectormill.embeddings a join vectormill.embeddings b using (index)
        where a.job_id = :one and b.job_id = :other and a.vector <> b.vector and a.vector <=> b.vector < 0.001
    """
    assert run_sql(engine, differing, one=usual, other=demanding) == [(8,)]
