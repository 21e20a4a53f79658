"""JSON whose numbers stay as they are written: `1.50`, `1e3`, and integers of any length."""

import json
from typing import Any, Final, Self

import orjson

#: Integers of so many digits fit into 64 bits.
_SHORT_DIGITS: Final = 18


class NoNumberError(ValueError):
    """A text holds NaN or Infinity, which JSON hasn't; the message is that word."""


class Number(float):
    """A number that a float or a 64-bit integer might not hold exactly, with its digits."""

    __slots__ = ("digits",)
    digits: str

    def __new__(cls, digits: str) -> Self:
        """Keep the digits as they stand."""
        made = super().__new__(cls, digits)
        made.digits = digits
        return made


def decode(text: str) -> Any:
    """Parse JSON slowly and exactly. Unlike the fast parser this one takes surrogates.

    Raises:
        json.JSONDecodeError, RecursionError: it is none.
        NoNumberError: it holds NaN or Infinity.
    """
    return _DECODER.decode(text)


def loads(data: bytes | str) -> Any:
    """Parse JSON, exactly where that matters. Raises as `decode`."""
    try:
        value = orjson.loads(data)
    except orjson.JSONDecodeError:  # numbers that no float holds are among its reasons
        return decode(data if isinstance(data, str) else data.decode())
    if may_be_inexact(value):
        return decode(data if isinstance(data, str) else data.decode())
    return value


def may_be_inexact(value: Any) -> bool:
    """Return whether what the fast parser has read holds a float, its word for integers past 64 bits too."""
    if type(value) is float:
        return True
    if type(value) is list:
        return any(map(may_be_inexact, value))
    return type(value) is dict and any(map(may_be_inexact, value.values()))


def dumps(value: Any, option: int | None = None) -> bytes:
    """Write JSON, numbers as they were read.

    Raises:
        TypeError: a value has no JSON, or a string holds surrogates.
    """
    return orjson.dumps(value, default=as_it_stands, option=option)


def as_it_stands(value: Any) -> orjson.Fragment:
    """Write a number for `orjson`, which asks for what it doesn't know."""
    if not isinstance(value, Number):
        raise TypeError
    return orjson.Fragment(value.digits)


def _integer(digits: str) -> int | Number:
    return int(digits) if len(digits) <= _SHORT_DIGITS and digits != "-0" else Number(digits)


def _refuse(constant: str) -> None:
    raise NoNumberError(constant)


_DECODER = json.JSONDecoder(parse_constant=_refuse, parse_int=_integer, parse_float=Number)
