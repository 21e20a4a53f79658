"""A corpus becomes a job: items copied in bounded commits, chunks planned, queued in one short last transaction."""

import hashlib
import json
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from time import monotonic
from typing import Any
from uuid import UUID

import numpy as np
import structlog
from sqlalchemy import Connection, Engine, RowMapping
from sqlalchemy.exc import DBAPIError
from uuid_utils.compat import uuid7

from pipeline import control, parts
from pipeline.catalog import vector_space_of
from pipeline.errors import EmptySource, IdempotencyConflict, LeaseLost, NotRetriable, UserError, VectormillError
from pipeline.jobs import Extent, Model, Reason, Reject
from pipeline.leases import Renewal
from pipeline.plan import Limits, Planner, Range, chunk_tokens, estimate_tokens
from pipeline.settings import Settings
from pipeline.sources import Corpus, Rows, Source, SourceFile
from pipeline.sources.reference import Places, check_referable
from pipeline.store import chunks, into, items, jobs, partitions
from pipeline.store.database import flush_later, is_connection_lost
from pipeline.store.into import Into

log = structlog.get_logger()

#: A submission commits when one of these is reached.
_COMMIT_ROWS = 100_000
_COMMIT_BYTES = 32 * 1024 * 1024
_COMMIT_SECONDS = 1.0
_COMMIT_CHUNKS = 5_000
_DELETE_ITEMS = 20_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What a person may choose of a job."""

    name: str
    dimensions: int | None = None
    dtype: str = "float32"
    max_item_tokens: int | None = None
    on_long: str = "truncate"
    max_rejects: str = ""
    unique_keys: bool = False
    priority: int = 0
    labels: Mapping[str, str] = field(default_factory=dict)
    idempotency_key: str | None = None
    #: Workers read the files themselves; Postgres gets no texts.
    by_reference: bool = False
    #: Folder or URI of the Parquet files that vectors go to, instead of Postgres.
    output: str | None = None
    #: Where the job's end is told, instead of where its workspace says.
    webhook: str | None = None
    #: The user's own table, which gets each vector too, by key.
    into: str | None = None
    #: Whether that table gets an index at the job's end.
    hnsw: bool = False

    def decisive(self) -> dict[str, Any]:
        """Those that decide the result."""
        names = ("dimensions", "dtype", "max_item_tokens", "on_long", "max_rejects", "unique_keys", "by_reference")
        return {name: getattr(self, name) for name in (*names, "output", "into", "hnsw")}


@dataclass(frozen=True, slots=True, kw_only=True)
class Planning:
    """How chunks are cut and how long a producer's lease lasts."""

    chunk_seconds: float
    chunk_items: int
    chunk_bytes: int
    lease_seconds: float


def planning(settings: Settings) -> Planning:
    """How the environment says that chunks are cut."""
    return Planning(
        chunk_seconds=settings.chunk_seconds,
        chunk_items=settings.chunk_items,
        chunk_bytes=settings.chunk_bytes,
        lease_seconds=settings.lease_seconds,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """What is asked for."""

    workspace_id: int
    model: Model
    corpus: Source
    options: Options
    planning: Planning
    #: The job's id, a UUIDv7, where it is known already; needs an idempotency key.
    job_id: UUID | None = None
    #: Hears how many items are committed.
    on_items: Callable[[int], None] = lambda _: None
    #: Called in the transaction that makes the job runnable, anew or again; what it raises undoes that.
    on_queue: Callable[[Connection, UUID], None] = lambda _, __: None
    #: Hears that somebody else has the job by now, while the corpus may still be read.
    on_lost: Callable[[], None] = lambda: None

    def payload(self) -> str:
        """SHA-256 over the sources and the options that decide the result; a stream counts once it is read."""
        decisive = {
            "model": self.model.name,
            "weights": self.model.weights_sha256,
            "source": self.corpus.fingerprint(),
            **self.options.decisive(),
        }
        return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()

    def stored_options(self, into: Into | None) -> dict[str, Any]:
        """What the job row keeps under `options`."""
        return {
            **self.options.decisive(),
            "into": into.to_json() if into else None,
            "columns": asdict(self.corpus.columns),
            "item_bytes": self.corpus.item_bytes,
            "webhook": self.options.webhook,
        }


@dataclass(frozen=True, slots=True)
class Submitted:
    """The job that a submission came to."""

    job_id: UUID
    #: Why no new job was made, for a person; empty when one was.
    attached: str = ""


def submit(engine: Engine, submission: Submission) -> Submitted:
    """Make a job of a corpus, or attach to the one that its idempotency key made before.

    Nothing runnable is left when this raises.

    Raises:
        SourceError: the corpus can't be read; `EmptySource`: it has no item.
        IdempotencyConflict: the key was used with another payload.
        NotRetriable: its job has failed for good.
        UserError: an option doesn't fit the model, or `unique_keys` and a key comes twice.
    """
    options = submission.options
    _check(options, submission.corpus)
    _check_lengths(options, submission.model)
    key = options.idempotency_key
    with engine.begin() as connection:
        # An insert would wait for what the job's producer is about to commit.
        known = key is not None and jobs.by_idempotency_key(connection, submission.workspace_id, key) is not None
    if known:
        return _attach(engine, submission)
    with engine.begin() as connection:
        job = jobs.NewJob(
            id=submission.job_id or uuid7(),
            workspace_id=submission.workspace_id,
            name=options.name,
            model_name=submission.model.name,
            vector_space_id=vector_space_of(
                connection,
                submission.model,
                dimensions=options.dimensions,
                max_item_tokens=options.max_item_tokens,
            ),
            priority=options.priority,
            labels=options.labels,
            options=submission.stored_options(_into(connection, submission)),
            idempotency_key=options.idempotency_key,
            payload_sha256=submission.payload(),
            lease_seconds=submission.planning.lease_seconds,
        )
        partitions.make_month(connection, partitions.month_of(job.id))
        is_new = jobs.insert_staging(connection, job)
    if is_new:
        _Staging(engine, submission, job.id, fence=1).run()
        return Submitted(job.id)
    return _attach(engine, submission)


def _check(options: Options, corpus: Source) -> None:
    """Refuse what can't be, before anything is read."""
    control.reject_limit(options.max_rejects, 0)
    if options.by_reference:
        if not isinstance(corpus, Corpus):
            raise UserError("a query can't be read by reference; leave out --by-reference.")
        if options.unique_keys:
            raise UserError("--unique-keys needs all keys in Postgres; leave out --by-reference, or --unique-keys.")
        for file in corpus.files:
            check_referable(file)
    if options.into and options.output:
        raise UserError("--into is for vectors in Postgres; leave out --output.")
    if options.hnsw and not options.into:
        raise UserError("--hnsw makes an index on the table that --into names; name one.")


def _check_lengths(options: Options, model: Model) -> None:
    """Refuse what only a model that is read here can do."""
    if model.upstream is None:
        return
    if options.max_item_tokens not in (None, model.max_item_tokens):
        raise UserError(
            f"--max-item-tokens {options.max_item_tokens}: {model.name} is read by its gateway, which isn't told; "
            "leave it out."
        )
    if options.on_long == "reject":
        raise UserError(
            f"--on-long reject: {model.name} is read by its gateway, which alone knows what is long; leave it out."
        )


def _into(connection: Connection, submission: Submission) -> Into | None:
    options = submission.options
    if not options.into:
        return None
    dimensions = options.dimensions or submission.model.dimensions
    key = submission.corpus.columns.key
    return into.check(connection, options.into, key_column=key, dimensions=dimensions, hnsw=options.hnsw)


def _attach(engine: Engine, submission: Submission) -> Submitted:
    """Go on from the job that has this idempotency key."""
    key = str(submission.options.idempotency_key)
    with engine.begin() as connection:
        found = jobs.by_idempotency_key(connection, submission.workspace_id, key)
    if found is None:  # it was undone just now
        return submit(engine, submission)
    job_id = found["id"]
    if submission.job_id not in (None, job_id):
        raise _conflict(key, job_id)
    if found["state"] == "staging":
        return _attach_to_staging(engine, submission, found)
    submission.corpus.read_fingerprint()
    if submission.payload() != found["payload_sha256"]:
        raise _conflict(key, job_id)
    if found["state"] == "failed":
        return _resume(engine, submission, job_id)
    return Submitted(job_id, f"this idempotency key made job {job_id} before; it is {found['state']}")


def _resume(engine: Engine, submission: Submission, job_id: UUID) -> Submitted:
    """Let a failed job go on."""
    made = f"this idempotency key made job {job_id} before"
    reopened = None
    with engine.begin() as connection:
        row = jobs.lock(connection, job_id)
        if row is not None and row["state"] == "failed":
            try:
                reopened = control.retry(connection, job_id)
            except NotRetriable as error:
                raise NotRetriable(f"{made}, which failed: {error} Use another key.", job_id) from error
            submission.on_queue(connection, job_id)
    if reopened is None:  # another submission was faster
        return _attach(engine, submission)
    how = f"resumed with {reopened:,} chunks" if reopened else "and nothing in it can be tried again; use another key"
    return Submitted(job_id, f"{made}; it had failed, {how}")


def _attach_to_staging(engine: Engine, submission: Submission, found: RowMapping) -> Submitted:
    """Leave the job to its producer while that lives, else take it over and begin afresh."""
    job_id, fence, lease_seconds = found["id"], found["fence"], submission.planning.lease_seconds
    if submission.payload() != found["payload_sha256"]:
        raise _conflict(str(submission.options.idempotency_key), job_id)
    with engine.begin() as connection:
        ours = found["staging_is_dead"] and jobs.take_over_staging(connection, job_id, fence, lease_seconds)
    if not ours:
        return Submitted(job_id, f"job {job_id} is being submitted with this idempotency key right now")
    _delete_items(engine, job_id, fence + 1)
    with engine.begin() as connection:
        if not jobs.hold_staging(connection, job_id, fence + 1, lease_seconds):
            return Submitted(job_id, f"job {job_id} is being submitted with this idempotency key right now")
        jobs.delete_chunks(connection, job_id)
    _Staging(engine, submission, job_id, fence + 1).run()
    return Submitted(job_id)


def _conflict(key: str, job_id: UUID) -> IdempotencyConflict:
    return IdempotencyConflict(
        f'the idempotency key "{key}" made job {job_id} from another payload (files, model or options differ); '
        "use another key."
    )


class _Staging:
    """One producer's way from `staging` to `queued`."""

    def __init__(self, engine: Engine, submission: Submission, job_id: UUID, fence: int) -> None:
        self._engine, self._submission, self._job_id, self._fence = engine, submission, job_id, fence
        model, options, planning = submission.model, submission.options, submission.planning
        bounds = (options.max_item_tokens, model.max_item_tokens)
        self._max_item_tokens = min((bound for bound in bounds if bound), default=None)
        tokens = chunk_tokens(planning.chunk_seconds, model.tokens_per_second)
        self._planner = Planner(Limits(tokens=tokens, items=planning.chunk_items, bytes=planning.chunk_bytes))
        self._lease_seconds = planning.lease_seconds
        self._items = self._chunks = self._rejects = 0
        #: Indexes of rejects in items that no chunk covers yet.
        self._rejected_at: list[int] = []
        self._spots = _Spots()

    def run(self) -> None:
        """Stage and queue, or undo."""
        try:
            with Renewal(self._renew, self._lease_seconds, self._submission.on_lost):
                self._stage()
        except BaseException as error:
            undo_staging(self._engine, self._job_id, self._fence)
            # The answer to the last COMMIT may have been lost, and the commit not.
            if not (isinstance(error, DBAPIError) and is_connection_lost(error) and self._is_queued()):
                raise

    def _is_queued(self) -> bool:
        with self._engine.begin() as connection:
            row = jobs.by_id(connection, self._job_id)
        return row is not None and row["fence"] == self._fence and row["state"] != "staging"

    def _renew(self) -> bool:
        with self._engine.begin() as connection:
            return jobs.hold_staging(connection, self._job_id, self._fence, self._lease_seconds)

    def _stage(self) -> None:
        corpus, options = self._submission.corpus, self._submission.options
        if options.output:
            parts.occupy(options.output, self._job_id)
        with self._engine.begin() as connection:
            self._hold(connection)
            jobs.insert_inputs(connection, self._job_id, corpus.inputs())
        if options.by_reference:
            assert isinstance(corpus, Corpus)
            self._plan_files(corpus)
        else:
            self._copy_rows(corpus)
        self._queue()

    def _copy_rows(self, corpus: Source) -> None:
        # No transaction is open while blocks are read: a stream may take its time.
        for blocks in _gathered(corpus.blocks()):
            with self._engine.begin() as connection:
                # The last transaction is flushed to disk, and all before it with it; a crash loses a staging anyway.
                flush_later(connection)
                self._hold(connection)
                self._copy(connection, blocks)
            self._submission.on_items(self._items)

    def _plan_files(self, corpus: Corpus) -> None:
        planned: list[chunks.NewChunk] = []
        rows: dict[int, int] = {}
        since = monotonic()
        for ordinal, file in enumerate(corpus.files):
            rows[ordinal] = 0
            for places in corpus.places(file):
                self._spots.add(self._items, ordinal, file, places)
                self._items += len(places.sizes)
                rows[ordinal] += len(places.sizes)
                tokens = estimate_tokens(places.sizes, self._max_item_tokens)
                planned += map(self._new_chunk, self._planner.add(tokens, places.sizes))
                if len(planned) >= _COMMIT_CHUNKS or monotonic() - since > _COMMIT_SECONDS:
                    self._commit_planned(planned, rows)
                    planned, rows, since = [], {ordinal: rows[ordinal]}, monotonic()
            planned += map(self._new_chunk, self._planner.break_off())
        self._commit_planned(planned, rows)

    def _commit_planned(self, planned: Sequence[chunks.NewChunk], rows: Mapping[int, int]) -> None:
        with self._engine.begin() as connection:
            flush_later(connection)
            self._hold(connection)
            chunks.insert_chunks(connection, self._job_id, planned)
            jobs.set_input_rows(connection, self._job_id, rows)
        self._submission.on_items(self._items)

    def _hold(self, connection: Connection) -> None:
        if not jobs.hold_staging(connection, self._job_id, self._fence, self._lease_seconds):
            raise LeaseLost("this submission was cancelled, or taken over by another one with its idempotency key.")

    def _copy(self, connection: Connection, blocks: Sequence[Rows]) -> None:
        items.copy_items(
            connection,
            self._job_id,
            self._items,
            [items.Block(block.keys, block.texts, block.carried) for block in blocks],
        )
        rejects: list[Reject] = []
        planned: list[Range] = []
        for block in blocks:
            rejects += [
                Reject(index=self._items + at, key=block.keys[at], code=code, message=message)
                for at, code, message in block.problems
            ]
            self._items += len(block.keys)
            sizes = np.fromiter((len(text) if text else 0 for text in block.texts), np.int64, len(block.texts))
            planned += self._planner.add(estimate_tokens(sizes, self._max_item_tokens), sizes)
        items.copy_rejects(connection, self._job_id, rejects)
        self._rejects += len(rejects)
        self._rejected_at += [reject.index for reject in rejects]
        chunks.insert_chunks(connection, self._job_id, list(map(self._new_chunk, planned)))

    def _new_chunk(self, chunk: Range) -> chunks.NewChunk:
        """The next chunk, with what was rejected in it, or where its rows stand; both are forgotten with that."""
        rejected = bisect_left(self._rejected_at, chunk.first_index + chunk.items)
        del self._rejected_at[:rejected]
        input_ordinal, extent = self._spots.extent(chunk)
        self._chunks += 1
        return chunks.NewChunk(
            ordinal=self._chunks - 1,
            first_index=chunk.first_index,
            items=chunk.items,
            estimated_tokens=chunk.tokens,
            rejected=rejected,
            input_ordinal=input_ordinal,
            extent=extent,
        )

    def _queue(self) -> None:
        options = self._submission.options
        if not self._items:
            raise EmptySource(f"{self._submission.corpus.name}: no rows; there is nothing to embed.")
        if options.unique_keys:
            self._check_keys()
        limit = control.reject_limit(options.max_rejects, self._items)
        with self._engine.begin() as connection:
            self._hold(connection)
            chunks.insert_chunks(connection, self._job_id, list(map(self._new_chunk, self._planner.finish())))
            jobs.queue(
                connection,
                self._job_id,
                self._fence,
                items_total=self._items,
                max_rejects=limit,
                payload=self._submission.payload(),
                keeps_texts=not options.by_reference,
            )
            if limit is not None and limit < self._rejects < self._items:
                # Before any chunk can be claimed: nobody pays for, or reads, a part of what fails anyway.
                control.fail(connection, self._job_id, Reason.TOO_MANY_REJECTS, control.too_many(self._rejects, limit))
            self._submission.on_queue(connection, self._job_id)

    def _check_keys(self) -> None:
        with self._engine.begin() as connection:
            twice = items.first_duplicate_key(connection, self._job_id)
        if twice:
            key, first, second = twice
            raise UserError(
                f'--unique-keys: key "{key}" comes twice, first as items {first:,} and {second:,} (counted from 0).'
            )


class _Spots:
    """Where the rows of files are, until a chunk holds them. Empty where items are copied."""

    def __init__(self) -> None:
        self._held: deque[tuple[int, int, SourceFile, Places]] = deque()

    def add(self, first_index: int, ordinal: int, file: SourceFile, places: Places) -> None:
        """Hold the places of the next rows, of the job's input `ordinal`."""
        self._held.append((first_index, ordinal, file, places))

    def extent(self, chunk: Range) -> tuple[int, Extent] | tuple[None, None]:
        """A chunk's input and extent; what lies before the chunk is dropped."""
        if not self._held:
            return None, None
        while self._held[0][0] + len(self._held[0][3].sizes) <= chunk.first_index:
            self._held.popleft()
        first_index, ordinal, file, places = self._held[0]
        end = chunk.first_index + chunk.items
        last_first, _, _, last = next(held for held in self._held if held[0] + len(held[3].sizes) >= end)
        return ordinal, places.extent(file, chunk.first_index - first_index, last, end - 1 - last_first)


def _gathered(blocks: Iterator[Rows]) -> Iterator[list[Rows]]:
    """Blocks as they are committed together: many rows to a COPY, bounded in rows, bytes and time."""
    gathered: list[Rows] = []
    rows = size = 0
    since = monotonic()
    for block in blocks:
        gathered.append(block)
        rows += len(block.keys)
        size += sum(len(text) for text in block.texts if text)
        if rows >= _COMMIT_ROWS or size >= _COMMIT_BYTES or monotonic() - since > _COMMIT_SECONDS:
            yield gathered
            gathered, rows, size, since = [], 0, 0, monotonic()
    if gathered:
        yield gathered


def undo_staging(engine: Engine, job_id: UUID, fence: int) -> None:
    """Forget a submission that didn't end, items first, in bounded transactions."""
    with engine.begin() as connection:
        row = jobs.by_id(connection, job_id)
    if row and _delete_items(engine, job_id, fence):
        with engine.begin() as connection:
            gone = jobs.delete_staging(connection, job_id, fence)
        if gone and row["options"].get("output"):
            try:
                parts.vacate(row["options"]["output"], job_id)
            except VectormillError as error:  # the folder may be why the submission didn't end
                log.warning("output_not_vacated", job=str(job_id), error=str(error))


def _delete_items(engine: Engine, job_id: UUID, fence: int) -> bool:
    """Delete what is staged. False: somebody else is its producer by now."""
    gone = _DELETE_ITEMS
    while gone == _DELETE_ITEMS:
        with engine.begin() as connection:
            row = jobs.lock(connection, job_id)
            if row is None or row["state"] != "staging" or row["fence"] != fence:
                return False
            gone = items.delete_some(connection, job_id, _DELETE_ITEMS)
    return True
