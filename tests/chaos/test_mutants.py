"""Mutants of the guarantees: the oracle objects with one switched off, and doesn't with all of them on. Those of
fence and token are in tests/acceptance/test_faults.py and test_failover.py."""

from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.acceptance.conftest import LEASE_SECONDS, write_corpus
from tests.acceptance.fleet import Fleet, eventually
from tests.chaos.wire import Moment, Wire
from tests.support.lines import Call, at_port, line_to

_MUTANTS = "tests.acceptance.mutants"
_LEASE_SECONDS = 3
#: Limit for a chunk that is long enough to outlast its lease on a fast machine; on a busy one it takes minutes.
_PATIENCE_SECONDS = 400.0


@pytest.mark.parametrize("renewed", [True, False])
def test_a_lease_that_nobody_renews(fleet: Fleet, texts: list[str], tmp_path: Path, renewed: bool) -> None:
    """A chunk takes longer than its lease; without renewal it counts as lost, and is embedded again."""
    corpus = write_corpus(tmp_path / "corpus.jsonl", texts * 2)
    one_chunk = {"VECTORMILL_CHUNK_ITEMS": "100000", "VECTORMILL_CHUNK_SECONDS": "600"}
    fleet.environment |= {**one_chunk, "VECTORMILL_LEASE_SECONDS": str(_LEASE_SECONDS), "MUTANT": "without_renewal"}
    fleet.start_dispatcher()
    fleet.start_worker(1, app="workers.runner.app" if renewed else _MUTANTS)
    job = fleet.submit(str(corpus), "--model", "minilm")
    lost = "select count(*) from vectormill.claim_losses"
    eventually(
        lambda: fleet.status(job)["state"] == "completed" or fleet.scalar(lost),
        "the job's end, or a lost claim",
        _PATIENCE_SECONDS,
    )
    found = fleet.objections(job, corpus, 0)
    if renewed:
        query = "select max(finished_at - started_at) > make_interval(secs => 2 * :lease) from vectormill.chunks"
        outlasts = fleet.scalar(query, lease=_LEASE_SECONDS)
        assert outlasts, "the chunk must outlast its lease, or this proves nothing"
        assert found == []
    else:  # the job still runs, which gives other objections too
        assert any("claims were lost" in said for said in found)


@pytest.mark.parametrize("swept", [True, False])
def test_a_chunk_whose_worker_is_gone(fleet: Fleet, texts: list[str], tmp_path: Path, swept: bool) -> None:
    """Its machine dies, and nobody is left to report it; without the sweep nobody ever claims the chunk again."""
    corpus = write_corpus(tmp_path / "corpus.jsonl", texts[:750])
    fleet.environment["MUTANT"] = "without_sweep"
    fleet.start_dispatcher("pipeline.cli" if swept else _MUTANTS)
    fleet.start_worker(1, name="doomed")
    job = fleet.submit(str(corpus), "--model", "minilm")
    _, chunk, _ = fleet.child_at_work(job)
    fleet.kill_tree("doomed")
    fleet.start_worker(1)
    long_gone = """
        select state = 'done' or lease_until < now() - make_interval(secs => 3 * :lease)
               and not exists (select from vectormill.chunks where id <> :chunk and state <> 'done')
        from vectormill.chunks where id = :chunk
    """
    eventually(lambda: fleet.scalar(long_gone, chunk=chunk, lease=LEASE_SECONDS), "what becomes of the chunk")
    if swept:
        fleet.await_end(job)
    assert bool(fleet.objections(job, corpus, 1)) is not swept


@pytest.fixture
def wire(fleet: Fleet) -> Iterator[Wire]:
    port = urlsplit(fleet.environment["VECTORMILL_DATABASE_URL"]).port
    assert port
    with line_to("127.0.0.1", port, Wire) as made:
        yield made


@pytest.mark.parametrize("at_once", [True, False])
def test_a_child_killed_inside_copy(fleet: Fleet, wire: Wire, texts: list[str], tmp_path: Path, at_once: bool) -> None:
    """Without one transaction the child's chunk is done, and has no vectors."""
    corpus = write_corpus(tmp_path / "corpus.jsonl", texts[:500])
    fleet.environment["MUTANT"] = "without_one_transaction"
    url = at_port(fleet.environment["VECTORMILL_DATABASE_URL"], wire.port)
    fleet.start_dispatcher()
    fleet.start_worker(1, app="workers.runner.app" if at_once else _MUTANTS, VECTORMILL_DATABASE_URL=url)

    def kill(call: Call) -> None:
        child = fleet.child_on_port(call.port)
        assert child
        child.kill()
        child.wait()
        call.cut()

    job = fleet.submit(str(corpus), "--model", "static")
    assert wire.strike(Moment.IN_COPY, kill, 60)
    fleet.await_end(job)
    assert bool(fleet.objections(job, corpus, 1)) is not at_once


def test_a_process_that_ends_by_itself_is_told_once(fleet: Fleet) -> None:
    fleet.start("patient", "http.server", "--bind", "127.0.0.1", "0")
    fleet.start("short", "pipeline.cli", "--help").wait()
    assert fleet.ended_alone() == ["short has ended by itself, with 0"]
    assert fleet.ended_alone() == []
    assert list(fleet.processes) == ["patient"]
