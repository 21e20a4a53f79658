"""The Python client against a real api, dispatcher, worker and engine."""

import asyncio
import json
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest

import vectormill
from tests.acceptance.fleet import eventually
from tests.contract.conftest import Gateway

_ROWS = [
    {"number": n, "subject": f"case {n}", "body": f"the mill grinds {n} sacks", "lang": ("en", None)[n % 2]}
    for n in range(40)
]
_TEXTS = [f"{row['subject']}\n\n{row['body']}" for row in _ROWS]
_HOW: dict[str, Any] = {"model": "static", "text": "{subject}\n\n{body}", "key": "number", "carry": "lang"}


@pytest.fixture(scope="module")
def allowed(gateway: Gateway, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Start a dispatcher, a worker of one model, and an api with a folder that callers may name."""
    folder = tmp_path_factory.mktemp("allowed")
    gateway.fleet.environment["VECTORMILL_API_SOURCES"] = str(folder)
    gateway.fleet.kill("api")
    gateway.start_api()
    gateway.fleet.start_dispatcher()
    gateway.fleet.start_worker(replicas=1, VECTORMILL_WORKER_MODELS="static")
    return folder


@pytest.fixture(scope="module")
def mill(gateway: Gateway, allowed: Path) -> Iterator[vectormill.Client]:
    with vectormill.connect(gateway.url, gateway.key) as client:
        yield client


def _cursor(_: Path) -> Any:
    connection = sqlite3.connect(":memory:")
    connection.execute("create table cases (number integer, subject text, body text, lang text)")
    connection.executemany("insert into cases values (:number, :subject, :body, :lang)", _ROWS)
    return connection.execute("select number, subject, body, lang from cases order by number")


def _file(folder: Path) -> Path:
    path = folder / "cases.parquet"
    pl.DataFrame(_ROWS).write_parquet(path)
    return path


_SOURCES: dict[str, Callable[[Path], Any]] = {
    "rows": lambda _: iter(_ROWS),
    "polars": lambda _: pl.DataFrame(_ROWS),
    "polars, lazy": lambda _: pl.LazyFrame(_ROWS),
    "pandas": lambda _: pd.DataFrame(_ROWS),
    "arrow": lambda _: pa.Table.from_pylist(_ROWS),
    "arrow, batches": lambda _: pa.Table.from_pylist(_ROWS).to_reader(max_chunksize=7),
    "duckdb": lambda folder: duckdb.sql(f"select * from '{_file(folder)}' order by number"),
    "cursor": _cursor,
    "file": _file,
    "files": lambda folder: [_file(folder)],
}


@pytest.mark.parametrize("kind", _SOURCES)
def test_rows_of_every_kind_become_the_same_vectors(
    mill: vectormill.Client, by_library: Any, tmp_path: Path, kind: str
) -> None:
    job = mill.embed(_SOURCES[kind](tmp_path), name=f"cases from {kind}", **_HOW)
    status = job.wait(120)
    assert (status.items.total, status.items.embedded + status.items.reused) == (40, 40)
    table = job.to_arrow()
    assert table["key"].to_pylist() == [str(n) for n in range(40)]
    assert table["lang"].to_pylist() == [row["lang"] for row in _ROWS]
    np.testing.assert_allclose(np.stack(table["embedding"].to_numpy()), by_library(_TEXTS), atol=1e-5)
    receipt = job.receipt()
    assert (receipt.balanced, receipt.verified, receipt.items["in"]) == (True, None, 40)
    counted = receipt.verify()
    assert (counted.verified, counted.missing, counted.double) == (True, 0, 0)


def test_vectors_come_as_frames_files_and_rows(mill: vectormill.Client, tmp_path: Path) -> None:
    job = mill.embed(_ROWS, **_HOW)
    job.wait(120)
    rows = list(job)
    assert [row["key"] for row in rows] == [str(n) for n in range(40)]
    frame, pandas = job.to_polars(), job.to_pandas()
    assert frame["key"].to_list() == list(pandas["key"]) == [row["key"] for row in rows]
    np.testing.assert_allclose(np.stack(pandas["embedding"].to_list()), [row["embedding"] for row in rows], atol=1e-6)
    saved = job.save(tmp_path / "vectors.jsonl")
    assert [json.loads(line) for line in saved.read_text().splitlines()] == rows
    assert list(tmp_path.iterdir()) == [saved]
    with pytest.raises(vectormill.UserError, match=r"\.parquet or \.jsonl"):
        job.save(tmp_path / "vectors.csv")
    near = job.search("case 7", k=3)
    assert len(near) == 3
    assert near[0].similarity >= near[1].similarity
    assert mill.job(str(job.id)[:18]).id == job.id


def test_files_of_the_api_are_named_by_their_paths_there(mill: vectormill.Client, allowed: Path) -> None:
    job = mill.embed(sources=[str(_file(allowed))], **_HOW)
    assert job.name == "cases"
    assert job.wait(120).items.total == 40


def test_rejects_and_the_end_of_a_job_that_fails(mill: vectormill.Client) -> None:
    texts: list[dict[str, Any]] = [{"id": "a", "text": "a mill"}, {"id": "b", "text": None}]
    job = mill.embed(texts, model="static", labels={"team": "search"}, reuse=False)
    status = job.wait(120)
    assert (status.items.rejected, status.labels) == (1, {"team": "search"})
    (reject,) = job.rejects()
    assert (reject.key, reject.code) == ("b", "missing_text")
    assert str(job.id) in [str(found.id) for found in mill.jobs(label="team=search")]
    failing = mill.embed([{"id": "b", "text": None}], model="static")
    with pytest.raises(vectormill.JobNotCompleted, match="is failed") as caught:
        failing.wait(120)
    assert caught.value.job.state == "failed"
    assert mill.embed(["only", "texts"], model="static").wait(120).items.total == 2


def test_the_same_again_gives_the_same_job(mill: vectormill.Client) -> None:
    first, second = (mill.embed(_ROWS, **_HOW, idempotency_key="cases of today") for _ in range(2))
    assert first.id == second.id
    assert mill.embed(_ROWS, **_HOW).id != first.id


def test_options_that_are_false_are_heeded(mill: vectormill.Client) -> None:
    for _ in range(2):
        status = mill.embed(["embedded again and again"], model="static", reuse=False).wait(120)
        assert (status.items.embedded, status.items.reused) == (1, 0)
    strict = mill.embed([{"text": "good"}, {"text": None}], model="static", max_rejects=0)
    with pytest.raises(vectormill.JobNotCompleted, match="is failed"):
        strict.wait(120)


def test_a_job_stays_the_one_that_was_named(mill: vectormill.Client) -> None:
    first = mill.embed(["one"], model="static", name="namesakes")
    named = mill.job("namesakes")
    assert named.id == first.id
    mill.embed(["one", "two"], model="static", name="namesakes").wait(120)
    assert named.wait(120).items.total == named.to_arrow().num_rows == 1


def test_a_wait_that_takes_too_long(mill: vectormill.Client) -> None:
    job = mill.embed([{"id": "a", "text": "no worker has this model"}], model="alone")
    with pytest.raises(TimeoutError, match="it goes on"):
        job.wait(0.2)
    assert job.cancel().state in ("cancelling", "cancelled")
    eventually(lambda: job.status().state == "cancelled", "the end of a cancelled job")
    with pytest.raises(vectormill.JobNotCompleted, match="is cancelled"):
        job.wait()


def test_mistakes_are_told_in_one_sentence(mill: vectormill.Client, gateway: Gateway, tmp_path: Path) -> None:
    with pytest.raises(vectormill.NotFound, match='"unknown"'):
        mill.embed(_ROWS, model="unknown")
    with pytest.raises(vectormill.UserError, match="s3://bucket"):
        mill.embed("s3://bucket/docs.parquet", model="static")
    with pytest.raises(vectormill.UserError, match="sources"):
        mill.embed(model="static")
    with pytest.raises(vectormill.UserError, match='no column "nothing"') as caught:
        mill.embed(_ROWS, model="static", text="nothing")
    assert caught.value.field == "text_column"
    with pytest.raises(vectormill.UserError, match="tomorow"):
        mill.embed(_ROWS, model="static", tomorow=True)
    with pytest.raises(vectormill.UserError, match="row 1: a value of type object"):
        mill.embed([{"text": "a"}, {"text": object()}], model="static")
    with pytest.raises(vectormill.UserError, match="row 0: int; give a mapping"):
        mill.embed([7], model="static")
    with pytest.raises(vectormill.UserError, match="no such file"):
        mill.embed(str(tmp_path / "missing.csv"), model="static")
    with pytest.raises(vectormill.UserError, match="a folder"):
        mill.embed(tmp_path, model="static")
    with pytest.raises(vectormill.NotFound):
        mill.job("no such job").status()
    with pytest.raises(vectormill.NotFound):
        mill.job("..").status()
    with vectormill.connect(gateway.url, "vm_wrong") as stranger, pytest.raises(vectormill.KeyRefused):
        stranger.models()
    assert "static" in [model.name for model in mill.models()]


def test_a_collection_follows_a_frame(mill: vectormill.Client, by_library: Any) -> None:
    collection = mill.create_collection("cases", **_HOW)
    frame = pl.DataFrame(_ROWS)
    assert collection.sync(frame).wait(120).items.total == 40
    later = frame.with_columns(
        pl.when(pl.col("number") == 3).then(pl.lit("a new body")).otherwise("body").alias("body")
    )
    status = collection.sync(later.filter(pl.col("number") < 38)).wait(120)
    assert (status.items.unchanged, status.items.removed) == (37, 2)
    assert collection.status().keys == 38
    (hit, *_) = collection.search("a new body", k=2)
    assert hit.key == "3"
    (hit,) = collection.search("case 4", k=1, where={"lang": "en"})
    assert hit.carried == {"lang": "en"}
    newest, _ = collection.history()
    assert (newest.changed, newest.unchanged, newest.removed) == (1, 37, 2)
    assert [found.name for found in mill.collections()] == ["cases"]
    gone = collection.sync([{**_ROWS[3], "gone": True}], delta=True, removed_column="gone").wait(120)
    assert gone.items.removed == 1
    many = mill.create_collection("many", model="static")
    many.sync([{"id": n, "text": f"a{n}"} for n in range(200)]).wait(120)
    shrunk = many.sync([{"id": 1, "text": "a1"}])
    with pytest.raises(vectormill.JobNotCompleted, match="removed") as caught:
        shrunk.wait(120)
    assert caught.value.job.reason == "too_many_removed"
    collection.drop()
    with pytest.raises(vectormill.NotFound):
        collection.status()


def test_a_second_sync_waits_or_is_refused(mill: vectormill.Client, gateway: Gateway) -> None:
    collection = mill.create_collection("busy", model="alone")
    first = collection.sync([{"id": "a", "text": "no worker has this model"}])
    with pytest.raises(vectormill.CollectionBusy):
        collection.sync([{"id": "a", "text": "another"}], queue=False)
    first.cancel()
    second = collection.sync(iter([{"id": "a", "text": "another"}]), delta=True)
    assert (second.id != first.id, second.status().items.total) == (True, 1), "rows are read once, and sent again"
    second.cancel()


def test_twins_that_are_awaited(gateway: Gateway, mill: vectormill.Client) -> None:
    async def act() -> None:
        async with vectormill.connect_async(gateway.url, gateway.key) as client:
            job = await client.embed(iter(_ROWS), **_HOW)
            assert (await job.wait(120)).items.total == 40
            assert [row["key"] async for row in job] == [str(n) for n in range(40)]
            assert [reject async for reject in job.rejects()] == []
            assert (await job.receipt(verify=True)).verified
            found = await asyncio.gather(*(job.search(f"case {n}", k=1) for n in range(5)))
            assert all(len(hits) == 1 for hits in found)
            mill.create_collection("awaited", **_HOW)
            collection = client.collection("awaited")
            await (await collection.sync(pl.DataFrame(_ROWS))).wait(120)
            assert (await collection.status()).keys == 40
            assert len(await collection.search("case 7", k=3)) == 3
            with pytest.raises(vectormill.NotFound):
                await client.job("no such job").status()

    asyncio.run(act())


def test_an_api_that_comes_back_is_waited_for(gateway: Gateway, mill: vectormill.Client) -> None:
    gateway.stop_api()
    with pytest.raises(vectormill.ServiceUnreachable, match="can't reach the api"):
        mill.models()
    gateway.start_api()
    assert mill.models()
