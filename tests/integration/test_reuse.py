"""Reuse of vectors on a real Postgres, with a real model: each text of a workspace is embedded once."""

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any
from uuid import UUID

import numpy as np
import pyarrow.parquet as pq
import pytest
from sqlalchemy import Connection, Engine, text

from pipeline.catalog.models import add_model, find_model, workspace_id
from pipeline.chunk_io import reader
from pipeline.core.chunks import Claim
from pipeline.core.models import Model
from pipeline.core.options import KeptOptions
from pipeline.core.text_identity import TextIdentity
from pipeline.db import embeddings, items, known_texts, lost_claims, restored, workspaces
from pipeline.jobs import control
from pipeline.jobs.purge import purge_job
from pipeline.jobs.verification import verified_receipt
from tests.support.jobs_made import chunk_rows, make_job, run_sql, take, taken
from workers.encoders.local import LocalEncoder
from workers.runner.reuse import sort_out
from workers.runner.run_chunk import run_chunk
from workers.watchdog import Watch

_REUSE = {"reuse": True}


@pytest.fixture
def model(engine: Engine, static_description: dict[str, Any]) -> Model:
    with engine.begin() as connection:
        add_model(connection, "static", static_description)
        return find_model(connection, workspace_id(connection), "static")


def job_of(engine: Engine, model: Model, texts: Sequence[str], per_chunk: int = 100, **how: Any) -> UUID:
    """Queue a job of these texts."""
    job = make_job(engine, model, len(texts), per_chunk=per_chunk, options={**_REUSE, **how.pop("options", {})}, **how)
    with engine.begin() as connection:
        statement = text("update vectormill.items set text = :text where job_id = :job and index = :index")
        connection.execute(statement, [{"job": job, "index": at, "text": each} for at, each in enumerate(texts)])
    return job


def run(engine: Engine, encoder: LocalEncoder, claim: Claim) -> dict[str, Any]:
    """Run a claimed chunk; return its counts."""
    run_chunk(engine, encoder, claim, Watch(hung_after_seconds=60, most_seconds=60), on_hang=lambda: None)
    names = ("state", "embedded", "reused", "rejected")
    (row,) = [row for row in chunk_rows(engine, claim.job_id) if row["id"] == claim.chunk_id]
    return {name: row[name] for name in names}


def counts(state: str, embedded: int, reused: int = 0, rejected: int = 0) -> dict[str, Any]:
    return {"state": state, "embedded": embedded, "reused": reused, "rejected": rejected}


def vectors(engine: Engine, job: UUID) -> list[str]:
    return [
        row[0]
        for row in run_sql(
            engine, "select vector::text from vectormill.embeddings where job_id = :job order by index", job=job
        )
    ]


def due_at_once(engine: Engine) -> None:
    """Let chunks that were given back for a moment be claimed now, while others are at work on theirs."""
    waiting = "select id from vectormill.chunks where not_before is not null order by id for update"
    run_sql(engine, f"update vectormill.chunks set not_before = null where id = any(array({waiting}))")


def verified(engine: Engine, job: UUID) -> bool | None:
    with engine.begin() as connection:
        return verified_receipt(connection, job).verified


def test_equal_texts_of_a_chunk_are_embedded_once(engine: Engine, encoder: LocalEncoder, model: Model) -> None:
    job = job_of(engine, model, ["one mill", "two mills", "one mill", "one mill"])
    assert run(engine, encoder, taken(engine, job)) == counts("done", 2, 2)
    one, two, *again = vectors(engine, job)
    assert one != two
    assert again == [one, one]
    keys = run_sql(engine, "select key from vectormill.embeddings where job_id = :job order by index", job=job)
    assert keys == [("k0",), ("k1",), ("k2",), ("k3",)]
    tokens = run_sql(engine, "select tokens from vectormill.embeddings where job_id = :job order by index", job=job)
    a, b = tokens[0][0], tokens[1][0]
    metered = "select sum(items), sum(prompt_tokens), sum(reused_items), sum(reused_tokens) from vectormill.usage"
    assert run_sql(engine, metered) == [(2, a + b, 2, 2 * a)]
    assert verified(engine, job)


def test_another_job_takes_the_vectors_that_are_there(engine: Engine, encoder: LocalEncoder, model: Model) -> None:
    texts = [f"mill {n}" for n in range(50)]
    first, second = job_of(engine, model, texts), job_of(engine, model, [*texts, "a new one"])
    assert run(engine, encoder, taken(engine, first)) == counts("done", 50)
    assert run(engine, encoder, taken(engine, second)) == counts("done", 1, 50)
    assert vectors(engine, second)[:-1] == vectors(engine, first)
    assert verified(engine, second)


@pytest.mark.parametrize(
    "options", [{"reuse": False}, {"dtype": "float16"}, {"precision": "float32"}, {"on_long": "reject"}, {"split": 16}]
)
def test_other_settings_embed_anew(
    engine: Engine, encoder: LocalEncoder, model: Model, options: dict[str, Any]
) -> None:
    run(engine, encoder, taken(engine, job_of(engine, model, ["a mill", "a river"])))
    other = job_of(engine, model, ["a mill", "a river"], options=options)
    assert run(engine, encoder, taken(engine, other)) == counts("done", 2)


def test_another_workspace_embeds_anew(engine: Engine, encoder: LocalEncoder, model: Model) -> None:
    with engine.begin() as connection:
        other = workspaces.create(connection, "other", 1.0)
    run(engine, encoder, taken(engine, job_of(engine, model, ["a mill"])))
    strangers = job_of(engine, model, ["a mill"], workspace=other)
    assert run(engine, encoder, taken(engine, strangers)) == counts("done", 1)


def test_a_mutant_that_forgets_workspaces_is_seen(
    engine: Engine, encoder: LocalEncoder, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(known_texts, "text", lambda statement: text(statement.replace("j.workspace_id", "0")))
    with pytest.raises(AssertionError):
        test_another_workspace_embeds_anew(engine, encoder, model)


def test_a_text_that_another_chunk_embeds_is_left_to_the_next_claim(
    engine: Engine, encoder: LocalEncoder, model: Model
) -> None:
    job = job_of(engine, model, ["shared", "mine", "shared", "yours"], per_chunk=2)
    ahead, claim = taken(engine, job, 0), taken(engine, job, 1)
    sort_out(engine, ahead, _items(engine, job, 0, 2))
    assert run(engine, encoder, claim) == counts("pending", 1)
    assert take(engine, job, 1) is None, "it is given back for a moment"
    due_at_once(engine)
    assert run(engine, encoder, taken(engine, job, 1)) == counts("pending", 1), "nothing came meanwhile"
    assert run(engine, encoder, ahead) == counts("done", 2)
    due_at_once(engine)
    assert run(engine, encoder, taken(engine, job, 1)) == counts("done", 1, 1)
    assert verified(engine, job)


@pytest.mark.parametrize(("losses", "embedded"), [(1, 2), (2, 4)])
def test_a_lost_chunk_shares_its_texts_until_one_of_them_may_be_the_cause(
    engine: Engine, encoder: LocalEncoder, model: Model, losses: int, embedded: int
) -> None:
    run(engine, encoder, taken(engine, job_of(engine, model, ["elsewhere"])))
    job = job_of(engine, model, ["here", "elsewhere", "here", "there"])
    for _ in range(losses):
        sort_out(engine, taken(engine, job), _items(engine, job, 0, 4))
        run_sql(engine, "update vectormill.chunks set lease_until = '-infinity' where job_id = :job", job=job)
        with engine.begin() as connection:
            assert len(lost_claims.expire_leases(connection, 10)) == 1
    assert run(engine, encoder, taken(engine, job)) == counts("done", embedded, 4 - embedded)
    assert verified(engine, job)


@pytest.mark.parametrize("first", ["confirmed", "taken over"])
def test_a_chunk_that_runs_again_while_its_text_is_taken_over(
    engine: Engine, encoder: LocalEncoder, model: Model, first: str
) -> None:
    """Another chunk has read that the text's chunk doesn't run; one of the two embeds it, whoever writes first."""
    job = job_of(engine, model, ["shared", "shared"], per_chunk=1)
    lost, other = taken(engine, job, 0), taken(engine, job, 1)
    sort_out(engine, lost, _items(engine, job, 0, 1))
    run_sql(engine, "update vectormill.chunks set state = 'pending', fence = fence + 1 where ordinal = 0")
    hashed = TextIdentity(other.options).of(b"", b"shared")
    with engine.begin() as connection:
        (read,) = known_texts.look_up(connection, other, [hashed])
    again = taken(engine, job, 0)

    def take_over() -> set[bytes]:
        with engine.begin() as connection:
            return known_texts.take_over(connection, other, [read], [1])

    if first == "confirmed":
        assert [item.index for item in sort_out(engine, again, _items(engine, job, 0, 1)).items] == [0]
        assert take_over() == set()
    else:
        assert take_over() == {hashed}
        assert sort_out(engine, again, _items(engine, job, 0, 1)).items == []


@pytest.mark.parametrize("end", ["given back", "cancelled", "rejected", "purged"])
def test_a_text_whose_first_item_gets_no_vector_is_taken_over(
    engine: Engine, encoder: LocalEncoder, model: Model, end: str
) -> None:
    first = job_of(engine, model, ["shared"])
    claim = taken(engine, first)
    sort_out(engine, claim, _items(engine, first, 0, 1))
    if end == "given back":
        run_sql(engine, "update vectormill.chunks set state = 'pending'")
    elif end == "cancelled":
        run_sql(engine, "update vectormill.chunks set state = 'cancelled', cancelled = 1")
    elif end == "rejected":  # while its chunk still runs
        run_sql(engine, "insert into vectormill.rejects values (:job, 0, 'k0', 'bad_vector', 'for a test')", job=first)
    else:
        run(engine, encoder, claim)
        run_sql(engine, "update vectormill.jobs set state = 'completed', receipt = '{}'")
        purge_job(engine, first)
        assert run_sql(engine, "select count(*) from vectormill.known_texts") == [(0,)]
    second = job_of(engine, model, ["shared"])
    assert run(engine, encoder, taken(engine, second)) == counts("done", 1)
    third = job_of(engine, model, ["shared"])
    assert run(engine, encoder, taken(engine, third)) == counts("done", 0, 1)
    if end == "given back":
        run_sql(engine, "update vectormill.chunks set not_before = null")
        assert run(engine, encoder, taken(engine, first)) == counts("done", 0, 1)


def test_a_vector_that_is_purged_unnoticed_is_made_again(engine: Engine, encoder: LocalEncoder, model: Model) -> None:
    run(engine, encoder, taken(engine, job_of(engine, model, ["shared"])))
    run_sql(engine, "delete from vectormill.embeddings")
    assert run(engine, encoder, taken(engine, job_of(engine, model, ["shared"]))) == counts("done", 1)


def test_items_with_the_text_of_a_reject_are_rejected_too(engine: Engine, encoder: LocalEncoder, model: Model) -> None:
    job = job_of(engine, model, ["   ", "a mill", "   "])
    assert run(engine, encoder, taken(engine, job)) == counts("done", 1, 0, 2)
    assert run_sql(engine, "select index, key, code from vectormill.rejects order by index") == [
        (0, "k0", "bad_vector"),
        (2, "k2", "bad_vector"),
    ]
    with engine.begin() as connection:
        run_sql(engine, "update vectormill.jobs set state = 'completed'")
        assert control.retry(connection, job) == 1


def test_passages_are_copied_whole(engine: Engine, encoder: LocalEncoder, model: Model) -> None:
    long = " ".join(f"sentence {n} tells of a mill." for n in range(40))
    first = job_of(engine, model, [long, "short", long], options={"split": 16})
    second = job_of(engine, model, [long], options={"split": 16})
    assert run(engine, encoder, taken(engine, first)) == counts("done", 2, 1)
    assert run(engine, encoder, taken(engine, second)) == counts("done", 0, 1)
    query = """
        select count(*), md5(string_agg(concat_ws(' ', passage, start, stop, tokens, vector), ',' order by passage))
        from vectormill.passages where job_id = :job and index = :index
    """
    of_each = [run_sql(engine, query, job=job, index=index) for job, index in ((first, 0), (first, 2), (second, 0))]
    assert of_each[0][0][0] > 5
    assert of_each[0] == of_each[1] == of_each[2]
    assert verified(engine, first)
    assert verified(engine, second)


@pytest.mark.parametrize("midway", [False, True])
def test_however_many_chunks_run_at_once_each_text_is_embedded_once(
    engine: Engine, encoder: LocalEncoder, model: Model, midway: bool
) -> None:
    """Four workers take chunks of two jobs in any order, and may give some back midway. A text of those may be embedded
    by two, in the moment in which one takes it over and another claims the chunk again."""
    choose, lock = Random(3), threading.Lock()
    words = [f"text {n}" for n in range(150)]
    jobs = [job_of(engine, model, choose.choices(words, k=300), per_chunk=15) for _ in range(2)]
    everything = set(run_sql(engine, "select distinct text from vectormill.items where job_id = any(:jobs)", jobs=jobs))

    def work() -> None:
        while run_sql(engine, "select from vectormill.chunks where state in ('pending', 'running') limit 1"):
            due_at_once(engine)
            with lock:
                job, ordinal = choose.choice(jobs), choose.randrange(20)
            if claim := take(engine, job, ordinal):
                how = Watch(hung_after_seconds=60, most_seconds=0 if midway and ordinal % 3 == 0 else 60)
                run_chunk(engine, encoder, claim, how, on_hang=lambda: None)

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(work) for _ in range(4)]:
            done.result()
    ((embedded, reused),) = run_sql(engine, "select sum(embedded), sum(reused) from vectormill.chunks")
    assert embedded + reused == 600
    assert len(everything) <= embedded <= len(everything) + (5 if midway else 0)
    different = """
        select count(distinct e.vector::text), count(distinct i.text)
        from vectormill.embeddings e join vectormill.items i using (job_id, index)
    """
    ((made, given),) = run_sql(engine, different)
    assert made == given == len(everything)
    assert all(verified(engine, job) for job in jobs)


def test_a_text_of_an_earlier_block_is_copied_within_the_claim(
    engine: Engine, encoder: LocalEncoder, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "_BLOCK_BYTES", 1)
    job = job_of(engine, model, ["one mill", "a river", "one mill"])
    assert run(engine, encoder, taken(engine, job)) == counts("done", 2, 1)


def test_a_chunk_whose_texts_others_embed_is_no_progress(engine: Engine, encoder: LocalEncoder, model: Model) -> None:
    first, second = job_of(engine, model, ["shared"]), job_of(engine, model, ["shared"])
    sort_out(engine, taken(engine, first), _items(engine, first, 0, 1))
    waits = []
    for _ in range(4):
        due_at_once(engine)
        assert run(engine, encoder, taken(engine, second)) == counts("pending", 0)
        query = "select extract(epoch from not_before - now())::float8 from vectormill.chunks where job_id = :job"
        waits.append(run_sql(engine, query, job=second)[0][0])
    assert waits == pytest.approx([2, 4, 8, 8], abs=1)
    assert run_sql(engine, "select count(*) from vectormill.usage") == [(0,)]


def test_a_lost_connection_is_retried(
    engine: Engine, encoder: LocalEncoder, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(engine, encoder, taken(engine, job_of(engine, model, ["a mill", "a river"])))
    lost: list[int] = []
    of_items = embeddings.of_items

    def cut_once(connection: Connection, *arguments: Any, **named: Any) -> Any:
        if not lost:
            lost.append(connection.execute(text("select pg_backend_pid()")).scalar_one())
            run_sql(engine, "select pg_terminate_backend(:pid, 5000)", pid=lost[0])
        return of_items(connection, *arguments, **named)

    monkeypatch.setattr(embeddings, "of_items", cut_once)
    assert run(engine, encoder, taken(engine, job_of(engine, model, ["a mill"]))) == counts("done", 0, 1)
    assert lost


def test_the_identity_tells_titles_from_texts() -> None:
    identity = TextIdentity(KeptOptions())
    assert (
        len({identity.of(b"", b"ab"), identity.of(b"a", b"b"), identity.of(b"ab", b""), identity.of(b"1:a", b"b")}) == 4
    )
    assert identity.of(b"a", b"b") == TextIdentity(KeptOptions()).of(b"a", b"b")


def test_copies_keep_the_order_of_items(engine: Engine, encoder: LocalEncoder, model: Model, tmp_path: Path) -> None:
    folder = str(tmp_path / "out")
    job = job_of(engine, model, ["b", "a", "b", "c", "a"], options={"output": folder})
    assert run(engine, encoder, taken(engine, job)) == counts("done", 3, 2)
    (part,) = tmp_path.rglob("*.parquet")
    table = pq.read_table(part)
    assert table["index"].to_pylist() == [0, 1, 2, 3, 4]
    rows = np.stack(table["embedding"].to_numpy(zero_copy_only=False))
    assert np.array_equal(rows[0], rows[2])
    assert np.array_equal(rows[1], rows[4])
    with engine.begin() as connection:
        receipt = verified_receipt(connection, job)
    assert (receipt.missing, receipt.double) == (0, 0)
    with engine.begin() as connection:
        assert restored.forget_parts(connection, job, [part.name]) == 1, "a restore finds the part gone"
    assert run(engine, encoder, taken(engine, job)) == counts("done", 3, 2)
    assert run_sql(engine, "select count(*) from vectormill.known_texts") == [(0,)]


def _items(engine: Engine, job: UUID, first: int, count: int) -> list[Any]:
    with engine.begin() as connection:
        return items.read(connection, job, first, count, carried=False)
