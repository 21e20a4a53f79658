"""Whose turn at the device is next, with several models."""

import asyncio
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.batching import Tokenised
from workers.lanes import Lanes, Request

BUDGET = 100


class _Encoder:
    """As much of one as a lane looks at."""

    budget_tokens = BUDGET


def waiting(lanes: Lanes, encoder: _Encoder, *lengths: int) -> Request:
    """A request whose texts have these lengths."""
    tokenised = Tokenised(list(lengths), np.array(lengths, np.int32), np.zeros(len(lengths), np.bool_))
    request = Request(cast(Any, None), cast("asyncio.Future[Any]", None), tokenised, np.empty((0, 0), np.float32), 0)
    lanes.add(cast(Any, encoder), request, len(lengths))
    return request


@given(
    crowds=st.lists(st.lists(st.integers(20, 100), min_size=1, max_size=20), min_size=2, max_size=5),
    turns=st.integers(0, 3),
    lane=st.integers(0, 5),
)
def test_a_short_text_waits_for_one_batch_of_any_model_at_most(crowds: list[list[int]], turns: int, lane: int) -> None:
    """After that which is under way when it comes: never for more than two."""
    lanes, encoders = Lanes(), [_Encoder() for _ in range(6)]
    for encoder, crowd in zip(encoders, crowds, strict=False):
        waiting(lanes, encoder, *crowd)
    for _ in range(turns):
        lanes.take()
    short = waiting(lanes, encoders[lane], 1)
    before = 0
    while batch := lanes.take():
        if any(text.request is short for text in batch[1]):
            break
        before += 1
    assert batch
    assert before <= 1


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 150)), max_size=60))
def test_every_texts_turn_comes_with_its_own_encoder(texts: list[tuple[int, int]]) -> None:
    lanes, encoders = Lanes(), [_Encoder() for _ in range(4)]
    asked = [(encoders[lane], waiting(lanes, encoders[lane], length)) for lane, length in texts]
    taken = []
    while batch := lanes.take():
        encoder, found = batch
        assert len(found) == 1 or max(text.tokens for text in found) * len(found) <= BUDGET
        taken += [(cast(Any, encoder), text.request) for text in found]
    assert sorted(map(id, (request for _, request in taken))) == sorted(map(id, (request for _, request in asked)))
    assert all(pair in asked for pair in taken)


@pytest.mark.parametrize("others", [0, 3])
def test_what_nobody_waits_for_is_left_out(others: int) -> None:
    lanes, encoder = Lanes(), _Encoder()
    waiting(lanes, encoder, 50, 60).dropped = True
    for _ in range(others):
        waiting(lanes, encoder, 5)
    batch = lanes.take()
    assert (len(batch[1]) if batch else 0) == others
