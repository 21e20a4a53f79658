"""Logging in with an API key, and out."""

from fastapi import APIRouter, Request, Response
from starlette.responses import RedirectResponse

from pipeline.api.dashboard import session
from pipeline.api.dashboard.answer import PageRoute, render
from pipeline.core.errors import InvalidApiKey, Unauthorized

router = APIRouter(route_class=PageRoute, include_in_schema=False)


@router.get("/login")
async def log_in_page(request: Request, next: str = "/") -> Response:  # noqa: A002 - the field's name
    """Where a key is asked for."""
    return render(request, "login.html", next=session.local(next), wrong="")


@router.get("/login/known")
async def known(request: Request) -> Response:
    """Whether this browser is logged in. The log-in page asks: a visitor who came by a link on another site has the
    cookie, but not yet sent it, since it is SameSite=Strict."""
    try:
        await session.viewer(request)
    except (Unauthorized, InvalidApiKey):
        return Response(status_code=204)
    return Response("yes", media_type="text/plain")


@router.post("/login")
async def log_in(request: Request) -> Response:
    """Keep a key in a cookie, if it is a live one."""
    fields = await session.form(request)
    goal = session.local(fields.get("next"))
    key = fields.get("key", "")
    try:
        await session.holder_of(request, key)
    except (Unauthorized, InvalidApiKey):
        wrong = "This key is unknown, revoked or expired." if key else "Give a key."
        return render(request, "login.html", 401, next=goal, wrong=wrong)
    response = RedirectResponse(goal, 303)
    session.remember(request, response, key)
    return response


@router.post("/logout")
async def log_out(request: Request) -> Response:
    """Forget the key."""
    session.must_be_ours(request)
    response = RedirectResponse("/login", 303)
    session.forget(request, response)
    return response
