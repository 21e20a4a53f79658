"""Pages of one job: its status, chunks and rejects."""

from collections import defaultdict
from datetime import UTC, datetime
from functools import partial
from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Query, Request, Response
from sqlalchemy import Connection, RowMapping

from pipeline.api.dashboard import drawing, history
from pipeline.api.dashboard.answer import PageRoute, show
from pipeline.api.dashboard.session import Viewer
from pipeline.api.dependencies import visible_job_id
from pipeline.core.chunks import RETRYABLE_REJECTS, RejectCode
from pipeline.core.errors import UnknownJob
from pipeline.core.jobs import Job, JobState
from pipeline.core.options import JobOptions, KeptOptions
from pipeline.db import dashboard, models, rejects, workers
from pipeline.jobs import status

router = APIRouter(route_class=PageRoute, include_in_schema=False)

_FIRST_REJECTS = 3
_FIRST_INPUTS = 5
_MOST_AT_WORK = 8
_PAGE = 50
_MOST_CHARACTERS = 4_000


def visible_job(connection: Connection, viewer: Viewer, job_id: UUID) -> Job:
    """Return a job that the viewer may see.

    Raises:
        UnknownJob: there is none.
    """
    job = status.known_job(connection, job_id)
    if not viewer.sees(job.workspace_id):
        raise UnknownJob
    return job


def _meant(connection: Connection, viewer: Viewer, job: str) -> Job:
    """Return the job that an address means: by its id, a unique beginning of it, or its name; of several with the name
    the newest.

    Raises:
        UnknownJob: the viewer sees none.
        UserError: several ids begin so.
    """
    try:
        job_id = UUID(job)  # first, since looking for names and beginnings takes longer
    except ValueError:
        job_id = visible_job_id(connection, viewer.caller, job)
    return visible_job(connection, viewer, job_id)


@router.get("/jobs/{job}")
async def show_job(request: Request, job: str) -> Response:
    """Show one job."""
    return await show(request, "job.html", partial(_job, job=job))


def _job(connection: Connection, viewer: Viewer, *, job: str) -> dict[str, Any]:
    row = _meant(connection, viewer, job)
    job_id = row.id
    found = status.job_status(connection, job_id)
    state = row.state
    cost, device_seconds = dashboard.cost(connection, job_id)
    files, first_files = dashboard.inputs(connection, job_id, _FIRST_INPUTS)
    total_chunks = found.chunks.total
    model = models.by_name(connection, row.model)
    return {
        "job": found,
        "row": row,
        "workspace": dashboard.workspace_of(connection, job_id),
        "ahead": dashboard.queue_positions(connection, [job_id]).get(job_id),
        "unserved": state in (JobState.QUEUED, JobState.RUNNING) and not _is_served(connection, row.model),
        "cost": cost,
        "price": model and model["price_per_million"],
        "device_seconds": device_seconds,
        "chart": _throughput(connection, job_id, row),
        "strip": drawing.strip(dashboard.strip(connection, job_id, total_chunks, drawing.MOST_CELLS)),
        "total_chunks": total_chunks,
        "at_work": dashboard.at_work(connection, job_id, _MOST_AT_WORK) if found.chunks.running else [],
        "rejects": _rejects_by_code(connection, job_id) if found.items.rejected else [],
        "receipt": status.receipt(connection, job_id),
        "attempts": dashboard.attempts(connection, job_id),
        "options": _options(row.options) | ({"notes": " ".join(row.notices)} if row.notices else {}),
        "files": files,
        "first_files": first_files,
        "history": history.of_job(connection, row),
        "retry": _retry(connection, row, state),
        "live": 30 if state.ended else 1,
    }


def _is_served(connection: Connection, model: str) -> bool:
    return any(model in worker["models"] for worker in workers.live(connection))


def _throughput(connection: Connection, job_id: UUID, row: Job) -> drawing.Chart | None:
    begin = row.started_at
    if begin is None:
        return None
    end = max(begin, row.finished_at or datetime.now(UTC))
    width = drawing.width_of_columns((end - begin).total_seconds())
    spans = dashboard.throughput(connection, job_id, width, begin)
    return drawing.throughput(spans, width, begin, end, going_on=not row.finished_at) if spans else None


def _rejects_by_code(connection: Connection, job_id: UUID) -> list[dict[str, Any]]:
    counts = rejects.count_by_code(connection, job_id)
    firsts = defaultdict(list)
    for row in dashboard.first_rejects(connection, job_id, list(counts), _FIRST_REJECTS):
        firsts[row["code"]].append(row)
    return [
        {"code": code, "count": count, "first": firsts[code], "retryable": RejectCode(code).retryable}
        for code, count in counts.items()
    ]


def _retry(connection: Connection, row: Job, state: JobState) -> RowMapping | None:
    """Return the numbers of rejects and chunks of an ended job that could be retried; None if there are none."""
    if state not in (JobState.COMPLETED, JobState.FAILED) or row.texts_removed_at:
        return None
    found = dashboard.reopenable(connection, row.id, sorted(RETRYABLE_REJECTS))
    return found if found["rejects"] or found["chunks"] else None


def _options(options: KeptOptions) -> dict[str, Any]:
    """Return the options that are set, by their titles on the page."""
    titles = {name: field.title for name, field in JobOptions.model_fields.items() if field.title}
    shown = {title: getattr(options, name) for name, title in titles.items() if getattr(options, name)}
    columns = options.columns
    if not options.splits:
        shown.pop(str(titles["split_by"]))
    texts = {"text": columns.template} if columns.template else {"text column": columns.text}
    shown |= texts | ({"title": columns.title} if columns.title else {}) | {"key column": columns.key}
    if columns.carry:
        shown["carried columns"] = ", ".join(columns.carry)
    if not options.reuse:
        shown["equal texts"] = "each embedded"
    if options.table:
        shown["vectors go also to"] = options.table.table
    return {title: "yes" if value is True else value for title, value in shown.items()}


@router.get("/jobs/{job}/rejects")
async def show_rejects(
    request: Request,
    job: str,
    code: RejectCode | None = None,
    after: Annotated[int, Query(ge=-1, lt=2**63)] = -1,
    text: Annotated[int | None, Query(ge=0, lt=2**63)] = None,
) -> Response:
    """Show a page of a job's rejects. The text of an item is shown only when it is asked for."""
    return await show(request, "rejects.html", partial(_reject_page, job=job, code=code, after=after, index=text))


def _reject_page(
    connection: Connection, viewer: Viewer, *, job: str, code: RejectCode | None, after: int, index: int | None
) -> dict[str, Any]:
    row = _meant(connection, viewer, job)
    found = rejects.page(connection, row.id, after, _PAGE + 1, code)
    shown = found[:_PAGE]
    return {
        "row": row,
        "rejects": shown,
        "counts": rejects.count_by_code(connection, row.id),
        "code": code.value if code else "",
        "after": after,
        "more": shown[-1]["index"] if len(found) > _PAGE else None,
        "text_index": index,
        "text": None if index is None else _text(connection, row, index),
        "live": 30 if row.state.ended else 2,
    }


def _text(connection: Connection, row: Job, index: int) -> dict[str, Any]:
    """Return an item's text, or the reason that it isn't there."""
    if row.options.by_reference:
        return {"why": "The text is in the source file; Postgres keeps none of this job's."}
    if row.texts_removed_at and index < row.texts_kept_from:
        return {"why": f"The text was removed on {row.texts_removed_at:%Y-%m-%d}, as set for ended jobs."}
    found = dashboard.text_of(connection, row.id, index, _MOST_CHARACTERS)
    if found is None or found["text"] is None:
        return {"why": "The text was not kept: the item was rejected when it was read."}
    return {"text": found["text"], "characters": found["characters"], "cut": found["characters"] > _MOST_CHARACTERS}
