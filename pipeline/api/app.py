"""FastAPI application of the api: routes, middleware, error responses, startup and shutdown."""

import asyncio
import re
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from functools import partial
from http import HTTPStatus
from importlib.metadata import version
from typing import Any
from uuid import uuid4

import orjson
import structlog
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipeline.api.dashboard import add_dashboard, error_page, is_for_people, no_page
from pipeline.api.database import AT_ONCE, Database
from pipeline.api.gateway.cache import GatewayCache
from pipeline.api.gateway.engines import Engines
from pipeline.api.gateway.metering import Meter
from pipeline.api.gateway.rate_limits import Limits
from pipeline.api.gateway.upstreams import Upstreams
from pipeline.api.methods import Headed, Optioned, Shared, allowed_methods
from pipeline.api.middleware_metrics import Counted, show
from pipeline.api.openapi_examples import add_examples
from pipeline.api.pacing import LeakyBuckets, Paced
from pipeline.api.packing import Unpacked
from pipeline.api.paths import Segmented, Trimmed
from pipeline.api.readiness import readyz
from pipeline.api.status import collections, forgets, jobs, keys, models, search, submissions, usage, workers
from pipeline.api.transfers import CONNECTIONS, Transfers
from pipeline.api.v1 import batches, embeddings, files
from pipeline.api.v1.embeddings import Gateway
from pipeline.api.v1.token_ids import decoder
from pipeline.core.errors import (
    ApiError,
    CollectionBusy,
    IdempotencyConflict,
    IllegalTransition,
    InternalError,
    PayloadTooLarge,
    RequestStalled,
    ServiceUnreachable,
    UnknownCollection,
    UnknownForget,
    UnknownJob,
    UnknownModel,
    UserError,
    VectormillError,
)
from pipeline.core.openai import make_error
from pipeline.db.database import make_engine
from pipeline.infra.settings import Settings

log = structlog.get_logger()

_FORM_BYTES = 1024 * 1024
_OF_SYNCS = re.compile(r"^(/api/collections/)[^/]+(/syncs)$")
#: Time by which a body may lag behind the minimum rate, and that rate: an upload holds its place meanwhile.
_PATIENCE_SECONDS = 60.0
_LEAST_BYTES_PER_SECOND = 16 * 1024
#: Limits on draining a body that was refused for its size: some clients write all of it before they read the answer.
_DRAINED_BYTES = 64 * 1024 * 1024
_DRAIN_SECONDS = 10.0
#: Status of the framework's own refusals → error code; the others are `invalid_payload`.
_CODES: dict[int, str] = {HTTPStatus.NOT_FOUND: "not_found", HTTPStatus.METHOD_NOT_ALLOWED: "method_not_allowed"}

#: Error class of a step → status and error code. If several fit, the first one counts.
_OF_STEPS: dict[type[VectormillError], tuple[int, str]] = {
    UnknownJob: (404, "not_found"),
    UnknownModel: (404, "model_not_found"),
    UnknownCollection: (404, "not_found"),
    UnknownForget: (404, "not_found"),
    CollectionBusy: (409, "collection_busy"),
    IllegalTransition: (409, "illegal_transition"),
    IdempotencyConflict: (422, "idempotency_conflict"),
    ServiceUnreachable: (503, "unreachable"),
    UserError: (400, "invalid_payload"),
}


def make_app(settings: Settings, database_url: str, redis_url: str) -> FastAPI:
    """Return the api's application: its routes, middleware and error handlers."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        asked = Database(make_engine(database_url, application="vectormill-api", pool_size=AT_ONCE))
        transfers = Transfers(make_engine(database_url, application="vectormill-api", pool_size=CONNECTIONS))
        cache, engines, meter = GatewayCache(asked), Engines(settings.engine_secret), Meter(asked)
        upstreams, limits = Upstreams(settings.gateway_seconds), Limits(redis_url, cache)
        app.state.database, app.state.transfers, app.state.settings = asked, transfers, settings
        app.state.gateway = Gateway(
            cache=cache,
            limits=limits,
            engines=engines,
            upstreams=upstreams,
            meter=meter,
            most_text_bytes=settings.item_bytes,
            decode=decoder(),
        )
        yield
        await engines.close()
        await upstreams.close()
        await limits.close()
        await meter.close()
        transfers.close()

    app = FastAPI(
        title="vectormill",
        version=version("vectormill"),
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    for part in (
        embeddings,
        files,
        batches,
        submissions,
        jobs,
        collections,
        search,
        forgets,
        workers,
        models,
        usage,
        keys,
    ):
        app.include_router(part.router)
    add_dashboard(app)
    app.add_route("/healthz", _healthz)
    app.add_route("/readyz", readyz)
    app.add_route("/metrics", show)
    app.add_exception_handler(ApiError, _answer)
    app.add_exception_handler(VectormillError, _answer_step)
    app.add_exception_handler(HTTPException, _answer_http)
    app.add_exception_handler(RequestValidationError, _answer_validation)
    # The rest of a form, around the file's bytes, is small.
    forms = {
        "/api/jobs": settings.api_upload_bytes,
        "/submit": settings.api_upload_bytes,
        "/api/collections/{collection}/syncs": settings.api_upload_bytes,
        "/v1/files": settings.batch_bytes + _FORM_BYTES,
    }
    # Starlette runs the middleware added last first.
    app.add_middleware(Unpacked, most_bytes=settings.api_body_bytes)
    app.add_middleware(
        Bounded,
        most_bytes=settings.api_body_bytes,
        most_of_forms=forms,
        most_seconds=settings.api_upload_seconds,
    )
    app.add_middleware(Optioned, routes=app.router.routes)
    app.add_middleware(Shared, origins=settings.api_origins)
    app.add_middleware(Identified)
    # Counted runs inside the middleware that may copy the scope: the router stores the route in the copy.
    app.add_middleware(Counted)
    app.add_middleware(Headed)
    app.add_middleware(Segmented)
    app.add_middleware(Trimmed)
    app.state.buckets = LeakyBuckets()
    app.add_middleware(Paced, buckets=app.state.buckets)
    describe = app.openapi
    app.openapi = partial(_described, describe)  # type: ignore[method-assign]
    return app


def _described(describe: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the OpenAPI description, with examples and the scheme by which a key is sent."""
    found = describe()
    add_examples(found)
    schemes = found.setdefault("components", {}).setdefault("securitySchemes", {})
    schemes["bearer"] = {"type": "http", "scheme": "bearer", "description": "An API key: vectormill keys create."}
    return found


async def _healthz(_: Request) -> Response:
    return Response("ok", media_type="text/plain")


class Identified:
    """Middleware that sets a request id, sent back as `x-request-id`, and answers unhandled exceptions."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI scope."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = f"req_{uuid4().hex}"
        scope.setdefault("state", {})["request_id"] = request_id
        began = False

        async def sending(message: Message) -> None:
            nonlocal began
            if message["type"] == "http.response.start":
                began = True
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            await self._app(scope, receive, sending)
        except ClientDisconnect:
            log.info("client_gone", request=request_id)
        except Exception as error:
            log.exception("request_failed", request=request_id, path=scope["path"], error=type(error).__name__)
            if not began:
                answer = _as_response(scope["path"], InternalError("The gateway failed; please try again."))
                await answer(scope, receive, sending)


class Bounded:
    """Middleware that refuses bodies over a size limit before they are read whole, and those that come too slowly.

    It applies to every route. Only time spent on waiting for the client counts.
    """

    def __init__(
        self,
        app: ASGIApp,
        most_bytes: int,
        most_of_forms: Mapping[str, int],
        *,
        most_seconds: float,
        patience_seconds: float = _PATIENCE_SECONDS,
    ) -> None:
        self._app, self._most_bytes, self._most_of_forms = app, most_bytes, most_of_forms
        self._most_seconds, self._patience_seconds = most_seconds, patience_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI scope."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers, size, waited, more = Headers(scope=scope), 0, 0.0, True
        told, most_bytes = headers.get("content-length", "0"), self._most_bytes
        if headers.get("content-type", "").lower().startswith("multipart/form-data"):
            path = _OF_SYNCS.sub(r"\1{collection}\2", scope["path"])
            most_bytes = self._most_of_forms.get(path, most_bytes)
        refused = told.isdecimal() and int(told) > most_bytes

        async def sending(message: Message) -> None:
            if refused and more and message["type"] == "http.response.body" and not message.get("more_body"):
                # The answer is complete by now, but a client that writes before it reads would lose it if the
                # connection were closed.
                await send({**message, "more_body": True})
                await _drain(receive)
                message = {"type": "http.response.body", "body": b""}
            await send(message)

        if refused:
            more = "expect" not in headers  # with Expect, a client waits for the answer before it sends the body
            request, error = Request(scope), _too_large(most_bytes)
            answer = error_page(request, error) if is_for_people(request) else _as_response(scope["path"], error)
            await answer(scope, receive, sending)
            return

        async def receiving() -> Message:
            nonlocal size, waited, more, refused
            # Time allowed for the bytes received so far, up to the limit for the whole body.
            due = min(self._patience_seconds + size / _LEAST_BYTES_PER_SECOND, self._most_seconds)
            began = time.monotonic()
            try:
                # After the body only the client's disconnect follows, at any time: no timeout.
                async with asyncio.timeout(due - waited if more else None):
                    message = await receive()
            except TimeoutError as error:
                raise _stalled() from error
            waited += time.monotonic() - began
            more = message.get("more_body", False)
            if message["type"] == "http.request":
                size += len(message.get("body", b""))
                if size > most_bytes:
                    refused = True
                    raise _too_large(most_bytes)
            return message

        await self._app(scope, receiving, sending)


async def _drain(receive: Receive) -> None:
    """Read and discard the rest of a client's body, within limits of bytes and time."""
    left = _DRAINED_BYTES
    with suppress(TimeoutError):
        async with asyncio.timeout(_DRAIN_SECONDS):
            while left > 0:
                message = await receive()
                left -= len(message.get("body", b""))
                if not message.get("more_body"):
                    return


def _too_large(most_bytes: int) -> PayloadTooLarge:
    error = PayloadTooLarge(f"The body is larger than {most_bytes:,} bytes; send less in a request.")
    # The rest of the body may stay unread, so the connection can't be reused.
    error.headers["connection"] = "close"
    return error


def _stalled() -> RequestStalled:
    error = RequestStalled(
        f"The body came too slowly: at least {_LEAST_BYTES_PER_SECOND / 1024:g} KiB/s are expected; send it again."
    )
    error.headers["connection"] = "close"
    return error


async def _answer(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return _as_response(request.url.path, error)


async def _answer_step(request: Request, error: Exception) -> Response:
    """Answer an error of a step, which knows no HTTP; raise it again if it has no status here."""
    for kind, (status, code) in _OF_STEPS.items():
        if isinstance(error, kind):
            return _write(request.url.path, status, code, str(error), getattr(error, "field", None))
    raise error


async def _answer_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code in (404, 405) and is_for_people(request):
        return no_page(request, error.status_code)
    code, headers = _CODES.get(error.status_code, "invalid_payload"), error.headers
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        # The framework lists the methods of the first matching route only.
        allowed = allowed_methods(request.app.router.routes, request.scope)
        headers = {"allow": allowed} if allowed else headers
    return _write(request.url.path, error.status_code, code, str(error.detail), headers=headers)


async def _answer_validation(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"][1:]) or str(first["loc"][0])
    return _write(request.url.path, 400, "invalid_payload", f"{where}: {first['msg']}.", where)


def _as_response(path: str, error: ApiError) -> Response:
    headers = dict(error.reply_headers)
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return _write(path, error.status, error.code, str(error), error.param, headers)


def _write(path: str, status: int, code: str, message: str, param: str | None = None, headers: Any = None) -> Response:
    """Return an error in OpenAI's envelope below `/v1`, elsewhere as a problem of RFC 9457."""
    if path == "/v1" or path.startswith("/v1/"):
        return Response(make_error(message, code, status, param), status, headers, "application/json")
    problem = {"type": "about:blank", "title": code.replace("_", " "), "status": status, "detail": message}
    if param:
        problem["field"] = param
    return Response(orjson.dumps(problem), status, headers, "application/problem+json")
