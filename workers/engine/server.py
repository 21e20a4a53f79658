"""HTTP server of the engine, which embeds for the api: `python -m workers.engine.server`. Its wire format is its own
(see `pipeline.core.openai`). A secret shared with the api keeps other clients out."""

import asyncio
import os
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, nullcontext, suppress
from functools import partial
from hmac import compare_digest
from http import HTTPStatus
from ipaddress import ip_address
from math import ceil
from uuid import UUID, uuid4

import orjson
import psutil
import structlog
from pydantic import SecretStr
from sqlalchemy import Engine as Database
from sqlalchemy.exc import SQLAlchemyError
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from pipeline.catalog.models import as_model
from pipeline.core.errors import BadVector, ModelError, ModelsOwnTokens, ModelUnusable, UpstreamUnavailable, UserError
from pipeline.core.models import Model
from pipeline.core.openai import pack_vectors
from pipeline.db import engines, models
from pipeline.db.database import make_engine
from pipeline.infra import http_server, metrics, metrics_server
from pipeline.infra.logs import configure_logs
from pipeline.infra.settings import MODELS_SHARE, Settings, engine_authorization, load_settings
from workers.encoders.imports import import_library
from workers.encoders.model_cache import Loader, ModelCache
from workers.engine.batcher import Batcher
from workers.engine.succession import hold_signals, serve_in_child

log = structlog.get_logger()

_CLOSE = {"connection": "close"}
#: Growth of a body when its token ids become texts, and the size of the JSON around texts.
_GROWTH, _FRAME_BYTES = 4, 1024 * 1024
_PERIOD_SECONDS = 2.0
#: Minimum time between two reads of the catalogue for unknown models.
_LEAST_AGE_SECONDS = 0.5
_GOODBYE_SECONDS = 5.0


class ServedModels:
    """Catalogue of the local models that this engine serves, and the engine's own row in the database."""

    def __init__(
        self,
        database: Database,
        settings: Settings,
        url: str,
        engine_id: UUID,
        can_use: Callable[[Model], bool] = lambda _: True,
    ) -> None:
        self._database, self._wanted, self._url, self._can_use = database, settings.worker_models, url, can_use
        self._device = settings.worker_devices[0]
        self._id = engine_id
        self.models: dict[str, Model] = {}
        self._read_at = float("-inf")
        self._finding = threading.Lock()

    def read(self) -> None:
        """Read the catalogue."""
        began = time.monotonic()
        try:
            with self._database.begin() as connection:
                rows = [row for row in models.every(connection) if row["kind"] == "local"]
        finally:
            # Requests that wait for one read share its result, even a failure.
            self._read_at = began
        if self._wanted:
            rows = [row for row in rows if {row["name"], *row["aliases"]} & set(self._wanted)]
        self.models = {row["name"]: as_model(row) for row in rows}

    def known(self, name: str, weights: str | None) -> Model | None:
        """Return a served model by name, if its weights have this SHA-256; `None` accepts any weights."""
        model = self.models.get(name)
        return model if model and weights in (None, model.weights_sha256) else None

    def find(self, name: str, weights: str | None) -> Model | None:
        """Return a model as `known` does. An unknown one may just have been added, so read the catalogue again, though
        not too often: concurrent requests for unknown models share one read."""
        asked = time.monotonic()
        with self._finding:
            if not self.known(name, weights) and self._read_at < asked:
                time.sleep(max(0.0, self._read_at + _LEAST_AGE_SECONDS - time.monotonic()))
                with suppress(SQLAlchemyError):
                    self.read()
        return self.known(name, weights)

    def show(self) -> None:
        """Publish the models that the engine serves, without those that are unusable now."""
        usable = sorted(name for name, model in self.models.items() if self._can_use(model))
        with self._database.begin() as connection:
            engines.show(connection, self._id, url=self._url, models=usable, device=self._device)

    @contextmanager
    def followed(self, *, goodbye: bool) -> Iterator[None]:
        """Read the catalogue and publish the engine in a thread during the block; with `goodbye`, remove its row at the
        end. A database that is away leaves things as they were; a frozen one doesn't hold up the end."""
        over = threading.Event()
        follower = threading.Thread(target=self._follow, args=(over, goodbye), name="catalogue", daemon=True)
        follower.start()
        try:
            yield
        finally:
            over.set()
            follower.join(_GOODBYE_SECONDS)

    def _follow(self, over: threading.Event, goodbye: bool) -> None:
        while True:
            try:
                self.read()
                self.show()
            except SQLAlchemyError as error:
                log.warning("database_unreachable", error=type(error).__name__)
            if over.wait(_PERIOD_SECONDS):
                break
        if goodbye:
            with suppress(SQLAlchemyError), self._database.begin() as connection:
                engines.delete(connection, self._id)


def make_app(
    catalogue: ServedModels, batcher: Batcher, secret: SecretStr | None = None, most_bytes: int = 16 * 1024**2
) -> Starlette:
    """Return the engine's HTTP app: `POST /embed`, `GET /healthz`, `GET /metrics`.

    Args:
        secret: must be the same as the api's.
        most_bytes: the largest body that the api takes, from which the engine's own limit is derived.
    """
    authorization = engine_authorization(secret)

    async def embed(request: Request) -> Response:
        # Checked before any of the body is read.
        if secret and not compare_digest(request.headers.get("authorization", "").encode(), authorization.encode()):
            return Response(b"VECTORMILL_ENGINE_SECRET doesn't match", HTTPStatus.UNAUTHORIZED, _CLOSE)
        try:
            body = await _read(request, _GROWTH * most_bytes + _FRAME_BYTES)
        except ClientDisconnect:
            return Response(status_code=400)
        if body is None:
            return Response(status_code=HTTPStatus.REQUEST_ENTITY_TOO_LARGE, headers=_CLOSE)
        asked = orjson.loads(body)
        wanted = asked["model"], asked.get("weights")
        model = catalogue.known(*wanted) or await asyncio.to_thread(catalogue.find, *wanted)
        if model is None:
            return Response(b"this engine doesn't serve the model", 404)
        token_ids = {int(at): ids for at, ids in asked.get("token_ids", {}).items()}
        how = {"queries": asked.get("queries", False), "token_ids": token_ids, "caller": asked.get("caller", "")}
        work = asyncio.ensure_future(batcher.embed(model, asked["texts"], **how))
        gone = asyncio.ensure_future(_gone(request))
        await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
        gone.cancel()
        if not work.done():
            work.cancel()
            return Response(status_code=400)
        try:
            return Response(pack_vectors(work.result()))
        except (UpstreamUnavailable, BadVector, ModelsOwnTokens, ModelError) as error:
            return _refusal(model, error)

    async def healthz(_: Request) -> Response:
        return Response(b"ok")

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        batcher.stop()

    routes = [
        Route("/embed", embed, methods=["POST"]),
        Route("/healthz", healthz),
        Route("/metrics", partial(_show, batcher)),
    ]
    return Starlette(routes=routes, lifespan=lifespan)


def _refusal(model: Model, error: Exception) -> Response:
    match error:
        case UpstreamUnavailable():
            return Response(str(error).encode(), 503, {"retry-after": str(ceil(error.retry_after_seconds or 1))})
        case BadVector() | ModelsOwnTokens():
            return Response(str(error.index).encode(), error.status)
        case ModelUnusable():
            # The api then asks another engine.
            return Response(str(error).encode(), HTTPStatus.FAILED_DEPENDENCY)
    log.error("model_failed", model=model.name, reason=str(error))
    return Response(str(error).encode(), 500)


async def _show(batcher: Batcher, _: Request) -> Response:
    """Serve the route `/metrics`."""
    batcher.show()
    return Response(metrics_server.page(metrics.ENGINE), media_type=metrics_server.CONTENT_TYPE)


async def _read(request: Request, most_bytes: int) -> bytes | None:
    """Return a request's body; None if it is larger than `most_bytes`, and then read no more of it."""
    told = request.headers.get("content-length", "0")
    if told.isdecimal() and int(told) > most_bytes:
        return None
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > most_bytes:
            return None
    return bytes(body)


async def _gone(request: Request) -> None:
    """Return when the client has closed its connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def main() -> None:
    """Serve until SIGTERM, and finish the requests in flight. The server is a child process, which is replaced when it
    is killed."""
    settings = load_settings()
    configure_logs(settings.log_level)
    if settings.database_url is None:
        raise UserError("an engine needs VECTORMILL_DATABASE_URL.")
    if settings.engine_secret is None and not is_loopback(settings.engine_host):
        raise UserError(
            f"an engine at {settings.engine_host}, beyond this machine, needs VECTORMILL_ENGINE_SECRET, "
            "and the api the same one."
        )
    hold_signals()
    listener = socket.create_server((settings.engine_host, settings.engine_port), backlog=1024)
    host = socket.gethostname() if _is_everywhere(settings.engine_host) else settings.engine_host
    url, engine_id = f"http://{host}:{listener.getsockname()[1]}", uuid4()
    with _database(settings) as database:
        catalogue = ServedModels(database, settings, url, engine_id)
        catalogue.read()
        # Publish the engine already: requests can wait for the first child. Not if named models must be loaded first.
        with nullcontext() if settings.worker_models else catalogue.followed(goodbye=False):
            import_library()  # takes seconds, and children inherit it
            import workers.encoders.local  # noqa: F401
    serve_in_child(partial(_serve, settings, url, engine_id, catalogue.models), listener)


def _serve(
    settings: Settings,
    url: str,
    engine_id: UUID,
    known: dict[str, Model],
    listener: socket.socket,
    deaths: int,
) -> None:
    device = settings.worker_devices[0]
    memory_bytes = settings.worker_memory_bytes or psutil.virtual_memory().total
    loader = Loader(device, os.cpu_count() if device == "cpu" else None, settings.worker_dtype)
    batcher = Batcher(ModelCache(loader, int(memory_bytes * MODELS_SHARE)), settings.engine_queue_seconds)
    with _database(settings) as database:
        catalogue = ServedModels(database, settings, url, engine_id, batcher.can_use)
        # The database may be away when a child is replaced.
        catalogue.models = known
        with suppress(SQLAlchemyError):
            catalogue.read()
        if settings.worker_models:
            with catalogue.followed(goodbye=False) if deaths else nullcontext():
                _load_all(catalogue, batcher)
        app = make_app(catalogue, batcher, settings.engine_secret, settings.api_body_bytes)
        with catalogue.followed(goodbye=True):
            http_server.run(app, metrics.ENGINE_CONNECTIONS_CLOSED, [listener])


@contextmanager
def _database(settings: Settings) -> Iterator[Database]:
    assert settings.database_url
    made = make_engine(settings.database_url.get_secret_value(), application="vectormill-engine", pool_size=1)
    try:
        yield made
    finally:
        made.dispose()


def is_loopback(host: str) -> bool:
    """Return True if an address can be reached from this machine only."""
    try:
        return ip_address(host).is_loopback
    except ValueError:  # a name
        return host == "localhost"


def _is_everywhere(host: str) -> bool:
    """Return True if an address means every address of this machine, and so can't be used to reach it."""
    try:
        return ip_address(host).is_unspecified
    except ValueError:  # a name
        return False


def _load_all(catalogue: ServedModels, batcher: Batcher) -> None:
    for model in list(catalogue.models.values()):
        with suppress(ModelUnusable):  # already logged; the other models are served
            batcher.load_now(model)


if __name__ == "__main__":
    main()
