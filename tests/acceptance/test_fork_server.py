"""Deaths of the process that forks a worker's children, and of the worker itself."""

from pathlib import Path

import psutil

from tests.acceptance.conftest import write_corpus
from tests.acceptance.fleet import Fleet, eventually


def server_of(fleet: Fleet) -> psutil.Process:
    """Return the fork server of the worker."""

    def found() -> psutil.Process | None:
        children = psutil.Process(fleet.processes["worker"].pid).children()
        alive = [child for child in children if child.status() != psutil.STATUS_ZOMBIE]
        return next((child for child in alive if "billiard.forkserver" in " ".join(child.cmdline())), None)

    return eventually(found, "a fork server")


def test_a_fork_server_that_dies_is_started_anew(fleet: Fleet, texts: list[str], tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus.jsonl", texts[:500])
    fleet.start_dispatcher()
    fleet.start_worker(1)
    job = fleet.submit(str(corpus), "--model", "minilm")
    child, _, _ = fleet.child_at_work(job)
    server = server_of(fleet)
    assert child.parent() == server
    server.kill()
    psutil.wait_procs([child])
    assert fleet.await_end(job)["state"] == "completed"
    assert fleet.processes["worker"].poll() is None
    assert server_of(fleet) != server
    assert fleet.objections(job, corpus) == []


def test_children_and_their_server_die_with_the_worker(fleet: Fleet, texts: list[str], tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus.jsonl", texts[:500])
    fleet.start_dispatcher()
    fleet.start_worker(1)
    child, _, _ = fleet.child_at_work(fleet.submit(str(corpus), "--model", "minilm"))
    server = server_of(fleet)
    fleet.kill("worker")
    assert not psutil.wait_procs([child, server], timeout=20)[1]
