"""Middleware that counts requests, and `/metrics`. It is open: nothing in it belongs to a workspace."""

from time import perf_counter

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipeline.infra import metrics, metrics_server

#: A client may call its method what it likes.
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


async def show(_: Request) -> Response:
    """The route `/metrics`."""
    return Response(metrics_server.page(metrics.API), media_type=metrics_server.CONTENT_TYPE)


class Counted:
    """Counts requests and their time, by the route that answered."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI calls it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        # Of a client that leaves before it has its answer.
        status, begin = "none", perf_counter()

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        try:
            await self._app(scope, receive, sending)
        finally:
            route = _template(scope)
            method = scope["method"] if scope["method"] in _METHODS else "other"
            metrics.API_REQUESTS.labels(route, method, status).inc()
            # Its turn is waited for by who asks too often, and says nothing of how fast others are answered.
            waited = scope.get("state", {}).get("waited", 0.0)
            metrics.API_REQUEST_SECONDS.labels(route).observe(max(0.0, perf_counter() - begin - waited))


def _template(scope: Scope) -> str:
    if route := scope.get("route"):
        return str(route.path)
    if "endpoint" not in scope:
        return "unknown"
    # The framework tells its own routes only. The others are a folder, or have no parameters.
    return str(scope["root_path"] or scope["path"])
