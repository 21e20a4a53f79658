"""Batching by token budget, and the isolation search for an item that kills its process."""

from itertools import zip_longest

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.encoders.batching import CONVICTED, Slice, isolated_slices, passes, share_out, token_batches

LENGTHS = st.lists(st.integers(0, 300), max_size=80)


@given(LENGTHS, st.integers(1, 1000), st.integers(1, 20), st.booleans())
def test_batches_hold_every_item_once_longest_first(lengths: list[int], budget: int, most: int, pads: bool) -> None:
    array = np.array(lengths, dtype=np.int32)
    batches = [batch.tolist() for batch in token_batches(array, budget, most, pads=pads)]
    assert sorted(at for batch in batches for at in batch) == list(range(len(lengths)))
    ordered = [lengths[at] for batch in batches for at in batch]
    assert ordered == sorted(lengths, reverse=True)


@given(LENGTHS, st.integers(1, 1000), st.integers(1, 20))
def test_batches_keep_the_budget_and_use_it(lengths: list[int], budget: int, most: int) -> None:
    batches = [[lengths[at] for at in batch] for batch in token_batches(np.array(lengths, np.int32), budget, most)]
    for batch, following in zip_longest(batches, batches[1:]):
        assert len(batch) <= most
        assert len(batch) == 1 or batch[0] * len(batch) <= budget
        full = len(batch) == most or max(1, batch[0]) * (len(batch) + 1) > budget
        assert full or following is None


@given(LENGTHS, st.integers(1, 1000), st.integers(1, 20))
def test_batches_without_padding_are_as_full_as_their_sum(lengths: list[int], budget: int, most: int) -> None:
    array = np.array(lengths, np.int32)
    batches = [[max(1, lengths[at]) for at in batch] for batch in token_batches(array, budget, most, pads=False)]
    for batch, following in zip_longest(batches, batches[1:]):
        assert len(batch) <= most
        assert len(batch) == 1 or sum(batch) <= budget
        assert following is None or len(batch) == most or sum(batch) + following[0] > budget


@given(st.integers(0, 700), st.integers(1, CONVICTED - 1))
def test_slices_hold_every_item_once_in_order(items: int, level: int) -> None:
    at = 0
    for piece in isolated_slices(items, level):
        assert piece.start == at < piece.stop
        at = piece.stop
    assert at == items


@pytest.mark.parametrize(
    ("level", "sizes"),
    [
        (1, [64, 64, 64, 8]),
        (2, [8] * 8 + [64, 64, 8]),
        (3, [1] * 8 + [64, 64, 64]),
        (4, [1] * 9 + [64, 64, 63]),
    ],
)
def test_slices_narrow_eightfold(level: int, sizes: list[int]) -> None:
    assert [piece.stop - piece.start for piece in isolated_slices(200, level)] == sizes


def search(items: int, poisons: set[int], stops: set[int]) -> tuple[list[int], int]:
    """Run a chunk to its end with items that kill their process; return the convicted ones and the number of crashes.

    A claim works as `workers.runner.run_chunk` does; it also ends without a crash after the commits numbered in
    `stops`.
    """
    left, level, crashes, commits = list(range(items)), 0, 0, 0
    convicted: list[int] = []
    while left:
        if level >= CONVICTED:
            convicted.append(left.pop(0))
            level = 1
        claimed = list(left)
        slices = list(isolated_slices(len(claimed), level)) if level else [Slice(0, len(claimed), 0)]
        for piece, following in zip_longest(slices, slices[1:]):
            under_way = claimed[piece.start : piece.stop]
            if poisons & set(under_way):
                level, crashes = level + 1, crashes + 1
                break
            left = [item for item in left if item not in under_way]
            level, commits = following.level if following else 0, commits + 1
            if commits in stops:
                break
    return convicted, crashes


@given(st.integers(1, 300), st.sets(st.integers(0, 299), max_size=12), st.sets(st.integers(1, 60), max_size=10))
@settings(max_examples=300)
def test_exactly_the_poisons_are_convicted(items: int, poisons: set[int], stops: set[int]) -> None:
    poisons = {poison for poison in poisons if poison < items}
    convicted, crashes = search(items, poisons, stops)
    assert convicted == sorted(poisons)
    assert crashes <= most_crashes(len(poisons))


def most_crashes(poisons: int) -> int:
    """Return the bound on crashes: one of the whole chunk, and four for each poison."""
    return 4 * poisons + 1 if poisons else 0


@pytest.mark.parametrize("poisons", [{0}, {99}, {63, 64}, {0, 1, 2, 3}, set(range(100))])
def test_the_bound_of_crashes_is_reached(poisons: set[int]) -> None:
    assert search(100, poisons, set()) == (sorted(poisons), most_crashes(len(poisons)))


@given(LENGTHS, st.integers(0, 400))
def test_passes_hold_every_item_once_and_fill_up_little(lengths: list[int], spare: int) -> None:
    found = [[lengths[at] for at in at.tolist()] for at in passes(np.array(lengths, np.int32), spare)]
    assert [length for each in found for length in each] == sorted(lengths, reverse=True)
    for each, following in zip_longest(found, found[1:]):
        filled_up = each[0] * len(each) - sum(each)
        assert filled_up <= spare
        assert following is None or filled_up + each[0] - following[0] > spare, "another pass only where it pays"


@given(weights=st.lists(st.integers(1, 9_000), min_size=1, max_size=200), total=st.integers(0, 1_000_000))
def test_shares_add_up(weights: list[int], total: int) -> None:
    found = share_out(total, np.array(weights, np.int32))
    assert found.sum() == total
    assert (found >= 0).all()
    exact = np.array(weights) * (total / sum(weights))
    assert (abs(found - exact) <= 1).all()
