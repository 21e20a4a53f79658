"""State machines of jobs and chunks."""

from typing import TypeVar

import pytest

from pipeline.core.chunks import CHUNK_TRANSITIONS, ChunkState, RejectCode
from pipeline.core.jobs import JOB_TRANSITIONS, JobState
from pipeline.db.jobs import sources_of

State = TypeVar("State")


def reachable(start: State, transitions: dict[State, frozenset[State]]) -> set[State]:
    found, new = {start}, {start}
    while new:
        new = {target for state in new for target in transitions[state]} - found
        found |= new
    return found


def test_every_job_state_can_be_reached() -> None:
    assert reachable(JobState.STAGING, JOB_TRANSITIONS) == set(JobState) == set(JOB_TRANSITIONS)


def test_every_chunk_state_can_be_reached() -> None:
    assert reachable(ChunkState.PENDING, CHUNK_TRANSITIONS) == set(ChunkState) == set(CHUNK_TRANSITIONS)


def test_from_every_job_state_an_end_is_near() -> None:
    for state in JobState:
        assert any(end.ended for end in reachable(state, JOB_TRANSITIONS))


def test_which_states_are_ends() -> None:
    assert {state.value for state in JobState if state.ended} == {"completed", "failed", "cancelled"}


def test_an_ended_job_moves_only_by_retry() -> None:
    assert {state: set(JOB_TRANSITIONS[state]) for state in JobState if state.ended} == {
        JobState.COMPLETED: {JobState.QUEUED},
        JobState.FAILED: {JobState.QUEUED},
        JobState.CANCELLED: set(),
    }


@pytest.mark.parametrize("to", JobState)
def test_the_store_moves_as_the_transitions_say(to: JobState) -> None:
    assert set(sources_of(to)) == {state for state in JobState if to in JOB_TRANSITIONS[state]}


def test_what_a_retry_may_mend_has_a_text() -> None:
    assert {code.value for code in RejectCode if code.retryable} == {
        *("bad_vector", "encode_failed", "crashed_worker", "gateway_refused", "gateway_failed")
    }
