"""Path normalisation: a name within a path stays one segment, also with a slash in it; stray slashes are dropped."""

import re
from urllib.parse import unquote

from starlette.types import ASGIApp, Receive, Scope, Send

_PREFIXES = (b"/api/", b"/jobs/")


class Segmented:
    """Middleware that keeps `%2F` apart from `/` below `/api` and `/jobs`: a job may be called `team/docs`, or
    `docs/cancel`.

    Servers decode a path before it is routed. Paths routed here still hold `%2F` and `%25`; `as_sent` decodes them.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI scope."""
        raw = scope.get("raw_path") or b""
        if scope["type"] == "http" and raw.startswith(_PREFIXES):
            kept = raw.replace(b"%25", b"%2525").replace(b"%2F", b"%252F").replace(b"%2f", b"%252F")
            scope = {**scope, "path": unquote(kept.decode("latin-1"))}
        await self._app(scope, receive, send)


class Trimmed:
    """Middleware that reads `/v1//embeddings/` as `/v1/embeddings`: clients whose base address ends in `/` send it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI scope."""
        path = re.sub("//+", "/", scope.get("path", ""))
        if scope["type"] == "http" and path.startswith("/v1/"):
            scope = {**scope, "path": path.rstrip("/")}
        await self._app(scope, receive, send)


def as_sent(segment: str) -> str:
    """Return a path parameter as the client meant it, decoded."""
    return unquote(segment)
