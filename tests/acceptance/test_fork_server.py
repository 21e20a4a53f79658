"""Deaths of the process that forks a worker's children, and of the worker itself."""

import os
import subprocess
import sys
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


#: A server that is dying: it takes no connection any more, and the pipe by which it lives is still open.
_DYING = """
import os
import billiard
from billiard import forkserver
from workers.runner import fork_server

if __name__ == "__main__":
    fork_server.start()
    os.unlink(forkserver._forkserver._forkserver_address)
    child = billiard.Process(target=print, args=("forked",))
    child.start()
    child.join()
"""


def test_a_child_is_forked_while_the_server_dies(fleet: Fleet, tmp_path: Path) -> None:
    (tmp_path / "dying.py").write_text(_DYING)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "dying.py")],
        env={**os.environ, **fleet.environment},
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout == "forked\n", done.stderr


def test_children_and_their_server_die_with_the_worker(fleet: Fleet, texts: list[str], tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus.jsonl", texts[:500])
    fleet.start_dispatcher()
    fleet.start_worker(1)
    child, _, _ = fleet.child_at_work(fleet.submit(str(corpus), "--model", "minilm"))
    server = server_of(fleet)
    fleet.kill("worker")
    assert not psutil.wait_procs([child, server], timeout=20)[1]
