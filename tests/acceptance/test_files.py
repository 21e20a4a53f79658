"""Jobs on files: sources that change, storage and tables that refuse, and data sets after a retry or a cancellation."""

import json
from pathlib import Path
from typing import Any
from uuid import UUID

import boto3
import duckdb
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from pipeline.infra import storage
from pipeline.jobs.verification import verified_receipt
from tests.acceptance.conftest import write_corpus
from tests.acceptance.fleet import Fleet, eventually
from tests.acceptance.poison import Poison
from tests.support.object_store import environment_of, s3_server


def _receipt(fleet: Fleet, job: UUID) -> dict[str, Any]:
    with fleet.engine.begin() as connection:
        return verified_receipt(connection, job).model_dump(by_alias=True)


def _keys(folder: Path) -> list[str]:
    return sorted(ds.dataset(folder).to_table(columns=["key"])["key"].to_pylist())


@pytest.mark.parametrize("change", ["another", "gone"])
def test_a_source_that_changes_fails_the_job(fleet: Fleet, texts: list[str], tmp_path: Path, change: str) -> None:
    corpus = write_corpus(tmp_path / "corpus.jsonl", texts[:1_000])
    fleet.start_dispatcher()
    job = fleet.submit(str(corpus), "--model", "static", "--by-reference")
    if change == "gone":
        corpus.unlink()
    else:
        write_corpus(corpus, texts[1_000:2_000])
    fleet.start_worker(1)
    ended = fleet.await_end(job)
    assert (ended["state"], ended["reason"]) == ("failed", "source_changed")
    assert "submit it again" in ended["message"]
    assert ended["items"]["embedded"] == 0
    assert _receipt(fleet, job)["verified"]


def test_a_storage_that_refuses_pauses_the_job_until_it_is_mended(
    fleet: Fleet, texts: list[str], tmp_path: Path
) -> None:
    corpus = write_corpus(tmp_path / "corpus.jsonl", texts[:500])
    with s3_server("vectors") as server, environment_of(server):
        fleet.environment |= server
        client = boto3.client("s3", endpoint_url=server["AWS_ENDPOINT_URL"], region_name="us-east-1")
        fleet.start_dispatcher()
        job = fleet.submit(str(corpus), "--model", "static", "--output", "s3://vectors/out")
        for name in list(storage.names_below("s3://vectors/")):
            storage.delete(f"s3://vectors/{name}")
        client.delete_bucket(Bucket="vectors")
        fleet.start_worker(1)
        paused = eventually(lambda: _if_state(fleet, job, "paused"), "a paused job")
        assert paused["reason"] == "storage_refused"
        assert "no such bucket" in paused["message"]
        client.create_bucket(Bucket="vectors")
        client.close()
        fleet.cli("resume", str(job))
        assert fleet.await_end(job)["state"] == "completed"
        assert _receipt(fleet, job)["verified"]
        assert storage.stat("s3://vectors/out/_SUCCESS")


def _if_state(fleet: Fleet, job: UUID, state: str) -> dict[str, Any] | None:
    found = fleet.status(job)
    return found if found["state"] == state else None


def test_retried_items_join_the_data_set(fleet: Fleet, texts: list[str], tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus.jsonl", [*texts[:300], f"{Poison.RAISES}, please", *texts[300:600]])
    out = tmp_path / "out"
    fleet.start_dispatcher()
    fleet.environment["MUTANT"] = "poisonable"
    fleet.start_worker(1, app="tests.acceptance.mutants", name="poisonable")
    job = fleet.submit(str(corpus), "--model", "static", "--by-reference", "--output", str(out))
    assert fleet.await_end(job)["items"]["rejected"] == 1
    assert _receipt(fleet, job)["verified"]
    assert len(_keys(out)) == 600
    fleet.kill("poisonable")

    fleet.start_worker(1)
    fleet.cli("retry", str(job))
    ended = fleet.await_end(job)
    assert (ended["state"], ended["items"]["embedded"], ended["items"]["rejected"]) == ("completed", 601, 0)
    assert _receipt(fleet, job)["verified"]
    assert _keys(out) == sorted(f"doc-{n}" for n in range(601))
    manifest = json.loads((out / "_manifest.json").read_bytes())
    assert manifest["rows"] == 601


def test_a_cancelled_job_leaves_no_data_set_but_what_it_wrote_can_be_read(
    fleet: Fleet, texts: list[str], tmp_path: Path
) -> None:
    corpus = write_corpus(tmp_path / "corpus.jsonl", texts)
    out = tmp_path / "out"
    fleet.start_dispatcher()
    fleet.start_worker(1)
    job = fleet.submit(str(corpus), "--model", "minilm", "--by-reference", "--output", str(out))
    eventually(lambda: fleet.status(job)["items"]["embedded"] > 0, "the first vectors")
    fleet.cli("cancel", str(job))
    ended = fleet.await_end(job)
    assert ended["state"] == "cancelled"
    assert _receipt(fleet, job)["verified"]
    assert [path.name for path in out.iterdir()] == ["_staging"]
    exported = tmp_path / "some.parquet"
    fleet.cli("results", str(job), "--to", str(exported))
    table = pq.read_table(exported)
    assert len(table) == ended["items"]["embedded"]
    assert table["index"].to_pylist() == sorted(set(table["index"].to_pylist()))


def test_an_occupied_folder_is_refused(fleet: Fleet, texts: list[str], tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus.jsonl", texts[:10])
    out = tmp_path / "out"
    first = fleet.submit(str(corpus), "--model", "static", "--output", str(out))
    refused = fleet.cli("submit", str(corpus), "--model", "static", "--output", str(out), check=False)
    assert refused.returncode == 2
    assert f"_staging/{first}/_job.json is there already; give an empty folder." in refused.stderr
    assert fleet.scalar("select count(*) from vectormill.jobs") == 1


def test_a_table_that_refuses_fails_the_job(fleet: Fleet, texts: list[str], tmp_path: Path) -> None:
    with fleet.engine.begin() as connection:
        connection.exec_driver_sql("create table docs (id text primary key, v vector(256), check (id <> 'doc-7'))")
    corpus = write_corpus(tmp_path / "corpus.jsonl", texts[:20])
    fleet.start_dispatcher()
    fleet.start_worker(1)
    job = fleet.submit(str(corpus), "--model", "static", "--into", "docs")
    ended = fleet.await_end(job)
    assert (ended["state"], ended["reason"]) == ("failed", "table_refused")
    assert "CheckViolation" in ended["message"]
    assert fleet.scalar("select count(*) from docs") == 0
    assert _receipt(fleet, job)["verified"]


def test_the_users_table_gets_each_vector_and_its_index(fleet: Fleet, texts: list[str], tmp_path: Path) -> None:
    with fleet.engine.begin() as connection:
        connection.exec_driver_sql("create table docs (id text primary key, v halfvec(256))")
    corpus = write_corpus(tmp_path / "corpus.jsonl", texts[:1_000])
    fleet.start_dispatcher()
    fleet.start_worker(1)
    job = fleet.submit(str(corpus), "--model", "static", "--into", "docs", "--hnsw", "--by-reference")
    assert fleet.await_end(job)["state"] == "completed"
    same = """
        select count(*) from docs d join vectormill.embeddings e on e.key = d.id
        where e.job_id = :job and d.v = e.vector::halfvec
    """
    assert fleet.scalar(same, job=job) == 1_000
    assert fleet.scalar("select count(*) from pg_indexes where indexname = 'docs_v_hnsw'") == 1


def test_the_query_in_the_guide_joins_vectors_and_source(
    fleet: Fleet, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = write_corpus(tmp_path / "docs.jsonl", texts[:200])
    fleet.start_dispatcher()
    fleet.start_worker(1)
    job = fleet.submit(str(corpus), "--model", "static", "--by-reference", "--output", str(tmp_path / "vectors"))
    assert fleet.await_end(job)["state"] == "completed"
    guide = (Path(__file__).parents[2] / "docs" / "how-to" / "large-corpora.md").read_text(encoding="utf-8")
    query = guide.partition('duckdb.sql("""')[2].partition('"""')[0]
    monkeypatch.chdir(tmp_path)
    rows = duckdb.sql(query).fetchall()
    assert [(key, text) for key, text, *_ in rows] == [(f"doc-{n}", text) for n, text in enumerate(texts[:200])]
    assert all(len(begins) == 2 for *_, begins in rows)
