"""Command line as programs use it."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import structlog
from sqlalchemy import Engine

from pipeline.chunk_io.commit import write_chunk
from pipeline.cli import main
from pipeline.core.chunks import RejectCode
from pipeline.core.models import Model
from tests.support.commands import run_command
from tests.support.jobs_made import DONE, job_row, make_job, make_model, part_of, reject, run_sql, taken

Run = Callable[..., "subprocess.CompletedProcess[str]"]
NOWHERE = "postgresql://vectormill@127.0.0.1:1/vectormill"
STATUS = {
    *("id", "name", "state", "reason", "model", "labels", "items", "tokens", "rate", "eta_seconds", "chunks"),
    *("created_at", "started_at", "finished_at", "notices", "passages", "lost_tokens", "most_truncated"),
}


@pytest.fixture
def environment(database: str, redis_url: str, tmp_path: Path) -> dict[str, str]:
    return {
        **os.environ,
        "VECTORMILL_DATABASE_URL": database,
        "VECTORMILL_REDIS_URL": redis_url,
        "VECTORMILL_HOME": str(tmp_path / "home"),
        "COLUMNS": "200",
    }


@pytest.fixture
def run(environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return a function that runs a command in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str, stdin: str = "", **more: str) -> "subprocess.CompletedProcess[str]":
        return run_command(*arguments, environment={**environment, **more}, stdin=stdin.encode())

    return run


@pytest.fixture
def start(environment: dict[str, str], tmp_path: Path) -> Run:
    """Return a function that runs a command as a process of its own."""

    def run(*arguments: str, stdin: str = "") -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "pipeline.cli", *arguments]
        return subprocess.run(
            command, input=stdin, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment
        )

    return run


def printed(run: Run, *arguments: str, code: int = 0) -> Any:
    done = run(*arguments, "--json")
    assert (done.returncode, done.stderr) == (code, "")
    return json.loads(done.stdout)


@pytest.fixture
def job_id(engine: Engine, model: Model) -> UUID:
    """Make a job of two chunks: one is done with a reject, the other is pending."""
    job_id = make_job(engine, model, name="docs", labels={"team": "search"})
    write_chunk(engine, taken(engine, job_id), 0, part_of([0, 1, 2], [reject(3, RejectCode.TOO_LONG)]), DONE)
    return job_id


def test_a_command_loads_no_more_than_it_needs() -> None:
    slow = {"alembic", "celery", "kombu", "redis", "torch", "fastapi"}
    code = f"import sys, pipeline.cli; print(sorted({slow} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_submit_prints_the_id_alone(engine: Engine, model: Model, start: Run) -> None:
    done = start(
        "submit", "-", "--model", "small", "--name", "mine", "--label", "a=b", stdin='{"id": 1, "text": "t"}\n'
    )
    assert (done.returncode, done.stderr) == (0, "")
    row = job_row(engine, UUID(done.stdout.removesuffix("\n")))
    assert (row["name"], row["state"], row["items_total"], row["labels"]) == ("mine", "queued", 1, {"a": "b"})


def test_status(job_id: UUID, run: Run) -> None:
    row = printed(run, "status", "docs")
    assert row.keys() - {"message", "output", "workspace"} == STATUS
    assert (row["id"], row["state"], row["reason"], row["model"]) == (str(job_id), "running", None, "small")
    assert row["labels"] == {"team": "search"}
    assert row["items"] == {
        "total": 8,
        "embedded": 3,
        "reused": 0,
        "unchanged": 0,
        "rejected": 1,
        "cancelled": 0,
        "pending": 4,
        "truncated": 0,
        "removed": 0,
    }
    assert row["tokens"] == {"prompt": 9}
    assert row["rate"].keys() == {"items_per_second", "tokens_per_second", "roofline"}
    assert row["chunks"] == {"pending": 1, "running": 0, "done": 1, "cancelled": 0}
    assert row["created_at"] < row["started_at"]
    assert row["finished_at"] is None


def test_jobs(engine: Engine, model: Model, job_id: UUID, run: Run) -> None:
    newer = make_job(engine, model)
    rows = printed(run, "jobs")
    assert [row["id"] for row in rows] == [str(newer), str(job_id)]
    assert rows[0].keys() - {"message", "output", "workspace"} == STATUS
    assert [row["id"] for row in printed(run, "jobs", "--state", "running")] == [str(job_id)]


def test_rejects(job_id: UUID, run: Run) -> None:
    assert printed(run, "rejects", str(job_id)) == [
        {"index": 3, "key": "k3", "code": "too_long", "message": "for a test"}
    ]


def test_receipt(engine: Engine, job_id: UUID, run: Run) -> None:
    account = printed(run, "receipt", str(job_id)[:30])
    counts = {"in": 8, "embedded": 3, "reused": 0, "unchanged": 0, "rejected": 1, "cancelled": 0, "removed": 0}
    assert account["items"] == counts | {"forgotten": 0}
    assert account["tokens"].items() >= {"prompt": 9, "billed": 9}.items()
    assert account["balanced"] is False
    assert not {"verified", "missing", "double"} & account.keys()
    write_chunk(engine, taken(engine, job_id, 1), 0, part_of([4, 5, 6, 7]), DONE)
    account = printed(run, "receipt", "docs", "--verify")
    assert [account[name] for name in ("balanced", "verified", "missing", "double")] == [True, True, 0, 0]
    run_sql(engine, "delete from vectormill.embeddings where index = 5")
    account = printed(run, "receipt", "docs", "--verify", code=1)
    assert [account[name] for name in ("balanced", "verified", "missing", "double")] == [True, False, 1, 0]


def test_control(engine: Engine, job_id: UUID, run: Run) -> None:
    for command, state in (("pause", "paused"), ("resume", "queued"), ("cancel", "cancelling")):
        done = run(command, "docs")
        assert (done.returncode, done.stdout) == (0, "")
        assert done.stderr.startswith(f"Job {job_id} is {state}")
        assert done.stderr.count("\n") == 1
    done = run("retry", "docs")
    assert (done.returncode, done.stderr) == (2, f"error job {job_id} is cancelling and can't be retried.\n")


MISTAKES: list[tuple[tuple[str, ...], str]] = [
    (("status", "nothing"), 'no job "nothing"; vectormill jobs lists them.'),
    (("submit", "-", "--model", "large"), 'no model "large"; available: small.'),
    (("submit", "none.jsonl", "--model", "small"), "none.jsonl: no such file."),
    (
        ("submit", "-", "--model", "small", "--text-column", "body"),
        '--text-column: standard input line 1: no column "body"; columns are text. Name "text".',
    ),
    (("submit", "-", "--model", "small", "--max-rejects", "many"), '--max-rejects "many": give a count'),
    (("submit", "-", "--model", "small", "--label", "x"), '--label "x": write it as key=value.'),
    (("submit", "-", "--model", "small", "--model", "small"), "--model: it is given twice; give it once."),
    (("submit", "-", "--model", "small", "--by-value", "--by-reference"), "--by-reference: it is given twice"),
    (("submit", "-", "--model", "small", "--label", "a=1", "--label", "a=2"), '--label "a=2": a is given twice.'),
    (
        ("submit", "-", "--model", "small", "--carry", "text", "--carry", "text"),
        '--carry: "text" is given twice.',
    ),
    (
        ("submit", "-", "--model", "small", "--json"),
        "--json has no effect without --dry-run; leave it out, or give both.",
    ),
    (("submit", "-", "--model", "small", "--at", "1e9"), "--at has no effect without --dry-run; leave it out"),
    (
        ("submit", "-", "--model", "small", "--dry-run", "--at", "1.5"),
        "--at 1.5: give a positive whole number of items, such as 1e9 or 1_000_000.",
    ),
    (("submit", "-", "--model", "small", "--wait", "--dry-run"), "--wait has no effect with --dry-run"),
    (("submit", "-", "--model", "small", "--timeout", "5"), "--timeout has no effect without --wait; leave it out"),
    (
        ("submit", "-", "--model", "small", "--quote", "none"),
        "--quote: standard input has no .csv or .tsv file, so it has",
    ),
    (("submit", "-", "--model", "small", "--delimiter", "ab"), "--delimiter: give one ASCII character, or tab"),
    (("submit", "-", "--model", "small", "--max-item-tokens", "999999"), "--max-item-tokens 999,999: small reads"),
    (
        ("submit", "-", "--model", "small", "--unique-keys"),
        '--key-column: standard input line 1: no column "id"; columns are text. Name another.',
    ),
    (("results", "docs", "--to", "a.csv"), "--to a.csv: give a file that ends in .parquet or .jsonl."),
    (("jobs", "--workspace", "other"), 'no workspace "other".'),
]


def test_a_mistake_is_one_clear_line(job_id: UUID, run: Run, start: Run) -> None:
    for way, (arguments, sentence) in [(start, MISTAKES[0]), *((run, mistake) for mistake in MISTAKES)]:
        done = way(*arguments, stdin='{"text": "t"}\n')
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(f"error {sentence}")
        assert done.stderr.count("\n") == 1


def test_without_a_name_the_only_model_is_taken_and_said(run: Run, engine: Engine, job_id: UUID) -> None:
    done = run("submit", "-", "--name", "unnamed model", stdin='{"text": "t"}\n')
    assert done.returncode == 0
    assert "note no model is named, so it is small, the only one there is" in done.stderr
    assert json.loads(run("status", done.stdout.strip(), "--json").stdout)["model"] == "small"
    make_model(engine, "other")
    done = run("submit", "-", stdin='{"text": "t"}\n')
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "error --model: name one of other, small.\n")


def test_a_wait_that_is_interrupted_says_that_the_job_goes_on(environment: dict[str, str], job_id: UUID) -> None:
    command = [sys.executable, "-m", "pipeline.cli", "watch", str(job_id)]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as watching:
        assert watching.stderr
        assert watching.stderr.readline().startswith("docs  ")
        watching.send_signal(signal.SIGINT)
        told = watching.stderr.read()
    assert watching.returncode == 130
    assert told.endswith(
        f"Job {job_id} goes on. Follow it: vectormill watch {job_id}\nStop it: vectormill cancel {job_id}\n"
    )


def test_a_database_that_is_away_is_exit_code_6(run: Run) -> None:
    done = run("jobs", VECTORMILL_DATABASE_URL=NOWHERE)
    assert (done.returncode, done.stdout) == (6, "")
    assert done.stderr.startswith("error can't reach the database; check VECTORMILL_DATABASE_URL")
    assert done.stderr.count("\n") == 1


def test_a_database_without_the_schema_is_a_clear_line(run: Run, empty_database: str) -> None:
    done = run("jobs", VECTORMILL_DATABASE_URL=empty_database)
    assert done.returncode == 2
    assert "vectormill migrate" in done.stderr
    assert done.stderr.count("\n") == 1


def test_what_a_command_logs_is_no_data(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["vectormill", "jobs"])
    monkeypatch.setenv("VECTORMILL_DATABASE_URL", NOWHERE)
    with pytest.raises(SystemExit):
        main()
    capsys.readouterr()
    structlog.get_logger().warning("something_happened")
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "something_happened" in printed.err


def test_results(engine: Engine, job_id: UUID, run: Run, tmp_path: Path) -> None:
    done = run("results", "docs", "--to", "out.jsonl")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "3 vectors written to out.jsonl.\n")
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [list(row) for row in rows] == [["index", "key", "embedding", "tokens", "truncated"]] * 3


def test_a_webhook_must_be_one_that_the_operator_allows(engine: Engine, model: Model, run: Run) -> None:
    done = run("submit", "-", "--model", "small", "--webhook", "https://evil.test/token", stdin='{"text": "t"}\n')
    assert (done.returncode, done.stdout) == (2, "")
    assert "--webhook: https://evil.test isn't below an address" in " ".join(done.stderr.split())
    assert run_sql(engine, "select * from vectormill.jobs") == []


def test_what_isnt_refused_is_said(engine: Engine, model: Model, run: Run, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('ID,text\n1,one\n2,"two\n3,3"\n')
    said = [
        'note a.csv line 1: no column "id", so these items have no key; columns are ID, text. If "ID" holds keys, '
        "name it as the key column.",
        "note a.csv lines 3 to 4: a quoted field goes on over lines that look like rows, and is read as one text. If a "
        "quote was left open there, close it, or set quote to none where quotes are mere letters.",
    ]
    done = run("submit", "a.csv", "--model", "small")
    assert (done.returncode, done.stderr.splitlines()) == (0, said)
    first = done.stdout.strip()
    assert [f"note {line}" for line in printed(run, "status", "a")["notices"]] == said
    done = run("submit", "a.csv", "--model", "small", "--key-column", "ID", "--quote", "none")
    assert done.stderr == (
        f'note another job is called "a" too, {first}; by the name, commands that read mean the newest, and those '
        "that change a job may ask for its id.\n"
    )
    assert job_row(engine, UUID(done.stdout.strip()))["items_total"] == 3


def test_a_name_of_several_jobs(engine: Engine, model: Model, run: Run) -> None:
    ended, running, newest = (make_job(engine, model, name="docs") for _ in range(3))
    run_sql(engine, "update vectormill.jobs set state = 'completed' where id = :id", id=ended)
    done = run("status", "docs", "--json")
    assert json.loads(done.stdout)["id"] == str(newest)
    assert done.stderr == (
        f'note 3 jobs are called "docs": {newest} (queued), {running} (queued), {ended} (completed); '
        "this is about the newest.\n"
    )
    done = run("cancel", "docs")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f'error 2 jobs are called "docs": {newest} (queued), {running} (queued); '
        "give the id of the one that is meant.\n"
    )
    assert run("cancel", str(newest)).returncode == 0
    assert run("pause", "docs").stderr.count("\n") == 1
    done = run("retry", "docs")
    assert (done.returncode, str(ended) in done.stderr) == (2, True)
