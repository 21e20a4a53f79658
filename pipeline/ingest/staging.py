"""Staging of a job from a corpus: copy items in bounded commits, plan chunks, queue in one short last transaction."""

from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from time import monotonic

import numpy as np
import numpy.typing as npt
import structlog
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError

from pipeline.catalog.rates import slot_rates
from pipeline.chunk_io.sinks import sink_of
from pipeline.core.chunks import FORGOTTEN, Extent, Reject, RejectCode
from pipeline.core.collections import OnDuplicateKey
from pipeline.core.errors import EmptySource, LeaseLost, ServiceUnreachable, SourceError, UserError, VectormillError
from pipeline.core.jobs import JobState, Reason
from pipeline.db import chunks, collection_keys, forgets, items, jobs, staging, syncs
from pipeline.db.database import flush_later, is_connection_lost
from pipeline.db.staging import Producer
from pipeline.infra.ahead import ahead
from pipeline.infra.leases import Renewal
from pipeline.ingest.changes import ChangedRows, Changes, joined
from pipeline.ingest.chunking import ChunkLimits, Planner, Range, chunk_tokens, estimate_split_tokens, estimate_tokens
from pipeline.ingest.submission import Planning, Submission
from pipeline.jobs import control
from pipeline.sources import Corpus, Rows, SourceFile
from pipeline.sources.source_file import Places

log = structlog.get_logger()

#: A submission commits when one of these is reached.
_COMMIT_ROWS = 100_000
_COMMIT_BYTES = 32 * 1024 * 1024
_COMMIT_SECONDS = 1.0
_COMMIT_CHUNKS = 5_000
_DELETE_ITEMS = 20_000


class Staging:
    """Work of one producer that takes a job from `staging` to `queued`."""

    def __init__(self, engine: Engine, submission: Submission, producer: Producer) -> None:
        self._engine, self._submission, self._producer = engine, submission, producer
        self._job_id = producer.job_id
        bounds = (submission.options.max_item_tokens, submission.model.max_item_tokens)
        self._max_item_tokens = min((bound for bound in bounds if bound), default=None)
        self._split_tokens = submission.options.split or self._max_item_tokens if submission.options.splits else None
        self._lease_seconds = submission.planning.lease_seconds
        self._items = self._chunks = self._rejects = self._keyless = self._forgotten = 0
        #: Items recorded by the last commit.
        self._committed = 0
        #: Indexes of rejects, and of all that is staged of a sync by reference, that no chunk covers yet.
        self._rejected_at: list[int] = []
        self._staged_at: list[int] = []
        #: Chunks that are inserted next.
        self._planned: list[chunks.NewChunk] = []
        self._spots = _Spots()
        self._changes = Changes(submission.sync, submission.kept_options(None)) if submission.sync else None

    def _notices(self) -> list[str]:
        told = self._submission.corpus.notices
        found = told.lines()
        if self._keyless and "no key" not in told:
            key = self._submission.corpus.columns.key
            found.append(f'{self._keyless:,} of {self._items:,} items have no key: "{key}" is missing there, or empty.')
        if self._changes and (repeated := self._changes.repeated):
            which = self._submission.sync and self._submission.sync.on_duplicate_key
            one = "last" if which is OnDuplicateKey.LAST else "first"
            found.append(f"{repeated:,} rows have a key that another row has too; the {one} row of each key counts.")
        return found

    def run(self) -> list[str]:
        """Stage and queue the job, or undo it. Return notices for the submitter, none of which is an error."""
        try:
            with Renewal(self._renew, self._lease_seconds, self._submission.on_lost):
                self._stage()
        except BaseException as error:
            undo(self._engine, self._producer)
            # The reply to the last COMMIT may be lost although the commit succeeded.
            if not (isinstance(error, DBAPIError) and is_connection_lost(error) and self._is_queued()):
                raise
        return self._notices()

    def _is_queued(self) -> bool:
        with self._engine.begin() as connection:
            row = jobs.by_id(connection, self._job_id)
        return row is not None and Producer.of(row) == self._producer and row.state is not JobState.STAGING

    def _renew(self) -> bool:
        with self._engine.begin() as connection:
            return staging.hold(connection, self._producer, self._lease_seconds)

    def _stage(self) -> None:
        corpus, options = self._submission.corpus, self._submission.options
        sink_of(self._submission.kept_options(None)).prepare(self._job_id)
        with self._engine.begin() as connection:
            self._hold(connection)
            staging.insert_inputs(connection, self._job_id, corpus.inputs())
            rates = slot_rates(connection, self._submission.model, options.precision)
        # A chunk for the slowest of them is soon done by the others.
        self._planner = Planner(_limits(self._submission.planning, min(rates.values())))
        if not options.by_reference:
            # A stream can't be read ahead: that couldn't be interrupted.
            is_stream = not isinstance(corpus, Corpus) or any(file.uri is None for file in corpus.files)
            for rows in self._read(corpus.blocks(), is_stream=is_stream):
                self._copy_rows(rows)
        else:
            assert isinstance(corpus, Corpus)
            if self._changes:
                self._compare_files(corpus)
            else:
                self._plan_files(corpus)
        self._queue()

    def _read(self, blocks: Iterator[Rows], *, is_stream: bool) -> Iterator[list[Rows]]:
        """Yield the rows that are copied at once. No transaction is open while they are read: a stream may be slow."""
        if self._changes is None:
            return _gathered(blocks)
        gathered = _gathered(map(self._changes.identified, blocks))
        # Rows are compared while the next ones are read and hashed.
        return gathered if is_stream else ahead(gathered)

    def _copy_rows(self, rows: list[Rows]) -> None:
        with self._engine.begin() as connection:
            # The last transaction's flush covers all before it, and a crash loses a staging anyway.
            flush_later(connection)
            self._hold(connection)
            self._blank_forgotten(connection, rows)
            self._copy(connection, self._changed(connection, rows) if self._changes else rows)
            self._advance(connection)
        self._submission.on_items(self._changes.rows if self._changes else self._items)

    def _compare_files(self, corpus: Corpus) -> None:
        """Copy what has changed of a sync by reference, but for the texts, and plan chunks over all rows: an item's
        index is the position of its row in the source."""
        for ordinal, file in enumerate(corpus.files):
            first = located = self._items
            places = corpus.again().places(file)  # the notices are those of the other reading
            for rows in self._read(corpus.rows_of(file), is_stream=False):
                end = self._items + sum(len(block.keys) for block in rows)
                while located < end:
                    located += self._locate(next(places, None), located, ordinal, file)
                self._copy_rows(rows)
            if located != self._items or next(places, None):
                raise _unsteady(file)
            # Inserted with the next rows, or at the end: a commit without rows could be lost unnoticed.
            self._planned += map(self._new_chunk, self._planner.break_off())
            with self._engine.begin() as connection:
                flush_later(connection)
                self._hold(connection)
                staging.set_input_rows(connection, self._job_id, {ordinal: self._items - first})

    def _locate(self, places: Places | None, first_index: int, ordinal: int, file: SourceFile) -> int:
        """Hold the places of a file's next rows. Return their number."""
        if places is None:
            raise _unsteady(file)
        self._spots.add(first_index, ordinal, file, places)
        return len(places.sizes)

    def _blank_forgotten(self, connection: Connection, blocks: Sequence[Rows]) -> None:
        """Turn rows with a forgotten key into rejects of which nothing is kept."""
        collection = self._submission.collection
        # All at once: while the next rows are read in a thread, each query waits for the interpreter.
        forgotten = forgets.forgotten_places(
            connection,
            self._submission.workspace_id,
            [key for block in blocks for key in block.keys],
            collection.id if collection else None,
        )
        self._forgotten += len(forgotten)
        start = 0
        for block in blocks:
            end = start + len(block.keys)
            first, last = bisect_left(forgotten, start), bisect_left(forgotten, end)
            _blank(block, [at - start for at in forgotten[first:last]])
            start = end

    def _changed(self, connection: Connection, rows: Sequence[Rows]) -> list[Rows]:
        assert self._changes
        # All at once: what a query costs whatever it compares is paid once.
        return [
            self._changes.of(connection, self._job_id, joined([row for row in rows if isinstance(row, ChangedRows)]))
        ]

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
                tokens = self._estimate(places.sizes)
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
            staging.set_input_rows(connection, self._job_id, rows)
            self._advance(connection)
        self._submission.on_items(self._items)

    def _hold(self, connection: Connection) -> None:
        if not staging.hold(connection, self._producer, self._lease_seconds):
            raise LeaseLost("this submission was cancelled, or taken over by another one with its idempotency key.")

    def _lost(self) -> ServiceUnreachable:
        return ServiceUnreachable(
            f"the database has lost a part of job {self._job_id} while it was submitted (was there a failover?); "
            "submit the same again."
        )

    def _advance(self, connection: Connection) -> None:
        if not staging.advance(connection, self._producer, self._committed, self._items):
            raise self._lost()
        self._committed = self._items

    def _copy(self, connection: Connection, blocks: Sequence[Rows]) -> None:
        in_files = self._submission.options.by_reference
        items.copy_items(
            connection,
            self._job_id,
            self._items,
            [
                items.Block(
                    block.keys,
                    [None] * len(block.texts) if in_files else block.texts,
                    block.carried,
                    None if in_files else block.titles,
                    block.identities if isinstance(block, ChangedRows) else None,
                    self._places(block)[0] if in_files else None,
                )
                for block in blocks
            ],
        )
        rejects: list[Reject] = []
        planned: list[Range] = []
        for block in blocks:
            places, rows = self._places(block)
            rejects += [
                Reject(index=self._items + int(places[at]), key=block.keys[at], code=code, message=message)
                for at, code, message in block.problems
            ]
            self._keyless += sum(
                key is None and text is not None for key, text in zip(block.keys, block.texts, strict=True)
            )
            if in_files:
                self._staged_at += (self._items + places).tolist()
            sizes, titles = np.zeros(rows, np.int64), np.zeros(rows, np.int64)
            sizes[places] = np.fromiter((len(text) if text else 0 for text in block.texts), np.int64, len(block.texts))
            if block.titles:
                titles[places] = np.fromiter(map(len, block.titles), np.int64)
            # A worker reads all rows of a chunk that is in a file.
            read = self._spots.sizes(self._items, rows) if in_files else sizes + titles
            self._items += rows
            planned += self._planner.add(self._estimate(sizes, titles), read)
        items.copy_rejects(connection, self._job_id, rejects)
        self._rejects += len(rejects)
        self._rejected_at += [reject.index for reject in rejects]
        self._insert_chunks(connection, planned)

    def _insert_chunks(self, connection: Connection, planned: Iterable[Range]) -> None:
        chunks.insert_chunks(connection, self._job_id, [*self._planned, *map(self._new_chunk, planned)])
        self._planned = []

    def _places(self, block: Rows) -> tuple[npt.NDArray[np.int64], int]:
        """Return the positions of a block's rows, counted from the next index, and how many indexes they take."""
        if self._submission.options.by_reference and isinstance(block, ChangedRows):
            return block.places, block.compared
        return np.arange(len(block.keys)), len(block.keys)

    def _estimate(
        self, sizes: npt.NDArray[np.int64], titles: npt.NDArray[np.int64] | None = None
    ) -> npt.NDArray[np.int64]:
        """Estimate the tokens of texts of these sizes in bytes, and with titles of these sizes."""
        if self._split_tokens:
            return estimate_split_tokens(sizes, titles, self._split_tokens, self._submission.options.overlap)
        return estimate_tokens(sizes, self._max_item_tokens)

    def _new_chunk(self, chunk: Range) -> chunks.NewChunk:
        """Return the next chunk, with its rejects, vacant places and the extent of its rows, and drop them from
        memory."""
        end = chunk.first_index + chunk.items
        rejected = bisect_left(self._rejected_at, end)
        del self._rejected_at[:rejected]
        input_ordinal, extent = self._spots.extent(chunk)
        vacant = 0
        if extent and self._changes:
            staged = bisect_left(self._staged_at, end)
            del self._staged_at[:staged]
            vacant = chunk.items - staged
        self._chunks += 1
        return chunks.NewChunk(
            ordinal=self._chunks - 1,
            first_index=chunk.first_index,
            items=chunk.items,
            estimated_tokens=chunk.tokens,
            rejected=rejected,
            vacant=vacant,
            input_ordinal=input_ordinal,
            extent=extent,
        )

    def _queue(self) -> None:
        options = self._submission.options
        if not self._items and not self._changes:
            raise EmptySource(f"{self._submission.corpus.name}: no rows; there is nothing to embed.")
        if options.unique_keys:
            self._check_keys()
        with self._engine.begin() as connection:
            self._hold(connection)
            self._insert_chunks(connection, self._planner.finish())
            self._advance(connection)
            refusal = self._settle_sync(connection)
            total = self._changes.rows if self._changes else self._items
            limit = control.reject_limit(options.max_rejects, total)
            if limit is not None:  # what was forgotten is no fault of the source
                limit += self._forgotten
            if staging.count_inputs(connection, self._job_id) != len(self._submission.corpus.inputs()):
                raise self._lost()
            staging.queue(
                connection,
                self._producer,
                items_total=self._items,
                max_rejects=limit,
                payload=self._submission.payload(),
                keeps_texts=not options.by_reference,
                notices=self._notices(),
            )
            # Before any chunk can be claimed: nobody pays for, or reads, a part of a job that fails anyway.
            if refusal:
                control.fail(connection, self._job_id, *refusal)
            elif limit is not None and limit < self._rejects < total:
                control.fail(connection, self._job_id, Reason.TOO_MANY_REJECTS, control.too_many(self._rejects, limit))
            self._submission.on_queue(connection, self._job_id)

    def _settle_sync(self, connection: Connection) -> tuple[Reason, str] | None:
        """Settle repeated and removed keys of a sync, and save what its end needs. Return why it fails, if it does."""
        changes, sync = self._changes, self._submission.sync
        if changes is None or sync is None:
            return None
        changes.repeated += syncs.settle_keys(connection, self._job_id, sync.version_id, sync.on_duplicate_key)
        self._rejects = chunks.sums(connection, self._job_id)["rejected"]
        syncs.save_counts(connection, self._job_id, changes.counts, changes.named if sync.whole else 0)
        if not sync.whole:
            return None
        if not changes.rows:
            return Reason.SOURCE_EMPTY, control.EMPTY_SYNC
        syncs.save_seen(connection, self._job_id, changes.seen_pages())
        keys = collection_keys.count_keys(connection, sync.version_id)
        return control.removal_refused(sync.max_removed, keys, keys - changes.named)

    def _check_keys(self) -> None:
        with self._engine.begin() as connection:
            twice = items.first_duplicate_key(connection, self._job_id)
            keyless = items.first_without_key(connection, self._job_id) if self._keyless else None
        if twice:
            key, first, second = twice
            raise UserError(
                f'key "{key}" comes twice, first as items {first:,} and {second:,} (counted from 0).',
                field="unique_keys",
            )
        if keyless is not None:
            raise UserError(f"item {keyless:,} has no key (counted from 0).", field="unique_keys")


def _limits(planning: Planning, tokens_per_second: float) -> ChunkLimits:
    tokens = chunk_tokens(planning.chunk_seconds, tokens_per_second)
    return ChunkLimits(tokens=tokens, items=planning.chunk_items, bytes=planning.chunk_bytes)


def _blank(block: Rows, forgotten: Sequence[int]) -> None:
    """Turn the rows at these positions into rejects of which nothing is kept."""
    for at in forgotten:
        block.blank(at)
    if forgotten:
        gone = set(forgotten)
        told = [(at, RejectCode.FORGOTTEN, FORGOTTEN) for at in forgotten]
        kept = [problem for problem in block.problems if problem[0] not in gone]
        block.problems[:] = sorted([*kept, *told], key=lambda problem: problem[0])


def _unsteady(file: SourceFile) -> SourceError:
    return SourceError(f"{file.name}: read twice, it had another number of rows; is it being written?")


class _Spots:
    """Places of file rows that no chunk covers yet. Empty when items are copied."""

    def __init__(self) -> None:
        self._held: deque[tuple[int, int, SourceFile, Places]] = deque()

    def add(self, first_index: int, ordinal: int, file: SourceFile, places: Places) -> None:
        """Hold the places of the next rows, which belong to the job's input `ordinal`."""
        self._held.append((first_index, ordinal, file, places))

    def sizes(self, first_index: int, rows: int) -> npt.NDArray[np.int64]:
        """Return the bytes of rows that are held."""
        found = [
            places.sizes[max(0, first_index - first) : max(0, first_index + rows - first)]
            for first, _, _, places in self._held
        ]
        return np.concatenate(found) if found else np.zeros(0, np.int64)

    def extent(self, chunk: Range) -> tuple[int, Extent] | tuple[None, None]:
        """Return a chunk's input and extent, and drop the places before the chunk."""
        if not self._held:
            return None, None
        while self._held[0][0] + len(self._held[0][3].sizes) <= chunk.first_index:
            self._held.popleft()
        first_index, ordinal, file, places = self._held[0]
        end = chunk.first_index + chunk.items
        last_first, _, _, last = next(held for held in self._held if held[0] + len(held[3].sizes) >= end)
        return ordinal, places.extent(file, chunk.first_index - first_index, last, end - 1 - last_first)


def _gathered(blocks: Iterable[Rows]) -> Iterator[list[Rows]]:
    """Yield the blocks to commit together: many rows per COPY, bounded in rows, bytes and time."""
    gathered: list[Rows] = []
    rows = size = 0
    since = monotonic()
    for block in blocks:
        gathered.append(block)
        rows += len(block.keys)
        size += sum(len(text) for text in block.texts if text) + sum(map(len, block.titles or ()))
        if rows >= _COMMIT_ROWS or size >= _COMMIT_BYTES or monotonic() - since > _COMMIT_SECONDS:
            yield gathered
            gathered, rows, size, since = [], 0, 0, monotonic()
    if gathered:
        yield gathered


def undo(engine: Engine, producer: Producer) -> None:
    """Delete a submission that didn't finish, items first, in bounded transactions."""
    job_id = producer.job_id
    with engine.begin() as connection:
        row = jobs.by_id(connection, job_id)
    if row and delete_items(engine, producer):
        with engine.begin() as connection:
            gone = staging.delete(connection, producer)
            if gone and row.options.sync:
                syncs.forget(connection, job_id)
        if gone:
            try:
                sink_of(row.options).discard(job_id)
            except VectormillError as error:  # an unusable folder may be why the submission failed
                log.warning("output_not_vacated", job=str(job_id), error=str(error))


def delete_items(engine: Engine, producer: Producer) -> bool:
    """Delete the staged items. Return False if the job is no longer this producer's to stage."""
    gone = _DELETE_ITEMS
    while gone == _DELETE_ITEMS:
        with engine.begin() as connection:
            row = jobs.lock(connection, producer.job_id)
            if row is None or row.state is not JobState.STAGING or Producer.of(row) != producer:
                return False
            gone = items.delete_some(connection, producer.job_id, _DELETE_ITEMS)
    return True
