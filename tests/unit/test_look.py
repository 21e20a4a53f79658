"""Numbers and times as people read them."""

from io import StringIO

import pytest
from rich.console import Console

from pipeline.cli.look import duration, ledger, number


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (0.4, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 0 s"),
        (280, "4 min 40 s"),
        (3_599, "59 min 59 s"),
        (3_600, "1 h 0 min"),
        (86_399, "23 h 59 min"),
        (90_000, "1 d 1 h"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0.0"),
        (3.14, "3.1"),
        (9.96, "10"),
        (42.4, "42"),
        (999.4, "999"),
        (999.6, "1.0k"),
        (1_234, "1.2k"),
        (123_456, "123.5k"),
        (999_960, "1.0M"),
        (1_500_000, "1.5M"),
    ],
)
def test_numbers(value: float, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("billed", "unanswered", "rows"),
    [(90, 0, []), (120, 0, ["billed 120"]), (120, 30, ["unanswered about 30", "billed 120"])],
)
def test_a_receipt_shows_the_bill_where_it_differs(billed: int, unanswered: int, rows: list[str]) -> None:
    items = {"in": 9, "embedded": 9, "reused": 0, "rejected": 0, "cancelled": 0}
    tokens = {"prompt": 90, "billed": billed, "unanswered": unanswered, "reused": 0}
    out = Console(file=StringIO(), width=80)
    out.print(ledger({"id": "01", "items": items, "tokens": tokens}, {}))
    assert isinstance(out.file, StringIO)
    lines = [" ".join(line.split()) for line in out.file.getvalue().splitlines()]
    assert [line for line in lines if line.startswith(("billed", "unanswered"))] == rows
