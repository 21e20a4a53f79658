"""Vectors in the user's own table, by key."""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from sqlalchemy import Engine
from sqlalchemy.exc import IntegrityError

from pipeline.chunk_io.commit import Commit, write_chunk
from pipeline.chunk_io.reader import read_chunk
from pipeline.core.chunks import Claim, RejectCode
from pipeline.core.errors import UserError
from pipeline.core.options import KeptOptions, UserTable
from pipeline.db import user_table
from pipeline.db.embeddings import Passages
from pipeline.dispatch.finalize import due, finalize
from tests.support.jobs_made import DIMENSIONS, DONE, job_row, make_job, make_model, part_of, run_sql, taken, vectors_of

_TABLE = "create table public.docs (id text primary key, title text, embedding vector(4))"


def checked(engine: Engine, name: str = "public.docs", key: str = "id", hnsw: bool = False) -> UserTable:
    with engine.begin() as connection:
        return user_table.check(connection, name, key_column=key, dimensions=DIMENSIONS, hnsw=hnsw)


def claim_into(engine: Engine, target: UserTable, count: int = 8) -> Claim:
    job = make_job(engine, make_model(engine), count, per_chunk=count)
    claim = taken(engine, job)
    return replace(claim, options=replace(claim.options, table=target))


def commit(engine: Engine, claim: Claim, indexes: Sequence[int], keys: Sequence[str | None]) -> None:
    part = part_of(indexes)
    write_chunk(engine, claim, 0, replace(part, rows=replace(part.rows, keys=list(keys))), DONE)


def in_table(engine: Engine) -> dict[Any, tuple[Any, Any]]:
    rows = run_sql(engine, "select id, title, embedding::text from public.docs")
    return {key: (title, vector) for key, title, vector in rows}


def as_text(index: int) -> str:
    return "[" + ",".join(f"{value:.9g}" for value in vectors_of([index])[0].tolist()) + "]"


def test_rows_are_inserted_and_updated(engine: Engine) -> None:
    run_sql(engine, _TABLE)
    run_sql(engine, "insert into public.docs values ('k1', 'kept', '[9,9,9,9]'), ('other', 'untouched', null)")
    target = checked(engine)
    kept = KeptOptions(table=target)
    assert KeptOptions.from_json(kept.to_json()) == kept
    commit(engine, claim_into(engine, target), [0, 1], ["k0", "k1"])
    found = in_table(engine)
    assert found.keys() == {"k0", "k1", "other"}
    assert found["other"] == ("untouched", None)
    assert found["k1"][0] == "kept"
    assert [float(x) for x in found["k1"][1][1:-1].split(",")] == pytest.approx(vectors_of([1])[0].tolist())


def test_of_a_key_twice_the_last_one_wins(engine: Engine) -> None:
    run_sql(engine, _TABLE)
    commit(engine, claim_into(engine, checked(engine)), [0, 1, 2], ["a", "b", "a"])
    first = {key: float(vector[1:].split(",")[0]) for key, (_, vector) in in_table(engine).items()}
    assert first == {"a": 2.0, "b": 1.0}


_PASSAGES = (
    "create table public.docs (id int, passage int, stop bigint, embedding vector(4), primary key (passage, id))"
)


def passages_of(indexes: Sequence[int], counts: Sequence[int]) -> Commit:
    """Return a commit of some items with so many passages each; a passage has ten characters."""
    of_rows = np.repeat(indexes, counts)
    part = part_of(of_rows.tolist())
    numbers = np.concatenate([np.arange(count, dtype=np.int32) for count in counts])
    passages = Passages(numbers, numbers * 10, numbers * 10 + 10)
    return replace(part, rows=replace(part.rows, passages=passages))


def test_passages_are_upserted_and_those_that_are_no_more_deleted(engine: Engine) -> None:
    run_sql(engine, _PASSAGES)
    run_sql(engine, "insert into public.docs select 7, n, 0, '[9,9,9,9]' from generate_series(0, 4) n")
    run_sql(engine, "insert into public.docs values (8, 3, 0, '[9,9,9,9]')")
    with engine.begin() as connection:
        target = user_table.check(
            connection, "public.docs", key_column="id", dimensions=DIMENSIONS, hnsw=False, passages=True
        )
    kept = KeptOptions(table=target, split=64)
    assert KeptOptions.from_json(kept.to_json()) == kept
    part = passages_of([0, 1, 2], [3, 1, 2])
    keys = ["7", "7", "7", "5", "7", "7"]  # the second item with key 7 is the one that counts
    write_chunk(engine, claim_into(engine, target), 0, replace(part, rows=replace(part.rows, keys=keys)), DONE)
    found = run_sql(engine, "select id, passage, stop, embedding::text from public.docs order by id, passage")
    assert [(key, passage, stop) for key, passage, stop, _ in found] == [(5, 0, 10), (7, 0, 10), (7, 1, 20), (8, 3, 0)]
    assert float(found[1][3][1:].split(",")[0]) == vectors_of([2])[0][0]


@pytest.mark.parametrize(
    ("table", "told"),
    [
        (_TABLE, 'no column "passage"'),
        ("create table public.docs (id text primary key, passage int, embedding vector(4))", "unique together"),
        ("create table public.docs (id text, passage text, embedding vector(4), primary key (id, passage))", "integer"),
        (
            "create table public.docs (id text, passage int, o int, embedding vector(4), unique (id, passage, o))",
            "unique together",
        ),
    ],
)
def test_a_table_that_cant_hold_passages_is_refused(engine: Engine, table: str, told: str) -> None:
    run_sql(engine, table)
    with engine.begin() as connection, pytest.raises(UserError, match=told):
        user_table.check(connection, "public.docs", key_column="id", dimensions=DIMENSIONS, hnsw=False, passages=True)


def test_a_commit_that_fails_writes_nothing_there(engine: Engine) -> None:
    run_sql(engine, _TABLE)
    claim = claim_into(engine, checked(engine))
    run_sql(engine, "alter table public.docs add check (id <> 'bad')")
    with pytest.raises(IntegrityError):
        commit(engine, claim, [0, 1], ["good", "bad"])
    assert in_table(engine) == {}
    assert run_sql(engine, "select count(*) from vectormill.embeddings") == [(0,)]


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        ("text", ["x", "-"], [None]),
        ("smallint", ["1", "-32768"], ["32768", "x", "", "1.0", "1_0", None]),
        ("bigint", ["9223372036854775807"], ["9223372036854775808", "٣"]),
        (
            "uuid",
            ["0198c0de-0000-7000-8000-000000000000"],
            ["0198c0de", "urn:uuid:0198c0de-0000-7000-8000-000000000000"],
        ),
    ],
)
def test_keys_that_dont_fit_are_told_apart(engine: Engine, kind: str, good: list[str], bad: list[str | None]) -> None:
    run_sql(engine, f"create table public.docs (id {kind} primary key, embedding halfvec(4))")
    target = checked(engine)
    assert [target.key_fault(key) for key in good] == [None] * len(good)
    assert all(target.key_fault(key) for key in bad)
    commit(engine, claim_into(engine, target), range(len(good)), good)
    assert len(run_sql(engine, "select id from public.docs")) == len(good)


def test_items_whose_keys_dont_fit_are_rejected_when_they_are_read(engine: Engine) -> None:
    run_sql(engine, "create table public.docs (id bigint primary key, embedding vector(4))")
    (block,) = read_chunk(engine, claim_into(engine, checked(engine))).blocks
    assert not block.items
    assert {reject.code for reject in block.rejects} == {RejectCode.BAD_KEY}
    assert block.rejects[0].message == "key is no bigint, as public.docs needs"


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ("create table public.other (x int)", "no such table in vectormill's database; write it as schema.table"),
        ("create view public.docs as select 1 as id", "it isn't a table"),
        (
            "create table public.docs (key text primary key, e vector)",
            'no column "id"; name the key column as it is called there',
        ),
        ("create table public.docs (id text, e vector)", '"id" isn\'t unique'),
        ("create table public.docs (id text, b int, e vector, unique (id, b))", '"id" isn\'t unique'),
        ("create table public.docs (id date primary key, e vector)", 'the key "id" is date'),
        (
            "create table public.docs (id text primary key)",
            "it has 0 columns of type vector or halfvec; it must have exactly one",
        ),
        ("create table public.docs (id text primary key, a vector, b halfvec)", "2 columns of type vector"),
        ("create table public.docs (id text primary key, e vector(5))", '"e" has 5 dimensions, the job\'s vectors 4'),
        (
            "create table public.docs (id text primary key, e vector, n int not null)",
            '"n" is not null without a default',
        ),
    ],
)
def test_tables_that_cant_take_the_vectors(engine: Engine, table: str, said: str) -> None:
    run_sql(engine, table)
    with pytest.raises(UserError, match=r"^into public\.docs: ") as refused:
        checked(engine)
    assert said in str(refused.value)


def test_an_index_needs_declared_dimensions(engine: Engine) -> None:
    run_sql(engine, "create table public.docs (id text primary key, embedding vector)")
    assert checked(engine)
    with pytest.raises(UserError, match=r'for an index, declare "embedding" as vector\(4\)'):
        checked(engine, hnsw=True)


def test_the_index_is_built_and_may_be_built_again(engine: Engine) -> None:
    run_sql(engine, _TABLE)
    target = checked(engine, hnsw=True)
    commit(engine, claim_into(engine, target), [0, 1], ["a", "b"])
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        user_table.build_hnsw(connection, target)
        connection.exec_driver_sql(
            "update pg_index set indisvalid = false where indexrelid = 'public.docs_embedding_hnsw'::regclass"
        )
        user_table.build_hnsw(connection, target)
        user_table.build_hnsw(connection, target)
    valid = "select indisvalid from pg_index where indexrelid = 'public.docs_embedding_hnsw'::regclass"
    assert run_sql(engine, valid) == [(True,)]


def test_no_index_on_partitions(engine: Engine) -> None:
    run_sql(engine, "create table public.docs (id text primary key, embedding vector(4)) partition by hash (id)")
    assert checked(engine)
    with pytest.raises(UserError, match="an index needs a plain table that vectormill's role owns"):
        checked(engine, hnsw=True)


def test_a_table_that_refuses_its_index_pauses_the_job(engine: Engine) -> None:
    run_sql(engine, _TABLE)
    target = checked(engine, hnsw=True)
    claim = claim_into(engine, target)
    commit(engine, claim, range(8), [f"k{index}" for index in range(8)])
    run_sql(engine, "alter table public.docs drop column embedding")
    options = json.dumps(KeptOptions(table=target, hnsw=True).to_json())
    run_sql(engine, "update vectormill.jobs set options = options || cast(:options as jsonb)", options=options)
    with engine.begin() as connection:
        assert due(connection, 10, long=True) == [claim.job_id]
    finalize(engine, claim.job_id)
    row = job_row(engine, claim.job_id)
    assert (row["state"], row["reason"]) == ("paused", "table_refused")
    assert "the index that the job asks for" in row["message"]
    assert "embedding" in row["message"]
