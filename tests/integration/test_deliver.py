"""What a job needs before it is completed."""

import json
import subprocess
import sys
from pathlib import Path
from uuid import uuid4

import pyarrow.parquet as pq
from sqlalchemy import Engine

from pipeline import parts, storage
from pipeline.deliver import Deliveries
from pipeline.jobs import Model
from pipeline.store import jobs
from pipeline.writeback import write_chunk
from tests.acceptance.fleet import eventually
from tests.jobs_made import RUNNING, make_job, part_of, run_sql, taken


def test_parts_that_a_retry_brought_are_delivered_too(engine: Engine, model: Model, tmp_path: Path) -> None:
    job_id = make_job(engine, model)
    options = "update vectormill.jobs set options = options || cast(:options as jsonb)"
    run_sql(
        engine, options, options=json.dumps({"output": str(tmp_path), "columns": {"carry": []}, "dtype": "float32"})
    )
    claim, deliveries = taken(engine, job_id), Deliveries(engine)

    def is_done() -> bool:
        with engine.begin() as connection:
            job = jobs.by_id(connection, job_id)
            assert job
            return deliveries.is_done(connection, job)

    for number in range(2):
        write_chunk(engine, claim, number, part_of([number]), RUNNING)
        # Another dispatcher may have completed the job meanwhile, and never have asked this one again.
        assert not is_done()
        eventually(lambda: not deliveries.is_under_way(job_id), "the end of the delivery")
    assert is_done()
    assert sum(pq.read_metadata(file).num_rows for file in tmp_path.glob("*.parquet")) == 2


def test_parts_that_the_database_forgot_are_not_left_beside_those_it_lists(tmp_path: Path) -> None:
    job_id, folder = uuid4(), str(tmp_path)
    parts.deliver(folder, job_id, [], {})
    forgotten = f"part-7-1-{uuid4().hex}-2.parquet"
    for name in (forgotten, "part-7-1.parquet", "mine.parquet", "part-of-mine.parquet"):
        (tmp_path / name).write_bytes(b"")
    parts.deliver(folder, job_id, [], {})
    assert set(storage.names_below(folder)) == {parts.MANIFEST, parts.SUCCESS, "mine.parquet", "part-of-mine.parquet"}


_DIES_WRITING = """
import os, sys, uuid
from pipeline import parts
os.fsync = lambda _: os._exit(9)
parts.deliver(sys.argv[1], uuid.UUID(sys.argv[2]), [], {})
"""


def test_a_death_in_the_middle_of_the_manifest_leaves_nothing(tmp_path: Path) -> None:
    job_id = uuid4()
    dies = subprocess.run([sys.executable, "-c", _DIES_WRITING, str(tmp_path), str(job_id)], check=False)
    assert dies.returncode == 9
    parts.deliver(str(tmp_path), job_id, [], {})
    assert set(storage.names_below(str(tmp_path))) == {parts.MANIFEST, parts.SUCCESS}
