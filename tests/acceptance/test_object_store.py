"""Job from a corpus in a bucket to Parquet in a bucket, while workers die in the middle of their parts."""

import io
import json
from collections.abc import Iterator
from pathlib import Path

import duckdb
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.infra import storage
from pipeline.jobs.verification import verified_receipt
from tests.acceptance.fleet import Fleet, eventually
from tests.support.object_store import content_of, environment_of, s3_server


@pytest.fixture
def bucket(fleet: Fleet) -> Iterator[str]:
    with s3_server("corpus") as server, environment_of(server):
        fleet.environment |= server
        yield "s3://corpus"


def _put_corpus(bucket: str, texts: list[str]) -> None:
    half = len(texts) // 2
    rows = [{"id": f"doc-{n}", "text": text} for n, text in enumerate(texts)]
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows[:half]), buffer, row_group_size=700)
    storage.write(f"{bucket}/in/2026/a.parquet", buffer.getvalue())
    storage.write(f"{bucket}/in/2026/b.jsonl", "".join(json.dumps(row) + "\n" for row in rows[half:]).encode())


def test_one_data_set_though_workers_die_in_their_parts(
    fleet: Fleet, bucket: str, texts: list[str], tmp_path: Path
) -> None:
    _put_corpus(bucket, texts)
    fleet.start_dispatcher()
    # Two of the worker's children die after a part is written and before it is recorded.
    deaths = [tmp_path / "first", tmp_path / "second"]
    fleet.environment |= {"MUTANT": "dying_in_parts", "DEATHS": ",".join(map(str, deaths))}
    fleet.start_worker(app="tests.acceptance.mutants")
    job = fleet.submit(f"{bucket}/in/", "--model", "static", "--by-reference", "--output", f"{bucket}/out")
    eventually(lambda: all(death.exists() for death in deaths) or None, "two children that died in their parts")
    assert not [name for name in storage.names_below(f"{bucket}/out") if not name.startswith("_staging/")]
    assert fleet.await_end(job)["state"] == "completed"

    with fleet.engine.begin() as connection:
        account = verified_receipt(connection, job)
    assert account.verified, account
    assert fleet.scalar("select count(*) from vectormill.claim_losses where job_id = :job", job=job) == 2
    names = set(storage.names_below(f"{bucket}/out"))
    parts = {name for name in names if name.endswith(".parquet")}
    assert names - parts == {"_manifest.json", "_SUCCESS"}
    folder = tmp_path / "out"
    for name in parts:
        storage.write(str(folder / name), content_of(f"{bucket}/out/{name}") or b"")
    keys = sorted(f"doc-{n}" for n in range(len(texts)))
    assert sorted(pq.read_table(folder)["key"].to_pylist()) == keys
    assert sorted(pl.read_parquet(folder / "*.parquet")["key"]) == keys
    assert (
        sorted(row[0] for row in duckdb.sql(f"select key from read_parquet('{folder}/*.parquet')").fetchall()) == keys
    )
