"""Page that submits a file: as a job of its own, or as a sync of a collection. Uploads take the way of `/api/jobs`."""

import secrets
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from fastapi import APIRouter, Request, Response
from sqlalchemy import Connection, Engine
from starlette.responses import PlainTextResponse, RedirectResponse

from pipeline.api.dashboard import session
from pipeline.api.dashboard.answer import PageRoute, show, show_fault
from pipeline.api.dashboard.session import Viewer
from pipeline.api.dependencies import ask
from pipeline.api.status.collections import intake_of_sync
from pipeline.api.status.submissions import TURNS, Intake, Wish, intake_of_job, receive_rows, submitter
from pipeline.catalog.models import DEFAULT_WORKSPACE
from pipeline.core.errors import ApiError, InvalidPayload, UserError
from pipeline.core.options import Columns
from pipeline.db import collections, models, workspaces
from pipeline.infra.settings import Settings
from pipeline.ingest.request import labels_of
from pipeline.ingest.submission import Submitted
from pipeline.sources import Corpus

router = APIRouter(route_class=PageRoute, include_in_schema=False)

#: Fields that a collection decides for all its syncs.
_OF_COLLECTIONS = ("model", "text_column", "text", "key_column")
#: Stands for the file in a command before one is chosen.
_NO_FILE = "FILE"


@dataclass(frozen=True, slots=True)
class FormWish:
    """Request that a form makes, for a job or for a sync, with its treatment."""

    columns: Callable[[Engine], Columns]
    submit: Callable[[Engine, Corpus, str], Submitted]
    #: A form uploads its rows.
    sources: list[str] = field(default_factory=list)


@router.get("/submit")
async def show_form(request: Request) -> Response:
    """Show the form."""
    return await show(request, "submit.html", _form)


@router.post("/submit")
async def submit_file(request: Request) -> Response:
    """Submit the uploaded file, and go on to the job's page. After an error show the form again, with its fields."""
    session.must_be_ours(request)  # first, since another site's form comes without the cookie
    viewer = await session.viewer(request, turns=TURNS)
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise InvalidPayload("Use the page's form, which sends multipart/form-data.")
    owner, by, settings = viewer.caller.workspace_id, submitter(viewer.caller), request.app.state.settings
    typed = dict[str, Any]()

    def read(fields: Mapping[str, Any]) -> FormWish:
        typed.update(fields)
        return _read(fields, owner, by, settings)

    try:
        made = await receive_rows(request, owner, Intake(read, _columns, _submit))
    except (ApiError, UserError) as error:
        return await show_fault(request, "submit.html", partial(_form, typed=typed, fault=str(error)), error)
    return RedirectResponse(f"/jobs/{made.job_id}", 303)


@router.post("/submit/command")
async def show_command(request: Request) -> Response:
    """Return the command that does what the form says."""
    session.must_be_ours(request)
    viewer = await session.viewer(request)
    fields = await session.form(request)
    workspace = await ask(request, lambda connection: workspaces.name_of(connection, viewer.caller.workspace_id))
    return PlainTextResponse(command_of(fields, workspace))


def _form(connection: Connection, viewer: Viewer, *, typed: Mapping[str, str] = {}, fault: str = "") -> dict[str, Any]:
    own = viewer.caller.workspace_id
    return {
        "models": [row["name"] for row in models.of_workspace(connection, own)],
        "collections": [{"name": each.name, "model": each.model} for each in collections.of_workspace(connection, own)],
        "typed": typed,
        "fault": fault,
        "command_line": command_of(typed, workspaces.name_of(connection, own)),
        # A form that is sent twice by mistake makes one job.
        "idempotency_key": secrets.token_urlsafe(16),
    }


def _columns(engine: Engine, wish: FormWish) -> Columns:
    return wish.columns(engine)


def _submit(engine: Engine, wish: FormWish, corpus: Corpus, name: str) -> Submitted:
    return wish.submit(engine, corpus, name)


def _read(fields: Mapping[str, Any], owner: int, by: str, settings: Settings) -> FormWish:
    """Read a form's fields. An empty one wasn't filled in.

    Raises:
        UserError: a field is wrong; the message names it.
    """
    given = {name: value for name, value in fields.items() if value != ""}
    key, collection = given.pop("idempotency_key", None), given.pop("collection", None)
    if labels := labels_of(_lines(given.pop("label", ""))):
        given["labels"] = labels
    if not collection:
        return _bound(intake_of_job(owner, by, settings, key), given)
    if theirs := next((name for name in _OF_COLLECTIONS if name in given), None):
        raise UserError(f"the collection {collection} has its own; leave it empty.", field=theirs)
    return _bound(intake_of_sync(owner, collection, by, settings, key), given)


def _bound(intake: Intake[Wish], fields: Mapping[str, Any]) -> FormWish:
    wish = intake.read(fields)
    return FormWish(
        lambda engine: intake.columns(engine, wish),
        lambda engine, corpus, name: intake.submit(engine, wish, corpus, name),
    )


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def command_of(fields: Mapping[str, str], workspace: str) -> str:
    """Return the command that does what a form says; `FILE` stands for a file that isn't chosen yet."""
    collection, file = fields.get("collection"), fields.get("file") or _NO_FILE
    # Fields that a collection decides are refused with one.
    names = ("name",) if collection else (*_OF_COLLECTIONS, "name")
    words = ["vectormill", *(("sync", collection) if collection else ("submit",))]
    words.append(f"./{file}" if file.startswith("-") else file)
    # A field's name is that of its option.
    for name, value in [
        *((name, fields.get(name)) for name in names),
        *(("label", label) for label in _lines(fields.get("label", ""))),
        ("workspace", workspace if workspace != DEFAULT_WORKSPACE else None),
    ]:
        if value:
            option = f"--{name.replace('_', '-')}"
            words += [f"{option}={value}"] if value.startswith("-") else [option, value]
    return shlex.join(words)
