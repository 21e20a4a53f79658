"""Globs, compared with Python's own where both mean the same."""

import fnmatch
import glob
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.errors import SourceError
from pipeline.sources.discovery import find_files
from pipeline.sources.patterns import MOST_CHARACTERS, MOST_SEGMENTS, Pattern

_NAMES = st.sampled_from(["a", "b", "ab", "ba", ".a", "aab"])
_SEGMENTS = st.sampled_from(["**", "*", "a*", "*b", "?", "[ab]", "[!a]*", "a", ".*", "*a*b*"])


@given(pattern=st.lists(_SEGMENTS, min_size=1, max_size=5), path=st.lists(_NAMES, min_size=1, max_size=5))
def test_a_path_matches_as_in_python(pattern: list[str], path: list[str]) -> None:
    """Compare with a slow matcher on `fnmatch`, which tries every split of the path over the segments."""
    written = [*pattern, "*"] if pattern[-1] == "**" else pattern

    def fits(segments: list[str], names: list[str]) -> bool:
        if not segments:
            return not names
        if segments[0] == "**":
            return fits(segments[1:], names) or (
                bool(names) and not names[0].startswith(".") and fits(segments, names[1:])
            )
        return bool(names) and _fits_one(segments[0], names[0]) and fits(segments[1:], names[1:])

    assert Pattern("/".join(pattern)).matches("/".join(path)) == fits(written, path)


def _fits_one(segment: str, name: str) -> bool:
    if name.startswith(".") and not segment.startswith("."):
        return False
    return fnmatch.fnmatchcase(name, segment)


@pytest.mark.parametrize(
    "pattern",
    ["*.jsonl", "**/*.jsonl", "x/*.jsonl", "x/**", "*/y/*.jsonl", "**/y/**/*.jsonl", "[ab].jsonl", "x/../*.jsonl"],
)
def test_files_match_as_in_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str) -> None:
    for name in ("a.jsonl", "b.jsonl", "x/a.jsonl", "x/y/c.jsonl", ".hidden/d.jsonl", "x/.e.jsonl", "x/y/z/f.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    monkeypatch.chdir(tmp_path)
    for place in ("", f"{tmp_path}/"):
        wanted = sorted(name for name in glob.glob(place + pattern, recursive=True) if Path(name).is_file())
        assert [file.name for file in find_files([place + pattern])] == wanted


@pytest.mark.parametrize(
    "pattern",
    ["**/" * 63 + "z", "**/a/" * 31 + "b", "*a" * 500 + "b", "?*" * 500, "[ab]*" * 200 + "c"],
)
def test_no_pattern_goes_back(pattern: str) -> None:
    """With backtracking, each of these would take longer than a lifetime."""
    Pattern(pattern).matches("a/" * 400 + "a" * 200)
    Pattern(pattern).matches("a" * 1_000)


@pytest.mark.parametrize("pattern", ["a" * MOST_CHARACTERS + "*", "*/" * (MOST_SEGMENTS + 1)])
def test_a_pattern_is_bounded(pattern: str) -> None:
    with pytest.raises(SourceError, match="a pattern may have"):
        Pattern(pattern)


@pytest.mark.parametrize("pattern", ["a**", "**.jsonl", "x/**b/c"])
def test_two_stars_stand_alone(pattern: str) -> None:
    with pytest.raises(SourceError, match=r"\*\* must stand alone"):
        Pattern(pattern)


def test_links(tmp_path: Path) -> None:
    """A link that the pattern names is followed. `**` follows none and says so, since a link might form a loop."""
    folder = tmp_path / "docs" / "old"
    folder.mkdir(parents=True)
    (folder / "a.jsonl").write_text("{}")
    (tmp_path / "docs" / "new").symlink_to(folder)
    (found,) = find_files([f"{tmp_path}/docs/n*/*.jsonl"])
    assert found.uri == str(folder / "a.jsonl")
    with pytest.raises(SourceError, match="docs/new: a link to a folder isn't followed by"):
        find_files([f"{tmp_path}/docs/**/*.jsonl"])
