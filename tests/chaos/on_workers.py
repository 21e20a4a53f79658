"""Faults of workers: kill, freeze, disconnection, restart, wrong clock."""

import os
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from glob import glob
from pathlib import Path
from random import Random

import psutil

from tests.acceptance.fleet import eventually
from tests.chaos.faults import Claimed, Do, Done, is_back
from tests.chaos.site import START_SECONDS, WORKERS, Site
from tests.chaos.wire import Moment
from tests.support.lines import Call

#: Debian's path of libfaketime, the library that shows a process another time.
FAKETIME = "/usr/lib/*/faketime/libfaketime.so.1"
#: Folder of the `sitecustomize` module that Python needs with it.
_AHEAD = Path(__file__).parent / "ahead"
#: Longest delay of a renewal on a busy machine.
_LATE_SECONDS = 1.5


def _at_work(site: Site, random: Random) -> tuple[psutil.Process, Claimed]:
    """Wait for a child that runs a chunk; return it and its claim."""
    query = """
        select c.id, c.fence, a.client_port from vectormill.chunks c
        join pg_stat_activity a on a.pid = c.backend_pid where c.state = 'running' order by c.id
    """

    def look() -> tuple[psutil.Process, Claimed] | None:
        rows = [row for row in site.rows(query) if row["client_port"]]
        random.shuffle(rows)
        for row in rows:
            port = site.wire.near_port(row["client_port"])
            if port and (child := site.fleet.child_on_port(port)):
                return child, Claimed(row["id"], row["fence"])
        return None

    return eventually(look, "a child at work", START_SECONDS)


def _suspended(site: Site, random: Random) -> tuple[psutil.Process, Claimed]:
    """Suspend a child in the middle of its chunk; return it and its claim. A chunk that had ended by then would be no
    target."""
    query = "select state = 'running' and fence = :fence from vectormill.chunks where id = :chunk"

    def look() -> tuple[psutil.Process, Claimed] | None:
        child, claim = _at_work(site, random)
        time.sleep(random.uniform(0, 0.3))
        with suppress(psutil.NoSuchProcess):
            child.suspend()
            if site.scalar(query, chunk=claim.chunk, fence=claim.fence):
                return child, claim
            child.resume()
        return None

    return eventually(look, "a child in the middle of its chunk", START_SECONDS)


def kill_child(site: Site, random: Random) -> Done:
    """Kill a child in the middle of its chunk."""
    child, claim = _suspended(site, random)
    child.kill()
    return Done(time.monotonic(), claim)


def kill_worker(site: Site, random: Random) -> Done:
    """Kill a worker's parent process, and start the worker again."""
    return _kill_and_start(site, random, site.fleet.kill)


def kill_machine(site: Site, random: Random) -> Done:
    """Kill a worker with all its children at once, so that nobody can report it, and start another in its place."""
    return _kill_and_start(site, random, site.fleet.kill_tree)


def _kill_and_start(site: Site, random: Random, kill: Callable[[str], None]) -> Done:
    site.await_workers()
    child, claim = _at_work(site, random)
    trees = {name: psutil.Process(site.fleet.processes[name].pid).children(recursive=True) for name in WORKERS}
    name = next(name for name, tree in trees.items() if child in tree)
    kill(name)
    site.killed += 1
    since = time.monotonic()
    site.start(name)
    return Done(since, claim)


def freeze_child(site: Site, random: Random) -> Done:
    """Freeze a child for longer than its lease, then let it go on as if nothing had happened."""
    return _frozen_until_lost(site, *_suspended(site, random))


def _frozen_until_lost(site: Site, child: psutil.Process, claim: Claimed) -> Done:
    since = time.monotonic()
    try:
        eventually(lambda: is_back(site, claim), "another claim on a frozen child's chunk", START_SECONDS)
    finally:
        child.resume()
    return Done(since, claim)


def freeze_shortly(site: Site, random: Random) -> Done:
    """Freeze a child for less than its lease minus the renewal interval, so that its claim holds."""
    child, claim = _suspended(site, random)
    time.sleep(random.uniform(0.2, 1) * (site.lease_seconds * 2 / 3 - _LATE_SECONDS))
    moment = site.scalar("select clock_timestamp()")
    child.resume()
    since = time.monotonic()
    # Once this is true, the sweep can't find the claim any more.
    settled = """
        select not exists (select from vectormill.chunks
                           where id = :chunk and fence = :fence and state = 'running'
                             and lease_until < cast(:moment as timestamptz) + make_interval(secs => :lease))
    """
    values = {"chunk": claim.chunk, "fence": claim.fence}
    asked = partial(site.scalar, settled, **values, moment=moment, lease=site.lease_seconds)
    eventually(asked, "a renewal after a short freeze, or the chunk's end")
    lost = site.scalar(
        "select exists (select from vectormill.claim_losses where chunk_id = :chunk and fence = :fence)", **values
    )
    return Done(since, said=("a claim is lost by a short freeze",) if lost else ())


def rolling_restart(site: Site, random: Random) -> Done:
    """Ask a worker to end, which first finishes its current work, and start another in its place."""
    site.await_workers()
    name = random.choice(WORKERS)
    said = site.end_worker(name)
    site.start(name)
    return Done(time.monotonic(), said=said)


def strike(moment: Moment, act: Callable[[Site, psutil.Process, Call, Claimed], Done]) -> Do:
    """Make a fault that strikes a write-back at this moment."""

    def do(site: Site, _: Random) -> Done:
        done: list[Done] = []

        def spring(call: Call) -> None:
            claim = _claim_of(site, [call.server_port])
            child = site.fleet.child_on_port(call.port)
            if claim and child:
                done.append(act(site, child, call, claim))

        # It is no strike if a reader's connection sprang the trap, or if the claim was lost already.
        while site.wire.strike(moment, spring, START_SECONDS):
            if done:
                return done[0]
        raise AssertionError(f"no write-back came to {moment}")

    return do


def _claim_of(site: Site, ports: list[int]) -> Claimed | None:
    """Return the claim, which may just have ended, of the child whose connections Postgres sees from these ports."""
    query = """
        select c.id, c.fence from vectormill.chunks c join pg_stat_activity a on a.pid = c.backend_pid
        where a.client_port = any(:ports) and c.state in ('running', 'done')
        order by c.finished_at desc nulls first limit 1
    """
    rows = site.rows(query, ports=ports)
    return Claimed(rows[0]["id"], rows[0]["fence"]) if rows else None


def kill_in_upload(site: Site, _: Random) -> Done:
    """Kill a child while it uploads a part to the object store, so that half of the part may be there."""
    done: list[Done] = []

    def spring(call: Call) -> None:
        child = site.fleet.child_on_port(call.port)
        if child is None:
            return
        own = {connection.laddr.port for connection in child.net_connections("tcp4")}
        claim = _claim_of(site, [each.server_port for each in site.wire.calls() if each.port in own])
        if claim:
            done.append(kill(site, child, call, claim))

    while site.store_line.strike(spring, START_SECONDS):
        if done:
            return done[0]
    raise AssertionError("nothing was uploaded")


def kill(_: Site, child: psutil.Process, call: Call, claim: Claimed) -> Done:
    with suppress(psutil.NoSuchProcess):
        child.kill()
        child.wait(timeout=10)
    call.cut()
    return Done(time.monotonic(), claim)


def cut(_: Site, __: psutil.Process, call: Call, claim: Claimed) -> Done:
    call.cut()
    return Done(time.monotonic(), claim)


def freeze_in_copy(site: Site, random: Random) -> Done:
    """Freeze a child during COPY, while its backend holds locks."""
    struck: list[psutil.Process] = []

    def freeze(_: Site, child: psutil.Process, __: Call, claim: Claimed) -> Done:
        child.suspend()
        struck.append(child)
        return Done(time.monotonic(), claim)

    frozen = strike(Moment.IN_COPY, freeze)(site, random)
    assert frozen.claim
    return _frozen_until_lost(site, struck[0], frozen.claim)


def clock_ahead(site: Site, random: Random) -> Done:
    """Restart a worker with a clock that is hours ahead, until this worker is replaced, whatever else happens to it."""
    site.await_workers()
    name = random.choice(WORKERS)
    said = site.end_worker(name)
    environment = {
        "LD_PRELOAD": glob(FAKETIME)[0],
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "FAKETIME": f"+{random.randint(2, 48)}h",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(_AHEAD), os.environ.get("PYTHONPATH")))),
    }
    site.start_worker(name, **environment)
    worker = eventually(partial(site.worker_id, name), "the id of the worker whose clock is ahead", START_SECONDS)
    query = "select exists (select from vectormill.chunks where state = 'done' and worker_id = :worker)"
    seen = partial(site.scalar, query, worker=worker)
    eventually(seen, "a chunk done by the worker whose clock is ahead", START_SECONDS)
    return Done(time.monotonic(), said=said)
