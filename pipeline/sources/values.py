"""Normalisation of values from every format and database: as keys, and as carried JSON."""

import math
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Address, IPv6Interface, IPv6Network
from typing import Final
from uuid import UUID

from pipeline.core.exact_json import Number

#: Longest key in bytes; a longer one rejects its row.
KEY_BYTES: Final = 1024

_KINDS = {bool: "a boolean", int | float: "a number", list: "a list", dict: "an object"}
_WRITTEN_AS_STRINGS = (UUID, IPv4Address, IPv4Interface, IPv4Network, IPv6Address, IPv6Interface, IPv6Network)
_DAY_NANOSECONDS = 86_400 * 10**9
_NOT_FINITE = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}


class BadKeyError(Exception):
    """The key can't be kept; the message says why."""


class NotScalarError(Exception):
    """The value is no string, number or boolean; the message says what it is."""


def as_key(value: object) -> str | None:
    """Return a key as it is stored, the same for the same value from every kind of source.

    Raises:
        BadKeyError: the value isn't a scalar, or can't be stored.
    """
    if value is None:
        return None
    try:
        key = scalar(value)
    except NotScalarError as error:
        raise BadKeyError(f"key is {error}") from None
    try:
        size = len(key.encode())
    except UnicodeEncodeError:
        raise BadKeyError("key is not valid UTF-8") from None
    if size > KEY_BYTES:
        raise BadKeyError(f"key has {size:,} bytes; at most {KEY_BYTES:,} are allowed")
    if "\0" in key:
        raise BadKeyError("key contains a NUL character")
    return key


def scalar(value: object) -> str:
    """Return a value as a string, the same for the same value from every kind of source.

    Raises:
        NotScalarError: it isn't one value, or not a finite number.
    """
    if isinstance(value, Number):
        return value.digits
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        if not math.isfinite(value):
            raise NotScalarError("not a finite number")
        return str(int(value)) if value.is_integer() else repr(value)
    if isinstance(value, int):
        return str(value)
    if isinstance(value, Decimal) and not value.is_finite():
        raise NotScalarError("not a finite number")
    plain = written(value)
    if not isinstance(plain, str):
        raise NotScalarError(f"{kind_of(value)}, not a string or a number")
    return plain


def kind_of(value: object) -> str:
    """Return the name of a value's kind, for the middle of a sentence."""
    return next((called for kind, called in _KINDS.items() if isinstance(value, kind)), f"of type {_named(value)}")


def _named(value: object) -> str:
    return type(value).__name__


def written(value: object) -> object:
    """Return values of types that JSON lacks as strings, a moment in UTC with all of its digits; others unchanged."""
    if isinstance(value, Decimal):
        return format(value, "f")
    if isinstance(value, datetime) and value.tzinfo is not None:
        return value.astimezone(UTC).isoformat()
    if isinstance(value, date | time):  # a datetime is a date
        return value.isoformat()
    if isinstance(value, timedelta):
        return interval(days=value.days, nanoseconds=value.seconds * 10**9 + value.microseconds * 10**3)
    return str(value) if isinstance(value, _WRITTEN_AS_STRINGS) else value


def interval(*, months: int = 0, days: int = 0, nanoseconds: int = 0) -> str:
    """Return an interval as Postgres writes it; days and smaller units share one sign."""
    below = days * _DAY_NANOSECONDS + nanoseconds
    whole_days, rest = divmod(abs(below), _DAY_NANOSECONDS)
    sign = "-" if below < 0 else ""
    counts = {"year": abs(months) // 12, "mon": abs(months) % 12, "day": whole_days}
    signs = {"year": "-" * (months < 0), "mon": "-" * (months < 0), "day": sign}
    parts = [f"{signs[unit]}{n} {unit}{'s' * (signs[unit] + str(n) != '1')}" for unit, n in counts.items() if n]
    if rest or not parts:
        seconds, fraction = divmod(rest, 10**9)
        clock = f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}.{fraction:09}"
        parts.append(sign + (clock.rstrip("0") if fraction else clock.partition(".")[0]))
    return " ".join(parts)


def carried(value: object) -> object:
    """Return a value as carried JSON, the same from every kind of source.

    Raises:
        TypeError: the value can't be carried; the message is its type.
    """
    value = written(value)
    if value is None or isinstance(value, str | bool | Number):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else _NOT_FINITE[repr(value)]
    if isinstance(value, int):
        return value if -(2**63) <= value < 2**64 else Number(str(value))
    if isinstance(value, list | tuple):
        return [carried(each) for each in value]
    if isinstance(value, dict):
        return {str(name): carried(each) for name, each in value.items()}
    raise TypeError(_named(value))
