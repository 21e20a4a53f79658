"""The reference pages say what is there: those that are generated, and those that are written."""

import re
import runpy
import tomllib
from pathlib import Path

from pipeline.cli import _Root
from pipeline.core.chunks import RejectCode
from pipeline.core.jobs import JobState, Reason
from pipeline.infra.settings import Settings

_DOCS = Path(__file__).resolve().parents[2] / "docs"
_PROSE = [_DOCS.parent / "README.md", *_DOCS.glob("how-to/*.md"), *_DOCS.glob("reference/*.md")]
#: Variables of what `up` runs, which `vectormill env` prints beside the settings.
_PRINTED = {"METRICS_URLS"}


def test_generated_pages_are_as_the_code_is() -> None:
    made = runpy.run_path(str(_DOCS / "generate.py"))["pages"]()
    for name, text in made.items():
        there = (_DOCS / "reference" / name).read_text(encoding="utf-8")
        assert there == text, f"{name} is old: python docs/generate.py"


def test_every_code_reason_and_state_is_explained() -> None:
    rejects = (_DOCS / "reference" / "reject-codes.md").read_text(encoding="utf-8")
    states = (_DOCS / "reference" / "states.md").read_text(encoding="utf-8")
    assert [code for code in RejectCode if f"`{code}`" not in rejects] == []
    assert [reason for reason in Reason if f"`{reason}`" not in states] == []
    assert [state for state in JobState if state not in states] == []


def test_no_page_names_a_setting_or_command_that_is_not_there() -> None:
    settings = {name.upper() for name in Settings.model_fields} | _PRINTED
    for page in _PROSE:
        text = page.read_text(encoding="utf-8")
        named = {name.removesuffix("_FILE") for name in re.findall(r"VECTORMILL_([A-Z_]*[A-Z])(?![_A-Z])", text)}
        assert named - settings == set(), page
        called = set(re.findall(r"(?:^|[`/ (])vectormill ([a-z][a-z-]+)\b(?! [a-z]+ )", text, re.MULTILINE))
        commands = {name for name in called if re.search(rf"`(?:\.venv/bin/)?vectormill {name}\b", text)}
        assert commands - _Root.entries.keys() == set(), page


def test_the_changelog_has_the_version() -> None:
    version = tomllib.loads((_DOCS.parent / "pyproject.toml").read_text())["project"]["version"]
    heads = re.findall(r"^## (\S+), \d{4}-\d{2}-\d{2}$", (_DOCS.parent / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert heads[0] == version
