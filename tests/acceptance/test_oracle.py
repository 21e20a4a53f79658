"""Tests of the oracle: it objects to spoiled vectors, to stray files, and to a commit under a stale fence that no count
shows."""

import json
from collections.abc import Callable
from pathlib import Path
from uuid import UUID

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sqlalchemy import Engine

from pipeline.chunk_io.commit import write_chunk
from pipeline.core.chunks import Claim
from pipeline.core.errors import LeaseLost
from pipeline.core.models import Model
from pipeline.db import chunks, lost_claims
from tests.acceptance import witness
from tests.acceptance.oracle import objections
from tests.support.jobs_made import DONE, PENDING, make_job, make_model, part_of, taken, vectors_of

Vectors = npt.NDArray[np.float32]

_ITEMS = 8


@pytest.fixture
def model(engine: Engine) -> Model:
    with engine.begin() as connection:
        witness.install(connection)
    return make_model(engine)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    file = tmp_path / "corpus.jsonl"
    file.write_text("".join(json.dumps({"id": f"k{at}"}) + "\n" for at in range(_ITEMS)), encoding="utf-8")
    return file


def _data_set(engine: Engine, model: Model, folder: Path, vectors: Vectors) -> UUID:
    """Make a job whose data set holds these vectors; return its id."""
    folder.mkdir()
    job = make_job(engine, model, _ITEMS, per_chunk=_ITEMS, options={"output": str(folder)})
    keys = [f"k{at}" for at in range(_ITEMS)]
    table = {"index": range(_ITEMS), "key": keys, "embedding": list(vectors), "tokens": [3] * _ITEMS}
    pq.write_table(pa.table({name: pa.array(values) for name, values in table.items()}), folder / "part.parquet")
    (folder / "_manifest.json").write_text(json.dumps({"files": [{"name": "part.parquet"}]}))
    (folder / "_SUCCESS").touch()
    return job


@pytest.mark.parametrize(
    ("spoil", "agrees"),
    [
        (lambda vector: vector, True),
        (lambda vector: vector.astype(np.float16), True),
        (lambda vector: vector * np.nan, False),
        (lambda vector: vector * [1, 1, 1, np.inf], False),
        (lambda vector: vector * 0, False),
        (lambda vector: vector * 2, False),
        (lambda vector: -vector, False),
        (lambda vector: vector[::-1], False),
    ],
    ids=["as it is", "float16", "nan", "infinite", "zero", "scaled", "opposite", "reversed"],
)
def test_a_vector_that_is_spoiled(
    engine: Engine, model: Model, corpus: Path, tmp_path: Path, spoil: Callable[[Vectors], Vectors], agrees: bool
) -> None:
    good = vectors_of(range(_ITEMS)) + 1
    spoiled = good.copy()
    spoiled[5] = spoil(good[5])
    calm, job = (_data_set(engine, model, tmp_path / name, each) for name, each in (("calm", good), ("job", spoiled)))
    with engine.begin() as connection:
        said = objections(connection, job, corpus, calm)
    assert ("1 vectors differ from the calm run's" in said) is not agrees


@pytest.mark.parametrize(
    ("name", "late"),
    [
        ("part-2.parquet", False),
        (".abc.partial", False),
        ("_staging/{job}/part-{chunk}-1-{token}.parquet", True),
        ("_staging/{job}/part-{chunk}-1-{token}-3.parquet", True),
        ("_staging/{job}/.abc_12.partial", True),
        ("_staging/{job}/part-{chunk}-2-{token}.parquet", False),
        ("_staging/{job}/part-{chunk}-11-{token}.parquet", False),
        ("_staging/{job}/_job.json", False),
    ],
)
def test_a_file_that_is_left_over(
    engine: Engine, model: Model, corpus: Path, tmp_path: Path, name: str, late: bool
) -> None:
    job = _data_set(engine, model, tmp_path / "job", vectors_of(range(_ITEMS)))
    lost = _lost(engine, job)
    stray = tmp_path / "job" / name.format(job=job, chunk=lost.chunk_id, token=lost.token.hex)
    stray.parent.mkdir(parents=True, exist_ok=True)
    stray.touch()
    with engine.begin() as connection:
        said = objections(connection, job, corpus)
    assert any("left over" in each for each in said) is not late


def test_a_file_that_is_missing(engine: Engine, model: Model, corpus: Path, tmp_path: Path) -> None:
    job = _data_set(engine, model, tmp_path / "job", vectors_of(range(_ITEMS)))
    (tmp_path / "job" / "_SUCCESS").unlink()
    with engine.begin() as connection:
        said = objections(connection, job, corpus)
    assert "files: ['_SUCCESS'] are missing, [] are left over" in said


def _lost(engine: Engine, job: UUID) -> Claim:
    claim = taken(engine, job, lease_seconds=-1)
    with engine.begin() as connection:
        lost_claims.expire_leases(connection, 1)
    return claim


@pytest.mark.parametrize("fenced", [True, False])
def test_a_part_that_is_committed_by_a_lost_claim(
    engine: Engine, model: Model, corpus: Path, monkeypatch: pytest.MonkeyPatch, fenced: bool
) -> None:
    """The first claim commits half of the chunk after the second claim, and the third the rest: all counts add up."""
    job = make_job(engine, model, _ITEMS, per_chunk=_ITEMS)
    first, _ = _lost(engine, job), _lost(engine, job)
    if fenced:
        with pytest.raises(LeaseLost):
            write_chunk(engine, first, 0, part_of(range(4)), PENDING)
    else:
        with monkeypatch.context() as patch:
            patch.setattr(chunks, "OURS", "cast(:fence as bigint) is not null")
            write_chunk(engine, first, 0, part_of(range(4)), PENDING)
    write_chunk(engine, taken(engine, job), 0, part_of(range(0 if fenced else 4, _ITEMS)), DONE)
    with engine.begin() as connection:
        said = objections(connection, job, corpus)
    assert said == ([] if fenced else ["1 commits that the witness saw under another fence than the chunk's"])
