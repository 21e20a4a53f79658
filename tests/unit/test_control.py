"""Reject limit of a job, and its final state."""

from decimal import Decimal
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.errors import UserError
from pipeline.core.job_status import Account
from pipeline.core.options import KeptOptions
from pipeline.jobs.control import outcome, reject_limit


@pytest.mark.parametrize(
    ("option", "items", "limit"),
    [
        ("", 0, None),
        ("", 99, None),
        ("", 100, 10),
        ("", 1_999, 199),
        ("0", 1_000, 0),
        ("50", 10, 50),
        ("0%", 1_000, 0),
        ("100%", 7, 7),
        ("2.5%", 1_000, 25),
        ("2.5%", 39, 0),
        ("10%", 10, 1),
        ("29%", 100, 29),
        ("0.57%", 10_000, 57),
    ],
)
def test_limits(option: str, items: int, limit: int | None) -> None:
    assert reject_limit(option, items) == limit


@given(st.integers(0, 10_000), st.integers(0, 10**9))
def test_a_share_is_exact(hundredths: int, items: int) -> None:
    share = Decimal(hundredths) / 100
    assert reject_limit(f"{share}%", items) == hundredths * items // 10_000


@pytest.mark.parametrize(
    "option", ["x", "%", "-1", "-1%", "101%", "1.5", "nan%", "inf%", "5 %%", "1,000", "ten", "5%5"]
)
def test_a_wrong_option_is_named(option: str) -> None:
    with pytest.raises(UserError, match=r"give a count such as 50, or a share such as 2\.5%") as caught:
        reject_limit(option, 100)
    assert f'max_rejects "{option}"' in str(caught.value)


def ended(
    *, into: int = 100, rejected: int = 0, lost: int = 0, limit: int | None = None, ends_as: str | None = None
) -> Any:
    options = KeptOptions()
    job: Any = SimpleNamespace(ends_as=ends_as, reason="by_user", message="why", max_rejects=limit, options=options)
    items = {"in": into, "embedded": into - rejected - lost, "reused": 0, "rejected": rejected, "cancelled": 0}
    account = {"items": items, "tokens": {"prompt": 0, "reused": 0}, "balanced": not lost}
    return outcome(job, Account.model_validate(account))


@pytest.mark.parametrize(("lost", "said"), [(5, "5 items missing"), (-2, "2 items too many")])
def test_a_job_whose_items_do_not_add_up_fails(lost: int, said: str) -> None:
    state, reason, message = ended(lost=lost)
    assert (state, reason) == ("failed", "items_unaccounted")
    assert said in message
    assert ended(lost=lost, ends_as="cancelled")[0] == "cancelled"


def test_what_becomes_of_a_job() -> None:
    assert ended() == ("completed", None, None)
    assert ended(rejected=10, limit=10) == ("completed", None, None)
    assert ended(rejected=99) == ("completed", None, None)
    assert ended(rejected=11, limit=10)[:2] == ("failed", "too_many_rejects")
    assert ended(rejected=100, limit=100)[:2] == ("failed", "all_rejected")
    assert ended(ends_as="cancelled", rejected=100) == ("cancelled", "by_user", "why")
    assert ended(ends_as="failed") == ("failed", "by_user", "why")
