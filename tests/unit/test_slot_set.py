"""Set of slots, against Python's own."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipeline.ingest.changes import SlotSet

_SLOTS = st.lists(st.integers(0, 40_000) | st.integers(2**40, 2**40 + 10), max_size=60)


@given(_SLOTS, _SLOTS, _SLOTS)
def test_a_slot_set_is_a_set(added: list[int], discarded: list[int], asked: list[int]) -> None:
    made, plain = SlotSet(), set(added) - (set(discarded) & set(added))
    made.add(np.array(added, np.int64))
    made.discard(np.array([slot for slot in discarded if slot in added], np.int64))
    assert made.contains(np.array(asked, np.int64)).tolist() == [slot in plain for slot in asked]
    assert len(made) == len(plain)
    bits = {
        page * 8_192 + at for page, data in made.pages().items() for at in range(8_192) if data[at // 8] >> at % 8 & 1
    }
    assert bits == plain
