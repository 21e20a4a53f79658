"""Each kind of fault: how it is done and mended, and whose return is waited for."""

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from glob import glob
from random import Random
from typing import Any

import psutil
import redis

from tests.acceptance.faults.site import DISPATCHERS, WORKERS, Site
from tests.acceptance.faults.wire import Call, Moment
from tests.acceptance.fleet import eventually
from tests.scripted_gateway import Answering, error, good

_STRIKE_SECONDS = 60.0
_FAKETIME = "/usr/lib/*/faketime/libfaketime.so.1"
#: The dispatcher's role passes on after ten seconds.
_ROLE_SECONDS = 12.0


@dataclass(frozen=True)
class Claimed:
    """A chunk under a claim."""

    chunk: int
    fence: int


@dataclass(frozen=True)
class Done:
    """What a fault has done."""

    #: From when on recovery is counted, by the monotonic clock.
    since: float
    #: The claim that was struck; `None`: the whole installation was.
    claim: Claimed | None = None
    #: What is wrong already.
    said: tuple[str, ...] = ()


Do = Callable[[Site, Random], Done]


@dataclass(frozen=True)
class Kind:
    """A kind of fault."""

    name: str
    do: Do
    #: How often it comes, beside others.
    weight: int = 1
    #: Reasons for which jobs may pause by it.
    pauses: tuple[str, ...] = ()
    possible: Callable[[Site], bool] = lambda _: True
    #: Whether all is as before, given the database's time when the fault was over. Default: `recovered`.
    back: "Callable[[Site, Done, Any], bool] | None" = None
    #: Within which it must be.
    most_seconds: float = 120.0


# ------------------------------------------------------------------------------------------------ workers


def _at_work(site: Site, random: Random) -> tuple[psutil.Process, Claimed]:
    """A child that runs a chunk right now, and the claim."""
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

    return eventually(look, "a child at work")


def kill_child(site: Site, random: Random) -> Done:
    """A child dies in the middle of its chunk."""
    child, claim = _at_work(site, random)
    time.sleep(random.uniform(0, 0.3))
    with suppress(psutil.NoSuchProcess):
        child.kill()
    return Done(time.monotonic(), claim)


def _worker_of(site: Site, child: psutil.Process) -> str:
    return next(n for n in WORKERS if child in psutil.Process(site.fleet.processes[n].pid).children(recursive=True))


def kill_worker(site: Site, random: Random) -> Done:
    """A worker's parent dies, and is started again."""
    child, claim = _at_work(site, random)
    name = _worker_of(site, child)
    site.fleet.kill(name)
    site.killed += 1
    since = time.monotonic()
    site.start(name)
    return Done(since, claim)


def kill_machine(site: Site, random: Random) -> Done:
    """A worker dies with all its children at once: nobody is left to tell. Another one takes its place."""
    child, claim = _at_work(site, random)
    name = _worker_of(site, child)
    site.fleet.kill_tree(name)
    site.killed += 1
    since = time.monotonic()
    site.start(name)
    return Done(since, claim)


def freeze_child(site: Site, random: Random) -> Done:
    """A child stands still for longer than its lease, and then goes on as if nothing had been."""
    child, claim = _at_work(site, random)
    return _freeze_until_lost(site, child, claim)


def _freeze_until_lost(site: Site, child: psutil.Process, claim: Claimed) -> Done:
    child.suspend()
    since = time.monotonic()
    try:
        eventually(lambda: _is_back(site, claim), "another claim on a frozen child's chunk", 10 * site.lease_seconds)
    finally:
        child.resume()
    return Done(since, claim)


def freeze_shortly(site: Site, random: Random) -> Done:
    """A child stands still for less than its lease less the renewal interval: its claim holds."""
    child, claim = _at_work(site, random)
    child.suspend()
    # A margin for all that isn't the freeze.
    time.sleep(random.uniform(0.2, 0.9) * (site.lease_seconds * 2 / 3))
    child.resume()
    query = "select count(*) from vectormill.claim_losses where chunk_id = :chunk and fence = :fence"
    lost = site.scalar(query, chunk=claim.chunk, fence=claim.fence)
    return Done(time.monotonic(), said=("a claim is lost by a short freeze",) if lost else ())


def rolling_restart(site: Site, random: Random) -> Done:
    """A worker is asked to end, does what it has at hand, and another one takes its place."""
    name = random.choice(WORKERS)
    process = site.fleet.processes[name]
    process.terminate()
    code = process.wait(timeout=120)
    site.start(name)
    return Done(time.monotonic(), said=(f"a worker ended with {code}",) if code else ())


def _strike(moment: Moment, act: Callable[[Site, psutil.Process, Call, Claimed], Done]) -> Do:
    """Strike a write-back at a moment of it."""

    def do(site: Site, _: Random) -> Done:
        done: list[Done] = []

        def strike(call: Call) -> None:
            query = """
                select c.id, c.fence from vectormill.chunks c join pg_stat_activity a on a.pid = c.backend_pid
                where a.client_port = :port and c.state in ('running', 'done')
                order by c.finished_at desc nulls first limit 1
            """
            rows = site.rows(query, port=call.server_port)
            child = site.fleet.child_on_port(call.port)
            if rows and child:
                done.append(act(site, child, call, Claimed(rows[0]["id"], rows[0]["fence"])))

        # One that a reader's connection springs, or whose claim is lost already, is no strike.
        while site.wire.strike(moment, strike, _STRIKE_SECONDS):
            if done:
                return done[0]
        raise AssertionError(f"no write-back came to {moment}")

    return do


def _kill(_: Site, child: psutil.Process, call: Call, claim: Claimed) -> Done:
    with suppress(psutil.NoSuchProcess):
        child.kill()
        child.wait(timeout=10)
    call.cut()
    return Done(time.monotonic(), claim)


def _cut(_: Site, __: psutil.Process, call: Call, claim: Claimed) -> Done:
    call.cut()
    return Done(time.monotonic(), claim)


def freeze_in_copy(site: Site, random: Random) -> Done:
    """A child stands still while it writes, its backend holding locks."""
    struck: list[tuple[psutil.Process, Claimed]] = []

    def freeze(_: Site, child: psutil.Process, __: Call, claim: Claimed) -> Done:
        child.suspend()
        struck.append((child, claim))
        return Done(time.monotonic(), claim)

    done = _strike(Moment.IN_COPY, freeze)(site, random)
    child, claim = struck[0]
    try:
        eventually(
            lambda: _is_back(site, claim), "another claim on a chunk frozen inside COPY", 10 * site.lease_seconds
        )
    finally:
        child.resume()
    return done


def clock_ahead(site: Site, random: Random) -> Done:
    """A worker whose clock is hours ahead takes part, and leaves."""
    known = [row["id"] for row in site.rows("select id from vectormill.workers")]
    environment = {"LD_PRELOAD": glob(_FAKETIME)[0], "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
    process = site.start_worker("worker-ahead", **environment, FAKETIME=f"+{random.randint(2, 48)}h")
    query = """
        select exists (select from vectormill.chunks c join vectormill.workers w on w.id = c.worker_id
                       where c.state = 'done' and w.id <> all(:known) and w.id not in
                         (select worker_id from vectormill.chunks where state = 'running' and lease_until < now()))
    """
    eventually(lambda: site.scalar(query, known=known), "a chunk done by the worker whose clock is ahead")
    process.terminate()
    code = process.wait(timeout=120)
    del site.fleet.processes["worker-ahead"]
    return Done(time.monotonic(), said=(f"the worker whose clock is ahead ended with {code}",) if code else ())


# ------------------------------------------------------------------------------------------------ dispatcher


def kill_dispatcher(site: Site, random: Random) -> Done:
    """A dispatcher dies, and is started again."""
    name = random.choice(DISPATCHERS)
    site.fleet.kill(name)
    since = time.monotonic()
    site.start(name)
    return Done(since)


def freeze_dispatcher(site: Site, random: Random) -> Done:
    """A dispatcher stands still until the other has its role, and goes on: two at once."""
    process = psutil.Process(site.fleet.processes[random.choice(DISPATCHERS)].pid)
    process.suspend()
    time.sleep(_ROLE_SECONDS)
    process.resume()
    return Done(time.monotonic())


# ------------------------------------------------------------------------------------------------ Redis


def kill_redis(site: Site, _: Random) -> Done:
    """Redis dies with all it holds, and is started again."""
    site.server("valkey").kill()
    return _since_redis_answers(site)


def freeze_redis(site: Site, random: Random) -> Done:
    """Redis stands still."""
    process = site.server("valkey")
    process.suspend()
    time.sleep(random.uniform(1, 8))
    process.resume()
    return _since_redis_answers(site)


def flush_redis(site: Site, _: Random) -> Done:
    """Redis forgets all."""
    with redis.Redis.from_url(site.redis_url) as client:
        client.flushall()
    return Done(time.monotonic())


def cut_redis(site: Site, random: Random) -> Done:
    """Workers' connections to Redis end, and for a while there are no new ones."""
    site.redis_line.cut()
    time.sleep(random.uniform(0.1, 4))
    site.redis_line.mend()
    return Done(time.monotonic())


def _since_redis_answers(site: Site) -> Done:
    def answers() -> bool:
        with suppress(redis.RedisError), redis.Redis.from_url(site.redis_url, socket_timeout=1) as client:
            return bool(client.ping())
        return False

    eventually(answers, "a Redis that answers")
    return Done(time.monotonic())


# ------------------------------------------------------------------------------------------------ Postgres


def restart_postgres(site: Site, _: Random) -> Done:
    """Postgres stops at once, without a checkpoint, and recovers from its log."""
    process = site.server("postgres")
    process.send_signal(signal.SIGQUIT)
    process.wait(timeout=60)
    site.scalar("select 1")
    return Done(time.monotonic())


def terminate_backends(site: Site, random: Random) -> Done:
    """An administrator ends sessions of workers and dispatchers."""
    query = """
        select pg_terminate_backend(pid) from pg_stat_activity
        where application_name ~ '^vectormill-(worker|presence|dispatcher|errands)$' and random() < :share
    """
    site.rows(query, share=random.uniform(0.2, 1))
    return Done(time.monotonic())


def half_open(site: Site, random: Random) -> Done:
    """The network swallows all between workers and Postgres, longer than a lease; then the connections are gone."""
    site.wire.freeze()
    time.sleep(random.uniform(1.1, 1.6) * site.lease_seconds)
    site.wire.thaw(cut=True)
    return Done(time.monotonic())


def full_tables(site: Site, random: Random) -> Done:
    """The disk of Postgres' tables is full for a while."""
    assert site.tables
    site.tables.fill()
    try:
        query = "select exists (select from vectormill.chunks where state = 'pending' and last_error ~* 'DiskFull')"
        with suppress(AssertionError):
            eventually(lambda: site.scalar(query), "a write-back that finds no room", 10)
        time.sleep(random.uniform(0, 2))
    finally:
        site.tables.clear()
    return Done(time.monotonic())


# ------------------------------------------------------------------------------------------------ outputs


def full_output(site: Site, random: Random) -> Done:
    """The disk that Parquet goes to is full for a while."""
    assert site.parquet
    site.parquet.fill()
    try:
        query = "select exists (select from vectormill.jobs where state = 'paused' and reason = 'storage_refused')"
        with suppress(AssertionError):
            eventually(lambda: site.scalar(query), "a job that pauses", 10)
        time.sleep(random.uniform(0, 2))
    finally:
        site.parquet.clear()
    return Done(time.monotonic())


def cut_store(site: Site, random: Random) -> Done:
    """The object store's connections end, and for a while there are no new ones."""
    site.store_line.cut()
    time.sleep(random.uniform(0.5, 5))
    site.store_line.mend()
    return Done(time.monotonic())


def freeze_store(site: Site, random: Random) -> Done:
    """The object store stands still."""
    site.store_line.freeze()
    time.sleep(random.uniform(0.5, 5))
    site.store_line.mend()
    return Done(time.monotonic())


# ------------------------------------------------------------------------------------------------ gateway


def _answering(answer: Answering, *, share: float = 1.0) -> Do:
    """The gateway answers so for a while, or some of its requests."""

    def do(site: Site, random: Random) -> Done:
        dice = Random(random.random())
        site.gateway.answer = lambda asked: answer(asked) if dice.random() < share else good(asked)
        time.sleep(random.uniform(2, 6))
        site.gateway.answer = good
        return Done(time.monotonic())

    return do


def _broken_json(asked: dict[str, Any]) -> Any:
    return 200, {}, b'{"object": "list", "data": [{"embedding": [0.1, '


def _too_few(asked: dict[str, Any]) -> Any:
    status, headers, body = good(asked)
    return status, headers, {**body, "data": body["data"][:-1]}


def _not_finite(asked: dict[str, Any]) -> Any:
    status, headers, body = good({**asked, "encoding_format": "float"})
    data = [{**row, "embedding": [math.nan] * len(row["embedding"])} for row in body["data"]]
    return status, headers, {**body, "data": data}


def _slowly(asked: dict[str, Any]) -> Iterator[bytes]:
    yield b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n\r\n"
    for _ in range(50):
        time.sleep(0.1)
        yield b" "


def _no_answer(_: dict[str, Any]) -> None:
    return None


# ------------------------------------------------------------------------------------------------ all


def _is_back(site: Site, claim: Claimed) -> bool:
    """Whether a chunk has been claimed again, or has ended; a job that is purged has."""
    query = "select fence > :fence or state in ('done', 'cancelled') from vectormill.chunks where id = :chunk"
    return site.scalar(query, chunk=claim.chunk, fence=claim.fence) is not False


def recovered(site: Site, done: Done, moment: Any) -> bool:
    """Whether the struck claim's chunk runs again; or, after a fault to all, a chunk was claimed since `moment` of the
    database's clock, and has ended."""
    if done.claim:
        return _is_back(site, done.claim)
    query = "select exists (select from vectormill.chunks where started_at > :moment and state = 'done')"
    return bool(site.scalar(query, moment=moment))


_WITH_DISKS = lambda site: site.tables is not None  # noqa: E731
_REFUSED = ("gateway_refused",)

KINDS = (
    Kind("worker child killed while it embeds", kill_child, 3),
    Kind("worker child killed inside COPY", _strike(Moment.IN_COPY, _kill), 2),
    Kind("worker child killed before COMMIT arrives", _strike(Moment.BEFORE_COMMIT, _kill), 2),
    Kind("worker child killed before COMMIT's answer", _strike(Moment.AFTER_COMMIT, _kill), 2),
    Kind("connection cut inside COPY", _strike(Moment.IN_COPY, _cut)),
    Kind("connection cut before COMMIT arrives", _strike(Moment.BEFORE_COMMIT, _cut)),
    Kind("connection cut before COMMIT's answer", _strike(Moment.AFTER_COMMIT, _cut), 2),
    Kind("worker killed", kill_worker),
    Kind("worker child frozen past its lease", freeze_child),
    Kind("worker child frozen inside COPY", freeze_in_copy),
    Kind("worker child frozen shortly", freeze_shortly, 2),
    Kind("rolling restart of a worker", rolling_restart),
    Kind("worker's clock hours ahead", clock_ahead, possible=lambda _: bool(glob(_FAKETIME))),
    Kind("dispatcher killed", kill_dispatcher, 2),
    Kind("dispatcher frozen, two at once", freeze_dispatcher),
    Kind("Redis killed", kill_redis),
    Kind("Redis frozen", freeze_redis),
    Kind("Redis flushed", flush_redis, 2),
    Kind("Redis cut off", cut_redis),
    Kind("Postgres restarted at once", restart_postgres),
    Kind("backends terminated", terminate_backends, 2),
    Kind("half-open connections to Postgres", half_open),
    Kind("disk full under the tables", full_tables, possible=_WITH_DISKS),
    Kind("disk full under Parquet", full_output, pauses=("storage_refused",), possible=_WITH_DISKS),
    Kind("object store cut off", cut_store),
    Kind("object store frozen", freeze_store),
    Kind("gateway: 429 storm", _answering(lambda _: error(429, retry_after="1"))),
    Kind("gateway: 503", _answering(lambda _: error(503))),
    Kind("gateway: slow bodies", _answering(_slowly, share=0.2)),
    Kind("gateway: broken JSON", _answering(_broken_json, share=0.5), pauses=_REFUSED),
    Kind("gateway: too few vectors", _answering(_too_few, share=0.5), pauses=_REFUSED),
    Kind("gateway: not a number", _answering(_not_finite, share=0.5), pauses=_REFUSED),
    Kind("gateway: no answer", _answering(_no_answer, share=0.7)),
)


class FullSpeed:
    """Every slot is at work, and has been for a while."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._since: float | None = None

    def __call__(self, site: Site, _: Done, __: Any) -> bool:
        """Ask again and again; once it is true, the next fault may come."""
        busy = site.scalar("select count(*) from vectormill.chunks where state = 'running'") == site.slots
        self._since = (self._since or time.monotonic()) if busy else None
        back = self._since is not None and time.monotonic() - self._since >= self._seconds
        if back:
            self._since = None
        return back


_STEADY_SECONDS = 3.0

#: At default settings, with what is promised there. Full speed includes three seconds of it.
AT_DEFAULTS = (
    Kind("machine of a worker dead", kill_machine, 2, most_seconds=45),
    Kind("worker child killed while it embeds", kill_child, 2, most_seconds=45),
    Kind("worker child frozen shortly", freeze_shortly),
    Kind("Redis flushed", flush_redis, back=FullSpeed(_STEADY_SECONDS), most_seconds=15),
    Kind("Redis killed", kill_redis, back=FullSpeed(_STEADY_SECONDS), most_seconds=30),
)
