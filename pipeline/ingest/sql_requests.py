"""Jobs requested in SQL: a request becomes a job over its query's rows.

The query runs on a connection of its own, whose login has only the rights that the operator gave it: on the pipeline's
own connection, a query could reset any role that was set for it.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from uuid import UUID

import orjson
import structlog
from sqlalchemy import Connection, Engine, RowMapping
from sqlalchemy.exc import DBAPIError

from pipeline.catalog.models import find_model
from pipeline.core.errors import (
    CollectionBusy,
    EmptySource,
    LeaseLost,
    ServiceUnreachable,
    SourceError,
    SourceStopped,
    UserError,
    VectormillError,
    Waiting,
)
from pipeline.core.jobs import JobState
from pipeline.core.options import Columns
from pipeline.core.requests import RequestReason, RequestState
from pipeline.db import jobs, sql_requests
from pipeline.db.collections import Collection
from pipeline.db.database import reporting_unreachable
from pipeline.db.staging import Producer
from pipeline.infra import metrics
from pipeline.infra.settings import Settings
from pipeline.ingest import staging
from pipeline.ingest.request import ELSEWHERE, JobRequest, read_fields, read_request
from pipeline.ingest.submission import Submission, planning
from pipeline.ingest.submit import submit
from pipeline.ingest.sync import SyncRequest, columns_of, submission_of, sync_other_versions
from pipeline.jobs import control
from pipeline.jobs.collections import find_collection
from pipeline.sources.query import QueryCorpus
from pipeline.webhooks import allowlist
from pipeline.webhooks.events import request_ended

log = structlog.get_logger()

#: Time limit for reaching a request's database, from the first failure after its last rows came.
_PATIENCE_SECONDS = 900.0
_MOST_MESSAGE = 2_000
#: Time between two tries to begin a sync while another one goes on.
_BUSY_SECONDS = 5.0


def stage(engine: Engine, settings: Settings, job_id: UUID) -> None:
    """Make a job of a request, or record in the request why not. Idempotent: repeated or concurrent calls make one job.

    Raises:
        ServiceUnreachable: the query's database can't be reached for now; the request waits.
        Waiting: another sync of the collection goes on.
    """
    with reporting_unreachable(), engine.begin() as connection:
        row = sql_requests.read(connection, job_id)
    if row is None or row["state"] != "requested":
        return
    came: list[int] = []
    try:
        submission, wish = _submission(engine, settings, row)
        done = submit(engine, replace(submission, on_items=came.append))
    except LeaseLost:  # another dispatcher has taken it over, or it was cancelled
        _heed_cancel(engine, job_id)
    except ServiceUnreachable as error:
        with engine.begin() as connection:
            waits = sql_requests.note_unreachable(connection, job_id, _short(error), anew=bool(came))
        if waits < _PATIENCE_SECONDS:
            raise
        _fail(engine, row, RequestReason.SOURCE_UNREACHABLE, error)
    except CollectionBusy as busy:
        raise Waiting(str(busy), most_seconds=_BUSY_SECONDS) from busy
    except UserError as error:
        _fail(engine, row, _reason(error), error)
    except DBAPIError:  # from our own database, not the query's
        raise
    except Exception as error:
        _fail(engine, row, RequestReason.QUERY_REFUSED, error)
        raise
    else:
        with engine.begin() as connection:
            sql_requests.end_submitted(connection, job_id)
        _heed_cancel(engine, job_id)
        _sync_other_versions(engine, submission, wish, done.job_id)


def _sync_other_versions(engine: Engine, submission: Submission, wish: JobRequest | SyncRequest, leader: UUID) -> None:
    if isinstance(wish, SyncRequest):
        for told in sync_other_versions(engine, submission, wish, leader):
            log.info("other_version_synced", job=str(leader), message=told)


def _heed_cancel(engine: Engine, job_id: UUID) -> None:
    """Undo or cancel the job of a request that was cancelled while the job was being made."""
    with engine.begin() as connection:
        row, job = sql_requests.read(connection, job_id), jobs.by_id(connection, job_id)
        if row is None or job is None or row["state"] != RequestState.CANCELLED:
            return
        if job.state in (JobState.QUEUED, JobState.RUNNING):  # a failed job that was resumed at that moment
            control.cancel(connection, job_id)
    if job.state == JobState.STAGING:
        staging.undo(engine, Producer.of(job))


def _submission(engine: Engine, settings: Settings, row: RowMapping) -> tuple[Submission, JobRequest | SyncRequest]:
    wish, columns, collection = _wish(engine, row)
    if settings.sql_url is None:
        raise UserError(
            "no login for queries: set VECTORMILL_SQL_URL of the dispatcher to the URL of a role that may read what "
            "requests select from, and nothing else."
        )
    if wish.webhook:
        allowlist.check(wish.webhook, settings.webhooks)
    with engine.begin() as connection:
        model = find_model(connection, row["workspace_id"], collection.model if collection else row["model"])
    corpus = QueryCorpus(
        settings.sql_url.get_secret_value(),
        row["query"],
        columns,
        settings.item_bytes,
        asked_by="VECTORMILL_SQL_URL",
        movable=True,
        seconds=settings.sql_seconds,
    )
    request: dict[str, Any] = {
        # The default key lets another dispatcher take over if this one dies.
        "idempotency_key": row["idempotency_key"] or f"sql {row['job_id']}",
        "job_id": row["job_id"],
        "submitted_by": f"role {row['requested_by']}",
        "on_queue": _end_submitted,
        "on_lost": lambda: corpus.stop(LeaseLost()),
    }
    if collection and isinstance(wish, SyncRequest):
        return submission_of(collection, model, wish, corpus, planning(settings), **request), wish
    assert isinstance(wish, JobRequest)
    submission = Submission(
        workspace_id=row["workspace_id"],
        model=model,
        corpus=corpus,
        planning=planning(settings),
        name=wish.name or "query",
        options=wish,
        priority=wish.priority,
        labels=wish.labels,
        **request,
    )
    return submission, wish


def _end_submitted(connection: Connection, job_id: UUID) -> None:
    """Mark the request as submitted, in the transaction that queues the job: a cancelled request never runs."""
    if not sql_requests.end_submitted(connection, job_id):
        raise LeaseLost("the request was cancelled meanwhile.")


#: Arguments of the SQL function, options that only files have, and those that its argument `options` may hold.
_ARGUMENTS = ("model", "name", "text_column", "key_column")
_OF_FILES = ("sources", "quote", "delimiter", "by_reference", "output")
SUBMIT_OPTIONS = [name for name in JobRequest.model_fields if name not in {*_ARGUMENTS, *_OF_FILES, *ELSEWHERE}]
SYNC_OPTIONS = [name for name in SyncRequest.model_fields if name not in {"name", *_OF_FILES}]


def _wish(engine: Engine, row: RowMapping) -> tuple[JobRequest | SyncRequest, Columns, Collection | None]:
    """Return what a request asks for, the columns that it reads, and of a sync the collection."""
    if row["collection"] is None:
        fields = {name: row[name] for name in _ARGUMENTS}
        wish = read_request({**_options(row, SUBMIT_OPTIONS), **fields})
        return wish, wish.columns, None
    with engine.begin() as connection:
        collection = find_collection(connection, row["workspace_id"], row["collection"])
    sync = read_fields(SyncRequest, {**_options(row, SYNC_OPTIONS), "name": row["name"]})
    return sync, columns_of(collection, sync), collection


def _options(row: RowMapping, known: Sequence[str]) -> dict[str, Any]:
    try:
        options: dict[str, Any] = orjson.loads(row["options"])
    except ValueError:
        raise UserError("they hold a number that is too large, or too many brackets.", field="options") from None
    if unknown := sorted(options.keys() - set(known)):
        raise UserError(
            f"no such option; the options are {', '.join(known)}.",
            field="options",
            given=f'"{unknown[0][:100]}"',
        )
    return options


def _reason(error: UserError) -> RequestReason:
    match error:
        case EmptySource():
            return RequestReason.EMPTY_SOURCE
        case SourceStopped():
            return RequestReason.QUERY_STOPPED
        case SourceError():
            return RequestReason.QUERY_REFUSED
        case _:
            return RequestReason.REQUEST_REFUSED


def _fail(engine: Engine, row: RowMapping, reason: RequestReason, error: Exception) -> None:
    with engine.begin() as connection:
        failed = sql_requests.end_failed(connection, row["job_id"], reason, _short(error))
        if failed:
            request_ended(connection, row, JobState.FAILED, reason, _short(error))
    if failed:
        metrics.DISPATCHER_JOBS_ENDED.labels("failed").inc()
        log.warning("request_failed", job=str(row["job_id"]), reason=reason.value)


def _short(error: Exception) -> str:
    if not isinstance(error, VectormillError):  # its text may quote rows of the query
        return f"a row can't be read ({type(error).__name__})."
    return str(error)[:_MOST_MESSAGE]
