"""Reader of a claimed chunk: its unfinished items, in blocks of bounded size."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sqlalchemy import Engine

from pipeline.chunk_io.sinks import Sink, sink_of
from pipeline.core.chunks import FORGOTTEN, Claim, Item, Reject, RejectCode
from pipeline.db import forgets, items, jobs
from pipeline.sources.by_reference import read_extent

#: Text that is embedded as one block, whatever size the planner expected of a file's rows.
_BLOCK_BYTES = 16 * 1024 * 1024
#: The same of texts that are split: an item is committed once all its passages are embedded, and a block mixes them.
_SPLIT_BLOCK_BYTES = 2 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class ItemBlock:
    """Items that have neither vector nor reject yet, and rejects found while they were read; in index order."""

    items: Sequence[Item]
    rejects: Sequence[Reject] = ()


@dataclass(frozen=True, slots=True)
class UnsettledItems:
    """The unfinished items of a chunk, in blocks of bounded size."""

    #: Number of items without vector or reject.
    left: int
    blocks: Iterator[ItemBlock]


def read_chunk(engine: Engine, claim: Claim) -> UnsettledItems:
    """Return the chunk's items that have neither vector nor reject yet.

    Raises, also while blocks are read:
        SourceChanged: the chunk's file is no longer the one that was planned.
        SourceError: that file is damaged.
        StorageRefused, StorageUnreachable: it can't be read now.
    """
    sink = sink_of(claim.options)
    with engine.begin() as connection:
        settled = items.settled(connection, claim.job_id, claim.first_index, claim.items)
        rows = (
            []
            if claim.extent
            else items.read(connection, claim.job_id, claim.first_index, claim.items, carried=claim.carries)
        )
        if claim.extent and claim.options.sync:
            # Most rows of a file may be unchanged; keys that were forgotten meanwhile are erased after the sync.
            whole = range(claim.first_index, claim.first_index + claim.items)
            settled |= set(whole) - items.indexes(connection, claim.job_id, claim.first_index, claim.items)
    settled |= sink.settled(engine, claim)
    if claim.extent:
        blocks = _from_file(claim, settled)
        if not claim.options.sync:
            blocks = _without_forgotten(engine, claim, blocks)
        return UnsettledItems(claim.items - len(settled), _with_a_place(sink, blocks))
    unfinished = [item for item in rows if item.index not in settled]
    return UnsettledItems(len(unfinished), _with_a_place(sink, _from_memory(claim, unfinished)))


def _block_bytes(claim: Claim) -> int:
    return _SPLIT_BLOCK_BYTES if claim.options.splits else _BLOCK_BYTES


def _with_a_place(sink: Sink, blocks: Iterator[ItemBlock]) -> Iterator[ItemBlock]:
    """Turn items that the sink can't take into rejects (`bad_key`)."""
    for block in blocks:
        faults = {item.index: fault for item in block.items if (fault := sink.fault(item))}
        if not faults:
            yield block
            continue
        bad = [
            Reject(index=item.index, key=item.key, code=RejectCode.BAD_KEY, message=faults[item.index])
            for item in block.items
            if item.index in faults
        ]
        yield ItemBlock([item for item in block.items if item.index not in faults], [*block.rejects, *bad])


def _without_forgotten(engine: Engine, claim: Claim, blocks: Iterator[ItemBlock]) -> Iterator[ItemBlock]:
    """Turn items of files whose key was forgotten into rejects without a key."""
    with engine.begin() as connection:
        workspace = jobs.workspace_of(connection, claim.job_id)
    for block in blocks:
        rows = [(row.index, row.key) for row in block.items] + [(row.index, row.key) for row in block.rejects]
        with engine.begin() as connection:
            places = forgets.forgotten_places(connection, workspace, [key for _, key in rows])
        gone = {rows[at][0] for at in places}
        if not gone:
            yield block
            continue
        told = [Reject(index=at, key=None, code=RejectCode.FORGOTTEN, message=FORGOTTEN) for at in sorted(gone)]
        kept = [reject for reject in block.rejects if reject.index not in gone]
        yield ItemBlock(
            [item for item in block.items if item.index not in gone],
            sorted([*kept, *told], key=lambda reject: reject.index),
        )


def _from_memory(claim: Claim, items: Sequence[Item]) -> Iterator[ItemBlock]:
    start = size = 0
    most = _block_bytes(claim)
    for at, item in enumerate(items, 1):
        size += len(item.text) + len(item.title)
        if size >= most:
            yield ItemBlock(items[start:at])
            start, size = at, 0
    yield ItemBlock(items[start:])


def _from_file(claim: Claim, settled: set[int]) -> Iterator[ItemBlock]:
    assert claim.extent
    index = claim.first_index
    good: list[Item] = []
    bad: list[Reject] = []
    size, most = 0, _block_bytes(claim)
    for rows in read_extent(claim.extent, claim.items, claim.options.columns, claim.options.item_bytes):
        bad += [
            Reject(index=index + at, key=rows.keys[at], code=code, message=message)
            for at, code, message in rows.problems
            if index + at not in settled
        ]
        carried, titles = (given or [b""] * len(rows.keys) for given in (rows.carried, rows.titles))
        for at, row in enumerate(zip(rows.keys, rows.texts, carried, titles, strict=True), index):
            key, text, more, title = row
            if text is not None and at not in settled:
                good.append(Item(index=at, key=key, text=text.decode(), carried=more, title=title.decode()))
                size += len(text) + len(title)
            if size >= most:
                yield ItemBlock(good, [each for each in bad if each.index <= at])
                good, bad, size = [], [each for each in bad if each.index > at], 0
        index += len(rows.keys)
    yield ItemBlock(good, bad)
