"""Faults of the services that workers depend on: dispatchers, Redis, Postgres, disks, the object store, upstreams."""

import base64
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from random import Random
from typing import Any

import numpy as np
import psutil
import redis

from tests.acceptance.fleet import eventually
from tests.chaos.disk import Disk
from tests.chaos.faults import Do, Done
from tests.chaos.site import DISPATCHERS, START_SECONDS, Site
from tests.chaos.store_line import StoreLine
from tests.support.lines import Line
from tests.support.scripted_gateway import DIMENSIONS, Answering, good

#: Limit for a change of leader: the lease of a lost one runs out after ten seconds.
ROLE_SECONDS = 15.0


def kill_dispatcher(site: Site, random: Random) -> Done:
    """Kill a dispatcher, and start it again."""
    name = random.choice(DISPATCHERS)
    site.fleet.kill(name)
    since = time.monotonic()
    site.start(name)
    return Done(since)


def freeze_dispatcher(site: Site, random: Random) -> Done:
    """Freeze the leading dispatcher until the other one leads, then let it go on: two leaders at once."""
    site.await_dispatchers()
    query = "select holder from vectormill.leases where name = 'dispatcher' and lease_until > now()"
    leads = eventually(lambda: site.scalar(query), "a dispatcher that leads")
    for name in random.sample(DISPATCHERS, len(DISPATCHERS)):
        process = psutil.Process(site.fleet.processes[name].pid)
        process.suspend()
        try:
            eventually(lambda: site.scalar(query) not in (None, leads), "another dispatcher that leads", ROLE_SECONDS)
        except AssertionError:  # this one was the standby
            continue
        finally:
            process.resume()
        return Done(time.monotonic())
    raise AssertionError("no dispatcher took over")


def kill_redis(site: Site, _: Random) -> Done:
    """Kill Redis with all it holds; its supervisor starts it again."""
    process = site.server("valkey")
    process.kill()
    since = time.monotonic()
    process.wait(timeout=60)
    _await_redis(site)
    return Done(since)


def freeze_redis(site: Site, random: Random) -> Done:
    """Freeze Redis for one to eight seconds."""
    process = site.server("valkey")
    process.suspend()
    time.sleep(random.uniform(1, 8))
    process.resume()
    since = time.monotonic()
    _await_redis(site)
    return Done(since)


def flush_redis(site: Site, _: Random) -> Done:
    """Delete everything in Redis."""
    with redis.Redis.from_url(site.redis_url) as client:
        client.flushall()
    return Done(time.monotonic())


def _await_redis(site: Site) -> None:
    def answers() -> bool:
        with suppress(redis.RedisError), redis.Redis.from_url(site.redis_url, socket_timeout=1) as client:
            return bool(client.ping())
        return False

    eventually(answers, "a Redis that answers")


def at_full_speed(do: Do) -> Do:
    """Delay a fault until all workers have started and every slot is at work."""
    query = "select count(*) from vectormill.chunks where state = 'running'"

    def begin(site: Site, random: Random) -> Done:
        site.await_workers()
        eventually(lambda: site.scalar(query) >= site.slots, "all slots at work", START_SECONDS)
        return do(site, random)

    return begin


def restart_postgres(site: Site, _: Random) -> Done:
    """Stop Postgres at once, without a checkpoint, so that it recovers from its log."""
    process = site.server("postgres")
    process.send_signal(signal.SIGQUIT)
    process.wait(timeout=60)
    site.scalar("select 1")
    return Done(time.monotonic())


def terminate_backends(site: Site, random: Random) -> Done:
    """Terminate sessions of workers and dispatchers, as an administrator would."""
    query = """
        select pg_terminate_backend(pid) from pg_stat_activity
        where application_name ~ '^vectormill-(worker|heartbeat|dispatcher|background)( |$)' and random() < :share
    """
    site.rows(query, share=random.uniform(0.2, 1))
    return Done(time.monotonic())


def half_open(site: Site, random: Random) -> Done:
    """Let nothing through between workers and Postgres for longer than a lease, then close the connections."""
    site.wire.freeze()
    time.sleep(random.uniform(1.1, 1.6) * site.lease_seconds)
    site.wire.cut()
    site.wire.mend()
    return Done(time.monotonic())


def cut_off(line: Callable[[Site], Line]) -> Do:
    """Close a line's connections, and for a while new ones too."""
    return _for_a_while(lambda site: line(site).cut(), lambda site: line(site).mend())


def frozen(line: Callable[[Site], Line]) -> Do:
    """Let nothing through a line for a while."""
    return _for_a_while(lambda site: line(site).freeze(), lambda site: line(site).mend())


def refused(line: Callable[[Site], StoreLine]) -> Do:
    """Answer each request with 503 for a while."""
    return _for_a_while(lambda site: line(site).refuse(), lambda site: line(site).mend())


def _for_a_while(begin: Callable[[Site], None], end: Callable[[Site], None]) -> Do:
    def do(site: Site, random: Random) -> Done:
        begin(site)
        time.sleep(random.uniform(0.5, 5))
        end(site)
        return Done(time.monotonic())

    return do


def full(disk: Callable[[Site], Disk | None], felt: str) -> Do:
    """Fill a disk until that is noticed, shown by the query `felt` turning true, and a little longer."""

    def do(site: Site, random: Random) -> Done:
        filled = disk(site)
        assert filled

        def is_felt() -> bool:
            filled.fill()  # again and again, since others delete
            return bool(site.scalar(felt))

        eventually(lambda: not site.scalar(felt), "the end of what an earlier fault did", START_SECONDS)
        try:
            eventually(is_felt, "somebody who finds no room")
            time.sleep(random.uniform(0, 2))
        finally:
            filled.clear()
        return Done(time.monotonic())

    return do


def answering(answer: Answering, *, share: float = 1.0) -> Do:
    """Let the upstream give this answer for a while, to all requests or to a share of them."""

    def do(site: Site, random: Random) -> Done:
        dice = Random(random.random())
        site.gateway.answer = lambda asked: answer(asked) if dice.random() < share else good(asked)
        time.sleep(random.uniform(2, 6))
        site.gateway.answer = good
        return Done(time.monotonic())

    return do


def broken_json(asked: dict[str, Any]) -> Any:
    """Break off in the middle of the JSON."""
    return 200, {}, b'{"object": "list", "data": [{"embedding": [0.1, '


def too_few(asked: dict[str, Any]) -> Any:
    """Leave out a vector."""
    status, headers, body = good(asked)
    return status, headers, {**body, "data": body["data"][:-1]}


def not_finite(asked: dict[str, Any]) -> Any:
    """Answer with vectors of NaNs, in base64, since JSON has none."""
    status, headers, body = good(asked)
    assert asked["encoding_format"] == "base64"
    nans = base64.b64encode(np.full(DIMENSIONS, np.nan, "<f4").tobytes()).decode()
    return status, headers, {**body, "data": [{**row, "embedding": nans} for row in body["data"]]}


def slowly(asked: dict[str, Any]) -> Iterator[bytes]:
    """Send a byte every 0.1 seconds, for five seconds, and then nothing."""
    yield b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n\r\n"
    for _ in range(50):
        time.sleep(0.1)
        yield b" "


def no_answer(_: dict[str, Any]) -> None:
    """Close the connection without an answer."""
    return
