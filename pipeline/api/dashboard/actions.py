"""Actions on a job, sent by the forms of its page."""

from functools import partial
from typing import Literal
from uuid import UUID

from fastapi import APIRouter, Request, Response
from sqlalchemy import Connection

from pipeline.api.dashboard.answer import PageRoute, act
from pipeline.api.dashboard.job import visible_job
from pipeline.api.dashboard.session import Viewer
from pipeline.core.errors import IllegalTransition
from pipeline.jobs import control

router = APIRouter(route_class=PageRoute, include_in_schema=False)

Action = Literal["cancel", "pause", "resume", "retry"]


@router.post("/jobs/{job_id}/{action}")
async def act_on_job(request: Request, job_id: UUID, action: Action) -> Response:
    """Cancel, pause, resume or retry a job."""
    return await act(request, partial(_act, job_id=job_id, action=action))


def _act(connection: Connection, viewer: Viewer, _fields: dict[str, str], *, job_id: UUID, action: Action) -> str:
    visible_job(connection, viewer, job_id)
    match action:
        case "cancel":
            control.cancel(connection, job_id)
        case "pause":
            control.pause(connection, job_id)
        case "resume":
            control.resume(connection, job_id)
        case "retry":
            if not control.retry(connection, job_id):
                raise IllegalTransition("Nothing in this job can be retried; its rejects say why.")
    return f"/jobs/{job_id}"
