"""Finalisation of a job before it is completed."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from uuid import uuid4

import pyarrow.parquet as pq
import pytest
from sqlalchemy import Engine

from pipeline.chunk_io import parquet_data_set, parquet_sink
from pipeline.chunk_io.commit import write_chunk
from pipeline.core.models import Model
from pipeline.dispatch.finalize import due, finalize
from pipeline.infra import storage
from tests.support.jobs_made import DONE, RUNNING, job_row, make_job, part_of, run_sql, taken


def test_parts_that_a_retry_brought_belong_to_the_data_set_too(
    engine: Engine, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = make_job(engine, model)
    options = "update vectormill.jobs set options = options || cast(:options as jsonb)"
    run_sql(
        engine, options, options=json.dumps({"output": str(tmp_path), "columns": {"carry": []}, "dtype": "float32"})
    )
    claim = taken(engine, job_id)
    write_chunk(engine, claim, 0, part_of([0]), RUNNING)
    write_chunk(engine, claim, 1, part_of([1, 2, 3]), DONE)
    other, make_data_set = taken(engine, job_id, 1), parquet_data_set.make_data_set

    def make_and_be_late(*arguments: Any) -> None:
        make_data_set(*arguments)
        monkeypatch.undo()
        # While this thread was slow, another dispatcher completed the job, and a retry wrote another part.
        again = "update vectormill.chunks set state = 'pending', embedded = 0 where id = :id"
        run_sql(engine, again, id=other.chunk_id)
        write_chunk(engine, taken(engine, job_id, 1), 0, part_of([4, 5, 6, 7]), DONE)

    run_sql(engine, "update vectormill.chunks set state = 'done', embedded = items where id = :id", id=other.chunk_id)
    monkeypatch.setattr(parquet_sink, "make_data_set", make_and_be_late)
    finalize(engine, job_id)
    assert job_row(engine, job_id)["state"] == "running", "what was finalised isn't all that is there by now"
    with engine.begin() as connection:
        assert due(connection, 10) == [job_id]
    finalize(engine, job_id)
    assert job_row(engine, job_id)["state"] == "completed"
    assert sum(pq.read_metadata(file).num_rows for file in tmp_path.glob("*.parquet")) == 8


def test_parts_that_the_database_forgot_are_not_left_beside_those_it_lists(tmp_path: Path) -> None:
    job_id, folder = uuid4(), str(tmp_path)
    parquet_data_set.make_data_set(folder, job_id, [], {})
    forgotten = f"part-7-1-{uuid4().hex}-2.parquet"
    for name in (forgotten, "part-7-1.parquet", "mine.parquet", "part-of-mine.parquet"):
        (tmp_path / name).write_bytes(b"")
    parquet_data_set.make_data_set(folder, job_id, [], {})
    assert set(storage.names_below(folder)) == {
        parquet_data_set.MANIFEST,
        parquet_data_set.SUCCESS,
        "mine.parquet",
        "part-of-mine.parquet",
    }


_DIES_WRITING = """
import os, sys, uuid
from pipeline.chunk_io import parquet_data_set
os.fsync = lambda _: os._exit(9)
parquet_data_set.make_data_set(sys.argv[1], uuid.UUID(sys.argv[2]), [], {})
"""


def test_a_death_in_the_middle_of_the_manifest_leaves_nothing(tmp_path: Path) -> None:
    job_id = uuid4()
    dies = subprocess.run([sys.executable, "-c", _DIES_WRITING, str(tmp_path), str(job_id)], check=False)
    assert dies.returncode == 9
    parquet_data_set.make_data_set(str(tmp_path), job_id, [], {})
    assert set(storage.names_below(str(tmp_path))) == {parquet_data_set.MANIFEST, parquet_data_set.SUCCESS}
