"""Commands on collections, as a user gives them."""

import json
import os
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from tests.acceptance.fleet import eventually
from tests.integration.test_forget import erase
from tests.integration.tickets import Tickets, beside, rows_of, sync_both
from tests.support.commands import run_command
from tests.support.jobs_made import run_sql

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def run(database: str, redis_url: str, tmp_path: Path) -> Run:
    """Return a function that runs a command."""
    environment = {
        **os.environ,
        "VECTORMILL_DATABASE_URL": database,
        "VECTORMILL_REDIS_URL": redis_url,
        "VECTORMILL_HOME": str(tmp_path / "home"),
        "COLUMNS": "80",
    }
    return lambda *arguments, stdin="": run_command(*arguments, environment=environment, stdin=stdin.encode())


def shown(done: "subprocess.CompletedProcess[str]") -> Any:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_pipe_reaches_both_versions(upgraded: Tickets, run: Run) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in rows_of(20))
    done = run("sync", "tickets", "-", stdin=lines)
    assert done.returncode == 0, done.stderr
    leader = UUID(done.stdout.strip())
    assert f"the next version (model small) is synced by job {beside(upgraded, leader)}" in done.stderr
    for job in (leader, beside(upgraded, leader)):
        upgraded.run(job)
    keys = [row["keys"] for row in shown(run("collections", "show", "tickets", "--json"))["versions"]]
    assert (keys, len(upgraded.view())) == ([20], 20)
    history = run("collections", "history", "tickets")
    assert ("small" in history.stdout, "static" in history.stdout) == (True, True)


def test_keys_of_a_file_go_in_both_versions(upgraded: Tickets, run: Run, tmp_path: Path) -> None:
    sync_both(upgraded, rows_of(20))
    (tmp_path / "gone.txt").write_text("k1\nk2\n")
    leader = UUID(run("sync", "tickets", "--remove-keys", str(tmp_path / "gone.txt")).stdout.strip())
    for job in (leader, beside(upgraded, leader)):
        upgraded.run(job)
    (version,) = shown(run("collections", "show", "tickets", "--json"))["versions"]
    assert (version["keys"], version["differs"]) == (18, None)


def test_a_swap_is_looked_at_and_done(upgraded: Tickets, run: Run, tmp_path: Path) -> None:
    early = run("collections", "swap", "tickets", "--yes")
    assert (early.returncode, "no whole sync has reached it yet" in early.stderr) == (2, True)
    sync_both(upgraded, rows_of(40))
    gold = tmp_path / "gold.jsonl"
    gold.write_text('{"query": "a mill of kind 7", "keys": ["k7"]}\n{"query": "kind 12", "keys": ["k12", "none"]}\n')
    compared = shown(run("collections", "swap", "tickets", "--gold", str(gold), "--json"))
    assert (compared["keys"], compared["next_keys"], compared["next_model"]) == (40, 40, "small")
    assert 0 < compared["overlap_at_10"] <= 1
    assert compared["recall_at_10"].keys() == {"current", "next"}
    assert all(0.25 <= share <= 0.75 for share in compared["recall_at_10"].values())
    asked = run("collections", "swap", "tickets", stdin="n\n")
    assert (asked.returncode, "overlap at 10" in asked.stderr) == (130, True)
    assert max(map(len, asked.stderr.splitlines())) <= 80
    swapped = run("collections", "swap", "tickets", "--keep", "2d", "--yes")
    assert "see the vectors of small" in swapped.stderr
    row = shown(run("collections", "show", "tickets", "--json"))
    assert (row["model"], row["versions"][0]["state"]) == ("small", "previous")
    assert "kept until" in run("collections", "show", "tickets").stdout
    back = run("collections", "swap-back", "tickets", "--yes")
    assert "see the vectors of static again" in back.stderr
    assert run("collections", "upgrade", "tickets", "--abandon").returncode == 0
    assert shown(run("collections", "show", "tickets", "--json"))["versions"] == []


def test_keys_are_forgotten_by_a_command(tickets: Tickets, run: Run, tmp_path: Path) -> None:
    tickets.sync(rows_of(20))
    (tmp_path / "erase.txt").write_text("k3\nk4\n\n")
    asked = run("forget", "--key", "k1", "--keys-file", str(tmp_path / "erase.txt"), stdin="n\n")
    assert "Erase 3 keys from all jobs and collections of default" in asked.stderr

    def erase_soon() -> None:
        made = eventually(lambda: run_sql(tickets.engine, "select id from vectormill.forgets"), "a request")[0][0]
        erase(tickets.engine, UUID(str(made)))

    with ThreadPoolExecutor(1) as threads:
        dispatcher = threads.submit(erase_soon)
        done = run("forget", "--key", "k1", "--keys-file", str(tmp_path / "erase.txt"), "--yes", "--json")
        dispatcher.result(60)
    assert shown(done) | {"keys": 3, "items": 3, "collected": 3} == shown(done)
    assert "3 keys forgotten: 3 items of jobs erased, and 3 keys of collections." in done.stderr
    assert "k3" not in tickets.view()
    assert "1 forgotten keys may come in again" in run("forget", "--key", "k1", "--key", "k9", "--allow").stderr
    assert run("forget", "--yes").returncode == 2
    late = run("forget", "--key", "k5", "--yes", "--timeout", "1")
    assert (late.returncode, "the dispatcher goes on with it" in late.stderr) == (7, True)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("no json", "line 1"),
        ('{"query": "a"}', "keys"),
        ('{"query": "", "keys": ["a"]}', "query"),
        ("", "has no query"),
    ],
)
def test_a_bad_gold_file_is_told(tickets: Tickets, run: Run, tmp_path: Path, line: str, told: str) -> None:
    (tmp_path / "gold.jsonl").write_text(line + "\n")
    done = run("collections", "swap", "tickets", "--gold", str(tmp_path / "gold.jsonl"))
    assert (done.returncode, told in done.stderr, "--gold" in done.stderr) == (2, True, True), done.stderr


def test_mistakes_with_versions_are_told(tickets: Tickets, run: Run) -> None:
    for arguments, told in (
        (("upgrade", "tickets"), "give either --model, or --abandon"),
        (("upgrade", "tickets", "--abandon"), "has no next version"),
        (("upgrade", "tickets", "--model", "none"), 'no model "none"'),
        (("upgrade", "none", "--model", "static"), 'no collection "none"'),
        (("swap", "tickets", "--yes"), "has no next version"),
        (("swap", "tickets", "--keep", "soon"), "write a number"),
        (("swap-back", "tickets", "--yes"), "has no previous version"),
    ):
        done = run("collections", *arguments)
        assert (done.returncode, told in done.stderr) == (2, True), done.stderr
    done = run("search", "a mill", "--collection", "tickets", "--version", "next")
    assert (done.returncode, "has no next version" in done.stderr) == (2, True)
    assert "--collection" in run("search", "a mill", "--job", "tickets", "--version", "next").stderr
