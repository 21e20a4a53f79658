"""Paths as clients write them. Whatever a name in one holds, it is one segment."""

import re
from urllib.parse import unquote

from starlette.types import ASGIApp, Receive, Scope, Send

_PREFIX = b"/api/"


class Segmented:
    """Below `/api`, keeps `%2F` apart from `/`: a job may be called `team/docs`, or `docs/cancel`.

    Servers decode a path before it is routed. What is routed here still has `%2F` and `%25`; `as_sent` decodes them.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI calls it."""
        raw = scope.get("raw_path") or b""
        if scope["type"] == "http" and raw.startswith(_PREFIX):
            kept = raw.replace(b"%25", b"%2525").replace(b"%2F", b"%252F").replace(b"%2f", b"%252F")
            scope = {**scope, "path": unquote(kept.decode("latin-1"))}
        await self._app(scope, receive, send)


class Trimmed:
    """Below `/v1`, reads `/v1//embeddings/` as `/v1/embeddings`, as clients write it whose base address ends so."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI calls it."""
        path = re.sub("//+", "/", scope.get("path", ""))
        if scope["type"] == "http" and path.startswith("/v1/"):
            scope = {**scope, "path": path.rstrip("/")}
        await self._app(scope, receive, send)


def as_sent(segment: str) -> str:
    """A path's parameter as its sender wrote it."""
    return unquote(segment)
