"""Troubles that the overview tells: each with its reason, the remedy, and the page to go to."""

import shlex
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Literal
from urllib.parse import urlencode

from sqlalchemy import Connection, RowMapping

from pipeline.api.dashboard import words
from pipeline.api.dashboard.session import Viewer
from pipeline.core import humanize
from pipeline.db import forgets, health, overview, workers

#: Silence up to which a worker that has gone is told of, as on the page of workers.
_GONE_SECONDS = 900.0
#: Time without a commit after which a model's jobs count as stuck.
_STUCK_SECONDS = 900.0
#: The dispatcher sweeps every second; a lease overdue for so long shows that something blocks it.
_SWEEP_SECONDS = 15.0
_MOST_JOBS = 5
_MOST_FORGETS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Trouble:
    """Something that isn't well."""

    #: `failed`: something stands still or is lost; `warning`: the rest goes on.
    kind: Literal["failed", "warning"]
    said: str
    remedy: str
    #: Page to go to, and the words of its link.
    href: str
    link: str
    #: Command that mends it; empty: there is none.
    command: str = ""


def find(
    connection: Connection,
    viewer: Viewer,
    waiting: Sequence[overview.Waiting],
    failed: Sequence[RowMapping],
    collections: Sequence[overview.Freshness],
    visible: Collection[str],
) -> list[Trouble]:
    """Return the troubles that a viewer sees, failures first.

    Args:
        visible: the models that the viewer may use.
    """
    found = [
        *_dispatcher(connection, viewer),
        *_models(connection, waiting, visible),
        *_jobs(connection, viewer, failed),
        *_collections(collections),
        *_forgets(connection, viewer),
    ]
    return sorted(found, key=lambda trouble: trouble.kind)


def _dispatcher(connection: Connection, viewer: Viewer) -> Iterator[Trouble]:
    left = health.lease_seconds_left(connection, workers.DISPATCHER_ROLE)
    if left is None or left < 0:
        known = "has been at work for " + humanize.duration(-left) if left else "is at work"
        yield Trouble(
            kind="failed",
            said=f"No dispatcher {known}, so no chunk is queued and no job ends.",
            remedy="Look at its log, and start one:",
            href="/jobs?state=running",
            link="Running jobs",
            command="vectormill dispatcher",
        )
        return
    # They may be anybody's, and only an admin sees all.
    overdue = health.overdue_chunks(connection, _SWEEP_SECONDS) if viewer.scope is None else None
    if overdue and overdue["chunks"]:
        yield Trouble(
            kind="failed",
            said=f"{words.count(overdue['chunks'], 'chunk')} of workers that have gone can’t be given to others.",
            remedy="A connection to Postgres holds them. This tells which one it is:",
            href="/workers",
            link="Workers",
            command="vectormill doctor",
        )


def _models(connection: Connection, waiting: Sequence[overview.Waiting], visible: Collection[str]) -> Iterator[Trouble]:
    known = workers.live(connection, _GONE_SECONDS)
    silent_before = datetime.now(UTC) - timedelta(seconds=workers.SEEN_SECONDS)
    live = [worker for worker in known if worker["seen_at"] >= silent_before]
    served = {name for worker in live if not worker["resting"] for name in worker["models"]}
    for each in waiting:
        if each.model not in served:
            yield Trouble(
                kind="failed",
                said=f"No worker serves {each.model}, and {words.count(each.jobs, 'job waits', 'jobs wait')} for it.",
                remedy="Start one where the model’s files are:",
                href="/workers",
                link="Workers",
                command=f"vectormill worker --model {shlex.quote(each.model)}",
            )
    for worker in known:
        place = f"/workers#worker-{worker['id']}"
        if worker not in live:
            yield _of_worker(worker, place, f"is silent, last seen {words.age(worker['seen_at'])}", "Look if it runs.")
        elif worker["resting"]:
            yield _of_worker(worker, place, "takes no chunks", f"It says: {worker['resting']}.")
        for name, why in worker["dropped"].items() if worker in live else ():
            if name in visible:
                yield _of_worker(worker, place, f"gave up {name}", f"It says: {why}. Fix that, then start it again.")


def _of_worker(worker: RowMapping, href: str, said: str, remedy: str) -> Trouble:
    told = f"The worker at {worker['host']}, {worker['device']}, {said}."
    return Trouble(kind="warning", said=told, remedy=remedy, href=href, link="Its row")


def _jobs(connection: Connection, viewer: Viewer, failed: Sequence[RowMapping]) -> Iterator[Trouble]:
    paused = overview.paused_by_system(connection, viewer.scope, _MOST_JOBS)
    for job in paused:
        name, advice = words.reason(job["reason"])
        yield Trouble(
            kind="failed",
            said=f"{job['name']} is paused: {name}.",
            remedy=advice,
            href=f"/jobs/{job['id']}",
            link="The job",
        )
    if paused and (more := paused[0]["jobs"] - len(paused)):
        yield Trouble(
            kind="failed",
            said=f"{words.count(more, 'more job is', 'more jobs are')} paused.",
            remedy="Each says why.",
            href="/jobs?state=paused",
            link="Paused jobs",
        )
    for model in overview.stuck(connection, viewer.scope, _STUCK_SECONDS):
        still = humanize.duration((datetime.now(UTC) - model["moved_at"]).total_seconds())
        if model["running"]:
            said = f"Nothing of {words.count(model['jobs'], 'job')} of {model['model']} was written for {still}."
            remedy = "Look at the workers’ logs; an upstream may be away, or its limit reached."
        else:
            said = f"{words.count(model['jobs'], 'job')} of {model['model']} did not begin for {still}."
            remedy = "Look if its workers are busy with other models, and at the dispatcher’s log."
        yield Trouble(
            kind="failed",
            said=said,
            remedy=remedy,
            href=f"/jobs?{urlencode({'model': model['model']})}",
            link="These jobs",
        )
    for job in failed:
        if not job["mended"]:
            name, advice = words.reason(job["reason"])
            yield Trouble(
                kind="failed",
                said=f"{job['name']} failed {words.age(job['finished_at'])}{': ' + name if name else ''}.",
                remedy=advice,
                href=f"/jobs/{job['id']}",
                link="The job",
            )


def _collections(collections: Sequence[overview.Freshness]) -> Iterator[Trouble]:
    for each in collections:
        page = f"/collections/{each.id}"
        if each.stale_seconds and each.expect_every:
            since = f"was synced {words.age(each.synced_at)}" if each.synced_at else "was never synced"
            every = humanize.duration(each.expect_every.total_seconds())
            yield Trouble(
                kind="warning",
                said=f"{each.name} {since}, and a sync is expected every {every}.",
                remedy="Its sync is under way." if each.running else "Look at the schedule of its syncs.",
                href=page,
                link="The collection",
            )
        if each.output_problem:
            yield Trouble(
                kind="warning",
                said=f"The files of {each.name} can’t be written: {each.output_problem}",
                remedy="They are tried again by themselves.",
                href=page,
                link="The collection",
            )


def _forgets(connection: Connection, viewer: Viewer) -> Iterator[Trouble]:
    for forget in forgets.with_problems(connection, viewer.scope, _MOST_FORGETS):
        yield Trouble(
            kind="warning",
            said=f"{words.count(forget.keys, 'key')} can’t be forgotten everywhere: {forget.problem}",
            remedy="It is tried again by itself once that is fixed.",
            href=f"/collections/{forget.collection_id}" if forget.collection_id else "/collections",
            link="Collections",
        )
