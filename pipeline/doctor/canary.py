"""A text through a worker: the whole way, and its vector compared with the one in the catalogue."""

import io
import json
import time
from collections.abc import Callable, Iterator
from uuid import UUID

from sqlalchemy import RowMapping

from pipeline import control, status
from pipeline.canary import CANARY, is_canary
from pipeline.catalog import as_model, find_row, workspace_id
from pipeline.doctor.findings import Finding, fail, ok, skipped
from pipeline.doctor.patient import Patient
from pipeline.errors import IllegalTransition
from pipeline.jobs import JobState
from pipeline.options import Columns
from pipeline.purge import purge_job
from pipeline.sources import Corpus
from pipeline.store import embeddings, health, models, workers
from pipeline.submission import Submission, planning
from pipeline.submit import submit

_POLL_SECONDS = 0.1
_CANCEL_SECONDS = 10.0
#: Before what waits; a fleet at work takes it with its next chunk.
_PRIORITY = 100


def canary(patient: Patient) -> Iterator[Finding]:
    """The canary text comes out of each model as it did when the model was added."""
    if patient.ask(health.missing_rights):
        yield skipped("only the schema's owner may send one, and purge it after")
        return
    chosen = _chosen(patient)
    for model in chosen:
        yield _send(patient, model)
    if not chosen:
        yield skipped("no local model of the default workspace is served")


def _chosen(patient: Patient) -> list[RowMapping]:
    """Models asked for; else the local ones that a worker serves, since others may cost."""
    workspace = patient.ask(workspace_id)
    if patient.canary_models:
        return [patient.ask(find_row, workspace, name) for name in patient.canary_models]
    live = patient.ask(workers.live)
    served = {name for worker in live for name in worker["models"]}
    rows = patient.ask(models.of_workspace, workspace)
    return [row for row in rows if row["kind"] == "local" and row["name"] in served]


def _send(patient: Patient, row: RowMapping) -> Finding:
    began = time.monotonic()
    job_id = _submit(patient, row)
    try:
        ended = _await(lambda: _state(patient, job_id).ended, patient.canary_seconds)
        if not ended:
            return fail(
                f"{row['name']} didn't embed it within {patient.canary_seconds:g} s",
                "the workers may be busy: see vectormill jobs, and give it longer with --timeout.",
            )
        return _judge(patient, row, job_id, time.monotonic() - began)
    finally:
        _forget(patient, job_id)


def _submit(patient: Patient, row: RowMapping) -> UUID:
    settings = patient.settings
    line = json.dumps({"id": "canary", "text": CANARY}).encode()
    corpus = Corpus(["-"], Columns(), settings.item_bytes, stdin=io.BytesIO(line))
    return submit(
        patient.engine,
        Submission(
            workspace_id=patient.ask(workspace_id),
            model=as_model(row),
            corpus=corpus,
            planning=planning(settings),
            name="doctor",
            priority=_PRIORITY,
            labels={"doctor": "canary"},
        ),
    ).job_id


def _judge(patient: Patient, row: RowMapping, job_id: UUID, seconds: float) -> Finding:
    job = patient.ask(status.job_status, job_id)
    if job.state is not JobState.COMPLETED:
        return fail(
            f"{row['name']}: its job {job.state}, {job.reason}: {job.message}",
            "mend that, then start the worker again.",
        )
    with patient.engine.begin() as connection:
        rows = [row for block in embeddings.stream(connection, job_id) for row in block]
    if not rows or not is_canary(rows[0][2], row["canary"]):
        return fail(f"{row['name']} gives another vector than when it was added", "its weights or a device are wrong.")
    return ok(f"{row['name']} embedded it in {seconds:.1f} s, as when it was added")


def _state(patient: Patient, job_id: UUID) -> JobState:
    return patient.ask(status.known_job, job_id).state


def _forget(patient: Patient, job_id: UUID) -> None:
    """Purge the job; one that hasn't ended is cancelled first, and left so if nobody ends it."""
    try:
        if not _state(patient, job_id).ended:
            patient.ask(control.cancel, job_id)
            _await(lambda: _state(patient, job_id).ended, _CANCEL_SECONDS)
        purge_job(patient.engine, job_id)
    except IllegalTransition:
        return


def _await(happened: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not (seen := happened()) and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
    return seen
