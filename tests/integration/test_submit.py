"""Submission of a corpus: it becomes a whole job, or nothing."""

import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import UUID

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sqlalchemy import Engine

from pipeline.broker import Publisher
from pipeline.core.errors import IdempotencyConflict, LeaseLost, ServiceUnreachable, SourceError, UserError
from pipeline.core.jobs import JobState, Reason
from pipeline.core.models import Model, Upstream
from pipeline.core.options import Columns, JobOptions
from pipeline.db import jobs, models
from pipeline.dispatch.dispatcher import finish
from pipeline.dispatch.state import Dispatcher
from pipeline.ingest import staging
from pipeline.ingest.submission import Planning, Submission, Submitted
from pipeline.ingest.submit import submit
from pipeline.sources import Corpus
from tests.support.jobs_made import chunk_rows, count, job_row, run_sql, taken

ROWS: list[dict[str, Any]] = [{"id": f"k{at}", "text": f"text {at}"} for at in range(10)]
ROWS[3]["text"] = ""
ROWS[7]["text"] = None


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def run(engine: Engine, model: Model) -> Callable[..., Submitted]:
    """Return a function that submits a source with options."""

    def run(source: str, *, stdin: Any = None, columns: Columns | None = None, **options: Any) -> Submitted:
        return submit(engine, submission(model, source, stdin=stdin, columns=columns, **options))

    return run


def submission(
    model: Model, source: str, *, stdin: Any = None, columns: Columns | None = None, lease: float = 30, **options: Any
) -> Submission:
    own = {name: options.pop(name) for name in ("name", "priority", "labels", "idempotency_key") if name in options}
    return Submission(
        workspace_id=1,
        model=model,
        corpus=Corpus([source], columns or Columns(), 1_000_000, stdin),
        options=JobOptions(**options),
        **{"name": "corpus", **own},
        planning=Planning(chunk_seconds=1, chunk_items=4, chunk_bytes=10_000, lease_seconds=lease),
    )


def jsonl(rows: Sequence[Mapping[str, Any]] = ROWS, name: str = "a.jsonl") -> str:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


def as_csv() -> str:
    Path("a.csv").write_text("id,text\n" + "".join(f"{row['id']},{row['text'] or ''}\n" for row in ROWS))
    return "a.csv"


def as_parquet() -> str:
    pq.write_table(pa.Table.from_pylist(ROWS), "a.parquet")
    return "a.parquet"


def nothing_is_left(engine: Engine) -> bool:
    return not any(count(engine, table) for table in ("jobs", "inputs", "chunks", "items", "rejects"))


def check_job(engine: Engine, job_id: UUID, codes: list[str]) -> None:
    row = job_row(engine, job_id)
    assert (row["state"], row["items_total"], row["lease_until"]) == ("queued", 10, None)
    items = run_sql(engine, "select index, key, text from vectormill.items where job_id = :id order by 1", id=job_id)
    bad = {3, 7}
    assert items == [(at, f"k{at}", None if at in bad else f"text {at}") for at in range(10)]
    rejects = run_sql(engine, "select index, key, code from vectormill.rejects order by 1")
    assert rejects == [(3, "k3", codes[0]), (7, "k7", codes[1])]
    check_chunks(engine, job_id, 10, bad)


def check_chunks(engine: Engine, job_id: UUID, total: int, bad: set[int]) -> None:
    """Check that chunks cover every item once, in order, within the limit, and count their rejects."""
    at = 0
    for row in chunk_rows(engine, job_id):
        assert row["first_index"] == at
        assert 1 <= row["items"] <= 4
        rejected = bad & set(range(at, at + row["items"]))
        assert row["rejected"] == len(rejected)
        assert row["state"] == ("done" if len(rejected) == row["items"] else "pending")
        at += row["items"]
    assert at == total


@pytest.mark.parametrize(
    ("make", "codes"),
    [
        (jsonl, ["empty_text", "missing_text"]),
        (as_csv, ["empty_text", "empty_text"]),
        (as_parquet, ["empty_text", "missing_text"]),
    ],
)
def test_a_file_becomes_a_job(
    engine: Engine, run: Callable[..., Submitted], make: Callable[[], str], codes: list[str]
) -> None:
    name = make()
    check_job(engine, run(name).job_id, codes)
    assert run_sql(engine, "select ordinal, uri, bytes from vectormill.inputs") == [
        (0, str(Path(name).absolute()), Path(name).stat().st_size)
    ]


def test_a_stream_becomes_a_job(engine: Engine, run: Callable[..., Submitted]) -> None:
    done = run("-", stdin=io.BytesIO(Path(jsonl()).read_bytes()))
    check_job(engine, done.job_id, ["empty_text", "missing_text"])
    assert job_row(engine, done.job_id)["payload_sha256"]


def test_many_commits_make_one_job(
    engine: Engine, run: Callable[..., Submitted], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "_COMMIT_ROWS", 5_000)
    rows = [{"text": "" if at % 1_000 == 7 else "t"} for at in range(12_345)]
    job_id = run(jsonl(rows)).job_id
    assert count(engine, "items") == job_row(engine, job_id)["items_total"] == 12_345
    bad = [index for (index,) in run_sql(engine, "select index from vectormill.rejects order by 1")]
    assert bad == list(range(7, 12_345, 1_000))
    check_chunks(engine, job_id, 12_345, set(bad))


def test_a_chunk_without_a_good_item_is_done(engine: Engine, run: Callable[..., Submitted]) -> None:
    job_id = run(jsonl([{"text": ""}] * 4 + [{"text": "t"}])).job_id
    check_chunks(engine, job_id, 5, {0, 1, 2, 3})


def test_options_and_carried_columns_are_kept(engine: Engine, run: Callable[..., Submitted]) -> None:
    rows: list[dict[str, Any]] = [{"text": "t", "lang": "de"}, {"text": "u", "lang": None}]
    done = run(
        jsonl(rows), columns=Columns(carry=("lang",)), labels={"a": "b"}, priority=3, dtype="float16", max_rejects="7"
    )
    row = job_row(engine, done.job_id)
    assert precision_of(engine, done.job_id) == row["options"]["precision"] == "auto"
    assert (row["labels"], row["priority"], row["max_rejects"]) == ({"a": "b"}, 3, 7)
    assert row["options"]["dtype"] == "float16"
    carried = run_sql(engine, "select carried from vectormill.items order by index")
    assert carried == [({"lang": "de"},), ({"lang": None},)]


def precision_of(engine: Engine, job_id: UUID) -> str:
    """Return the precision that workers learn of a job together with its model."""
    with engine.begin() as connection:
        row = models.of_job(connection, job_id)
    assert row
    return str(row["precision"])


def test_a_demanded_precision_reaches_workers_and_decides_the_payload(
    engine: Engine, run: Callable[..., Submitted]
) -> None:
    first = run(jsonl(), precision="float32", idempotency_key="k")
    assert precision_of(engine, first.job_id) == "float32"
    assert taken(engine, first.job_id).options.precision == "float32"
    with pytest.raises(IdempotencyConflict):
        run("a.jsonl", idempotency_key="k")
    run_sql(engine, "update vectormill.jobs set options = options - 'precision'")
    assert precision_of(engine, first.job_id) == "auto", "a job of a version before"


# Failed submissions leave nothing behind


def test_a_broken_file_leaves_nothing(
    engine: Engine, run: Callable[..., Submitted], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "_COMMIT_ROWS", 5_000)
    name = jsonl([{"text": ""}, *[{"text": "t"}] * 11_000])
    with Path(name).open("a") as file:
        file.write("{broken\n")
    with pytest.raises(SourceError, match="line 11,002"):
        run(name, idempotency_key="k")
    assert nothing_is_left(engine)


@pytest.mark.parametrize("name", ["empty.jsonl", "empty.csv"])
def test_an_empty_corpus_is_refused(engine: Engine, run: Callable[..., Submitted], name: str) -> None:
    Path(name).write_text("" if name.endswith("jsonl") else "text\n")
    with pytest.raises(SourceError, match="nothing to embed"):
        run(name)
    assert nothing_is_left(engine)


def test_a_key_that_comes_twice_is_refused_if_asked(engine: Engine, run: Callable[..., Submitted]) -> None:
    name = jsonl([{"id": key, "text": "t"} for key in ("a", "b", "a", None, None)])
    with pytest.raises(UserError, match='key "a" comes twice, first as items 0 and 2'):
        run(name, unique_keys=True)
    assert nothing_is_left(engine)
    assert run(name).job_id


def test_an_item_without_key_is_refused_if_keys_must_be_unique(engine: Engine, run: Callable[..., Submitted]) -> None:
    name = jsonl([{"id": "a", "text": "t"}, {"id": None, "text": ""}, {"id": None, "text": "t"}])
    with pytest.raises(UserError, match=r"unique_keys: item 2 has no key"):
        run(name, unique_keys=True)
    assert nothing_is_left(engine)
    done = run(name)
    assert done.notices == ['1 of 3 items have no key: "id" is missing there, or empty.']
    assert job_row(engine, done.job_id)["notices"] == done.notices


@pytest.mark.parametrize("by_reference", [False, True])
def test_what_is_said_of_a_corpus_is_kept(engine: Engine, run: Callable[..., Submitted], by_reference: bool) -> None:
    Path("a.tsv").write_text('Id\ttext\n1\t"x"\n')
    done = run("a.tsv", by_reference=by_reference)
    assert done.notices == [
        'a.tsv line 1: no column "id", so these items have no key; columns are Id, text. If "Id" holds '
        "keys, name it as the key column.",
        "a.tsv: fields stand in quotes, first on line 2, and keep them, since TSV has no quoting; to read them "
        "without, set quote to '\"'.",
    ]
    assert job_row(engine, done.job_id)["notices"] == done.notices


def test_signs_of_csv_belong_to_the_payload(engine: Engine, run: Callable[..., Submitted]) -> None:
    Path("a.tsv").write_text("id;text\n1;x\n")
    columns = Columns(delimiter=";")
    made = run("a.tsv", columns=columns, idempotency_key="k")
    assert run("a.tsv", columns=columns, idempotency_key="k").job_id == made.job_id
    for other in (Columns(delimiter=";", quote='"'), Columns(delimiter="|")):
        with pytest.raises(IdempotencyConflict):
            run("a.tsv", columns=other, idempotency_key="k")


def test_signs_without_effect_are_refused(engine: Engine, run: Callable[..., Submitted]) -> None:
    with pytest.raises(UserError, match=r"quote: a.jsonl has no .csv or .tsv file, so it has no effect; leave it out"):
        run(jsonl(), columns=Columns(quote=""))
    assert nothing_is_left(engine)


@pytest.mark.parametrize("options", [{"max_rejects": "many"}, {"dimensions": 3}, {"max_item_tokens": 1_000}])
def test_wrong_options_are_refused(engine: Engine, run: Callable[..., Submitted], options: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        run(jsonl(), **options)
    assert nothing_is_left(engine)


# Idempotency


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_item_tokens": 128}, "max_item_tokens 128"),
        ({"on_long": "reject"}, "on_long reject"),
        ({"precision": "float32"}, "precision float32: small is served by an upstream"),
    ],
)
def test_a_gateways_texts_are_not_measured_here(
    engine: Engine, model: Model, options: dict[str, Any], said: str
) -> None:
    upstream = Upstream(
        url="http://127.0.0.1:1/v1",
        model="far",
        reply_model=None,
        key_env=None,
        base64=True,
        request_inputs=1,
        request_tokens=1,
    )
    far = replace(model, upstream=upstream)
    with pytest.raises(UserError, match=said):
        submit(engine, submission(far, jsonl(), **options))
    assert nothing_is_left(engine)
    assert submit(engine, submission(far, jsonl(), max_item_tokens=far.max_item_tokens)).job_id


def test_what_rejects_nothing_is_refused(engine: Engine, model: Model) -> None:
    boundless = replace(model, max_item_tokens=None)
    with pytest.raises(UserError, match="on_long: small reads texts of any length"):
        submit(engine, submission(boundless, jsonl(), on_long="reject"))
    assert nothing_is_left(engine)


def test_the_same_key_attaches(engine: Engine, run: Callable[..., Submitted]) -> None:
    first = run(jsonl(), idempotency_key="k")
    second = run("a.jsonl", idempotency_key="k")
    assert (first.attached, second.job_id) == ("", first.job_id)
    assert "it is queued" in second.attached
    assert count(engine, "jobs") == 1
    assert count(engine, "items") == 10


def test_a_stream_attaches_by_its_hash(run: Callable[..., Submitted]) -> None:
    data = Path(jsonl()).read_bytes()
    first = run("-", stdin=io.BytesIO(data), idempotency_key="k")
    assert run("-", stdin=io.BytesIO(data), idempotency_key="k").job_id == first.job_id
    with pytest.raises(IdempotencyConflict):
        run("-", stdin=io.BytesIO(data + b'{"text": "more"}\n'), idempotency_key="k")


@pytest.mark.parametrize("changed", ["file", "option", "columns"])
def test_another_payload_conflicts(run: Callable[..., Submitted], changed: str) -> None:
    run(jsonl(), idempotency_key="k")
    if changed == "file":
        jsonl(ROWS[:5])
    columns = Columns(carry=("id",)) if changed == "columns" else None
    with pytest.raises(IdempotencyConflict, match='the idempotency key "k" made job'):
        run("a.jsonl", idempotency_key="k", columns=columns, dtype="float16" if changed == "option" else "float32")


def test_a_failed_job_resumes(engine: Engine, run: Callable[..., Submitted]) -> None:
    first = run(jsonl(), idempotency_key="k")
    with engine.begin() as connection:
        jobs.begin_cancelling(connection, first.job_id, JobState.FAILED, Reason.MODEL_CANNOT_LOAD, "no luck")
        for row in chunk_rows(engine, first.job_id):
            run_sql(
                engine,
                "update vectormill.chunks set state = 'cancelled', cancelled = items - rejected where id = :id",
                id=row["id"],
            )
    dispatcher = Dispatcher(engine=engine, publisher=_none(), lease_seconds=30, text_retention_days=7)
    finish(dispatcher)
    assert job_row(engine, first.job_id)["state"] == "failed"
    second = run("a.jsonl", idempotency_key="k")
    assert second.job_id == first.job_id
    assert "resumed with 7 chunks" in second.attached, "all but the one whose only item was rejected"
    assert job_row(engine, first.job_id)["state"] == "queued"
    assert taken(engine, first.job_id)


def _none() -> Publisher:
    return Publisher("redis://127.0.0.1:1/0")


class Interrupted(Exception):
    """Interruption of a producer in the middle."""


def staged(engine: Engine, model: Model, monkeypatch: pytest.MonkeyPatch, lease: float) -> "staging.Staging":
    """Stop a producer after its items, before the job is queued, with nothing undone, and return its staging."""
    stopped: list[staging.Staging] = []

    def stop(self: staging.Staging) -> None:
        stopped.append(self)
        raise Interrupted

    with monkeypatch.context() as patched:
        patched.setattr(staging.Staging, "_queue", stop)
        patched.setattr(staging, "undo", lambda *_: None)
        with pytest.raises(Interrupted):
            submit(engine, submission(model, "a.jsonl", idempotency_key="k", lease=lease))
    return stopped[0]


def test_a_live_staging_attaches(engine: Engine, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    jsonl()
    producer = staged(engine, model, monkeypatch, lease=30)
    second = submit(engine, submission(model, "a.jsonl", idempotency_key="k"))
    assert second.job_id == producer._job_id
    assert "is being submitted" in second.attached
    assert job_row(engine, second.job_id)["state"] == "staging"


def test_a_dead_staging_is_taken_over(engine: Engine, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    jsonl()
    producer = staged(engine, model, monkeypatch, lease=-1)
    second = submit(engine, submission(model, "a.jsonl", idempotency_key="k"))
    assert (second.job_id, second.attached) == (producer._job_id, "")
    check_job(engine, second.job_id, ["empty_text", "missing_text"])
    # Nothing that the old producer does afterwards has an effect.
    for step in (producer._queue, producer._stage):
        with pytest.raises(LeaseLost):
            step()
    staging.undo(engine, producer._producer)
    check_job(engine, second.job_id, ["empty_text", "missing_text"])


def test_an_old_producer_is_fenced_off_while_the_new_one_stages(
    engine: Engine, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    jsonl()
    old = staged(engine, model, monkeypatch, lease=-1)
    new = staged(engine, model, monkeypatch, lease=30)
    assert (old._job_id, old._producer.fence + 1) == (new._job_id, new._producer.fence)
    with pytest.raises(LeaseLost):
        old._queue()
    staging.undo(engine, old._producer)
    new._queue()
    check_job(engine, new._job_id, ["empty_text", "missing_text"])


def test_a_staging_of_which_the_database_lost_a_part_is_refused(
    engine: Engine, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a failover, the job would be queued without the lost items."""
    jsonl()
    producer = staged(engine, model, monkeypatch, lease=30)
    run_sql(engine, "update vectormill.jobs set items_total = 4")
    with pytest.raises(ServiceUnreachable, match="has lost a part of job"):
        producer._queue()
    assert job_row(engine, producer._job_id)["state"] == "staging"


def test_two_producers_with_one_fence_are_told_apart(
    engine: Engine, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The database has lost the first producer's takeover of the staging, and the next producer repeats it."""
    jsonl()
    first = staged(engine, model, monkeypatch, lease=-1)
    run_sql(engine, "update vectormill.jobs set token = gen_random_uuid()")
    with pytest.raises(LeaseLost):
        first._queue()
    staging.undo(engine, first._producer)
    assert job_row(engine, first._job_id)["state"] == "staging"


# Slow streams


class Watched(io.RawIOBase):
    """Stream that counts, at each read, the open transactions that wait for it."""

    def __init__(self, engine: Engine, lines: list[bytes]) -> None:
        self._engine, self._lines = engine, iter(lines)
        self.waiting = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        [(waiting,)] = run_sql(
            self._engine,
            "select count(*) from pg_stat_activity where datname = current_database() "
            "and pid <> pg_backend_pid() and state like 'idle in transaction%'",
        )
        self.waiting += waiting
        line = next(self._lines, b"")
        buffer[: len(line)] = line
        return len(line)


def test_no_transaction_waits_for_a_stream(engine: Engine, run: Callable[..., Submitted]) -> None:
    stream = Watched(engine, [b'{"text": "t"}\n' * 1_000] * 20)
    run("-", stdin=io.BufferedReader(stream, 20_000))
    assert count(engine, "items") == 20_000
    assert stream.waiting == 0


def test_an_undone_submission_takes_only_its_own(engine: Engine, run: Callable[..., Submitted]) -> None:
    kept = run(jsonl()).job_id
    Path("b.jsonl").write_text('{"text": "t"}\nbroken')
    with pytest.raises(SourceError):
        run("b.jsonl")
    check_job(engine, kept, ["empty_text", "missing_text"])
