"""Chunk planning: every item in one chunk, in order, within limits."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.ingest.chunking import ChunkLimits, Planner, Range, chunk_tokens, estimate_tokens, request_batches

Item = tuple[int, int]
ITEMS = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 120)), max_size=60)
LIMITS = st.builds(ChunkLimits, tokens=st.integers(1, 60), items=st.integers(1, 8), bytes=st.integers(1, 300))


def plan(blocks: list[list[Item]], limits: ChunkLimits) -> list[Range]:
    planner = Planner(limits)
    found: list[Range] = []
    for block in blocks:
        tokens, sizes = np.array(block, dtype=np.int64).reshape(-1, 2).T
        found += planner.add(tokens, sizes)
    return found + list(planner.finish())


def fits(items: list[Item], limits: ChunkLimits) -> bool:
    tokens, sizes = (sum(column) for column in zip(*items, strict=True))
    return tokens <= limits.tokens and sizes <= limits.bytes and len(items) <= limits.items


@given(ITEMS, LIMITS)
def test_every_item_once_and_in_order(items: list[Item], limits: ChunkLimits) -> None:
    at = 0
    for chunk in plan([items], limits):
        assert chunk.first_index == at
        assert chunk.items > 0
        at += chunk.items
    assert at == len(items)


@given(ITEMS, LIMITS)
def test_chunks_keep_their_limits(items: list[Item], limits: ChunkLimits) -> None:
    for chunk in plan([items], limits):
        start, end = chunk.first_index, chunk.first_index + chunk.items
        assert chunk.items == 1 or fits(items[start:end], limits)
        assert chunk.tokens == sum(tokens for tokens, _ in items[start:end])


@given(st.integers(1, 3_000), st.integers(8, 200))
def test_full_chunks_first_and_a_falling_tail(count: int, limit: int) -> None:
    chunks = [chunk.tokens for chunk in plan([[(1, 1)] * count], ChunkLimits(tokens=limit, items=10_000, bytes=10_000))]
    assert chunks[:-1] == sorted(chunks[:-1], reverse=True)
    assert chunks[-1] <= limit // 8
    full = limit // 8 * 8
    assert chunks.count(full) >= (count - 4 * full) // full


@given(ITEMS, LIMITS, st.lists(st.integers(0, 60), max_size=5))
def test_block_boundaries_dont_matter(items: list[Item], limits: ChunkLimits, cuts: list[int]) -> None:
    edges = [0, *sorted(min(cut, len(items)) for cut in cuts), len(items)]
    blocks = [items[start:end] for start, end in pairwise(edges)]
    assert plan(blocks, limits) == plan([items], limits)


def test_an_item_over_a_limit_is_a_chunk_of_its_own() -> None:
    limits = ChunkLimits(tokens=10, items=100, bytes=100)
    assert plan([[(4, 1), (50, 1), (4, 1), (1, 500), (1, 1)]], limits) == [
        Range(0, 1, 4),
        Range(1, 1, 50),
        Range(2, 1, 4),
        Range(3, 1, 1),
        Range(4, 1, 1),
    ]


def test_estimates() -> None:
    sizes = np.array([0, 1, 4, 400, 40_000])
    assert estimate_tokens(sizes, 256).tolist() == [0, 2, 3, 102, 256]
    assert estimate_tokens(sizes, None).tolist() == [0, 2, 3, 102, 10_002]


@pytest.mark.parametrize(("seconds", "rate", "tokens"), [(10, 1500, 15_000), (0.5, 3, 2), (0.001, 1, 1)])
def test_chunks_are_sized_by_work(seconds: float, rate: float, tokens: int) -> None:
    assert chunk_tokens(seconds, rate) == tokens


@given(st.lists(ITEMS, max_size=8), LIMITS)
def test_no_chunk_goes_across_a_break(files: list[list[Item]], limits: ChunkLimits) -> None:
    planner = Planner(limits)
    found: list[Range] = []
    ends = {0}
    for file in files:
        tokens, sizes = np.array(file, dtype=np.int64).reshape(-1, 2).T
        found += planner.add(tokens, sizes)
        found += planner.break_off()
        ends.add(max(ends) + len(file))
    found += planner.finish()
    starts = [chunk.first_index for chunk in found]
    assert starts == [0, *(chunk.first_index + chunk.items for chunk in found)][: len(found)]
    assert sum(chunk.items for chunk in found) == max(ends)
    assert ends - {max(ends)} <= {*starts, 0}


def test_many_small_files_hold_little_back() -> None:
    planner = Planner(ChunkLimits(tokens=800, items=100, bytes=10_000))
    out = 0
    for _ in range(1_000):
        out += len([*planner.add(np.array([1]), np.array([4])), *planner.break_off()])
    assert out >= 950


@given(
    lengths=st.lists(st.integers(1, 50), max_size=60),
    most_tokens=st.integers(1, 200),
    most_items=st.integers(1, 20),
)
def test_requests_hold_what_a_gateway_takes(lengths: list[int], most_tokens: int, most_items: int) -> None:
    found = [batch.tolist() for batch in request_batches(np.array(lengths, np.int32), most_tokens, most_items)]
    assert [at for batch in found for at in batch] == list(range(len(lengths)))
    for batch in found:
        assert 1 <= len(batch) <= most_items
        assert len(batch) == 1 or sum(lengths[at] for at in batch) <= most_tokens
    for batch, following in pairwise(found):  # no batch had room for the next one's first item
        full = len(batch) == most_items
        assert full or sum(lengths[at] for at in batch) + lengths[following[0]] > most_tokens
