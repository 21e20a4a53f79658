"""Batch requests whose jobs are purged, retried or cancelled, or whose storage goes away, at a bad moment."""

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import Engine, RowMapping

from pipeline.batch_api import batches, files
from pipeline.batch_api.results import finish
from pipeline.broker import Publisher
from pipeline.catalog.models import workspace_id
from pipeline.chunk_io.commit import write_chunk
from pipeline.core.errors import StorageRefused, VectormillError, Waiting
from pipeline.core.jobs import Reason
from pipeline.core.models import Model
from pipeline.core.requests import BatchState
from pipeline.db import batches as rows
from pipeline.db import files as file_rows
from pipeline.db import items, jobs, rejects
from pipeline.dispatch import dispatcher as dispatch
from pipeline.dispatch import maintenance
from pipeline.dispatch.background import Background, BackgroundTask, Resources
from pipeline.dispatch.state import Dispatcher
from pipeline.infra import metrics, storage
from pipeline.infra.settings import Settings
from pipeline.ingest.submit import submit
from pipeline.jobs import control, purge
from tests.acceptance.fleet import eventually
from tests.support.jobs_made import DONE, chunk_rows, count, job_row, part_of, reject, run_sql, taken, unfinished


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(files=str(tmp_path / "files"), chunk_items=4)


@pytest.fixture
def end_jobs(engine: Engine, redis_url: str) -> Iterator[Callable[[], None]]:
    """Yield a function that ends the jobs that are over."""
    publisher = Publisher(redis_url)
    dispatcher = Dispatcher(engine=engine, publisher=publisher, lease_seconds=30, text_retention_days=7)

    def end() -> None:
        maintenance.drain(dispatcher)
        dispatch.finish(dispatcher)

    yield end
    publisher.close()


def lines(*texts: str, model: str = "small") -> bytes:
    """Return a JSONL line for each text, with the custom_ids of `tests.support.jobs_made`."""
    made = [
        {"custom_id": f"k{n}", "method": "POST", "url": "/v1/embeddings", "body": {"model": model, "input": text}}
        for n, text in enumerate(texts)
    ]
    return b"".join(json.dumps(one).encode() + b"\n" for one in made)


#: Eight lines, of which the fifth is bad.
EIGHT = lines("a", "b", "c", "d", "", "f", "g", "h")


def ask(engine: Engine, settings: Settings, data: bytes = EIGHT) -> str:
    """Make a batch request that isn't staged yet, and return its id."""
    with engine.begin() as connection:
        workspace = workspace_id(connection)
    file = files.keep(engine, settings, workspace, purpose="batch", name="nightly.jsonl", source=BytesIO(data))
    row = {
        "id": files.new_id("batch_"),
        "workspace_id": workspace,
        "endpoint": "/v1/embeddings",
        "completion_window": "24h",
        "input_file_id": file["id"],
    }
    with engine.begin() as connection:
        return str(rows.insert(connection, row, 86_400)["id"])


def staged(engine: Engine, settings: Settings, data: bytes = EIGHT) -> tuple[str, UUID]:
    """Make and stage a batch request, and return its id and its job's."""
    batch = ask(engine, settings, data)
    batches.stage(engine, settings, batch)
    return batch, row_of(engine, batch)["job_id"]


def row_of(engine: Engine, batch: str) -> RowMapping:
    with engine.begin() as connection:
        row = rows.by_id(connection, batch)
    assert row
    return row


def embed(engine: Engine, job: UUID, start: int = 0, stop: int = 8, bad: Sequence[int] = ()) -> None:
    """Embed the items from `start` to before `stop`. Reject the bad ones for a reason that allows a retry."""
    for chunk in chunk_rows(engine, job):
        if chunk["state"] == "pending" and start <= chunk["first_index"] < stop:
            claim = taken(engine, job, chunk["ordinal"])
            indexes = [item.index for item in unfinished(engine, claim)]
            part = part_of([at for at in indexes if at not in bad], [reject(at) for at in indexes if at in bad])
            write_chunk(engine, claim, 0, part, DONE)


def failed(engine: Engine, job: UUID, end_jobs: Callable[[], None]) -> None:
    """Fail a job for a reason other than its texts."""
    with engine.begin() as connection:
        control.fail(connection, job, Reason.MODEL_CANNOT_LOAD, "no folder /models/small on this machine")
    end_jobs()
    assert job_row(engine, job)["state"] == "failed"


def cancel(engine: Engine, batch: str) -> None:
    with engine.begin() as connection:
        assert batches.let_go(connection, batch, BatchState.CANCELLED)


def kept(engine: Engine) -> int:
    """Return the number of output and error files that have not expired."""
    seen = "select count(*) from vectormill.files where purpose = 'batch_output' and expires_at > now()"
    return int(run_sql(engine, seen)[0][0])


def read(engine: Engine, batch: RowMapping, kind: str) -> list[str]:
    """Return the custom_ids of a file's lines."""
    with engine.begin() as connection:
        file = file_rows.find(connection, batch["workspace_id"], batch[f"{kind}_file_id"])
    assert file
    with files.open_kept(file) as opened:
        return [json.loads(line)["custom_id"] for line in opened]


def due(engine: Engine) -> list[str]:
    with engine.begin() as connection:
        return rows.to_end(connection, 10)


# Files


def purge_part(engine: Engine, job: UUID, table: str) -> None:
    """Purge a part of a job, as if the purge were cut off."""
    with engine.begin() as connection:
        jobs.give_up(connection, job)
        assert items.delete_range(connection, table, job, 0, 8)


@pytest.mark.parametrize(
    "purging",
    [
        lambda engine, job: purge_part(engine, job, "embeddings"),
        lambda engine, job: purge_part(engine, job, "rejects"),
        purge.purge_job,
    ],
    ids=["the vectors", "the rejects", "all"],
)
def test_nobody_gets_a_part_of_what_is_purged(
    engine: Engine, model: Model, settings: Settings, end_jobs: Callable[[], None], purging: Callable[..., Any]
) -> None:
    batch, job = staged(engine, settings)
    embed(engine, job)
    end_jobs()
    purging(engine, job)
    finish(engine, settings, batch)
    row = row_of(engine, batch)
    assert (row["state"], row["errors"][0]["code"], row["output_file_id"]) == ("failed", "job_purged", None)
    assert kept(engine) == 0


def test_results_that_arent_what_the_receipt_says_are_nobodys(
    engine: Engine, model: Model, settings: Settings, end_jobs: Callable[[], None]
) -> None:
    batch, job = staged(engine, settings)
    embed(engine, job)
    end_jobs()
    run_sql(engine, "delete from vectormill.embeddings where index = 2")
    with pytest.raises(VectormillError, match="6 output lines and 1 error lines, but its receipt says 7 and 1"):
        finish(engine, settings, batch)
    assert (row_of(engine, batch)["state"], due(engine), kept(engine)) == ("finalizing", [batch], 0)


def test_both_files_are_of_one_moment(
    engine: Engine, model: Model, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One request is cancelled while another goes on with the job, whose next chunk ends between the two files."""
    (batch, job), (other, same) = (staged(engine, settings) for _ in range(2))
    assert job == same
    embed(engine, job, 0, 4)
    cancel(engine, batch)
    assert due(engine) == [batch]
    look = rejects.page_with_carried

    def meanwhile(*given: Any, **named: Any) -> Any:
        monkeypatch.undo()
        embed(engine, job)
        return look(*given, **named)

    monkeypatch.setattr(rejects, "page_with_carried", meanwhile)
    finish(engine, settings, batch)
    row = row_of(engine, batch)
    assert (row["state"], row["counts"]) == (
        "cancelled",
        {"total": 8, "completed": 4, "failed": 1, "input_tokens": 12, "cached_tokens": 0},
    )
    assert (read(engine, row, "output"), read(engine, row, "error")) == (
        ["k0", "k1", "k2", "k3"],
        ["k4", "k5", "k6", "k7"],
    )
    assert (row_of(engine, other)["state"], count(engine, "embeddings")) == ("in_progress", 7)


def test_one_whose_job_is_retried_waits_for_it_again(
    engine: Engine, model: Model, settings: Settings, end_jobs: Callable[[], None]
) -> None:
    batch, job = staged(engine, settings)
    embed(engine, job, bad=[7])
    end_jobs()
    with engine.begin() as connection:
        rows.begin_finalizing(connection, batch)
        assert control.retry(connection, job) == 1
    assert due(engine) == [batch], "whoever began to end it may be dead"
    finish(engine, settings, batch)
    row = row_of(engine, batch)
    assert (row["state"], row["finalizing_at"], due(engine)) == ("in_progress", None, [])
    embed(engine, job)
    end_jobs()
    finish(engine, settings, batch)
    row = row_of(engine, batch)
    assert (row["state"], row["counts"]) == (
        "completed",
        {"total": 8, "completed": 7, "failed": 1, "input_tokens": 21, "cached_tokens": 0},
    )


@pytest.mark.parametrize("after", [0, 1], ids=["before the output", "before the errors"])
def test_a_storage_that_goes_away_leaves_no_file_that_nobody_knows_of(
    engine: Engine,
    model: Model,
    settings: Settings,
    end_jobs: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
    after: int,
) -> None:
    batch, job = staged(engine, settings)
    embed(engine, job)
    end_jobs()
    folder, away = Path(settings.files_folder), Path(settings.files_folder + "-away")
    write, written = storage.write_from, []

    def failing(uri: str, source: Any) -> None:
        written.append(uri)
        if len(written) == after + 1:
            folder.rename(away)
            folder.write_text("a file")
        write(uri, source)

    monkeypatch.setattr(storage, "write_from", failing)
    with pytest.raises(StorageRefused, match="there is a file where a folder must be"):
        finish(engine, settings, batch)
    assert (row_of(engine, batch)["state"], kept(engine), len(written)) == ("finalizing", 0, after + 1)
    folder.unlink()
    away.rename(folder)
    finish(engine, settings, batch)
    row = row_of(engine, batch)
    assert (row["state"], len(read(engine, row, "output")), read(engine, row, "error")) == ("completed", 7, ["k4"])
    with engine.begin() as connection:
        past = file_rows.expired(connection, 10)
    assert len(past) == after
    for file_id in past:
        assert files.delete_file(engine, file_id)
    assert sum(one.is_file() for one in folder.rglob("*")) == 3, "input, output and errors"


def test_an_input_file_whose_storage_is_away_is_waited_for(engine: Engine, model: Model, settings: Settings) -> None:
    batch = ask(engine, settings)
    folder, away = Path(settings.files_folder), Path(settings.files_folder + "-away")
    folder.rename(away)
    with pytest.raises(VectormillError, match="its folder is missing; mount it again"):
        batches.stage(engine, settings, batch)
    assert row_of(engine, batch)["state"] == "validating"
    away.rename(folder)
    for file in folder.rglob("file-*"):
        file.unlink()
    batches.stage(engine, settings, batch)
    (error,) = row_of(engine, batch)["errors"]
    assert error["code"] == "file_not_found"
    assert str(folder) not in error["message"], "where files are is the operator's business"


def test_why_a_model_cant_be_loaded_is_the_operators_business(
    engine: Engine, model: Model, settings: Settings, end_jobs: Callable[[], None]
) -> None:
    batch, job = staged(engine, settings)
    failed(engine, job, end_jobs)
    finish(engine, settings, batch)
    told = [(error["code"], error["message"]) for error in row_of(engine, batch)["errors"]]
    assert told == [
        ("model_cannot_load", "no worker can load its model; ask the operator for the reason."),
        ("empty_text", "line 5: text is empty"),
    ]


# The same content again


def texts_are_gone(engine: Engine) -> None:
    run_sql(engine, "update vectormill.jobs set texts_removed_at = now()")
    run_sql(engine, "update vectormill.items set text = null")


def another_prompt(engine: Engine) -> None:
    run_sql(engine, "update vectormill.models set document_prompt = 'passage: '")


@pytest.mark.parametrize("change", [texts_are_gone, another_prompt])
def test_what_cant_be_tried_again_is_made_anew(
    engine: Engine,
    model: Model,
    settings: Settings,
    end_jobs: Callable[[], None],
    change: Callable[[Engine], None],
) -> None:
    _, job = staged(engine, settings)
    failed(engine, job, end_jobs)
    change(engine)
    batch, another = staged(engine, settings)
    assert (another != job, row_of(engine, batch)["state"]) == (True, "in_progress")
    embed(engine, another)
    end_jobs()
    assert staged(engine, settings)[1] == another


def test_vectors_of_another_prompt_arent_the_same(
    engine: Engine, model: Model, settings: Settings, end_jobs: Callable[[], None]
) -> None:
    _, job = staged(engine, settings)
    embed(engine, job)
    end_jobs()
    assert staged(engine, settings)[1] == job
    another_prompt(engine)
    assert staged(engine, settings)[1] != job


def test_two_at_once_after_a_failure_attach_to_one(
    engine: Engine, model: Model, settings: Settings, end_jobs: Callable[[], None]
) -> None:
    _, job = staged(engine, settings)
    embed(engine, job, 0, 4)
    failed(engine, job, end_jobs)
    asked = [ask(engine, settings) for _ in range(2)]
    waiting = (
        "select count(*) = 2 from pg_stat_activity where wait_event_type = 'Lock' and datname = current_database()"
    )
    with ThreadPoolExecutor() as threads:
        with engine.begin() as holding:
            # Both requests have read that the job failed when they come to retry it.
            jobs.lock(holding, job)
            staging = [threads.submit(batches.stage, engine, settings, batch) for batch in asked]
            eventually(lambda: run_sql(engine, waiting)[0][0], "two that wait for the job")
        for one in staging:
            one.result(60)
    found = [row_of(engine, batch) for batch in asked]
    assert [(row["state"], row["job_id"]) for row in found] == [("in_progress", job)] * 2
    assert job_row(engine, job)["state"] == "queued"


def test_a_cancelled_job_that_is_purged_hides_no_later_one(
    engine: Engine, model: Model, settings: Settings, end_jobs: Callable[[], None]
) -> None:
    batch, cancelled = staged(engine, settings)
    cancel(engine, batch)
    end_jobs()
    _, job = staged(engine, settings)
    assert job != cancelled
    embed(engine, job)
    end_jobs()
    purge.purge_job(engine, cancelled)
    assert staged(engine, settings)[1] == job


def test_one_that_is_cancelled_while_it_is_staged_is_no_job(engine: Engine, model: Model, settings: Settings) -> None:
    batch, other = ask(engine, settings), ask(engine, settings)
    with ThreadPoolExecutor() as threads:
        with engine.begin() as holding:
            # No items can be copied while their table is locked.
            holding.exec_driver_sql("lock table vectormill.items in share mode")
            staging = threads.submit(batches.stage, engine, settings, batch)
            eventually(lambda: count(engine, "jobs"), "a job that is being staged")
            with pytest.raises(Waiting):
                batches.stage(engine, settings, other)
            cancel(engine, batch)
        staging.result(60)
    assert (count(engine, "jobs"), count(engine, "items"), due(engine)) == (0, 0, [batch])
    finish(engine, settings, batch)
    assert (row_of(engine, batch)["state"], row_of(engine, batch)["errors"]) == ("cancelled", None)
    batches.stage(engine, settings, other)
    assert row_of(engine, other)["state"] == "in_progress"


@pytest.mark.parametrize("again", [False, True], ids=["anew", "again"])
def test_a_dispatcher_that_dies_leaves_no_job_that_runs_for_nobody(
    engine: Engine,
    model: Model,
    settings: Settings,
    end_jobs: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
    again: bool,
) -> None:
    if again:
        first, job = staged(engine, settings)
        failed(engine, job, end_jobs)
        finish(engine, settings, first)
    batch = ask(engine, settings)

    def last(*given: Any) -> Any:
        made = submit(*given)
        assert job_row(engine, made.job_id)["state"] == "queued"
        raise KeyboardInterrupt

    monkeypatch.setattr("pipeline.batch_api.batches.submit", last)
    with pytest.raises(KeyboardInterrupt):
        batches.stage(engine, settings, batch)
    cancel(engine, batch)
    assert job_row(engine, row_of(engine, batch)["job_id"])["state"] == "cancelling"


def test_to_wait_is_no_failure(engine: Engine, settings: Settings) -> None:
    tried: list[object] = []

    def wait(resources: Resources, piece: object) -> None:
        tried.append(piece)
        raise Waiting("for another one.")

    def failures() -> float:
        return sum(sample.value for family in metrics.DISPATCHER_FAILURES.collect() for sample in family.samples)

    before = failures()
    background = Background(Resources(engine, settings), [BackgroundTask("wait", lambda *_: ["piece"], wait)])
    background.begin()
    eventually(lambda: tried and not background.under_way, "the end of a piece")
    background.begin()
    assert (tried, failures()) == (["piece"], before), "it rests before it is begun again"
