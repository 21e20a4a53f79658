"""Estimates of jobs compared with the real cost, by the real tokeniser and in real tables."""

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, text

from pipeline.core.errors import SourceError, UserError
from pipeline.core.models import Model
from pipeline.core.options import Columns, JobOptions, KeptOptions
from pipeline.db import scratch, usage
from pipeline.db.database import make_engine
from pipeline.infra.settings import Settings
from pipeline.ingest.estimate import Fleet, Measurement, Tokens, estimate
from pipeline.ingest.prediction import NO_ROW, Measured, Rates, RowCost
from pipeline.ingest.row_costs import SampleRow, measure_rows
from pipeline.ingest.submission import planning
from pipeline.sources import Corpus
from tests.support.jobs_made import make_job, make_model, run_sql
from tests.support.roles import logins
from workers.encoders.local import LocalEncoder

_DOCUMENTS = 20_000


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a corpus: a fifth of its texts are duplicates, one in a thousand is empty, and lengths differ widely."""
    path = tmp_path_factory.mktemp("corpus") / "docs.jsonl"
    with path.open("w") as file:
        for n in range(_DOCUMENTS):
            same = n - 1 if n % 5 == 4 else n
            text = "" if n % 1_000 == 999 else f"{same} mill " * (same * 7_919 % 97 + 1)
            file.write(json.dumps({"id": n, "text": text}) + "\n")
    return path


@pytest.fixture
def model(engine: Engine) -> Model:
    return replace(make_model(engine, tokens_per_second=10_000.0), max_item_tokens=64, dimensions=384)


@pytest.fixture(scope="module")
def encoder(static_model: Path) -> LocalEncoder:
    return LocalEncoder(static_model, "cpu")


_RATES = Rates(token_seconds=1e-5, vector_seconds=1e-4, measured=Measured.HERE)
_ROW = RowCost(seconds=1e-6, wal_bytes=100, disk_bytes=200)


def _fleet(slots: int = 2) -> Fleet:
    return Fleet(slots=slots, devices=1, planning=planning(Settings()))


def _one_token_each(rows: Sequence[SampleRow], _: int) -> Measurement:
    return Measurement(
        tokens=Tokens([1] * len(rows), [False] * len(rows), [0] * len(rows)), rates=_RATES, item=_ROW, vector=_ROW
    )


@pytest.mark.parametrize("by_reference", [False, True])
def test_the_truth_lies_in_the_interval(corpus: Path, model: Model, encoder: LocalEncoder, by_reference: bool) -> None:
    def tokens(texts: Sequence[str]) -> Tokens:
        read = encoder.tokenise(list(texts), 64)
        assert read.lost is not None
        return Tokens(read.lengths.tolist(), read.truncated.tolist(), read.lost.tolist())

    def measure(rows: Sequence[SampleRow], items: int) -> Measurement:
        assert items == pytest.approx(_DOCUMENTS, rel=0.01)
        read = tokens([row.text.decode() for row in rows])
        return Measurement(tokens=read, rates=_RATES, item=NO_ROW if by_reference else _ROW, vector=_ROW)

    source = Corpus([str(corpus)], Columns(), 100_000)
    found = estimate(source, model, JobOptions(by_reference=by_reference), _fleet(), measure)
    texts = [each.decode() for rows in source.blocks() for each in rows.texts if each]
    lengths, cut, *_ = tokens(texts)
    assert found["items"]["total"] == _DOCUMENTS
    estimated = found["tokens"]
    margin = (estimated["high"] - estimated["low"]) / 2
    assert abs(sum(lengths) - estimated["total"]) < 2 * margin
    assert 0 < margin < estimated["total"] / 20
    assert found["truncated"]["share"] == pytest.approx(sum(cut) / len(cut), abs=0.05)
    pieces = found["pieces"]
    once = estimated["total"] * (1 - found["duplicates"]["share"])
    working = (once * 1e-5 + _DOCUMENTS * 1e-4) / 2
    assert pieces["embed_seconds"] + pieces["write_seconds"] == pytest.approx(working, rel=0.1)
    assert pieces["submit_seconds"] > 0
    time = found["time"]
    assert time["seconds"] == pytest.approx(
        sum(pieces[f"{part}_seconds"] for part in ("submit", "start", "embed", "write")), abs=0.1
    )
    assert (time["slots"], time["measured"]) == (2, "here")
    if by_reference:
        assert estimated["sampled_items"] == pytest.approx(2_000, abs=20)
    else:
        assert found["items"]["rejected"] == 20
        assert found["duplicates"]["share"] == pytest.approx(1 - len(set(texts)) / len(texts), abs=1e-4)


def test_a_corpus_is_scaled(corpus: Path, model: Model) -> None:
    def of(at: int | None, *, reuse: bool = False) -> dict[str, Any]:
        source, options = Corpus([str(corpus)], Columns(), 100_000), JobOptions(reuse=reuse)
        return estimate(source, model, options, _fleet(), _one_token_each, price_per_million=0.5, at=at)

    here, there = of(None), of(10**9)
    assert (here["at"], there["at"]) == (None, 10**9)
    assert there["items"] == {"total": 10**9, "rejected": 10**6}
    pieces = there["pieces"]
    assert pieces["wal_bytes"] == 10**9 * 100 + 999 * 10**6 * 100
    assert pieces["disk_bytes"] == 10**9 * 200 + 999 * 10**6 * 200
    assert pieces["cost"] == pytest.approx(999 * 0.5)
    assert pieces["embed_seconds"] == pytest.approx(999e6 * 1e-5 / 2, rel=0.01)
    assert of(10**9, reuse=True)["pieces"]["cost"] == pytest.approx(999 * 0.5 * 0.8, rel=0.01), "equal texts cost once"
    assert pieces["submit_seconds"] > 1_000  # a microsecond to stage an item, and its reading


def test_no_rows_take_nothing(model: Model, tmp_path: Path) -> None:
    (tmp_path / "none.jsonl").touch()
    source = Corpus([str(tmp_path / "none.jsonl")], Columns(), 100_000)
    found = estimate(source, model, JobOptions(), _fleet(0), _one_token_each, at=10**6)
    assert found["items"] == {"total": 0, "rejected": 0}
    assert found["bytes"] == {"postgres": 0, "parquet": 0}


def _sample(count: int = 500) -> list[SampleRow]:
    return [SampleRow(f"key-{n}", f"{n} mill ".encode() * 30, None) for n in range(count)]


def test_rows_are_measured_where_they_would_be(engine: Engine) -> None:
    measure = partial(measure_rows, engine, _sample())
    item, vector = measure(KeptOptions(), 384)
    assert 240 < item.wal_bytes < 400
    assert 240 < item.disk_bytes < 450
    # A vector of 1,544 bytes and its row fit on a page five times.
    assert 1_540 < vector.wal_bytes < 2_000
    assert 8_192 / 5 < vector.disk_bytes < 8_192 / 4
    assert 0 < vector.seconds < 1
    _, half = measure(KeptOptions.from_json({"dtype": "float16"}), 384)
    assert half.disk_bytes < vector.disk_bytes - 384
    # Longer ones are kept apart, four pieces to a page.
    _, long = measure(KeptOptions(), 1_536)
    assert 1_536 * 4 < long.disk_bytes < 1_536 * 4 * 1.5
    by_reference, parquet = measure(KeptOptions(by_reference=True, output="/nowhere/to/be/found"), 384)
    assert by_reference == NO_ROW
    assert 384 * 4 * 0.85 < parquet.parquet_bytes < 384 * 4 * 1.1
    assert (parquet.wal_bytes, parquet.disk_bytes) == (0, 0)
    _nothing_is_left(engine)


def _nothing_is_left(engine: Engine) -> None:
    assert run_sql(engine, "select relname from pg_class where relname like 'dry_run%'") == []
    assert run_sql(engine, "select count(*) from vectormill.items") == [(0,)]


def test_a_login_that_may_make_no_tables(engine: Engine, database: str) -> None:
    """It gets temporary ones, which aren't logged: their WAL is told from their size."""
    api = make_engine(logins(database)["api"], application="vectormill-tests")
    with scratch.scratch_tables(api) as tables:
        assert not tables.logged
    _, vector = measure_rows(api, _sample(), KeptOptions(), 384)
    api.dispose()
    assert vector.wal_bytes == 384 * 4 + 28
    assert 8_192 / 5 < vector.disk_bytes < 8_192 / 4
    _nothing_is_left(engine)


def test_a_login_that_may_not_even_make_temporary_tables(engine: Engine, database: str) -> None:
    api = make_engine(logins(database)["api"], application="vectormill-tests")
    run_sql(engine, f'revoke temporary on database "{database.rpartition("/")[2]}" from public')
    with pytest.raises(UserError, match="grant it temporary on the database"):
        measure_rows(api, _sample(), KeptOptions(), 384)
    api.dispose()


def test_a_wrong_column_is_said(corpus: Path, model: Model) -> None:
    source = Corpus([str(corpus)], Columns(text="body"), 100)
    with pytest.raises(SourceError, match='no column "body"'):
        estimate(source, model, JobOptions(), _fleet(), _one_token_each)


def test_what_is_not_refused_is_said(model: Model, tmp_path: Path) -> None:
    path = tmp_path / "docs.tsv"
    path.write_text('ID\ttext\n1\t"mill"\n')
    for by_reference in (False, True):
        source, options = Corpus([str(path)], Columns(), 1_000), JobOptions(by_reference=by_reference)
        found = estimate(source, model, options, _fleet(), _one_token_each)
        assert ['If "ID" holds keys' in found["notices"][0], "fields stand in quotes" in found["notices"][1]] == [
            True
        ] * 2
    with pytest.raises(UserError, match=r"max_item_tokens 65: .* reads 64 tokens of a text at most"):
        estimate(source, model, JobOptions(max_item_tokens=65), _fleet(), _one_token_each)


def test_what_workers_did_lately(engine: Engine) -> None:
    """Chunks that were claimed once and are done count, by the kind of their job's output."""
    model = make_model(engine)
    to_postgres, to_parquet = (make_job(engine, model, options=options) for options in ({}, {"output": "/out"}))
    run_sql(
        engine,
        """
        update vectormill.chunks set state = 'done', fence = 1, started_at = now() - interval '20 s',
               finished_at = now() - interval '10 s'
        """,
    )
    run_sql(
        engine,
        """
        insert into vectormill.usage
          (workspace_id, job_id, model, chunk_id, fence, part, items, prompt_tokens, device_seconds, created_at)
        select 1, job_id, :model, id, 1, part, 2, 100, 1.5, now() - interval '10 s'
        from vectormill.chunks, generate_series(0, 1) part
        """,
        model=model.name,
    )

    def work(parquet: bool, seconds: float = 3_600) -> usage.ChunkWork:
        with engine.begin() as connection:
            return usage.recent_chunks(connection, model.name, parquet=parquet, window_seconds=seconds)

    whole = usage.ChunkWork(chunks=2, vectors=8, tokens=400, device_seconds=6.0, slot_seconds=20.0)
    assert (work(False), work(True)) == (whole, whole)
    assert work(False, 5) == usage.ChunkWork(0, 0, 0, 0, 0)
    again = "update vectormill.chunks set fence = 2 where job_id = :job and ordinal = 0"
    run_sql(engine, again, job=to_postgres)
    assert work(False) == usage.ChunkWork(chunks=1, vectors=4, tokens=200, device_seconds=3.0, slot_seconds=10.0)
    # A chunk that ended five minutes before the newest one counts for a third.
    older = "update vectormill.chunks set {0} = {0} - interval '5 min' where job_id = :job and ordinal = 0"
    for moment in ("started_at", "finished_at"):
        run_sql(engine, older.format(moment), job=to_parquet)
    assert work(True).slot_seconds == pytest.approx(10 + 10 * 0.368, rel=0.01)


def test_the_rate_follows_what_workers_did_last(engine: Engine) -> None:
    """The rate follows up and down: work of an hour ago counts next to nothing."""
    name = make_model(engine, tokens_per_second=400.0).name

    def work(tokens: int, minutes_ago: int) -> float | None:
        with engine.begin() as connection:
            connection.execute(
                text("""
                    insert into vectormill.usage
                      (workspace_id, job_id, model, prompt_tokens, device_seconds, created_at, device, precision)
                    values (1, gen_random_uuid(), :model, :tokens, 10, now() - make_interval(mins => :age), 'cpu',
                            'float32')
                """),
                {"model": name, "tokens": tokens, "age": minutes_ago},
            )
            measured = usage.measured_rates(connection, 3_600, 5)
            return next((float(row["rate"]) for row in measured if row["model"] == name), None)

    assert work(1_000, 70) is None
    assert work(4_000, 55) == pytest.approx(400)
    assert work(35_000, 10) == pytest.approx(3_500, rel=0.01)
    assert work(4_000, 0) == pytest.approx(400 + 3_100 * 0.12, rel=0.1)
