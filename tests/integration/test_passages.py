"""Passages of a chunk on a real Postgres, with a real model: written, read, verified, searched and purged."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from sqlalchemy import Engine

from pipeline.chunk_io import sinks
from pipeline.core.chunks import Claim
from pipeline.core.models import Model
from pipeline.db import items, search
from pipeline.jobs import purge, results, verification
from tests.integration.test_run_chunk import model, run, watch
from tests.support.jobs_made import make_job, run_sql, taken
from workers.encoders.batching import Batch
from workers.encoders.local import LocalEncoder
from workers.encoders.reading import Ids
from workers.runner.slice_encoding import SliceEncoding

__all__ = ["model"]

_TEXTS = ["one two three four five six. " * 4, "short", "seven eight nine. " * 9]
_PASSAGES = "select index, passage, start, stop from vectormill.passages order by index, passage"


def split_job(engine: Engine, model: Model, **options: object) -> Claim:
    job = make_job(engine, model, len(_TEXTS), options={"split": 16, **options})
    for index, body in enumerate(_TEXTS):
        query = "update vectormill.items set text = :body, title = :title where index = :index"
        run_sql(engine, query, index=index, body=body, title=f"title {index}")
    return taken(engine, job)


def test_passages_are_committed_with_their_characters(engine: Engine, encoder: LocalEncoder, model: Model) -> None:
    claim = split_job(engine, model)
    assert run(engine, encoder, claim)["embedded"] == len(_TEXTS)
    found = run_sql(engine, _PASSAGES)
    for index, body in enumerate(_TEXTS):
        parts = [row for row in found if row[0] == index]
        assert [passage for _, passage, *_ in parts] == list(range(len(parts)))
        assert "".join(body[start:stop] for *_, start, stop in parts) == body
    assert run_sql(engine, "select passages from vectormill.chunks") == [(len(found),)]
    assert run_sql(engine, "select items from vectormill.usage") == [(len(_TEXTS),)]
    assert run_sql(engine, "select max(tokens) from vectormill.passages") <= [(16,)]


def test_the_model_reads_the_title_before_each_passage(engine: Engine, encoder: LocalEncoder, model: Model) -> None:
    run(engine, encoder, split_job(engine, model, columns={"title": "{title}"}))
    rows = run_sql(engine, "select index, start, stop, tokens from vectormill.passages order by index, passage")
    read = [f"title {index}\n\n{_TEXTS[index][start:stop]}" for index, start, stop, _ in rows]
    assert [tokens for *_, tokens in rows] == encoder.tokenise(read).lengths.tolist()
    made = run_sql(engine, "select vector::text from vectormill.passages order by index, passage")
    alone = encoder.encode(encoder.tokenise(read))
    assert np.allclose([json.loads(vector) for (vector,) in made], alone, atol=1e-6)


def test_a_passage_that_fails_rejects_its_item(
    engine: Engine, encoder: LocalEncoder, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, bad = encoder._forward, set(encoder.tokenise(["six"]).ids[0].tolist())

    def without_six(ids: list[Ids]) -> Any:
        if any(bad & set(each.tolist()) for each in ids):
            raise RuntimeError("six")
        return forward(ids)

    monkeypatch.setattr(encoder, "_forward", without_six)
    found = run(engine, encoder, split_job(engine, model))
    assert (found["state"], found["embedded"], found["rejected"]) == ("done", 2, 1)
    ((index, code, message),) = run_sql(engine, "select index, code, message from vectormill.rejects")
    assert (index, code) == (0, "encode_failed")
    assert re.fullmatch(r"passage \d \(characters \d+ to \d+\): the model raised RuntimeError", message)
    assert {index for index, *_ in run_sql(engine, _PASSAGES)} == {1, 2}


def test_a_passage_without_a_vector_rejects_its_item(
    engine: Engine, encoder: LocalEncoder, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, bad = encoder._forward, set(encoder.tokenise(["six"]).ids[0].tolist())

    def zero_for_six(ids: list[Ids]) -> Any:
        vectors = forward(ids).clone()
        vectors[[bool(bad & set(each.tolist())) for each in ids]] = 0
        return vectors

    monkeypatch.setattr(encoder, "_forward", zero_for_six)
    found = run(engine, encoder, split_job(engine, model))
    assert (found["embedded"], found["rejected"]) == (2, 1)
    assert [row[0] for row in run_sql(engine, "select index from vectormill.rejects")] == [0]
    assert {index for index, *_ in run_sql(engine, _PASSAGES)} == {1, 2}


def test_an_item_is_committed_with_its_last_passage(engine: Engine, encoder: LocalEncoder, model: Model) -> None:
    """However often is committed, and although the claim's time is over, no half item is written."""
    how = watch(most_seconds=0)
    how.commit_seconds = 0.0
    encoder.budget_tokens, before = 16, encoder.budget_tokens
    try:
        found = run(engine, encoder, split_job(engine, model), how)
    finally:
        encoder.budget_tokens = before
    assert found["state"] == "pending"
    assert 0 < found["embedded"] < len(_TEXTS)
    whole = "select index, max(passage) + 1 = count(*), max(stop) from vectormill.passages group by index"
    assert [(done, stop) for _, done, stop in run_sql(engine, whole)] == [
        (True, len(_TEXTS[index])) for index, *_ in run_sql(engine, whole)
    ]


def test_a_title_without_room_rejects_its_item(engine: Engine, encoder: LocalEncoder, model: Model) -> None:
    claim = split_job(engine, model)
    run_sql(engine, "update vectormill.items set title = repeat('word ', 12) where index = 2")
    assert run(engine, encoder, claim)["rejected"] == 1
    assert run_sql(engine, "select index, code, message from vectormill.rejects") == [
        (2, "too_long", "prompt and title leave fewer than 8 of 16 tokens for a passage")
    ]


def test_passages_are_read_as_they_were_written(
    engine: Engine, encoder: LocalEncoder, model: Model, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Also where a page ends within an item."""
    monkeypatch.setattr(sinks, "_PAGE", 2)
    claim = split_job(engine, model)
    run(engine, encoder, claim)
    written = run_sql(
        engine, "select index, key, passage, start, stop from vectormill.passages order by index, passage"
    )
    whole = [tuple(json.loads(line)[name] for name in _READ) for line in lines(engine, claim, 0, 9)]
    assert whole == [tuple(row) for row in written]
    part = [json.loads(line)["index"] for line in lines(engine, claim, 1, 2)]
    assert part == [index for index, *_ in written if index == 1]
    results.export(engine, claim.job_id, tmp_path / "all.parquet")
    table = pq.read_table(tmp_path / "all.parquet")
    assert table.column_names == ["index", "key", "embedding", "tokens", "truncated", "passage", "start", "stop"]
    assert [tuple(row[name] for name in _READ) for row in table.to_pylist()] == whole


_READ = ("index", "key", "passage", "start", "stop")


def lines(engine: Engine, claim: Claim, first: int, end: int) -> list[bytes]:
    return b"".join(results.stream(engine, claim.job_id, "jsonl", first, end)).splitlines()


def test_a_search_shows_the_passage(engine: Engine, encoder: LocalEncoder, model: Model) -> None:
    claim = split_job(engine, model)
    run(engine, encoder, claim)
    index, start, stop = run_sql(engine, "select index, start, stop from vectormill.passages where passage = 1")[0]
    text = _TEXTS[index][start:stop]
    vector = encoder.encode(encoder.tokenise([f"title {index}\n\n{text}"]))[0]
    with engine.begin() as connection:
        found = search.nearest_items(connection, claim.job_id, vector.tolist(), 1, passages=True)
    assert found[0].similarity == pytest.approx(1, abs=1e-6)
    assert _TEXTS[found[0].index][found[0].start : found[0].stop] == found[0].text


@pytest.mark.parametrize(
    ("harm", "missing", "double"),
    [
        ("delete from vectormill.passages where index = 0 and passage = 1", 1, 0),
        ("delete from vectormill.passages where index = 0 and passage = 0", 2, 0),
        ("delete from vectormill.passages where index = 1", 2, 0),
        ("update vectormill.passages set stop = stop - 1 where index = 1", 1, 0),
        ("update vectormill.passages set passage = 99 where index = 0 and passage = 1", 2, 0),
        ("insert into vectormill.rejects values ((select job_id from vectormill.jobs_ids), 1, null, 'x', 'x')", 0, 1),
    ],
)
def test_a_receipt_is_verified_by_passages(
    engine: Engine, encoder: LocalEncoder, model: Model, harm: str, missing: int, double: int
) -> None:
    claim = split_job(engine, model)
    run(engine, encoder, claim)
    with engine.begin() as connection:
        assert verification.verified_receipt(connection, claim.job_id).verified
    run_sql(engine, harm.replace("select job_id from vectormill.jobs_ids", "select id from vectormill.jobs"))
    with engine.begin() as connection:
        found = verification.verified_receipt(connection, claim.job_id)
    assert not found.verified
    assert (found.missing, found.double) == (missing, double)


def test_a_worker_that_commits_half_an_item_is_found_out(
    engine: Engine, encoder: LocalEncoder, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mutant that takes an item for done with its first passage."""
    real = SliceEncoding._add

    def too_early(self: SliceEncoding, batch: Batch) -> None:
        real(self, batch)
        owners = self._texts.owner[batch.at]
        self._missing[owners[self._missing[owners] >= 0]] = 0

    monkeypatch.setattr(SliceEncoding, "_add", too_early)
    monkeypatch.setattr(encoder, "budget_tokens", 16)
    how = watch()
    how.commit_seconds = 0.0
    claim = split_job(engine, model)
    run(engine, encoder, claim, how)
    with engine.begin() as connection:
        assert not verification.verified_receipt(connection, claim.job_id).verified


def test_passages_and_titles_go_with_their_job(engine: Engine, encoder: LocalEncoder, model: Model) -> None:
    claim = split_job(engine, model)
    run(engine, encoder, claim)
    count = run_sql(engine, "select count(*) from vectormill.passages")[0][0]
    run_sql(engine, "update vectormill.items set text = null where index = 1")
    with engine.begin() as connection:
        items.remove_texts(connection, claim.job_id, 0, len(_TEXTS))
    assert run_sql(engine, "select distinct text, title from vectormill.items") == [(None, None)]
    run_sql(engine, "update vectormill.jobs set state = 'completed', items_total = :items", items=len(_TEXTS))
    assert purge.purge_job(engine, claim.job_id)["passages"] == count
    assert run_sql(engine, "select count(*) from vectormill.passages") == [(0,)]
