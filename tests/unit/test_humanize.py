"""Numbers and durations formatted for people."""

import pytest

from pipeline.core import humanize


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (0, "0"),
        (0.44, "0.4"),
        (52.3, "52"),
        (999, "999"),
        (999.6, "1.0k"),
        (4_312, "4.3k"),
        (310_000, "310k"),
        (12_400_000, "12.4M"),
        (3.2e9, "3.2B"),
    ],
)
def test_short(value: float, said: str) -> None:
    assert humanize.short(value) == said


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.02, "< 0.1 s"),
        (3.24, "3.2 s"),
        (42, "42 s"),
        (280, "4 min 40 s"),
        (3_600, "1 h"),
        (3_780, "1 h 3 min"),
        (90_000, "1 d 1 h"),
    ],
)
def test_duration(seconds: float, said: str) -> None:
    assert humanize.duration(seconds) == said
