"""Canary check: a text goes the whole way through a worker, and its vector is compared with the catalogue's."""

import io
import json
import time
from collections.abc import Callable, Iterator
from uuid import UUID

from sqlalchemy import RowMapping

from pipeline.catalog.models import as_model, find_row, workspace_id
from pipeline.core.canary import CANARY, is_canary
from pipeline.core.errors import IllegalTransition
from pipeline.core.jobs import JobState
from pipeline.core.options import Columns, JobOptions
from pipeline.db import embeddings, health, models, workers
from pipeline.doctor.context import Context
from pipeline.doctor.report import Finding, fail, ok, skipped
from pipeline.ingest.submission import Submission, planning
from pipeline.ingest.submit import submit
from pipeline.jobs import control, status
from pipeline.jobs.purge import purge_job
from pipeline.sources import Corpus

_POLL_SECONDS = 0.1
_CANCEL_SECONDS = 10.0
#: Above waiting jobs, so that a busy fleet takes the canary with its next chunk.
_PRIORITY = 100


def canary(context: Context) -> Iterator[Finding]:
    """Check that each model still gives the canary text the vector that it gave when it was added."""
    if context.ask(health.missing_rights):
        yield skipped("only the schema's owner may send a canary, and purge its job")
        return
    chosen = _chosen(context)
    for model in chosen:
        yield _send(context, model)
    if not chosen:
        yield skipped("no local model of the default workspace is served")


def _chosen(context: Context) -> list[RowMapping]:
    """Return the models asked for; else the local ones that a worker serves, since others may cost money."""
    workspace = context.ask(workspace_id)
    if context.canary_models:
        return [context.ask(find_row, workspace, name) for name in context.canary_models]
    live = context.ask(workers.live)
    served = {name for worker in live for name in worker["models"]}
    rows = context.ask(models.of_workspace, workspace)
    return [row for row in rows if row["kind"] == "local" and row["name"] in served]


def _send(context: Context, row: RowMapping) -> Finding:
    began = time.monotonic()
    job_id = _submit(context, row)
    try:
        ended = _await(lambda: _state(context, job_id).ended, context.canary_seconds)
        if not ended:
            return fail(
                f"{row['name']} didn't embed it within {context.canary_seconds:g} s",
                "the workers may be busy: see vectormill jobs, and give it longer with --timeout.",
            )
        return _judge(context, row, job_id, time.monotonic() - began)
    finally:
        _forget(context, job_id)


def _submit(context: Context, row: RowMapping) -> UUID:
    settings = context.settings
    line = json.dumps({"id": "canary", "text": CANARY}).encode()
    corpus = Corpus(["-"], Columns(), settings.item_bytes, stdin=io.BytesIO(line))
    return submit(
        context.engine,
        Submission(
            workspace_id=context.ask(workspace_id),
            model=as_model(row),
            corpus=corpus,
            planning=planning(settings),
            name="doctor",
            # The workers are to embed it.
            options=JobOptions(reuse=False),
            priority=_PRIORITY,
            labels={"doctor": "canary"},
            submitted_by="vectormill doctor",
        ),
    ).job_id


def _judge(context: Context, row: RowMapping, job_id: UUID, seconds: float) -> Finding:
    job = context.ask(status.job_status, job_id)
    if job.state is not JobState.COMPLETED:
        return fail(
            f"{row['name']}: its job {job.state}, {job.reason}: {job.message}",
            "fix that, then start the worker again.",
        )
    with context.engine.begin() as connection:
        rows = [row for block in embeddings.stream(connection, job_id) for row in block]
    if not rows or not is_canary(rows[0][2], row["canary"]):
        return fail(f"{row['name']} gives another vector than when it was added", "its weights or a device are wrong.")
    return ok(f"{row['name']} embedded it in {seconds:.1f} s, as when it was added")


def _state(context: Context, job_id: UUID) -> JobState:
    return context.ask(status.known_job, job_id).state


def _forget(context: Context, job_id: UUID) -> None:
    """Purge the job. If it hasn't ended, cancel it first; if it still hasn't 10 s later, leave it."""
    try:
        if not _state(context, job_id).ended:
            context.ask(control.cancel, job_id)
            _await(lambda: _state(context, job_id).ended, _CANCEL_SECONDS)
        purge_job(context.engine, job_id)
    except IllegalTransition:
        return


def _await(happened: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not (seen := happened()) and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
    return seen
