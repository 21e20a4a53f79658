"""Rows of a query, from a real Postgres and a real DuckDB."""

import subprocess
import sys
from pathlib import Path

import duckdb
import pytest
from sqlalchemy import Engine

from pipeline.core.chunks import RejectCode
from pipeline.core.errors import LeaseLost, ServiceUnreachable, SourceError, SourceStopped, UserError
from pipeline.core.options import Columns
from pipeline.sources import query
from pipeline.sources.query import QueryCorpus
from tests.support.jobs_made import run_sql


def corpus(url: str, query: str, **columns: object) -> QueryCorpus:
    return QueryCorpus(url, query, Columns(**columns), 1_000)  # type: ignore[arg-type]


def rows(source: QueryCorpus) -> list[tuple[str | None, str | None]]:
    return [
        (key, text.decode() if text else None)
        for block in source.blocks()
        for key, text in zip(block.keys, block.texts, strict=True)
    ]


def test_rows_come_in_order(database: str) -> None:
    query = "select n as id, 'text ' || n as text from generate_series(1, 12000) n order by n desc"
    assert rows(corpus(database, query)) == [(str(n), f"text {n}") for n in range(12_000, 0, -1)]


def test_keys_and_carried_columns_of_all_kinds(database: str) -> None:
    query = """
        select '0198c0de-0000-7000-8000-000000000000'::uuid as id, 'x' as text, 1.50::numeric as price,
               date '2026-11-23' as day, '{"a": [1, null]}'::jsonb as more, true as yes, null::int as none
        union all select null, null, null, null, null, null, null
    """
    (block,) = corpus(database, query, carry=("price", "day", "more", "yes", "none")).blocks()
    assert block.keys == ["0198c0de-0000-7000-8000-000000000000", None]
    assert block.carried
    assert block.carried[0] == b'{"price":"1.50","day":"2026-11-23","more":{"a":[1,null]},"yes":true,"none":null}'
    assert [(at, code) for at, code, _ in block.problems] == [(1, RejectCode.MISSING_TEXT)]


def test_a_text_that_is_none_is_rejected(database: str) -> None:
    (block,) = corpus(database, "select 1 as id, now() as text union all select 2, now()").blocks()
    assert [(code, message) for _, code, message in block.problems] == [
        (RejectCode.NOT_A_STRING, f"row {n}: text is a number, not a string") for n in (1, 2)
    ]


def test_keys_of_a_kind_that_none_may_be(database: str) -> None:
    query = r"select '\x00'::bytea as id, 'a' as text"
    (block,) = corpus(database, query).blocks()
    assert [(code, message) for _, code, message in block.problems] == [
        (RejectCode.BAD_KEY, "row 1: key is of type bytes, not a string or a number")
    ]


def test_a_value_that_the_driver_has_no_word_for(database: str) -> None:
    query = "select 1 as id, 'a' as text, 'infinity'::date as valid_to"
    with pytest.raises(SourceError, match=r"a value can't be read \(DataError\); cast it to text"):
        rows(corpus(database, query))


def test_percent_signs_and_colons_are_no_parameters(database: str) -> None:
    assert rows(corpus(database, "select 'a:b %s %(x)s' as text where 'ab' like '%b';")) == [(None, "a:b %s %(x)s")]


def test_duckdb(tmp_path: Path) -> None:
    path = tmp_path / "shop.db"
    with duckdb.connect(str(path)) as connection:
        connection.sql("create table items as select range as id, 'item ' || range as text from range(7000)")
    source = corpus(f"duckdb:///{path}", "select * from items order by id")
    assert rows(source) == [(str(n), f"item {n}") for n in range(7_000)]
    assert source.name == f"the query on duckdb:///{path}"


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("select wrong", 'column "wrong" does not exist'),
        ("select 1 as id", 'no column "text"; columns are id'),
        ("select 'a' as text, 'b' as text", 'the column "text" comes twice'),
        ("delete from vectormill.jobs", 'syntax error at or near "delete"'),
        ("with d as (delete from vectormill.jobs returning 1) select 'x' as text from d", "must not contain"),
        ("select 'x' as text; drop table vectormill.jobs", "cannot"),
        ("create table t (x int)", 'syntax error at or near "create"'),
    ],
)
def test_what_a_query_may_not(database: str, engine: Engine, query: str, said: str) -> None:
    with pytest.raises((SourceError, ServiceUnreachable), match=said) as refused:
        rows(corpus(database, query))
    assert "vectormill:" not in str(refused.value)
    assert run_sql(engine, "select count(*) from vectormill.jobs") == [(0,)]


def test_options_of_the_url_count_but_for_the_right_to_write(database: str) -> None:
    url = f"{database}?options=-c%20statement_timeout%3D50%20-c%20default_transaction_read_only%3Doff"
    with pytest.raises(SourceStopped, match="statement timeout"):
        rows(QueryCorpus(url, "select pg_sleep(60)::text as text", Columns(), 1_000, seconds=600))
    shown = "select current_setting('transaction_read_only') as text"
    assert rows(corpus(url, shown)) == [(None, "on")]


def test_it_can_be_stopped_where_the_server_has_nothing_to_cancel(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(query, "_CANCEL_SECONDS", 0.1)
    source = corpus(database, "select repeat('x', 900) as text from generate_series(1, 100000)")
    blocks = source.blocks()
    next(blocks)
    source.stop(LeaseLost())
    with pytest.raises(LeaseLost):
        list(blocks)
    with pytest.raises(LeaseLost):
        list(source.blocks())


def test_bytes_cant_be_carried(database: str) -> None:
    with pytest.raises(SourceError, match='column "b" holds bytes, which can\'t be carried; cast it to text'):
        rows(corpus(database, "select 'x' as text, 'x'::bytea as b", carry=("b",)))


def test_a_database_that_isnt_there() -> None:
    source = corpus("postgresql://somebody:secret@127.0.0.1:1/shop", "select 1 as text")
    with pytest.raises(
        ServiceUnreachable, match=r"can't reach postgresql://127\.0\.0\.1:1/shop, the source's database"
    ) as lost:
        rows(source)
    assert "secret" not in str(lost.value)


def test_a_url_that_is_none_and_a_driver_that_isnt_there() -> None:
    with pytest.raises(UserError, match=r"^from: not a URL"):
        corpus("not a url", "select 1")
    with pytest.raises(UserError, match=r"its driver isn't installed; pip install 'vectormill\[snowflake\]'"):
        corpus("snowflake://account/db", "select 1")


def test_the_fingerprint_knows_no_password(database: str) -> None:
    one, two = (corpus(f"postgresql://user:{word}@host/db", "select 1") for word in ("first", "second"))
    assert one.fingerprint() == two.read_fingerprint()
    assert one.inputs() == two.inputs()
    assert "first" not in str(one.inputs()) + one.name
    assert one.fingerprint() != corpus("postgresql://user@host/db", "select 2").fingerprint()


def test_memory_stays_small(database: str) -> None:
    program = """
import resource, sys
from pipeline.core.options import Columns
from pipeline.sources.query import QueryCorpus
query = "select n as id, repeat('x', 1000) as text from generate_series(1, {}) n"
def peak(count):
    source = QueryCorpus(sys.argv[1], query.format(count), Columns(), 10_000)
    assert sum(len(block.keys) for block in source.blocks()) == count
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
few, many = peak(20_000), peak(300_000)
print(many / few)
"""
    done = subprocess.run([sys.executable, "-c", program, database], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 1.15
