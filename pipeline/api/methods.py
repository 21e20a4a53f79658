"""HEAD and OPTIONS for `/v1` and `/api`, and CORS for `/v1`."""

from collections.abc import Sequence
from http import HTTPStatus

from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_PREFIXES = ("/v1/", "/api/")
_METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE")
#: Response headers that CORS exposes to scripts, besides those that they may always read.
_SHOWN = (
    "retry-after",
    "retry-after-ms",
    "x-request-id",
    "x-vectormill-token-ids",
    "x-vectormill-truncated",
    *(f"x-ratelimit-{what}-{of}" for what in ("limit", "remaining", "reset") for of in ("requests", "tokens")),
)


class Headed:
    """Middleware that answers HEAD as GET, without the body."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI scope."""
        if scope["type"] != "http" or scope["method"] != "HEAD" or not scope["path"].startswith(_PREFIXES):
            await self._app(scope, receive, send)
            return
        is_over = False

        async def sending(message: Message) -> None:
            nonlocal is_over
            if message["type"] == "http.response.body":
                if is_over:
                    # Don't produce a long body to its end: its producer sees a client that has gone.
                    raise ClientDisconnect
                is_over, message = True, {"type": "http.response.body", "body": b"", "more_body": False}
            await send(message)

        await self._app({**scope, "method": "GET"}, receive, sending)


class Optioned:
    """Middleware that answers OPTIONS with the methods that an address has."""

    def __init__(self, app: ASGIApp, routes: Sequence[BaseRoute]) -> None:
        self._app, self._routes = app, routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI scope."""
        answer: ASGIApp = self._app
        is_asked = scope["type"] == "http" and scope["method"] == "OPTIONS"
        if is_asked and (allowed := allowed_methods(self._routes, scope)):
            answer = Response(status_code=HTTPStatus.NO_CONTENT, headers={"allow": allowed})
        await answer(scope, receive, send)


def allowed_methods(routes: Sequence[BaseRoute], scope: Scope) -> str:
    """Return the methods of an address below `/v1` or `/api`, as in the header Allow; empty if no route has it."""
    if not scope["path"].startswith(_PREFIXES):
        return ""

    def has(method: str) -> bool:
        return any(route.matches({**scope, "method": method})[0] is Match.FULL for route in routes)

    found = [method for method in _METHODS if has(method)]
    if not found:
        return ""
    return ", ".join([*found, *(["HEAD"] if "GET" in found else []), "OPTIONS"])


class Shared:
    """CORS middleware that lets scripts of some origins use `/v1`. They send a key like others; cookies don't count."""

    def __init__(self, app: ASGIApp, origins: Sequence[str]) -> None:
        self._app = app
        self._shared = CORSMiddleware(
            app, allow_origins=origins, allow_methods=_METHODS, allow_headers=["*"], expose_headers=_SHOWN
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI scope."""
        is_shared = scope["type"] == "http" and scope["path"].startswith("/v1/")
        await (self._shared if is_shared else self._app)(scope, receive, send)
