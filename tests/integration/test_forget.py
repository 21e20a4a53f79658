"""Forgotten keys on a real Postgres: erased from jobs and collections, and kept from coming back."""

import codecs
import hashlib
import io
import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID

import orjson
import polars as pl
import pytest
from sqlalchemy import Engine, text

from pipeline.batch_api import files
from pipeline.catalog.models import find_model, workspace_id
from pipeline.chunk_io import parquet_erasure
from pipeline.chunk_io.sinks import sink_of
from pipeline.core.errors import NotRetriable, UserError, Waiting
from pipeline.core.jobs import Reason
from pipeline.core.options import JobOptions
from pipeline.db import chunks, forgets, jobs, outputs, workspaces
from pipeline.db import files as stored_files
from pipeline.dispatch import completion, finalize
from pipeline.infra.settings import Settings
from pipeline.ingest.collections import create_collection
from pipeline.ingest.submission import Submission, planning
from pipeline.ingest.submit import submit
from pipeline.jobs import control, erasure, forgetting, status
from pipeline.jobs.collections import drop_collection, find_collection
from pipeline.jobs.verification import verified_receipt
from pipeline.sources import Corpus
from tests.acceptance.conftest import write_corpus
from tests.integration.tickets import Row, Tickets, drain_job, rows_of
from tests.support.jobs_made import run_sql


def erase(engine: Engine, made: UUID) -> None:
    """Do what the dispatcher does."""
    erasure.erase(engine, made, partial(files.erase_keys, engine, Settings()))


def forget(engine: Engine, *keys: str, collection: Any = None, workspace: int | None = 1) -> UUID:
    """Forget keys to the end."""
    assert workspace
    made = forgetting.forget_keys(engine, workspace, keys, by="a test", collection=collection)
    erase(engine, made)
    return made


def counts(engine: Engine, made: UUID) -> tuple[int, int, int]:
    with engine.begin() as connection:
        found = forgetting.forget_status(connection, 1, made)
    assert found.finished_at is not None
    return found.keys, found.items, found.collected


def receipts(engine: Engine) -> list[tuple[int, bool | None]]:
    """Return what each job has forgotten, and whether its receipt verifies, the oldest first."""
    with engine.begin() as connection:
        found = run_sql(engine, "select id from vectormill.jobs order by id")
        made = [verified_receipt(connection, UUID(str(job))) for (job,) in found]
    return [(receipt.items.forgotten, receipt.verified) for receipt in made]


def traces(engine: Engine, key: str) -> list[str]:
    """Return the tables that hold a key anywhere."""
    tables = run_sql(
        engine,
        "select c.relname from pg_class c where c.relnamespace = 'vectormill'::regnamespace and c.relkind = 'r'",
    )
    query = "select exists (select from vectormill.{} t where t::text like :key)"
    return [table for (table,) in tables if run_sql(engine, query.format(f'"{table}"'), key=f"%{key}%")[0][0]]


def secret_rows(count: int = 20) -> list[dict[str, Any]]:
    return [{"id": f"person-{n:03}", "text": f"the letter of person-{n:03}", "lang": "en"} for n in range(count)]


def test_a_key_leaves_no_trace_and_does_not_come_back(tickets: Tickets) -> None:
    rows = secret_rows()
    tickets.sync(rows)
    tickets.sync([{**rows[3], "text": "another letter of person-003"}, *rows[:3], *rows[4:]])
    assert traces(tickets.engine, "person-003")
    made = forget(tickets.engine, "person-003", "person-004", "nobody")
    assert counts(tickets.engine, made) == (3, 3, 2)
    assert traces(tickets.engine, "person-003") == []
    left = [*rows[:3], *rows[5:]]
    tickets.shows(left)
    assert receipts(tickets.engine) == [(2, True), (1, True)]
    assert tickets.sync(rows) == {"in": 20, "unchanged": 18, "rejected": 2}
    assert traces(tickets.engine, "person-003") == []
    told = run_sql(tickets.engine, "select code, key, message from vectormill.rejects")
    assert told == [("forgotten", None, "its key was forgotten")] * 2
    with tickets.engine.begin() as connection:
        found = find_collection(connection, tickets.workspace, "tickets")
    assert forgetting.allow_keys(tickets.engine, 1, ["person-003", "other"], collection=None) == 1
    assert forgetting.allow_keys(tickets.engine, 1, ["person-004"], collection=found) == 0
    assert tickets.sync(rows) == {"in": 20, "embedded": 1, "unchanged": 18, "rejected": 1}
    tickets.shows([*rows[:4], *rows[5:]])


def test_passages_and_rejects_are_erased(make_tickets: Callable[..., Tickets]) -> None:
    tickets = make_tickets(split=16)
    long = " ".join(f"word{n}" for n in range(80))
    rows: list[Row] = [{"id": f"person-{n}", "text": None if n == 2 else f"{long} person-{n}"} for n in range(5)]
    tickets.sync(rows, max_rejects="100%")
    made = forget(tickets.engine, "person-1", "person-2")
    assert counts(tickets.engine, made) == (2, 2, 1)
    assert traces(tickets.engine, "person-1") == traces(tickets.engine, "person-2") == []
    assert receipts(tickets.engine) == [(2, True)]


def test_only_one_collection_may_forget(tickets: Tickets) -> None:
    with tickets.engine.begin() as connection:
        create_collection(connection, tickets.workspace, "others", model="static", options=JobOptions())
        others = find_collection(connection, tickets.workspace, "others")
    rows = secret_rows()
    tickets.sync(rows)
    assert counts(tickets.engine, forget(tickets.engine, "person-001", collection=others)) == (1, 0, 0)
    tickets.shows(rows)
    assert tickets.sync(rows) == {"in": 20, "unchanged": 20}


def test_another_workspace_keeps_its_keys(tickets: Tickets) -> None:
    with tickets.engine.begin() as connection:
        other = workspaces.create(connection, "other", 1.0)
    rows = secret_rows()
    tickets.sync(rows)
    forget(tickets.engine, "person-001", workspace=other)
    tickets.shows(rows)
    assert tickets.sync(rows) == {"in": 20, "unchanged": 20}
    with tickets.engine.begin() as connection, pytest.raises(UserError, match="no request"):
        forgetting.forget_status(connection, tickets.workspace, forget(tickets.engine, "k", workspace=other))


def test_a_job_that_goes_on_is_waited_for(tickets: Tickets) -> None:
    rows = secret_rows()
    job = tickets.submit(rows)
    tickets.run_chunk(job, 0)
    made = forgetting.forget_keys(tickets.engine, 1, ["person-001", "person-019"], by="a test", collection=None)
    with pytest.raises(Waiting, match=str(job)):
        erase(tickets.engine, made)
    with tickets.engine.begin() as connection:
        assert forgetting.forget_status(connection, 1, made).waits_for == job
    assert "person-001" not in tickets.view()
    tickets.run(job)
    assert "person-019" in tickets.view()
    erase(tickets.engine, made)
    assert traces(tickets.engine, "person-001") == traces(tickets.engine, "person-019") == []
    assert receipts(tickets.engine) == [(2, True)]


def test_an_interrupted_erasure_goes_on(tickets: Tickets, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(erasure, "_ITEMS_AT_ONCE", 3)
    monkeypatch.setattr(erasure, "_COLLECTED_AT_ONCE", 2)
    rows = secret_rows()
    tickets.sync(rows)
    tickets.sync([{**row, "text": row["text"] + " again"} for row in rows])
    keys = [str(row["id"]) for row in rows[::2]]
    made = forgetting.forget_keys(tickets.engine, 1, keys, by="a test", collection=None)
    # Later and later: what was done is looked through again.
    steps, deaths = 0, {at * (at + 3) // 2 for at in range(1, 20)}
    for function in ("erase", "note_collected"):
        whole = getattr(forgets, function)

        def dying(*arguments: Any, whole: Any = whole, **named: Any) -> Any:
            nonlocal steps
            steps += 1
            done = whole(*arguments, **named)
            if steps in deaths:
                raise KeyboardInterrupt
            return done

        monkeypatch.setattr(forgets, function, dying)
    interrupted = 0
    while True:
        try:
            erase(tickets.engine, made)
            break
        except KeyboardInterrupt:
            interrupted += 1
    assert interrupted > 3
    assert counts(tickets.engine, made) == (10, 20, 10)
    tickets.shows([{**row, "text": row["text"] + " again"} for row in rows[1::2]])
    assert receipts(tickets.engine) == [(10, True), (10, True)]


def test_a_table_of_the_user_forgets_too(engine: Engine, make_tickets: Callable[..., Tickets]) -> None:
    run_sql(engine, "create table public.notes (id text primary key, embedding vector(256))")
    tickets = make_tickets(into="public.notes")
    tickets.sync(secret_rows(5))
    forget(engine, "person-001")
    assert run_sql(engine, "select count(*), min(id) from public.notes where id like 'person-00_'") == [
        (4, "person-000")
    ]


def test_files_that_are_read_in_place_are_without_forgotten_keys(tickets: Tickets, tmp_path: Path) -> None:
    engine = tickets.engine
    corpus = write_corpus(tmp_path / "corpus.jsonl", [f"a letter of kind {n}" for n in range(30)])
    key = str(json.loads(corpus.read_text().splitlines()[4])["id"])
    first = run_by_reference(tickets, corpus)
    assert counts(engine, forget(engine, key)) == (1, 1, 0)
    second = run_by_reference(tickets, corpus)
    with engine.begin() as connection:
        before, after = (verified_receipt(connection, job) for job in (first, second))
    with engine.begin() as connection, pytest.raises(NotRetriable, match="were forgotten"):
        control.retry(connection, first)
    assert (before.items.embedded, before.items.forgotten, before.verified) == (30, 1, True)
    assert (after.items.embedded, after.items.rejected, after.verified) == (29, 1, True)
    assert run_sql(engine, "select code, key from vectormill.rejects") == [("forgotten", None)]


def test_a_key_that_is_forgotten_while_a_sync_by_reference_waits_is_erased(tickets: Tickets) -> None:
    tickets.by_reference = True
    tickets.sync(rows_of(20))
    rows = rows_of(20, "other mills")
    job = tickets.submit(rows)
    made = forgetting.forget_keys(tickets.engine, tickets.workspace, ["k3"], by="a test", collection=None)
    tickets.run(job)
    erase(tickets.engine, made)
    tickets.shows([row for row in rows if row["id"] != "k3"])


def test_a_sync_by_reference_is_retried_without_the_keys_that_were_forgotten(tickets: Tickets) -> None:
    tickets.by_reference = True
    rows = rows_of(20)
    job = tickets.submit(rows)
    with tickets.engine.begin() as connection:
        control.fail(connection, job, Reason.SOURCE_DAMAGED, "a test")
    drain_job(tickets.engine, job)
    tickets.end(job)
    forget(tickets.engine, "k3", "k15")
    with tickets.engine.begin() as connection:
        assert control.retry(connection, job) > 0
    tickets.run(job)
    tickets.shows([row for row in rows if row["id"] not in ("k3", "k15")])


def run_by_reference(tickets: Tickets, corpus: Path) -> UUID:
    with tickets.engine.begin() as connection:
        model = find_model(connection, workspace_id(connection), "static")
    options = JobOptions(by_reference=True, reuse=False)
    source = Corpus([str(corpus)], options.columns, 1_000_000)
    made = submit(
        tickets.engine,
        Submission(
            workspace_id=tickets.workspace,
            model=model,
            corpus=source,
            planning=planning(Settings()),
            name="read in place",
            options=options,
        ),
    )
    tickets.embed(made.job_id)
    completion.end(tickets.engine, made.job_id)
    return made.job_id


def test_keys_are_looked_up_by_one_pass_over_a_job(tickets: Tickets) -> None:
    """10,000 keys don't cost a scan each."""
    tickets.sync(rows_of(300))
    keys = [f"k{n}" for n in range(5)] + [f"other {n}" for n in range(10_000)]
    made = forgetting.forget_keys(tickets.engine, 1, keys, by="a test", collection=None)
    with tickets.engine.begin() as connection:
        found = forgets.by_id(connection, made)
        assert found
        (job,) = forgets.jobs_after(connection, found, None, 10)
        plan = "\n".join(
            connection.scalars(
                text("explain " + forgets._NAMED_OF["embeddings"]),
                {"job": job, "first": 0, "end": 300, "id": made},
            )
        )
    assert "Seq Scan" not in plan, plan
    assert plan.count("items_") == 1 or "Index Scan" in plan, plan
    erase(tickets.engine, made)
    assert counts(tickets.engine, made) == (10_005, 5, 5)


def test_a_retry_brings_nothing_back(tickets: Tickets) -> None:
    rows = secret_rows()
    job = tickets.submit(rows)
    tickets.run_chunk(job, 0)
    with tickets.engine.begin() as connection:
        control.fail(connection, job, Reason.SOURCE_CHANGED, "for a test")
        chunks.cancel_pending(connection, job, 0, 1_000)
    tickets.end(job)
    forget(tickets.engine, "person-001", "person-019")
    with tickets.engine.begin() as connection:
        control.retry(connection, job)
    tickets.run(job)
    assert traces(tickets.engine, "person-019") == []
    assert len(tickets.view()) == 18
    # One had its vector; the other is no item of the second try.
    assert receipts(tickets.engine) == [(1, True)]


def test_what_was_truncated_names_no_forgotten_key(make_tickets: Callable[..., Tickets]) -> None:
    tickets = make_tickets(max_item_tokens=4)
    rows = [{"id": f"person-{n}", "text": " ".join(["mill"] * (10 + n))} for n in range(5)]
    tickets.sync(rows)
    assert "chunks" in traces(tickets.engine, "person-3")
    forget(tickets.engine, "person-3")
    assert traces(tickets.engine, "person-3") == []
    with tickets.engine.begin() as connection:
        (job,) = connection.scalars(text("select id from vectormill.jobs"))
        kept = status.receipt(connection, job).most_truncated
    assert sorted(str(each.key) for each in kept) == ["person-0", "person-1", "person-2", "person-4"]


def test_columns_that_a_failed_sync_has_kept_are_erased(tickets: Tickets) -> None:
    rows = secret_rows()
    tickets.sync(rows)
    job = tickets.submit([{**row, "lang": f"of {row['id']}"} for row in rows])
    with tickets.engine.begin() as connection:
        control.fail(connection, job, Reason.SOURCE_CHANGED, "for a test")
        chunks.cancel_pending(connection, job, 0, 1_000)
    tickets.end(job)
    assert "sync_changes" in traces(tickets.engine, "of person-003")
    forget(tickets.engine, "person-003")
    assert traces(tickets.engine, "person-003") == []


def to_parquet(tickets: Tickets, folder: Path, *, end: bool = True, **options: Any) -> UUID:
    """Embed ten letters, of which one has no text, to Parquet."""
    rows = [{"id": f"person-{n}", "text": None if n == 2 else f"{_LONG} letter {n}"} for n in range(10)]
    source = folder / "rows.jsonl"
    if not source.exists():
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with tickets.engine.begin() as connection:
        model = find_model(connection, workspace_id(connection), "static")
    wish = JobOptions.model_validate({"output": str(folder / "out"), "max_rejects": "100%", **options})
    submission = Submission(
        workspace_id=1,
        model=model,
        corpus=Corpus([str(source)], wish.columns, 1_000_000),
        planning=replace(planning(Settings()), chunk_items=4),
        name="parquet",
        options=wish,
    )
    job = submit(tickets.engine, submission).job_id
    tickets.embed(job)
    if end:
        finalize.finalize(tickets.engine, job)
    return job


_LONG = " ".join(f"word{n}" for n in range(40))


@pytest.mark.parametrize("options", [{}, {"by_reference": True, "reuse": False}, {"split": 16}])
def test_parquet_is_written_anew_without_a_forgotten_key(
    tickets: Tickets, tmp_path: Path, options: dict[str, Any]
) -> None:
    to_parquet(tickets, tmp_path, **options)
    out = tmp_path / "out"
    before = {path.name for path in out.glob("*.parquet")}
    made = forget(tickets.engine, "person-1", "person-2", "person-7")
    assert counts(tickets.engine, made) == (3, 3, 0)
    assert receipts(tickets.engine) == [(3, True)]
    files = {path.name for path in out.glob("*.parquet")}
    assert len(files - before) == 2, "of three parts, one had none of the keys"
    found = pl.read_parquet([out / name for name in files])
    assert set(found["key"]) == {f"person-{n}" for n in (0, 3, 4, 5, 6, 8, 9)}
    manifest = json.loads((out / "_manifest.json").read_text())
    assert {file["name"] for file in manifest["files"]} == files
    assert sum(file["rows"] for file in manifest["files"]) == manifest["rows"] == len(found)
    assert sorted(path.name for path in out.iterdir() if path.name.startswith("_")) == ["_SUCCESS", "_manifest.json"]
    assert not any(b"person-1" in path.read_bytes() for path in out.rglob("*") if path.is_file())
    with tickets.engine.begin() as connection:
        assert forgetting.forget_status(connection, 1, made).outputs == []


@pytest.mark.parametrize("at", ["before the parts count", "before the manifest"])
def test_an_interrupted_rewriting_of_parquet_is_done_again(
    tickets: Tickets, tmp_path: Path, at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    to_parquet(tickets, tmp_path)
    made = forgetting.forget_keys(tickets.engine, 1, ["person-1"], by="a test", collection=None)

    def die(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if at == "before the manifest":
            patch.setattr(parquet_erasure, "_replacements", die)
        else:
            patch.setattr(outputs, "replace", die)
        with pytest.raises(KeyboardInterrupt):
            erase(tickets.engine, made)
    erase(tickets.engine, made)
    assert receipts(tickets.engine) == [(1, True)]
    assert not any(b"person-1" in path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file())


def test_parts_of_a_job_that_did_not_complete_are_written_anew(tickets: Tickets, tmp_path: Path) -> None:
    job = to_parquet(tickets, tmp_path, end=False)
    run_sql(tickets.engine, "update vectormill.jobs set state = 'cancelled' where id = :job", job=job)
    assert counts(tickets.engine, forget(tickets.engine, "person-1")) == (1, 1, 0)
    assert not any(b"person-1" in path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file())


def test_results_of_a_job_of_which_a_part_is_forgotten(tickets: Tickets, tmp_path: Path) -> None:
    job = to_parquet(tickets, tmp_path)
    forget(tickets.engine, *(f"person-{n}" for n in range(4)))
    with tickets.engine.begin() as connection:
        found = jobs.by_id(connection, job)
    assert found
    blocks = sink_of(found.options).read(tickets.engine.begin, job, 0, 10)
    assert [vector.key for block in blocks for vector in block] == [f"person-{n}" for n in range(4, 10)]


def test_parts_of_others_in_the_same_folder_are_left_alone(tickets: Tickets, tmp_path: Path) -> None:
    """A job's files were moved away, and another job's are there now."""
    to_parquet(tickets, tmp_path)
    (tmp_path / "out").rename(tmp_path / "moved")
    to_parquet(tickets, tmp_path, reuse=False)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    made = forget(tickets.engine, "nobody")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    with tickets.engine.begin() as connection:
        assert forgetting.forget_status(connection, 1, made).outputs == [str(tmp_path / "out")]
    forget(tickets.engine, "person-1")
    assert set(pl.read_parquet(tmp_path / "out" / "*.parquet")["key"]) == {f"person-{n}" for n in (0, *range(3, 10))}


def test_a_part_that_counts_no_more_for_a_restored_database_stays(tickets: Tickets, tmp_path: Path) -> None:
    """Postgres goes back to before an erasure, and the keys are forgotten again."""
    job = to_parquet(tickets, tmp_path)
    before = run_sql(tickets.engine, "select chunk_id, name, rows, bytes from vectormill.outputs")
    forget(tickets.engine, "person-1")
    for chunk, name, rows, size in before:
        back = "update vectormill.outputs set name = :name, rows = :rows, bytes = :bytes where chunk_id = :chunk"
        run_sql(tickets.engine, back, name=name, rows=rows, bytes=size, chunk=chunk)
    keys = set(pl.read_parquet(tmp_path / "out" / "*.parquet")["key"])
    made = forget(tickets.engine, "person-1", "person-9")
    assert set(pl.read_parquet(tmp_path / "out" / "*.parquet")["key"]) == keys - {"person-9"}
    with tickets.engine.begin() as connection:
        assert forgetting.forget_status(connection, 1, made).outputs == [str(tmp_path / "out")], job


def test_files_that_nobody_finds_are_told(tickets: Tickets, tmp_path: Path) -> None:
    to_parquet(tickets, tmp_path)
    (tmp_path / "out").rename(tmp_path / "moved")
    made = forget(tickets.engine, "person-1")
    with tickets.engine.begin() as connection:
        assert forgetting.forget_status(connection, 1, made).outputs == [str(tmp_path / "out")]


def test_lines_of_batch_files_are_erased(tickets: Tickets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VECTORMILL_FILES", str(tmp_path))
    lines = [orjson.dumps({"custom_id": f"person-{n}", "body": {"input": f"letter {n}"}}) + b"\n" for n in range(5)]
    lines += [b"no JSON\n", b'{"custom_id": []}\n', b"7\n", b'{"custom_id": "person-1", "n": NaN}\n']

    def keep(name: str, content: bytes) -> str:
        kept = files.keep(tickets.engine, Settings(), 1, purpose="batch", name=name, source=io.BytesIO(content))
        return str(kept["id"])

    file, other = keep("mine", codecs.BOM_UTF8 + b"".join(lines)), keep("other", lines[4])
    lines[0] = codecs.BOM_UTF8 + lines[0]
    insert = """
        insert into vectormill.batches (id, workspace_id, endpoint, completion_window, input_file_id)
        values ('batch_1', 1, '/v1/embeddings', '24h', :file)
    """
    run_sql(tickets.engine, insert, file=file)
    made = forgetting.forget_keys(tickets.engine, 1, ["person-1"], by="a test", collection=None)
    with pytest.raises(Waiting, match="batch_1"):
        erase(tickets.engine, made)
    run_sql(tickets.engine, "update vectormill.batches set ended_at = now()")
    erase(tickets.engine, made)
    with tickets.engine.begin() as connection:
        rows = {
            row["id"]: row
            for row in stored_files.page(connection, 1, purpose=None, after=None, oldest_first=True, limit=10)
        }
    with files.open_kept(rows[file]) as opened, files.open_kept(rows[other]) as untouched:
        content = opened.read()
        assert untouched.read() == lines[4]
    assert content == b"".join([lines[0], *lines[2:-1]])
    assert (rows[file]["bytes"], rows[file]["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
    with tickets.engine.begin() as connection:
        expired = stored_files.expired(connection, 10)
    for each in expired:
        files.delete_file(tickets.engine, each)
    assert len([path for path in tmp_path.rglob("file-*") if path.is_file()]) == 2, "nothing is left"


def test_a_key_that_is_allowed_meanwhile_stays(tickets: Tickets) -> None:
    rows = secret_rows()
    job = tickets.submit(rows)
    made = forgetting.forget_keys(tickets.engine, 1, ["person-001", "person-002"], by="a test", collection=None)
    with pytest.raises(Waiting):
        erase(tickets.engine, made)
    assert forgetting.allow_keys(tickets.engine, 1, ["person-001"], collection=None) == 1
    tickets.run(job)
    erase(tickets.engine, made)
    assert ("person-001" in tickets.view(), "person-002" in tickets.view()) == (True, False)


def test_a_collection_is_not_dropped_while_it_forgets(tickets: Tickets) -> None:
    tickets.sync(secret_rows())
    with tickets.engine.begin() as connection:
        found = find_collection(connection, tickets.workspace, "tickets")
    made = forgetting.forget_keys(tickets.engine, 1, ["person-001"], by="a test", collection=found)
    with tickets.engine.begin() as connection, pytest.raises(UserError, match=f"request {made}"):
        drop_collection(connection, found)
    erase(tickets.engine, made)
    with tickets.engine.begin() as connection:
        drop_collection(connection, found)


def test_tables_that_jobs_wrote_to_are_named(tickets: Tickets, tmp_path: Path) -> None:
    """They are the user's own, who erases there; a collection's table forgets by itself."""
    run_sql(tickets.engine, "create table public.letters (id text primary key, embedding vector(256))")
    to_parquet(tickets, tmp_path, output=None, into="public.letters")
    made = forget(tickets.engine, "person-1")
    with tickets.engine.begin() as connection:
        assert forgetting.forget_status(connection, 1, made).tables == ["public.letters"]


@pytest.mark.parametrize("fault", ["dropped", "referenced"])
def test_a_table_that_refuses_holds_up_nothing_else(
    engine: Engine, make_tickets: Callable[..., Tickets], fault: str
) -> None:
    run_sql(engine, "create table public.notes (id text primary key, embedding vector(256))")
    tickets = make_tickets(into="public.notes")
    tickets.sync(secret_rows(5))
    if fault == "dropped":
        run_sql(engine, "drop table public.notes")
        made = forget(engine, "person-001")
    else:
        run_sql(engine, "create table public.refers as select 'person-001' as id")
        run_sql(engine, "alter table public.refers add foreign key (id) references public.notes")
        made = forgetting.forget_keys(engine, 1, ["person-001"], by="a test", collection=None)
        with pytest.raises(Waiting, match="violates foreign key"):
            erase(engine, made)
        with engine.begin() as connection:
            told = forgetting.forget_status(connection, 1, made)
        assert ("foreign key" in str(told.problem), told.items) == (True, 1)
        run_sql(engine, "drop table public.refers")
        erase(engine, made)
    assert counts(engine, made) == (1, 1, 1)
    assert traces(engine, "person-001") == []


def test_forgotten_rows_are_no_fault_of_the_source(tickets: Tickets) -> None:
    rows = secret_rows()
    tickets.sync(rows)
    forget(tickets.engine, "person-001", "person-002")
    done = tickets.sync([{**rows[0], "text": "new"}, *rows[1:]], max_rejects="0")
    assert done == {"in": 20, "embedded": 1, "unchanged": 17, "rejected": 2}


def test_forgotten_rows_are_found_in_every_block_of_a_source(tickets: Tickets, tmp_path: Path) -> None:
    rows = secret_rows()
    tickets.sync(rows)
    forget(tickets.engine, "person-001", "person-009", "person-019")
    parts = [rows[:8], rows[8:10], rows[10:]]
    paths = [tmp_path / f"{at}.jsonl" for at in range(len(parts))]
    for path, part in zip(paths, parts, strict=True):
        path.write_text("".join(json.dumps(row) + "\n" for row in part))
    job = tickets.submit_files(paths)
    tickets.run(job)
    with tickets.engine.begin() as connection:
        receipt = verified_receipt(connection, job)
    assert (receipt.verified, receipt.items.unchanged, receipt.items.rejected) == (True, 17, 3)
