"""Celery task of a worker: find the model, claim, run. A claim that fails is given back, or its process exits."""

import os
from dataclasses import dataclass
from functools import cache
from math import inf
from uuid import UUID

import psutil
import structlog
from billiard import current_process
from celery import Task
from celery.exceptions import Retry
from psycopg.errors import CheckViolation, InsufficientPrivilege
from sqlalchemy import Engine
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError, ProgrammingError

from pipeline.broker import RUN_CHUNK
from pipeline.catalog.models import as_model
from pipeline.catalog.rates import least_rate
from pipeline.core.chunks import ChunkState, Claim
from pipeline.core.errors import (
    GatewayBusy,
    GatewayRefused,
    LeaseLost,
    ModelError,
    SourceChanged,
    SourceError,
    StorageRefused,
    StorageUnreachable,
    VectormillError,
)
from pipeline.core.jobs import Reason
from pipeline.core.models import Model
from pipeline.core.options import Precision
from pipeline.db import chunks, jobs, lost_claims, models, workers
from pipeline.db.database import is_connection_lost, make_engine, plain_reason
from pipeline.infra import metrics
from pipeline.infra.settings import MODELS_SHARE, Settings, load_settings, read_key
from pipeline.jobs import control
from workers import instrumentation
from workers.encoders.batching import Encoder
from workers.encoders.model_cache import Loader, ModelCache
from workers.runner.app import app, worker_id_of
from workers.runner.outcome import GivenBack, Lost, NotDone, Refused, Result
from workers.runner.run_chunk import run_chunk
from workers.upstream.attempts import Attempts
from workers.upstream.client import UpstreamClient
from workers.upstream.encoder import PATIENCE_SECONDS, UpstreamEncoder
from workers.upstream.rate_limiter import RateLimiter, connect
from workers.upstream.state import UpstreamState
from workers.watchdog import Watch

log = structlog.get_logger()

#: Backoff of a chunk that failed for a reason outside of it.
_BACK_OFF_SECONDS = 10.0
_LEAST_HANG_SECONDS = 60.0
_HANG_FACTOR = 20
#: Commit interval of an upstream's vectors, since they are paid for.
_COMMIT_SECONDS = 10.0
#: Approximate number of commits per chunk for vectors that are computed here and go to Postgres.
_COMMITS = 8


@dataclass(frozen=True, slots=True)
class Link:
    """Connection of a child to an upstream's model, with its rate limiter and state."""

    model: Model
    client: UpstreamClient
    #: Account of its limits, shared by the fleet.
    limiter: RateLimiter
    state: UpstreamState


class Child:
    """Resources that a child process keeps from one chunk to the next."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        url = settings.database_url
        assert url is not None
        # For commits, for what is read ahead, for vectors that are reused or an upstream's requests, and for the lease.
        self.engine: Engine = make_engine(url.get_secret_value(), application="vectormill-worker", pool_size=4)
        devices = settings.worker_devices
        device = devices[current_process().index % len(devices)]
        on_cpu = device == "cpu"
        threads = max(1, (os.cpu_count() or 1) // settings.worker_replicas) if on_cpu else None
        memory_bytes = settings.worker_memory_bytes or psutil.virtual_memory().total
        self.model_cache = ModelCache(
            Loader(device, threads, settings.worker_dtype),
            int(memory_bytes * MODELS_SHARE) // settings.worker_replicas,
        )
        assert settings.redis_url is not None
        self._redis = connect(settings.redis_url.get_secret_value())
        self._links: dict[str, Link] = {}

    def link(self, model: Model) -> Link:
        """Return the link to an upstream's model: the one that is kept, unless its catalogue entry has changed."""
        upstream, kept = model.upstream, self._links.get(model.name)
        assert upstream
        if kept is None or (kept.model.upstream, kept.model.weights_sha256) != (upstream, model.weights_sha256):
            if kept:
                kept.client.close()
            seconds, in_flight = self.settings.gateway_seconds, self.settings.gateway_in_flight
            client = UpstreamClient(upstream, seconds=seconds, in_flight=in_flight)
            limiter = RateLimiter(self._redis, upstream, request_seconds=seconds)
            kept = self._links[model.name] = Link(model, client, limiter, UpstreamState())
        return kept

    def is_held(self, model: Model) -> bool:
        """Return True if an upstream lets nothing through for longer than a chunk would wait for it."""
        assert model.upstream
        limiter = self.link(model).limiter
        limiter.key = read_key(model.upstream.key_env) if model.upstream.key_env else None
        return limiter.held_seconds() > PATIENCE_SECONDS

    def prepare(self, model: Model, claim: Claim) -> tuple[Encoder, Watch]:
        """Return the encoder of a claimed chunk, and the watch over it.

        Raises:
            GatewayRefused: the upstream's key isn't set here.
        """
        most_seconds = most_chunk_seconds(self.settings)
        if model.upstream:
            # The encoder stops by itself at the chunk's time limit, after the requests in flight.
            hung_after = most_seconds + 2 * self.settings.gateway_seconds
            watch = Watch(hung_after, most_seconds, commit_seconds=_COMMIT_SECONDS)
            link, attempts = self.link(model), Attempts(self.engine, claim, model.name, watch)
            in_flight = self.settings.gateway_in_flight
            encoder = UpstreamEncoder(model, link.client, link.limiter, attempts, link.state, in_flight=in_flight)
            return encoder, watch
        local = self.model_cache.get(model, claim.options.precision)
        metrics.WORKER_DEVICE_MEMORY_BYTES.labels(str(local.device)).set(local.held_bytes)
        with self.engine.begin() as connection:
            rate = least_rate(connection, model, claim.options.precision, local.device_kind)
        # A single long text may exceed the budget.
        expected_seconds = max(local.budget_tokens, claim.max_item_tokens or 0) / rate
        hung_after = max(_LEAST_HANG_SECONDS, _HANG_FACTOR * expected_seconds)
        # A commit costs little beside the work that it saves from a crash. With an output it would add a part file.
        commit_seconds = inf if claim.options.output else self.settings.chunk_seconds / _COMMITS
        return local, Watch(hung_after, most_seconds, commit_seconds=commit_seconds)


@cache
def _child() -> Child:
    return Child(load_settings())


@app.task(name=RUN_CHUNK, bind=True, throws=(NotDone,))
def run_chunk_task(task: Task, job: str, chunk_id: int) -> Result:
    """Embed one chunk of a job, if it can be claimed. The result and errors are for Flower; Postgres has the truth."""
    child, worker_id, job_id = _child(), worker_id_of(task.request.hostname), UUID(job)
    with structlog.contextvars.bound_contextvars(job=job, chunk=chunk_id, fence=None):
        try:
            wanted = _model_of(child.engine, job_id)
            if wanted is None:
                return Result("nothing to do: its job is gone")
            model, precision = wanted
            try:
                if not model.upstream:
                    child.model_cache.get(model, precision)  # a model that can't be loaded takes no chunk
                return _run(child, model, job_id, chunk_id, worker_id, task.request.id)
            except ModelError as error:
                log.error("model_dropped", model=model.name, reason=str(error))
                child.model_cache.drop(model.name)
                with child.engine.begin() as connection:
                    workers.drop_model(connection, worker_id, model.name, str(error))
                raise Refused.of(error) from None
        except LeaseLost:
            log.warning("lease_lost")
            raise Lost("another claim has the chunk, or its job has ended") from None
        except DBAPIError as error:
            if not is_connection_lost(error):
                # Celery logs this error and Flower shows it, so it must not hold the rows that Postgres quotes.
                raise VectormillError(plain_reason(error)) from None
            log.warning("database_unreachable")
            raise _retry(GivenBack("not claimed: the database is away")) from None
        except GivenBack as reason:
            raise _retry(reason) from None


def _retry(reason: GivenBack) -> Retry:
    """Return what gives a task the state of one that another follows; the dispatcher sends that one."""
    return Retry(str(reason), reason)


def _model_of(engine: Engine, job_id: UUID) -> tuple[Model, Precision] | None:
    with engine.begin() as connection:
        row = models.of_job(connection, job_id)
    return (as_model(row), Precision(row["precision"])) if row else None


def _run(child: Child, model: Model, job_id: UUID, chunk_id: int, worker_id: UUID, task_id: str) -> Result:
    if model.upstream and child.is_held(model):
        instrumentation.let_go(model.name, "held")
        raise GivenBack("not claimed: its gateway lets nothing through now")
    with child.engine.begin() as connection:
        claim = chunks.claim(
            connection,
            job_id,
            chunk_id,
            worker_id=worker_id,
            task_id=task_id,
            lease_seconds=child.settings.lease_seconds,
        )
    if claim is None:
        log.debug("nothing_to_claim")
        instrumentation.let_go(model.name, "missed")
        return Result("nothing to do: it waits for nobody, as it has ended, runs or is paused")
    structlog.contextvars.bind_contextvars(fence=claim.fence)
    return _embed(child, model, claim)


def _embed(child: Child, model: Model, claim: Claim) -> Result:
    """Embed a claimed chunk, and settle the claim however it ends."""
    try:
        with instrumentation.claimed(model.name):
            encoder, watch = child.prepare(model, claim)
            tally = run_chunk(child.engine, encoder, claim, watch, on_hang=_leave)
    except GatewayBusy as error:
        log.warning("gateway_busy", error=str(error), wait_seconds=round(error.wait_seconds, 1))
        raise GivenBack.of(error) from None
    except GatewayRefused as error:
        _give_back(child.engine, claim, error)
        _pause_jobs(child.engine, model, error)
        raise Refused.of(error) from None
    except ModelError as error:
        # The canary came out right at loading. A process that lost its device never gets it back; a new one may.
        log.error("model_stopped", model=model.name, reason=str(error))
        try:
            with child.engine.begin() as connection:
                lost_claims.note_stop(connection, claim)
            _give_back(child.engine, claim, error)
        finally:
            os._exit(70)
    except (LeaseLost, DBAPIError) as error:
        _give_back(child.engine, claim, error)
        if isinstance(error, IntegrityError | DataError | ProgrammingError):
            _stop_job(child.engine, claim, error)
        if isinstance(error, DBAPIError) and is_connection_lost(error):
            log.warning("database_unreachable")
            raise Lost("the database is away") from None
        raise
    except (SourceError, StorageRefused, StorageUnreachable) as error:
        _give_back(child.engine, claim, error)
        _stop_job(child.engine, claim, error)
        kind = GivenBack if isinstance(error, StorageUnreachable) else Refused
        raise kind.of(error) from None
    except Exception as error:  # noqa: BLE001
        # A text or a bug of ours caused this. Exit: the parent frees the claim and counts the loss, so that
        # isolation finds the text, and a worker that loses chunk after chunk rests.
        log.error("chunk_crashed", error=type(error).__name__)
        os._exit(70)
    if tally.given_back:
        raise GivenBack(f"{tally.given_back}; {tally}")
    return Result(str(tally))


def _pause_jobs(engine: Engine, model: Model, error: GatewayRefused) -> None:
    """Pause all jobs of a model whose upstream refuses, until a person has fixed what the error says."""
    log.error("gateway_refused", model=model.name, reason=str(error))
    with engine.begin() as connection:
        for job_id in jobs.running_of_model(connection, model.name):
            control.pause_for(connection, job_id, Reason(error.reason), str(error))


def _stop_job(engine: Engine, claim: Claim, error: Exception) -> None:
    """Fail a job whose files have changed or are damaged, or whose table refuses the vectors. Pause one whose storage
    or database refuses us. A storage that doesn't answer is retried with the next claim."""
    job_id, into = claim.job_id, claim.options.table
    with engine.begin() as connection:
        match error:
            case StorageRefused():
                control.pause_for(connection, job_id, Reason.STORAGE_REFUSED, str(error))
            case SourceChanged():
                control.fail(connection, job_id, Reason.SOURCE_CHANGED, str(error))
            case SourceError():
                control.fail(connection, job_id, Reason.SOURCE_DAMAGED, str(error))
            case DBAPIError(orig=InsufficientPrivilege()):
                more = ", update and delete" if into and into.passage_columns else " and update"
                yours = f"; on the job's own table grant select, insert{more}" if into else ""
                message = f"the workers' login lacks a right ({plain_reason(error)}); run ops/postgres/roles.sql{yours}"
                control.pause_for(connection, job_id, Reason.WORKERS_FAILING, message)
            case DBAPIError() if into:
                message = f"the job's own table refuses the vectors ({plain_reason(error)})"
                control.fail(connection, job_id, Reason.TABLE_REFUSED, message)
            case DBAPIError(orig=CheckViolation()) if claim.options.sync:  # there is no partition for its rows
                message = f"its collection is gone ({plain_reason(error)})"
                control.fail(connection, job_id, Reason.TABLE_REFUSED, message)


def most_chunk_seconds(settings: Settings) -> float:
    """Return the time limit of a claim from its first block on; past it, results are committed, the rest given back."""
    return max(300.0, 20 * settings.chunk_seconds)


def _leave() -> None:
    log.error("batch_hung")
    os._exit(70)


def _give_back(engine: Engine, claim: Claim, error: Exception) -> None:
    """Give back the chunk for other workers, unless another claim has it already or the database is away.

    A chunk may still be this claim's although its lease seemed lost: a failover took commits, so the row isn't as the
    claim left it.
    """
    if isinstance(error, DBAPIError) and is_connection_lost(error):
        return
    progress = chunks.Progress(
        state=ChunkState.PENDING,
        not_before_seconds=0 if isinstance(error, ModelError | LeaseLost) else _BACK_OFF_SECONDS,
        isolation=None,
        error=plain_reason(error) if isinstance(error, DBAPIError) else str(error) or None,
    )
    with engine.begin() as connection:
        given_back = chunks.record(connection, claim, progress)
    if given_back:
        log.warning("chunk_given_back", error=type(error).__name__)
