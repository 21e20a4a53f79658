"""Results: a job's vectors as a file."""

import json
from pathlib import Path
from uuid import UUID

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sqlalchemy import Engine

from pipeline.chunk_io.commit import write_chunk
from pipeline.core.errors import UserError
from pipeline.core.models import Model
from pipeline.core.options import VectorType
from pipeline.db import embeddings
from pipeline.jobs.results import export
from tests.support.jobs_made import DIMENSIONS, DONE, make_job, part_of, reject, run_sql, taken, vectors_of

ITEMS = 5_000


def write(engine: Engine, job_id: UUID, target: Path) -> int:
    return export(engine, job_id, target)


@pytest.fixture
def job_id(engine: Engine, model: Model) -> UUID:
    """Make a job of three blocks: its second half was written first, one item is a reject, and items carry columns."""
    job_id = make_job(engine, model, ITEMS, per_chunk=ITEMS // 2, options={"columns": {"carry": ["lang", "key", "n"]}})
    write_chunk(engine, taken(engine, job_id, 1), 0, part_of(range(ITEMS // 2, ITEMS)), DONE)
    good = [index for index in range(ITEMS // 2) if index != 7]
    write_chunk(engine, taken(engine, job_id, 0), 0, part_of(good, [reject(7)]), DONE)
    run_sql(engine, "update vectormill.embeddings set truncated = true where index = 1")
    run_sql(
        engine, """update vectormill.items set carried = jsonb_build_object('lang', 'dé', 'n', index, 'key', 'x')"""
    )
    return job_id


INDEXES = [index for index in range(ITEMS) if index != 7]


def test_parquet(engine: Engine, job_id: UUID, tmp_path: Path) -> None:
    target = tmp_path / "out.parquet"
    assert write(engine, job_id, target) == ITEMS - 1
    table = pq.read_table(target)
    types = {field.name: field.type for field in table.schema}
    assert list(types) == ["index", "key", "embedding", "tokens", "truncated", "lang", "n"]
    assert pa.types.is_fixed_size_list(types["embedding"])
    assert (types["embedding"].list_size, types["embedding"].value_type) == (DIMENSIONS, pa.float32())
    assert (types["index"], types["tokens"], types["truncated"]) == (pa.int64(), pa.int32(), pa.bool_())
    assert table["index"].to_pylist() == INDEXES
    assert table["key"].to_pylist() == [f"k{index}" for index in INDEXES]
    assert table["lang"].to_pylist() == ["dé"] * (ITEMS - 1)
    assert table["n"].to_pylist()[:3] == ["0", "1", "2"]
    assert table["truncated"].to_pylist()[:3] == [False, True, False]
    read = np.stack(table["embedding"].to_numpy())
    np.testing.assert_array_equal(read, vectors_of(INDEXES))


def test_json_lines(engine: Engine, job_id: UUID, tmp_path: Path) -> None:
    target = tmp_path / "out.jsonl"
    assert write(engine, job_id, target) == ITEMS - 1
    rows = [json.loads(line) for line in target.read_text().splitlines()]
    assert list(rows[0]) == ["index", "key", "embedding", "tokens", "truncated", "n", "lang"]
    assert (rows[1]["key"], rows[1]["tokens"], rows[1]["truncated"]) == ("k1", 3, True)
    assert (rows[1]["lang"], rows[1]["n"]) == ("dé", 1)
    assert [row["index"] for row in rows] == INDEXES
    np.testing.assert_array_equal(np.array([row["embedding"] for row in rows], dtype=np.float32), vectors_of(INDEXES))


def test_rows_come_in_blocks(engine: Engine, job_id: UUID) -> None:
    with engine.begin() as connection:
        sizes = [len(block) for block in embeddings.stream(connection, job_id)]
    assert sizes == [2_000, 2_000, 999]


def test_half_precision(engine: Engine, model: Model, tmp_path: Path) -> None:
    job_id = make_job(engine, model, 4, options={"dtype": "float16"})
    write_chunk(engine, taken(engine, job_id), 0, part_of(range(4)), DONE)
    write(engine, job_id, tmp_path / "out.parquet")
    read = np.stack(pq.read_table(tmp_path / "out.parquet")["embedding"].to_numpy())
    np.testing.assert_array_equal(read, vectors_of(range(4)).astype(np.float16).astype(np.float32))


def test_a_job_without_vectors(engine: Engine, model: Model, tmp_path: Path) -> None:
    job_id = make_job(engine, model, options={"columns": {"carry": ["lang"]}})
    assert write(engine, job_id, tmp_path / "out.parquet") == 0
    table = pq.read_table(tmp_path / "out.parquet")
    assert (table.num_rows, table.column_names) == (0, ["index", "key", "embedding", "tokens", "truncated", "lang"])
    assert table.schema.field("embedding").type.list_size == DIMENSIONS
    assert write(engine, job_id, tmp_path / "out.jsonl") == 0
    assert (tmp_path / "out.jsonl").read_bytes() == b""


def test_a_column_that_begins_late(engine: Engine, job_id: UUID, tmp_path: Path) -> None:
    run_sql(engine, "update vectormill.items set carried = carried - 'lang' where index < 3000")
    write(engine, job_id, tmp_path / "out.parquet")
    assert pq.read_table(tmp_path / "out.parquet")["lang"].to_pylist() == [None] * 2_999 + ["dé"] * 2_000


@pytest.mark.parametrize("name", ["out.csv", "out", "nowhere/out.parquet", "nowhere/out.jsonl"])
def test_a_wrong_target_leaves_nothing(engine: Engine, model: Model, tmp_path: Path, name: str) -> None:
    job_id = make_job(engine, model, 4)
    with pytest.raises(UserError, match=r"^to "):
        write(engine, job_id, tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_export_leaves_the_old_file(
    engine: Engine, job_id: UUID, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out.parquet"
    target.write_text("old")
    decode, calls = embeddings._decode, []

    def fail_late(wire: bytes, kept_as: VectorType) -> object:
        calls.append(1)
        if len(calls) > 3_000:
            raise OSError("the disk is full")
        return decode(wire, kept_as)

    monkeypatch.setattr(embeddings, "_decode", fail_late)
    with pytest.raises(UserError, match="the disk is full"):
        write(engine, job_id, target)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("out.parquet", "old")]
