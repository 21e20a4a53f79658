"""Findings of checks, as the doctor reports them."""

import enum
from dataclasses import dataclass


class State(enum.StrEnum):
    """How a matter stands."""

    OK = "ok"
    #: It works, and may not one day.
    WARN = "warn"
    FAIL = "fail"
    #: Not looked at, for a reason.
    SKIPPED = "skipped"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the doctor's report."""

    state: State
    #: What is.
    found: str
    #: What to do about it; empty where nothing must be done.
    mend: str = ""
    #: Whether it failed for want of an answer: it may be another one in a moment.
    unreachable: bool = False


def ok(found: str) -> Finding:
    """All is well."""
    return Finding(State.OK, found)


def warn(found: str, mend: str) -> Finding:
    """It works, and may not one day."""
    return Finding(State.WARN, found, mend)


def fail(found: str, mend: str, *, unreachable: bool = False) -> Finding:
    """It doesn't work."""
    return Finding(State.FAIL, found, mend, unreachable)


def skipped(why: str) -> Finding:
    """Not looked at."""
    return Finding(State.SKIPPED, why)
