"""Glob patterns over paths, matched by segment, in time bounded by the lengths of pattern and path."""

import fnmatch
import re
from collections.abc import Callable
from itertools import pairwise

from pipeline.core.errors import SourceError

MOST_CHARACTERS = 1_024
MOST_SEGMENTS = 64

_GLOB = re.compile(r"[*?\[]")

#: Indexes of the pattern's segments that may come next.
State = frozenset[int]


def is_glob(path: str) -> bool:
    """Return True if a path is a pattern."""
    return _GLOB.search(path) is not None


def first_glob(path: str) -> str:
    """Return the part of a path before its first glob character."""
    return _GLOB.split(path, maxsplit=1)[0]


class Pattern:
    """Glob pattern for paths, with slashes between segments.

    `*`, `?` and `[…]` match within a segment, and don't match the dot of a hidden name at its beginning. `**` alone
    matches any number of folders, and at the end everything below.
    """

    def __init__(self, pattern: str) -> None:
        """Parse the pattern.

        Raises:
            SourceError: the pattern is too long, or `**` is a part of a segment.
        """
        segments = [segment for segment in pattern.split("/") if segment]
        if len(pattern) > MOST_CHARACTERS or len(segments) > MOST_SEGMENTS:
            raise SourceError(
                f"{pattern[:60]}…: a pattern may have {MOST_CHARACTERS:,} characters and {MOST_SEGMENTS} segments."
            )
        for segment in segments:
            if "**" in segment and segment != "**":
                raise SourceError(f"{pattern}: ** must stand alone between slashes; for a part of a name write *.")
        if segments[-1:] == ["**"]:  # at the end it matches the files, too
            segments.append("*")
        # Several `**` in a row are one.
        once = [segment for before, segment in pairwise(["", *segments]) if {before, segment} != {"**"}]
        self._tests = [None if segment == "**" else _test(segment) for segment in once]

    def begin(self) -> State:
        """Return the state before the first segment of a path."""
        return self._spread({0})

    def step(self, state: State, name: str) -> State:
        """Return the state after one more segment of the path."""
        after: set[int] = set()
        for at in state:
            if at == len(self._tests):
                continue
            test = self._tests[at]
            if test is None:
                if not name.startswith("."):
                    after.add(at)
            elif test(name):
                after.add(at + 1)
        return self._spread(after)

    def _spread(self, state: set[int]) -> State:
        """Add to the state the segment after each `**`, which may match no folder."""
        return frozenset(state | {at + 1 for at in state if at < len(self._tests) and self._tests[at] is None})

    def ended(self, state: State) -> bool:
        """Return True if a path that ends here matches."""
        return len(self._tests) in state

    def goes_on(self, state: State) -> bool:
        """Return True if a longer path may match."""
        return any(at < len(self._tests) for at in state)

    def is_anywhere(self, state: State) -> bool:
        """Return True if any folder may come next."""
        return any(at < len(self._tests) and self._tests[at] is None for at in state)

    def matches(self, path: str) -> bool:
        """Return True if a whole path matches."""
        state = self.begin()
        for name in path.split("/"):
            state = self.step(state, name)
            if not state:
                return False
        return self.ended(state)


def _test(segment: str) -> Callable[[str], object]:
    if not is_glob(segment):
        return segment.__eq__
    # The standard library's translation uses atomic groups for stars: no backtracking.
    match = re.compile(fnmatch.translate(segment)).match
    if segment.startswith("."):
        return match
    return lambda name: not name.startswith(".") and match(name)
