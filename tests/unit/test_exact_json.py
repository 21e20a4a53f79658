"""JSON round trip of numbers, which come back as they were written."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.core import exact_json

numbers = st.from_regex(r"-?(0|[1-9][0-9]{0,40})(\.[0-9]{1,40})?([eE][+-]?[0-9]{1,4})?", fullmatch=True)


@settings(deadline=None)
@given(st.lists(numbers, max_size=5), numbers)
def test_numbers_come_back(some: list[str], one: str) -> None:
    written = f'{{"some":[{",".join(some)}],"one":{one}}}'
    if "-0" not in (*some, one):  # the fast parser reads -0 as an integer
        assert exact_json.dumps(exact_json.loads(written)).decode() == written
    assert exact_json.dumps(exact_json.decode(written)).decode() == written


def test_it_is_a_number_for_whoever_calculates() -> None:
    (number,) = exact_json.loads("[1.50]")
    assert number == 1.5
    assert exact_json.loads("[7]") == [7]


def test_what_is_no_json() -> None:
    with pytest.raises(exact_json.NoNumberError, match="NaN"):
        exact_json.loads("[NaN]")
    with pytest.raises(json.JSONDecodeError):
        exact_json.loads("[")
    with pytest.raises(TypeError):
        exact_json.dumps(object())
