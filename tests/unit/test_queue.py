"""Queue of the device: fair turns among requests, callers and models."""

import asyncio
from collections import Counter
from collections.abc import Iterable
from itertools import count
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from workers.encoders.batching import Tokenised
from workers.engine.pace import Pace
from workers.engine.queue import DeviceQueue, QueuedRequest, Text, Work, seconds_ahead

#: Tokens of one turn on a CPU: two batches.
TURN_TOKENS = 100


class _Encoder:
    """Encoder with only the attributes that a queue reads."""

    budget_tokens = TURN_TOKENS // 2
    device = torch.device("cpu")


def waiting(queues: DeviceQueue, encoder: _Encoder, *lengths: int, caller: str = "") -> QueuedRequest:
    """Queue a request whose texts have these lengths."""
    tokenised = Tokenised(list(lengths), np.array(lengths, np.int32), np.zeros(len(lengths), np.bool_))
    work = Work(caller, "m", sum(lengths), 0.0)
    nobody = cast("asyncio.Future[Any]", None)
    request = QueuedRequest(cast(Any, None), nobody, tokenised, np.empty((0, 0), np.float32), 0, work)
    queues.add(cast(Any, encoder), request)
    return request


def batches(queues: DeviceQueue) -> Iterable[list[Text]]:
    """Yield batches, turn by turn, until no request waits."""
    while batch := queues.take():
        yield list(batch[1])


def turns_until(queues: DeviceQueue, request: QueuedRequest) -> int:
    """Return the number of turns before the one with a text of the request."""
    return next(turn for turn, batch in enumerate(batches(queues)) if any(text.request is request for text in batch))


@given(st.lists(st.tuples(st.integers(0, 3), st.lists(st.integers(0, 150), min_size=1, max_size=9)), max_size=20))
def test_every_text_goes_once_with_its_own_encoder_within_a_turn(asked: list[tuple[int, list[int]]]) -> None:
    queues, encoders = DeviceQueue(), [_Encoder() for _ in range(4)]
    requests = [(encoders[queue], waiting(queues, encoders[queue], *lengths)) for queue, lengths in asked]
    taken = []
    while batch := queues.take():
        encoder, found = batch
        assert len(found) == 1 or sum(text.tokens for text in found) <= TURN_TOKENS
        taken += [(id(encoder), id(text.request), text.at) for text in found]
    texts = [(id(queue), id(one), at) for queue, one in requests for at in range(len(one.tokenised.ids))]
    assert sorted(taken) == sorted(texts)


@given(crowd=st.lists(st.lists(st.integers(5, 100), min_size=1, max_size=9), max_size=15), turns=st.integers(0, 9))
@example(crowd=[[50]] * 15, turns=1)
@example(crowd=[[5]] * 4 + [[96]], turns=4)
def test_a_text_alone_is_in_one_of_the_next_two_turns(crowd: list[list[int]], turns: int) -> None:
    """The text may be no longer than its caller's other texts, of which any number may wait."""
    queues, encoder = DeviceQueue(), _Encoder()
    for lengths in crowd:
        waiting(queues, encoder, *lengths * 20)
    for _ in range(turns):
        queues.take()
    assert turns_until(queues, waiting(queues, encoder, 5)) <= 1


@given(alone=st.integers(1, 16), texts=st.integers(40, 60), turns=st.integers(0, 9), apart=st.booleans())
def test_texts_alone_are_in_the_next_two_turns(alone: int, texts: int, turns: int, apart: bool) -> None:
    """The texts are as long as those of the large requests, of the same caller or of another one."""
    queues, encoder = DeviceQueue(), _Encoder()
    for _ in range(4):
        waiting(queues, encoder, *[5] * texts)
    for _ in range(turns):
        queues.take()
    small = [waiting(queues, encoder, 5, caller="other" if apart else "") for _ in range(alone)]
    soon = [text.request for _, batch in zip(range(2), batches(queues), strict=False) for text in batch]
    assert all(request in soon for request in small)


@given(models=st.integers(1, 5), turns=st.integers(0, 9))
def test_models_take_turns(models: int, turns: int) -> None:
    queues, encoders = DeviceQueue(), [_Encoder() for _ in range(models)]
    for encoder in encoders:
        waiting(queues, encoder, *[50] * 40)
    for _ in range(turns):
        queues.take()
    assert turns_until(queues, waiting(queues, encoders[0], 1)) < models


@given(requests=st.lists(st.integers(1, 6), min_size=2, max_size=4), length=st.integers(1, 30))
def test_callers_have_equal_shares_however_many_requests_they_have(requests: list[int], length: int) -> None:
    queues, encoder = DeviceQueue(), _Encoder()
    for caller, number in enumerate(requests):
        for _ in range(number):
            waiting(queues, encoder, *[length] * 1_500, caller=str(caller))
    given_to: Counter[str] = Counter()
    of_request: Counter[QueuedRequest] = Counter()
    for _, batch in zip(range(15), batches(queues), strict=False):
        for text in batch:
            given_to[text.request.work.caller] += length
            of_request[text.request] += length
    assert max(given_to.values()) - min(given_to[str(each)] for each in range(len(requests))) <= 2 * TURN_TOKENS
    for caller, number in enumerate(requests):
        shares = [share for request, share in of_request.items() if request.work.caller == str(caller)]
        assert len(shares) == number
        assert max(shares) - min(shares) <= 2 * TURN_TOKENS


@given(st.integers(2, 150), st.integers(1, 2), st.booleans())
def test_short_texts_that_never_end_starve_nobody(long: int, flood: int, apart: bool) -> None:
    """The short texts come faster than the device can embed them."""
    queues, encoder = DeviceQueue(), _Encoder()
    callers = count()

    def come() -> None:
        for _ in range(flood * TURN_TOKENS):
            waiting(queues, encoder, 1, caller=str(next(callers)) if apart else "flood")

    come()
    queues.take()
    patient, turn = waiting(queues, encoder, long), 0
    while batch := queues.take():
        if any(text.request is patient for text in batch[1]):
            break
        come()
        turn += 1
        assert turn <= 2 + 2 * flood, "those before it have had theirs"


def test_a_batch_is_of_texts_about_as_long() -> None:
    queues, encoder = DeviceQueue(), _Encoder()
    for caller in "ab":
        waiting(queues, encoder, *[10, 50] * 40, caller=caller)
    found = [{text.tokens for text in batch} for batch in batches(queues)]
    assert sum(len(lengths) > 1 for lengths in found) <= 1
    assert len(found) <= 2 * 40 * 60 / TURN_TOKENS + 1


@pytest.mark.parametrize("others", [0, 3])
def test_what_nobody_waits_for_is_left_out(others: int) -> None:
    queues, encoder = DeviceQueue(), _Encoder()
    waiting(queues, encoder, 50, 60).dropped = True
    for _ in range(others):
        waiting(queues, encoder, 5)
    batch = queues.take()
    assert (len(batch[1]) if batch else 0) == others


@pytest.mark.parametrize(
    ("queue", "seconds", "ahead"),
    [
        ([], 1_000, 0),
        ([("a", 12), ("a", 12), ("a", 12)], 12, 36),
        ([("a", 60)] * 4, 0.5, 2),  # each other request gets as much as this one
        ([("a", 3), ("a", 60)], 10, 13),
        ([("b", 60)] * 4, 10, 10),  # another caller has half of the device
        ([("b", 4)], 10, 4),
        ([("a", 5), ("b", 60), ("c", 60)], 10, 5 + 15 + 15),
    ],
)
def test_what_is_ahead_of_a_request(queue: list[tuple[str, float]], seconds: float, ahead: float) -> None:
    assert seconds_ahead(queue, "a", seconds) == pytest.approx(ahead)


@given(before=st.floats(1, 1e6), after=st.floats(1_000, 1e6), batch=st.floats(0.5, 5))
def test_a_pace_follows_what_is_done(before: float, after: float, batch: float) -> None:
    """The pace follows up and down within two minutes of work."""
    pace = Pace(before)
    for _ in range(int(120 / batch) + 1):
        pace.learn(round(after * batch), batch)
    assert pace.seconds(after) == pytest.approx(1, rel=0.02 + before / after / 1_000)
