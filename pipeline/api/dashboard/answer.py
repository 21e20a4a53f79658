"""Rendering of a page: viewer → one snapshot of the database → template → ETag; and error pages."""

import asyncio
import shlex
from collections.abc import Callable, Coroutine, Mapping
from functools import cache
from hashlib import sha256
from typing import Any

import structlog
from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from jinja2 import Environment, PackageLoader, StrictUndefined
from sqlalchemy import Connection
from starlette.requests import ClientDisconnect
from starlette.responses import HTMLResponse, RedirectResponse

from pipeline.api.dashboard import drawing, session, words
from pipeline.api.dashboard.session import Viewer
from pipeline.api.dependencies import ask
from pipeline.core import humanize
from pipeline.core.errors import (
    ApiError,
    IllegalTransition,
    InvalidApiKey,
    Unauthorized,
    UnknownCollection,
    UnknownJob,
    UserError,
)
from pipeline.db import dashboard

log = structlog.get_logger()

#: Query of a page's data, returned as its template's variables.
Look = Callable[[Connection, Viewer], dict[str, Any]]

_HEADERS = {
    # Nothing is loaded from elsewhere, nothing is inline, and no other site may frame a page or receive its forms.
    "content-security-policy": "default-src 'self'; object-src 'none'; base-uri 'none'; form-action 'self'; "
    "frame-ancestors 'none'",
    "cache-control": "no-store",
    "referrer-policy": "same-origin",
    "x-content-type-options": "nosniff",
}
_TITLES = {
    400: "That can't be shown",
    403: "Not allowed",
    404: "Not found",
    409: "Not now",
    405: "Not an address to open",
    413: "Too large",
    503: "The database can't be reached",
}
_NOTHING_HERE = "Nothing here is visible to this key. Check that the address is complete."
_FORMS_ONLY = "This address only takes what a page's buttons send. Go to the jobs, and use the buttons there."


class PageRoute(APIRoute):
    """Route for people: an error becomes a page, and a viewer who isn't logged in is redirected to the log-in page."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the route's handler, wrapped so that errors become pages."""
        handle = super().get_route_handler()

        async def answer(request: Request) -> Response:
            try:
                response = await handle(request)
            except (Unauthorized, InvalidApiKey):
                response = RedirectResponse(session.log_in_path(request), 303)
                session.delete_cookie(request, response)
            except ApiError as error:
                response = problem(request, error.status, str(error), error.reply_headers)
            except (UnknownCollection, UnknownJob, RequestValidationError):
                response = problem(request, 404, _NOTHING_HERE)
            except UserError as error:
                response = problem(request, 409 if isinstance(error, IllegalTransition) else 400, str(error))
            except ClientDisconnect:
                raise
            except Exception as error:
                log.exception("page_failed", path=request.url.path, error=type(error).__name__)
                response = problem(request, 500, "The page failed; the api's log has the reason. Try again.")
            response.headers.update(_HEADERS)
            return response

        return answer


def is_for_people(request: Request) -> bool:
    """Return True if a browser asks for a page, outside the addresses for programs."""
    path = f"{request.url.path}/"
    return "text/html" in request.headers.get("accept", "") and not path.startswith(("/v1/", "/api/", "/static/"))


def no_page(request: Request, status: int) -> Response:
    """Return the page for an address that no route answers: 404, or 405 where only forms go."""
    response = problem(request, status, _FORMS_ONLY if status == 405 else _NOTHING_HERE)
    response.headers.update(_HEADERS)
    return response


def error_page(request: Request, error: ApiError) -> Response:
    """Return the page for an error that arose before a route was found."""
    response = problem(request, error.status, str(error), error.reply_headers)
    response.headers.update(_HEADERS)
    return response


async def show(request: Request, template: str, look: Look) -> Response:
    """Render a page for the viewer who is logged in.

    Raises:
        Unauthorized, InvalidApiKey: nobody is logged in.
    """
    viewer = await session.viewer(request)

    def run(connection: Connection) -> dict[str, Any]:
        dashboard.begin_snapshot(connection)
        return {"holder": dashboard.key_holder(connection, viewer.caller.key_id), **look(connection, viewer)}

    found = await ask(request, run)
    return await asyncio.to_thread(render, request, template, viewer=viewer, **found)


async def act(request: Request, do: Callable[[Connection, Viewer, dict[str, str]], str]) -> Response:
    """Run a form's action in one transaction, and redirect to the page that `do` returns.

    Raises:
        Unauthorized, InvalidApiKey: nobody is logged in.
        Forbidden: the form wasn't sent by one of our pages.
    """
    session.must_be_ours(request)  # first, since another site's form comes without the cookie
    viewer = await session.viewer(request)
    fields = await session.form(request)  # last, since only a known caller may take time to send it
    return RedirectResponse(await ask(request, lambda connection: do(connection, viewer, fields)), 303)


def render(request: Request, template: str, status: int = 200, **variables: Any) -> Response:
    """Render a template as a response, or answer 304 if the browser's ETag matches."""
    given = {
        "viewer": None,
        "holder": None,
        "live": 0,
        "path": request.url.path,
        "flower": (request.app.state.settings.flower_url or "").rstrip("/"),
    }
    html = _templates().get_template(template).render({**given, **variables}).encode()
    etag = f'"{sha256(html).hexdigest()[:32]}"'
    if status == 200 and request.method == "GET" and request.headers.get("if-none-match") == etag:
        return Response(status_code=304, headers={"etag": etag})
    return HTMLResponse(html, status, {"etag": etag})


def problem(request: Request, status: int, message: str, headers: Mapping[str, str] = {}) -> Response:
    """Render a page that says what went wrong. After a temporary failure, the browser asks for the page again."""
    title = _TITLES.get(status, "That didn't work")
    viewer = getattr(request.state, "viewer", None)
    # The server that is away may be back soon. A form is never sent again automatically.
    live = 2 if status == 503 and request.method == "GET" else 0
    response = render(request, "problem.html", status, viewer=viewer, title=title, message=message, live=live)
    response.headers.update(headers)
    return response


async def show_fault(request: Request, template: str, look: Look, error: ApiError | UserError) -> Response:
    """Render a page with a form once more, after what it sent was refused."""
    response = await show(request, template, look)
    if isinstance(error, ApiError):
        response.status_code = error.status
        response.headers.update(error.reply_headers)
    else:
        response.status_code = 400
    return response


@cache
def _templates() -> Environment:
    made = Environment(
        loader=PackageLoader("pipeline.api.dashboard"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["quoted"] = shlex.quote
    for filter_ in ("short", "size", "duration"):
        made.filters[filter_] = getattr(humanize, filter_)
    for filter_ in ("number", "money", "count", "ordinal", "ago", "until", "page_name"):
        made.filters[filter_] = getattr(words, filter_)
    for name in ("percent", "progress", "reason", "advice", "time_left", "took"):
        made.globals[name] = getattr(words, name)
    made.globals["bar"] = drawing.bar
    return made
