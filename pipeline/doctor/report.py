"""Findings of the doctor's checks."""

import enum
from dataclasses import dataclass


class State(enum.StrEnum):
    """Result of a check."""

    OK = "ok"
    #: Works now, but may fail one day.
    WARN = "warn"
    FAIL = "fail"
    #: Not checked, for a reason.
    SKIPPED = "skipped"


@dataclass(frozen=True, slots=True)
class Finding:
    """Line of the doctor's report."""

    state: State
    #: The observed state.
    found: str
    #: Advice; empty if nothing must be done, or `found` says it already.
    mend: str = ""
    #: True if there was no answer, so that a retry may find another state.
    unreachable: bool = False


def ok(found: str) -> Finding:
    """Return the finding that all is well."""
    return Finding(State.OK, found)


def warn(found: str, mend: str) -> Finding:
    """Return the finding that something works now, but may fail one day."""
    return Finding(State.WARN, found, mend)


def fail(found: str, mend: str, *, unreachable: bool = False) -> Finding:
    """Return the finding that something doesn't work."""
    return Finding(State.FAIL, found, mend, unreachable)


def skipped(why: str) -> Finding:
    """Return the finding that a check was skipped."""
    return Finding(State.SKIPPED, why)
