"""Spans of time as options take them: a number and a unit."""

import re
from datetime import timedelta

from pipeline.core.errors import UserError

_SPAN = re.compile(r"(\d{1,5})([smhd])")
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}


def read_span(option: str, given: str) -> timedelta:
    """Return the span that an option gives, such as `90d`.

    Raises:
        UserError: it is no number with s, m, h or d.
    """
    found = _SPAN.fullmatch(given)
    if not found:
        raise UserError(f'{option} "{given}": write a number and s, m, h or d, such as 90d.')
    return timedelta(**{_UNITS[found[2]]: int(found[1])})
