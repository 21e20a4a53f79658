"""Request metrics by route, and `/metrics`, which needs no key: nothing in it belongs to a workspace."""

from time import perf_counter

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipeline.infra import metrics, metrics_server

#: Methods that become labels. A client may send any other name, which counts as `other`.
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


async def show(_: Request) -> Response:
    """Serve `/metrics`."""
    return Response(metrics_server.page(metrics.API), media_type=metrics_server.CONTENT_TYPE)


class Counted:
    """Middleware that counts requests and measures their time, by the route that answered."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI scope."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        # Status of a request whose client leaves before the answer.
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
            # The delay of a caller that asks too often says nothing about how fast requests are answered.
            waited = scope.get("state", {}).get("waited", 0.0)
            metrics.API_REQUEST_SECONDS.labels(route).observe(max(0.0, perf_counter() - begin - waited))


def _template(scope: Scope) -> str:
    if route := scope.get("route"):
        return str(route.path)
    if "endpoint" not in scope:
        return "unknown"
    # FastAPI records only its own routes. The others are a mounted folder, or have no parameters.
    return str(scope["root_path"] or scope["path"])
