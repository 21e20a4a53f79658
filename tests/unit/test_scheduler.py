"""Scheduler's choice of the job whose chunk is published next."""

from collections import Counter
from uuid import UUID

from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.jobs import ActiveJob, JobState
from pipeline.db.chunks import InFlight
from pipeline.dispatch.scheduler import Tokens, choose


class Feed:
    def __init__(self, job: int, chunks: int, tokens: int = 100) -> None:
        self._chunks = iter([(job * 1000 + at, tokens) for at in range(chunks)])

    def take(self) -> tuple[int, int] | None:
        return next(self._chunks, None)


def job(number: int, *, workspace: int = 1, weight: float = 1.0, priority: int = 0) -> ActiveJob:
    return ActiveJob(
        id=UUID(int=number),
        name=f"job-{number}",
        state=JobState.RUNNING,
        model="model",
        workspace_id=workspace,
        weight=weight,
        priority=priority,
        max_rejects=None,
    )


def chosen(jobs: list[ActiveJob], room: int, sizes: list[int], in_flight: dict[int, int] | None = None) -> list[int]:
    """Return the jobs' numbers in the order of publishing. `in_flight` holds tokens in flight by a job's number."""
    spaces = {each.id.int: each.workspace_id for each in jobs}
    running = (in_flight or {}).items()
    tokens = Tokens([InFlight(UUID(int=number), "model", spaces[number], count) for number, count in running])
    feeds = {each.id: Feed(each.id.int, size) for each, size in zip(jobs, sizes, strict=True)}
    return [job_id.int for job_id, _ in choose(jobs, feeds, tokens, room)]


def test_priority_comes_first() -> None:
    jobs = [job(1), job(2, priority=5), job(3, priority=-1)]
    assert chosen(jobs, 5, [2, 2, 2]) == [2, 2, 1, 1, 3]


def test_jobs_of_a_workspace_take_turns_the_oldest_first() -> None:
    assert chosen([job(2), job(1)], 4, [3, 3]) == [1, 2, 1, 2]


def test_a_small_job_doesnt_wait_for_a_huge_one_of_its_workspace() -> None:
    assert chosen([job(1), job(2)], 4, [9, 2], {1: 1_000}) == [2, 2, 1, 1]


def test_a_workspaces_share_doesnt_grow_with_its_jobs() -> None:
    jobs = [job(1), job(2), job(3, workspace=2)]
    assert Counter(chosen(jobs, 40, [100, 100, 100])) == {1: 10, 2: 10, 3: 20}


def test_workspaces_share_by_weight() -> None:
    jobs = [job(1, workspace=1, weight=1), job(2, workspace=2, weight=3)]
    assert Counter(chosen(jobs, 40, [100, 100])) == {1: 10, 2: 30}


def test_who_has_much_in_flight_waits() -> None:
    jobs = [job(1, workspace=1), job(2, workspace=2)]
    assert chosen(jobs, 4, [9, 9], {1: 1_000}) == [2, 2, 2, 2]


def test_chunks_without_tokens_share_too() -> None:
    jobs = [job(1, workspace=1), job(2, workspace=2)]
    feeds = {each.id: Feed(each.id.int, 9, tokens=0) for each in jobs}
    assert Counter(job_id.int for job_id, _ in choose(jobs, feeds, Tokens(), 6)) == {1: 3, 2: 3}


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(-2, 2), st.integers(0, 6)), max_size=6), st.integers(-3, 20))
def test_never_more_than_room_and_each_chunk_once(made: list[tuple[int, int, int]], room: int) -> None:
    jobs = [job(number, workspace=space, priority=level) for number, (space, level, _) in enumerate(made)]
    feeds = {each.id: Feed(each.id.int, size) for each, (*_, size) in zip(jobs, made, strict=True)}
    found = list(choose(jobs, feeds, Tokens(), room))
    assert len(found) == max(0, min(room, sum(size for *_, size in made)))
    assert len(set(found)) == len(found)
