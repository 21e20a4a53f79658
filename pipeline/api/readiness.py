"""Readiness of the api: its database answers. While it doesn't, a balancer that asks sends requests elsewhere."""

from starlette.requests import Request
from starlette.responses import Response

from pipeline.core.errors import Busy, UpstreamUnavailable

_ANSWER_SECONDS = 3.0


async def readyz(request: Request) -> Response:
    """The route `/readyz`."""
    try:
        await request.app.state.database.answers_within(_ANSWER_SECONDS)
    except (UpstreamUnavailable, Busy) as error:
        return Response(str(error), 503, media_type="text/plain")
    return Response("ok", media_type="text/plain")
