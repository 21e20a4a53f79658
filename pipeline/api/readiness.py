"""Readiness probe of the api: 503 while the database doesn't answer, so that load balancers send requests elsewhere."""

from starlette.requests import Request
from starlette.responses import Response

from pipeline.core.errors import Busy, UpstreamUnavailable

_ANSWER_SECONDS = 3.0


async def readyz(request: Request) -> Response:
    """Serve `/readyz`."""
    try:
        await request.app.state.database.answers_within(_ANSWER_SECONDS)
    except (UpstreamUnavailable, Busy) as error:
        return Response(str(error), 503, media_type="text/plain")
    return Response("ok", media_type="text/plain")
