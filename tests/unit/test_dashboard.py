"""Words and drawings of the dashboard, as tables of cases."""

from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest
from fastapi import APIRouter, FastAPI
from starlette.requests import ClientDisconnect
from starlette.testclient import TestClient

from pipeline.api.dashboard import drawing, session, submit_page, words
from pipeline.api.dashboard.answer import PageRoute
from pipeline.core.chunks import RejectCode
from pipeline.core.errors import InvalidPayload
from pipeline.core.job_status import ChunkCounts, ItemCounts, JobStatus, Rate, TokenCounts
from pipeline.core.jobs import JobState, Reason
from pipeline.db.dashboard import Cell

NOW = datetime(2026, 9, 1, 12, 0, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "–"),
        (Decimal(0), "0.00"),
        (Decimal("1234.5"), "1,234.50"),
        (Decimal("0.0115"), "0.0115"),
        (Decimal("0.02"), "0.02"),
        (Decimal("0.00000312"), "< 0.0001"),
    ],
)
def test_money(value: Decimal | None, said: str) -> None:
    assert words.money(value) == said


@pytest.mark.parametrize(
    ("part", "whole", "said"),
    [
        (0, 0, "–"),
        (0, 10, "0 %"),
        (10, 10, "100 %"),
        (1, 1_000_000, "1 %"),
        (999_999, 1_000_000, "99 %"),
    ],
)
def test_percent_is_whole_only_when_it_is(part: float, whole: float, said: str) -> None:
    assert words.percent(part, whole) == said


@pytest.mark.parametrize(
    ("seconds", "said"), [(1, "5 s"), (43, "45 s"), (281, "4 min 45 s"), (1_501, "25 min"), (7_333, "2 h")]
)
def test_rough(seconds: float, said: str) -> None:
    assert words.rough(seconds) == said


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(-3, "just now"), (59, "just now"), (61, "1 min ago"), (7_300, "2 h ago"), (180_000, "2 d ago")],
)
def test_age(seconds: float, said: str) -> None:
    assert words.age(NOW - timedelta(seconds=seconds), NOW) == said


def status(*, over: int, pace: float, elapsed: float, state: str = "running", cancelled: int = 0) -> JobStatus:
    return JobStatus(
        id=UUID(int=1),
        name="docs",
        state=JobState(state),
        reason=None,
        message=None,
        model="m",
        labels={},
        output=None,
        notices=[],
        items=ItemCounts(total=1_000, embedded=over, cancelled=cancelled, pending=1_000 - over - cancelled),
        tokens=TokenCounts(),
        rate=Rate(items_per_second=pace),
        eta_seconds=None,
        chunks=ChunkCounts(),
        created_at=NOW - timedelta(seconds=elapsed),
        started_at=NOW - timedelta(seconds=elapsed),
        finished_at=None,
    )


def test_time_left_shows_what_is_not_known() -> None:
    steady = status(over=500, pace=10, elapsed=50)
    assert words.time_left(steady, NOW) == "about 45 s" or words.time_left(steady, NOW) == "about 1 min"
    assert words.time_left(status(over=100, pace=1, elapsed=50), NOW) == "7 min 30 s to 15 min"
    for unknown in (
        status(over=0, pace=0, elapsed=5),
        status(over=10, pace=0, elapsed=600),
        status(over=10, pace=5, elapsed=5, state="paused"),
    ):
        assert words.time_left(unknown, NOW) is None


def test_progress_of_what_failed_is_what_has_a_vector() -> None:
    how = {"over": 300, "pace": 0, "elapsed": 9, "cancelled": 700}
    assert words.progress(status(**how, state="failed")) == "30 %"
    assert words.progress(status(**how, state="completed")) == "100 %"


def test_every_code_and_reason_is_told() -> None:
    assert set(words.REJECTS) == set(RejectCode)
    assert set(words.REASONS) == set(Reason)


def test_a_bar_shows_one_reject_among_millions() -> None:
    parts = drawing.bar(ItemCounts(total=5_000_000, embedded=4_999_999, reused=0, rejected=1, cancelled=0, pending=0))
    assert [part.kind for part in parts] == ["embedded", "rejected"]
    assert parts[1].width >= 0.5
    assert parts[1].begin + parts[1].width <= 100.01
    assert drawing.bar(ItemCounts(total=0, embedded=0, reused=0, rejected=0, cancelled=0)) == []


@pytest.mark.parametrize(("seconds", "width"), [(0, 1), (60, 1), (61, 2), (3_600, 60), (86_400 * 3, 7_200)])
def test_columns_are_of_round_widths(seconds: float, width: int) -> None:
    assert drawing.width_of_columns(seconds) == width


def test_throughput_leaves_gaps_and_marks_what_goes_on() -> None:
    begin = datetime.fromtimestamp(1_000_000, UTC)
    chart = drawing.throughput(
        [(1_000_000, 10, 900), (1_000_030, 10, 450)], 10, begin, begin + timedelta(seconds=35), going_on=True
    )
    assert [column.open for column in chart.columns] == [False, True]
    assert chart.top == 100
    assert [column.height for column in chart.columns] == [90, 45]
    assert chart.columns[1].begin == pytest.approx(3 * chart.columns[0].width, abs=0.01)


def cell(**counts: Any) -> Cell:
    usual = dict.fromkeys(("pending", "running", "cancelled", "rejected_items", "lost"), 0)
    return Cell(
        **{
            **usual,
            "first_chunk": 3,
            "last_chunk": 4,
            "chunks": 2,
            "items": 500,
            "claims": 2,
            "last_error": None,
            "task_id": None,
            **counts,
        }
    )


@pytest.mark.parametrize(
    ("counts", "kind"),
    [
        ({}, "done"),
        ({"rejected_items": 1}, "rejected"),
        ({"pending": 1, "rejected_items": 1}, "pending"),
        ({"pending": 1, "running": 1}, "running"),
        ({"running": 1, "cancelled": 1}, "cancelled"),
        ({"running": 1, "lost": 1, "last_error": "lease expired"}, "trouble"),
    ],
)
def test_a_cell_is_as_its_worst_chunk(counts: dict[str, Any], kind: str) -> None:
    assert drawing.strip([cell(**counts)])[0].kind == kind


def test_a_cell_tells_its_attempts() -> None:
    (drawn,) = drawing.strip([cell(running=1, claims=5, lost=1, last_error="lease expired")])
    assert drawn.again
    assert drawn.tip == "chunks 4 to 5: 1 done, 1 running|500 items, 5 claims|1 claim lost: lease expired"


def test_whoever_leaves_a_page_while_it_waits_makes_no_failure_of_it() -> None:
    app, router = FastAPI(), APIRouter(route_class=PageRoute)

    @router.get("/")
    async def page() -> None:
        raise ClientDisconnect

    app.include_router(router)
    with pytest.raises(ClientDisconnect):
        TestClient(app).get("/")


@pytest.mark.parametrize(
    ("fields", "workspace", "said"),
    [
        ({}, "default", "vectormill submit FILE"),
        ({"file": "a b.csv", "model": "m", "name": "n"}, "default", "vectormill submit 'a b.csv' --model m --name n"),
        ({"model": "m"}, "search", "vectormill submit FILE --model m --workspace search"),
        ({"file": "-x.csv", "name": "-n"}, "default", "vectormill submit ./-x.csv --name=-n"),
        ({"label": "-a=1\n\nb=2"}, "default", "vectormill submit FILE --label=-a=1 --label b=2"),
        (
            {"collection": "tickets", "model": "m", "text_column": "body", "name": "n", "label": "a=1"},
            "search",
            "vectormill sync tickets FILE --name n --label a=1 --workspace search",
        ),
    ],
)
def test_the_command_that_does_what_a_form_says(fields: dict[str, str], workspace: str, said: str) -> None:
    assert submit_page.command_of(fields, workspace) == said


def test_fields_of_a_form_are_few() -> None:
    assert session.fields_of(b"a=1%0D%0A2&b=+x") == {"a": "1\n2", "b": " x"}
    with pytest.raises(InvalidPayload, match="more than 20 fields"):
        session.fields_of(b"&".join([b"a=1"] * 21))
