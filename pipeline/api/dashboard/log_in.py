"""Log-in with an API key, and log-out."""

from fastapi import APIRouter, Request, Response
from starlette.responses import RedirectResponse

from pipeline.api.dashboard import session
from pipeline.api.dashboard.answer import PageRoute, render
from pipeline.core.errors import InvalidApiKey, Unauthorized

router = APIRouter(route_class=PageRoute, include_in_schema=False)


@router.get("/login")
async def log_in_page(request: Request, next: str = "/") -> Response:  # noqa: A002 - the field's name
    """Show the log-in page, which asks for a key."""
    return render(request, "login.html", next=session.local(next), wrong="")


@router.get("/login/known")
async def known(request: Request) -> Response:
    """Answer 200 if this browser is logged in, else 204.

    The log-in page asks for it: the browser of a visitor who came by a link on another site has the cookie, but
    hasn't sent it yet, since it is SameSite=Strict.
    """
    try:
        await session.viewer(request)
    except (Unauthorized, InvalidApiKey):
        return Response(status_code=204)
    return Response("yes", media_type="text/plain")


@router.post("/login")
async def log_in(request: Request) -> Response:
    """Log in: set the cookie if the key is live."""
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
    """Log out: delete the cookie with the key."""
    session.must_be_ours(request)
    response = RedirectResponse("/login", 303)
    session.delete_cookie(request, response)
    return response
