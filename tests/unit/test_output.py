"""Receipts as the command line prints them."""

from io import StringIO
from uuid import UUID

import pytest
from rich.console import Console

from pipeline.api.openapi_examples import EXAMPLES
from pipeline.cli import output
from pipeline.cli.jobs import _print_status
from pipeline.cli.output import ledger
from pipeline.core.job_status import EmbeddedOn, JobStatus, Receipt, TruncatedItem


def receipt(items: dict[str, int], tokens: dict[str, int], truncated: int) -> Receipt:
    account = {"items": items, "tokens": tokens, "truncated": truncated, "balanced": True}
    return Receipt.model_validate({"id": UUID(int=1), "state": "completed", **account})


@pytest.mark.parametrize(
    ("billed", "unanswered", "rows"),
    [(90, 0, []), (120, 0, ["billed 120"]), (120, 30, ["unanswered about 30", "billed 120"])],
)
def test_a_receipt_shows_the_bill_where_it_differs(billed: int, unanswered: int, rows: list[str]) -> None:
    items = {"in": 9, "embedded": 9, "reused": 0, "rejected": 0, "cancelled": 0}
    tokens = {"prompt": 90, "billed": billed, "unanswered": unanswered, "reused": 0}
    out = Console(file=StringIO(), width=80)
    out.print(ledger(receipt(items, tokens, 0), {}))
    assert isinstance(out.file, StringIO)
    lines = [" ".join(line.split()) for line in out.file.getvalue().splitlines()]
    assert [line for line in lines if line.startswith(("billed", "unanswered"))] == rows


def test_a_receipt_says_what_embedded_the_items() -> None:
    made = receipt(
        {"in": 9, "embedded": 9, "reused": 0, "rejected": 0, "cancelled": 0},
        {"prompt": 90, "billed": 90, "unanswered": 0, "reused": 0},
        0,
    )
    on = EmbeddedOn(device="NVIDIA H200", precision="bfloat16", items=9, tokens=90)
    out = Console(file=StringIO(), width=80)
    out.print(ledger(made.model_copy(update={"embedded_on": [on]}), {}))
    assert isinstance(out.file, StringIO)
    lines = [" ".join(line.split()) for line in out.file.getvalue().splitlines()]
    assert lines[3:5] == ["embedded 9 90", "on NVIDIA H200, bfloat16 9 90"]


def test_a_key_is_no_markup(monkeypatch: pytest.MonkeyPatch) -> None:
    out = Console(file=StringIO(), width=300)
    monkeypatch.setattr("pipeline.cli.output.stdout", out)
    made = JobStatus.model_validate(EXAMPLES["JobStatus"])
    worst = [TruncatedItem(index=0, key="[/b]", lost_tokens=7)]
    _print_status(made.model_copy(update={"lost_tokens": 7, "most_truncated": worst}))
    assert isinstance(out.file, StringIO)
    assert "most of [/b] (7)" in out.file.getvalue()


def test_a_receipt_says_how_many_texts_were_cut_and_what_to_do() -> None:
    items = {"in": 9, "embedded": 9, "reused": 0, "rejected": 0, "cancelled": 0}
    tokens = {"prompt": 90, "billed": 90, "unanswered": 0, "reused": 0}
    out = Console(file=StringIO(), width=300)
    part = EmbeddedOn(device="cpu", precision="float32", items=9, tokens=90)
    out.print(ledger(receipt(items, tokens, 1_200).model_copy(update={"embedded_on": [part]}), {}))
    assert isinstance(out.file, StringIO)
    lines = [" ".join(line.split()) for line in out.file.getvalue().splitlines()]
    assert "truncated 1,200" in lines
    assert lines[-1].startswith("1,200 texts were truncated at the token limit. --on-long split makes passages of such")


@pytest.mark.parametrize(("width", "is_terminal"), [(80, True), (200, True), (140, False)])
def test_a_list_fits_a_terminal_and_loses_nothing_in_a_pipe(
    monkeypatch: pytest.MonkeyPatch, width: int, is_terminal: bool
) -> None:
    written = StringIO()
    console = Console(file=written, width=width, force_terminal=is_terminal, color_system=None, soft_wrap=True)
    monkeypatch.setattr(output, "stdout", console)
    name, message = "a-name-" * 20, " ".join(f"word{n}" for n in range(60))
    columns = [
        output.Column("name", flexible=True),
        output.Column("count", right=True),
        output.Column("rate", right=True, from_width=100),
        output.Column("message", flexible=True, folds=True),
    ]
    output.print_list(columns, [[name, "1,234,567", "9.9k/s", message]])
    lines = written.getvalue().splitlines()
    told = " ".join(written.getvalue().split())
    assert "1,234,567" in told
    if is_terminal:
        assert max(map(len, lines)) <= width
        assert ("9.9k/s" in told) is (width >= 100)
        assert all(word in told for word in message.split()), "a message goes on over lines"
    else:
        assert len(lines) == 2
        assert name in told
        assert message in told
