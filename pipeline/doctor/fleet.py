"""Checks of the processes, by the rows they write and the replies they give."""

from collections.abc import Iterator
from http import HTTPStatus

from pipeline.db import engines, health, workers
from pipeline.dispatch.leader import ROLE
from pipeline.doctor.context import Context, answer
from pipeline.doctor.report import Finding, fail, ok, skipped, warn

#: An engine without a heartbeat for so long gets no requests.
_ENGINE_SEEN_SECONDS = 10.0
#: The dispatcher sweeps every second; a lease overdue for so long shows that something blocks it.
_SWEEP_SECONDS = 15.0


def dispatcher(context: Context) -> Iterator[Finding]:
    """Check that a dispatcher is the leader."""
    left = context.ask(health.lease_seconds_left, ROLE)
    if left is None:
        yield fail(
            "no leader: no chunk is queued, no lease swept, no job finished",
            "start one, better two: vectormill dispatcher",
        )
    elif left < 0:
        yield fail(f"no leader since {-left:.0f} s", "see its log, and start one: vectormill dispatcher")
    else:
        yield ok("one leads")


def some_workers(context: Context) -> Iterator[Finding]:
    """Check that workers are alive, and serve each model that a workspace may use."""
    live = context.ask(workers.live)
    if not live:
        yield fail("none is alive", "start one on each machine: vectormill worker")
        return
    for worker in live:
        if worker["resting"]:
            yield warn(f"the one at {worker['host']} rests: it {worker['resting']}", "see its log; start it again.")
    # Models that a worker dropped are left to the next check.
    known = {name for worker in live for name in (*worker["models"], *worker["dropped"])}
    alone = [row["name"] for row in context.ask(health.enabled_models) if row["name"] not in known]
    for name in alone:
        yield fail(f"none serves {name}", f"start one that does: vectormill worker --model {name}")
    if not alone:
        slots = sum(worker["slots"] for worker in live)
        yield ok(f"{len(live)} alive with {slots} slots; every model is served")


def dropped_models(context: Context) -> Iterator[Finding]:
    """Check that no worker has dropped a model."""
    live = context.ask(workers.live)
    served = {name for worker in live for name in worker["models"]}
    dropped = [(worker["host"], *each) for worker in live for each in worker["dropped"].items()]
    for host, name, reason in dropped:
        found = f"{name} was dropped at {host}: {reason}"
        mend = f"fix that, then start the worker at {host} again."
        yield warn(found, mend) if name in served else fail(found, mend)
    if not dropped:
        yield ok("none was dropped")


def overdue(context: Context) -> Iterator[Finding]:
    """Check that expired leases are swept."""
    found = context.ask(health.overdue_chunks, _SWEEP_SECONDS)
    if found["chunks"]:
        yield fail(
            f"{found['chunks']:,} whose lease ran out, the oldest's {found['oldest_seconds']:,.0f} s ago, aren't swept",
            "a backend locks them: find it in pg_stat_activity by its xact_start, and pg_terminate_backend it.",
        )
    else:
        yield ok("no lease is overdue")


def api(context: Context) -> Iterator[Finding]:
    """Check that the api answers, and reaches its database."""
    url = context.api_url
    if url is None:
        yield skipped("its address isn't known; set VECTORMILL_API_URL")
        return
    status = answer(url, "/readyz")
    if status is None:
        yield fail(f"no answer from {url}", "start it: vectormill api")
    elif status != HTTPStatus.OK:
        yield fail(f"{url} isn't ready (/readyz answers {status})", "see its log: it can't reach its database.")
    else:
        yield ok(f"ready at {url}")


def some_engines(context: Context) -> Iterator[Finding]:
    """Check that engines answer, and serve each local model that the api may be asked for."""
    live = context.ask(engines.live, _ENGINE_SEEN_SECONDS)
    local = [row["name"] for row in context.ask(health.enabled_models) if row["kind"] == "local"]
    if not live:
        if local:
            yield warn("none is alive: the api serves no local model", "start one for each device: vectormill engine")
        else:
            yield ok("none is alive, and none is needed")
        return
    silent = [row["url"] for row in live if answer(row["url"], "/healthz") != HTTPStatus.OK]
    for url in silent:
        yield fail(f"no answer from {url}", "the api must reach it there: see its log, its VECTORMILL_ENGINE_HOST.")
    alone = set(local) - {name for row in live for name in row["models"]}
    for name in sorted(alone):
        yield warn(f"none serves {name}", f"start one that does: vectormill engine --model {name}")
    if not silent and not alone:
        yield ok(f"{len(live)} alive; every local model is served")


def flower(context: Context) -> Iterator[Finding]:
    """Check that Flower answers, and refuses requests without its password."""
    url = context.flower_url
    if url is None:
        yield skipped("its address isn't known; set VECTORMILL_FLOWER_URL")
        return
    status = answer(url, "/api/workers")
    if status is None:
        yield fail(f"no answer from {url}", "start it: vectormill flower")
    elif status != HTTPStatus.UNAUTHORIZED:
        yield fail(
            f"{url} answers {status} without a password", "start it with vectormill flower, which sets a password."
        )
    else:
        yield ok(f"at {url}, behind its password")
