"""JSON parser and serialiser that keep numbers as they are written: `1.50`, `1e3`, and integers of any length."""

import json
from typing import Any, Final, Self

import orjson

#: Integers of at most this many digits fit into 64 bits.
_SHORT_DIGITS: Final = 18


class NoNumberError(ValueError):
    """NaN or Infinity in a text, which JSON doesn't have; the message is that word."""


class Number(float):
    """Number with its digits, since a float or a 64-bit integer might not hold it exactly."""

    __slots__ = ("digits",)
    digits: str

    def __new__(cls, digits: str) -> Self:
        """Create the number and keep its digits as they are."""
        made = super().__new__(cls, digits)
        made.digits = digits
        return made


def decode(text: str) -> Any:
    """Parse JSON slowly and exactly. Unlike the fast parser, this one accepts surrogates.

    Raises:
        json.JSONDecodeError, RecursionError: the text isn't valid JSON, or is nested too deeply.
        NoNumberError: the text holds NaN or Infinity.
    """
    return _DECODER.decode(text)


def loads(data: bytes | str) -> Any:
    """Parse JSON, exactly where a number needs it. Raises as `decode`."""
    try:
        value = orjson.loads(data)
    except orjson.JSONDecodeError:  # also raised for numbers that no float holds
        return decode(data if isinstance(data, str) else data.decode())
    if may_be_inexact(value):
        return decode(data if isinstance(data, str) else data.decode())
    return value


def may_be_inexact(value: Any) -> bool:
    """Return True if a value from the fast parser holds a float, which it also makes of integers past 64 bits."""
    if type(value) is float:
        return True
    if type(value) is list:
        return any(map(may_be_inexact, value))
    return type(value) is dict and any(map(may_be_inexact, value.values()))


def dumps(value: Any, option: int | None = None) -> bytes:
    """Serialise a value to JSON, with numbers as they were read.

    Raises:
        TypeError: a value has no JSON form, or a string holds surrogates.
    """
    return orjson.dumps(value, default=as_it_stands, option=option)


def as_it_stands(value: Any) -> orjson.Fragment:
    """Serialise a number for `orjson`, which calls this for types that it doesn't know."""
    if not isinstance(value, Number):
        raise TypeError
    return orjson.Fragment(value.digits)


def _integer(digits: str) -> int | Number:
    return int(digits) if len(digits) <= _SHORT_DIGITS and digits != "-0" else Number(digits)


def _refuse(constant: str) -> None:
    raise NoNumberError(constant)


_DECODER = json.JSONDecoder(parse_constant=_refuse, parse_int=_integer, parse_float=Number)
