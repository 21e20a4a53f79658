"""Idempotent submission: make a job, or attach to the one that the idempotency key made before."""

from uuid import UUID

from sqlalchemy import Connection, Engine
from uuid_utils.compat import uuid7

from pipeline.catalog.models import vector_space_of
from pipeline.core.errors import CollectionBusy, IdempotencyConflict, NotRetriable, UserError
from pipeline.core.jobs import Job, JobState
from pipeline.core.models import Model
from pipeline.core.options import LEAST_PASSAGE_TOKENS, JobOptions, OnLong, Precision, UserTable
from pipeline.db import collections, jobs, partitions, staging, syncs, user_table
from pipeline.db.collections import Collection
from pipeline.db.staging import Producer
from pipeline.ingest.staging import Staging, delete_items, undo
from pipeline.ingest.submission import Submission, Submitted
from pipeline.jobs import control
from pipeline.sources import Corpus, Source
from pipeline.sources.by_reference import check_referable


def submit(engine: Engine, submission: Submission) -> Submitted:
    """Make a job of a corpus, or attach to the one that its idempotency key made before.

    Nothing runnable is left behind when this raises.

    Raises:
        SourceError: the corpus can't be read; `EmptySource`: it has no item.
        IdempotencyConflict: the key was used with another payload.
        NotRetriable: its job has failed for good.
        UserError: an option doesn't fit the model, or `unique_keys` and a key comes twice.
        CollectionBusy: the job is a sync, and another one of its collection hasn't ended.
    """
    options, key = submission.options, submission.idempotency_key
    check(options, submission.corpus, submission.model)
    with engine.begin() as connection:
        # Look first: an insert would block on the uncommitted transaction of the job's producer.
        known = key is not None and jobs.by_idempotency_key(connection, submission.workspace_id, key) is not None
    if known:
        return _attach(engine, submission)
    with engine.begin() as connection:
        space = vector_space_of(
            connection, submission.model, dimensions=options.dimensions, max_item_tokens=options.max_item_tokens
        )
        if submission.collection and submission.collection.vector_space_id != space:
            raise UserError(
                f"model {submission.model.name} isn't what it was when the collection {submission.collection.name} was "
                "created, so its vectors can't be mixed with those that are there; create another collection."
            )
        job = staging.NewJob(
            id=submission.job_id or uuid7(),
            workspace_id=submission.workspace_id,
            name=submission.name,
            model_name=submission.model.name,
            vector_space_id=space,
            priority=submission.priority,
            labels=submission.labels,
            options=submission.kept_options(_table(connection, submission)),
            idempotency_key=key,
            payload_sha256=submission.payload(),
            version_id=submission.collection.version_id if submission.collection else None,
            submitted_by=submission.submitted_by,
            query=submission.query,
            lease_seconds=submission.planning.lease_seconds,
        )
        partitions.make_month(connection, partitions.month_of(job.id))
        if submission.collection is None:
            tell_namesake(connection, submission.workspace_id, submission.name, submission.corpus)
        producer = staging.begin(connection, job)
        if producer:
            _begin_sync(connection, submission, job.id)
    if producer:
        return Submitted(job.id, notices=Staging(engine, submission, producer).run())
    if submission.collection:
        _make_way(engine, submission, submission.collection)
    return _attach(engine, submission) if key is not None else submit(engine, submission)


def _begin_sync(connection: Connection, submission: Submission, job_id: UUID) -> None:
    if submission.collection and submission.sync:
        syncs.forget(connection, job_id)  # what an earlier producer of this job has left
        collections.begin_sync(
            connection,
            job_id,
            submission.collection,
            whole=submission.sync.whole,
            beside=submission.beside,
        )


def _make_way(engine: Engine, submission: Submission, collection: Collection) -> None:
    """Undo a sync of the same collection whose producer died.

    Raises:
        CollectionBusy: another sync goes on.
    """
    with engine.begin() as connection:
        running = syncs.running(connection, collection.version_id)
        job = jobs.by_id(connection, running) if running else None
        if job is None or (submission.idempotency_key and job.idempotency_key == submission.idempotency_key):
            return
        heir = None
        if job.state is JobState.STAGING:
            heir = staging.take_over(connection, Producer.of(job), submission.planning.lease_seconds)
    if heir is None:
        raise CollectionBusy(collection.name, job.id)
    undo(engine, heir)


def check(options: JobOptions, corpus: Source, model: Model) -> None:
    """Raise `UserError` for options that can't work or would have no effect, before anything is read."""
    _check_ways(options, corpus)
    _check_dialect(corpus)
    check_model(options, model)


def check_model(options: JobOptions, model: Model) -> None:
    """Raise `UserError` for options that don't fit a model."""
    check_lengths(options, model)
    if model.upstream and options.precision is not Precision.AUTO:
        raise UserError(
            f"{model.name} is served by an upstream, which decides that itself; leave it out.",
            field="precision",
            given=options.precision,
        )


def _check_dialect(corpus: Source) -> None:
    columns = corpus.columns
    if columns.delimiter is None and columns.quote is None:
        return
    files = corpus.files if isinstance(corpus, Corpus) else []
    if not any(file.format.divided for file in files):
        raise UserError(
            f"{corpus.name} has no .csv or .tsv file, so it has no effect; leave it out.",
            field="delimiter" if columns.delimiter is not None else "quote",
        )


def tell_namesake(connection: Connection, workspace_id: int, name: str, corpus: Source) -> None:
    """Add a notice if another job has this name."""
    if others := jobs.named(connection, workspace_id, name, 1):
        corpus.notices.add("name", _name_taken(name, others[0]["id"]))


def _name_taken(name: str, other: UUID) -> str:
    return (
        f'another job is called "{name}" too, {other}; by the name, commands that read mean the newest, '
        "and those that change a job may ask for its id."
    )


def _check_ways(options: JobOptions, corpus: Source) -> None:
    control.reject_limit(options.max_rejects, 0)
    if options.by_reference:
        if not isinstance(corpus, Corpus):
            raise UserError("a query can't be read by reference; leave the option out.", field="by_reference")
        if options.unique_keys:
            raise UserError(
                "it needs all keys in Postgres, so this job can't be read by reference; leave one of the two out.",
                field="unique_keys",
            )
        for file in corpus.files:
            check_referable(file)
    if options.into and options.output:
        raise UserError("it is for vectors in Postgres, not in Parquet; leave it or output out.", field="into")
    if options.hnsw and not options.into:
        raise UserError("the index is made on a table of yours; name one with into.", field="hnsw")


def check_lengths(options: JobOptions, model: Model) -> None:
    """Refuse text lengths that the model can't honour; a gateway model's limits can't be changed."""
    if options.splits:
        _check_passage_tokens(options, model)
    if model.upstream is None:
        if options.max_item_tokens and model.max_item_tokens and options.max_item_tokens > model.max_item_tokens:
            raise UserError(
                f"{model.name} reads {model.max_item_tokens:,} tokens of a text at most; ask for no more, or leave it "
                "out.",
                field="max_item_tokens",
                given=f"{options.max_item_tokens:,}",
            )
        if options.on_long is OnLong.REJECT and not options.max_item_tokens and not model.max_item_tokens:
            raise UserError(
                f"{model.name} reads texts of any length, so none is too long; leave it out, or set a length with "
                "max_item_tokens.",
                field="on_long",
            )
        return
    if options.max_item_tokens not in (None, model.max_item_tokens):
        raise UserError(
            f"{model.name} is served by an upstream, which takes no token limit; leave it out.",
            field="max_item_tokens",
            given=f"{options.max_item_tokens:,}",
        )
    if options.on_long is OnLong.REJECT:
        raise UserError(
            f"{model.name} is served by an upstream, and only that knows which texts are too long; leave it out.",
            field="on_long",
            given="reject",
        )


def _check_passage_tokens(options: JobOptions, model: Model) -> None:
    """Refuse passages that the model can't read whole, or whose tokens nobody here can count."""
    option = "split" if options.split else "on_long"
    if model.upstream:
        raise UserError(
            f"{model.name} is served by an upstream, and only that can count its tokens; split the texts before, or "
            "use a local model.",
            field=option,
        )
    most = min((bound for bound in (options.max_item_tokens, model.max_item_tokens) if bound), default=None)
    if options.split and most and options.split > most:
        raise UserError(
            f"{model.name} reads {most:,} tokens of a text at most here; ask for no more.",
            field="split",
            given=f"{options.split:,}",
        )
    if not options.split and not most:
        raise UserError(
            f"{model.name} reads texts of any length, so none is too long; set split to the tokens of a passage.",
            field="on_long",
        )
    if not options.split and most and most < LEAST_PASSAGE_TOKENS:
        raise UserError(
            f"passages of {most:,} tokens are too small, give at least {LEAST_PASSAGE_TOKENS}.", field="max_item_tokens"
        )
    tokens = options.split or most
    if tokens and options.overlap > tokens // 2:
        raise UserError(f"give at most half of a passage, {tokens // 2:,} tokens.", field="overlap")


def _table(connection: Connection, submission: Submission) -> UserTable | None:
    options = submission.options
    if not options.into:
        return None
    dimensions = options.dimensions or submission.model.dimensions
    key = submission.corpus.columns.key
    return user_table.check(
        connection,
        options.into,
        key_column=key,
        dimensions=dimensions,
        hnsw=options.hnsw,
        passages=options.splits,
        deletes=submission.sync is not None,
    )


def _attach(engine: Engine, submission: Submission) -> Submitted:
    """Attach to the job that has this idempotency key, or resume it."""
    key = str(submission.idempotency_key)
    with engine.begin() as connection:
        known = jobs.by_idempotency_key(connection, submission.workspace_id, key)
    if known is None:  # its submission was undone just now
        return submit(engine, submission)
    job, is_dead = known
    job_id = job.id
    if submission.job_id not in (None, job_id):
        raise _conflict(key, job_id)
    if job.state is JobState.STAGING:
        return _attach_to_staging(engine, submission, job, is_dead=is_dead)
    submission.corpus.read_fingerprint()
    if submission.payload() != job.payload_sha256:
        raise _conflict(key, job_id)
    if job.state is JobState.FAILED:
        return _resume(engine, submission, job_id)
    return Submitted(job_id, f"this idempotency key made job {job_id} before; it is {job.state}")


def _resume(engine: Engine, submission: Submission, job_id: UUID) -> Submitted:
    """Resume a failed job."""
    made = f"this idempotency key made job {job_id} before"
    reopened = None
    with engine.begin() as connection:
        job = jobs.lock(connection, job_id)
        if job is not None and job.state is JobState.FAILED:
            try:
                reopened = control.retry(connection, job_id)
            except NotRetriable as error:
                raise NotRetriable(f"{made}, which failed: {error} Use another key.", job_id) from error
            submission.on_queue(connection, job_id)
    if reopened is None:  # another submission was faster
        return _attach(engine, submission)
    how = f"resumed with {reopened:,} chunks" if reopened else "and nothing in it can be retried; use another key"
    return Submitted(job_id, f"{made}; it had failed, {how}")


def _attach_to_staging(engine: Engine, submission: Submission, job: Job, *, is_dead: bool) -> Submitted:
    """Leave the job to its producer while that is alive; otherwise take it over and start again."""
    job_id, lease_seconds = job.id, submission.planning.lease_seconds
    if submission.payload() != job.payload_sha256:
        raise _conflict(str(submission.idempotency_key), job_id)
    producer = None
    if is_dead:
        with engine.begin() as connection:
            producer = staging.take_over(connection, Producer.of(job), lease_seconds)
    if producer is None:
        return Submitted(job_id, f"job {job_id} is being submitted with this idempotency key right now")
    delete_items(engine, producer)
    with engine.begin() as connection:
        if not staging.hold(connection, producer, lease_seconds):
            return Submitted(job_id, f"job {job_id} is being submitted with this idempotency key right now")
        staging.delete_chunks(connection, job_id)
        _begin_sync(connection, submission, job_id)
    return Submitted(job_id, notices=Staging(engine, submission, producer).run())


def _conflict(key: str, job_id: UUID) -> IdempotencyConflict:
    return IdempotencyConflict(
        f'the idempotency key "{key}" made job {job_id} from another payload (files, model or options differ); '
        "use another key."
    )
