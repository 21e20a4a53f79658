"""Imports of a command before it does anything. Modules are counted, since seconds depend on the machine."""

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from pipeline.cli import _Root

#: Modules that each cost a tenth of a second or more. Neither `--help` nor commands that only read jobs need them.
_SLOW = {
    "numpy",
    "pyarrow",
    "obstore",
    "httpx2",
    "httpcore2",
    "aiohttp",
    "redis",
    "celery",
    "kombu",
    "fastapi",
    "torch",
}
_RUN = """
import sys
from pipeline.cli import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
print(*sys.modules, file=sys.stderr)
"""


def imported(*arguments: str, database: str = "") -> set[str]:
    environment = {**os.environ, "VECTORMILL_DATABASE_URL": database}
    command = [sys.executable, "-c", _RUN, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return set(done.stderr.splitlines()[-1].split())


def test_help_imports_what_it_shows_and_no_more() -> None:
    modules = imported("--help")
    assert not modules & {*_SLOW, "sqlalchemy", "psycopg", "structlog", "pydantic_settings"}
    assert len(modules) < 500


@pytest.mark.parametrize("arguments", [("jobs",), ("models", "list"), ("keys", "list"), ("workspaces", "list")])
def test_commands_that_read_import_the_database_and_no_more(database: str, arguments: tuple[str, ...]) -> None:
    modules = imported(*arguments, database=database)
    assert "sqlalchemy" in modules
    assert not modules & _SLOW
    assert len(modules) < 850


def test_every_command_is_where_the_list_says() -> None:
    for name, entry in _Root.entries.items():
        command = entry.load(name)
        assert command.name == name
        assert command.help
        assert len(entry.summary) <= 60, "a line of a terminal of 80 columns"


def commands() -> Iterator[Any]:
    for name, entry in _Root.entries.items():
        command = entry.load(name)
        yield command
        yield from getattr(command, "commands", {}).values()


@pytest.mark.parametrize("command", list(commands()), ids=lambda command: command.name)
def test_helps_are_whole_at_80_columns(
    command: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    command.main(["--help"], "vectormill", standalone_mode=False)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    shown = {word for line in lines for word in line.strip("│ ").split()}
    for told in (command.help, *(parameter.help for parameter in command.params)):
        assert set(told.split()) <= shown
    assert all(it.metavar and it.metavar.isupper() for it in command.params if it.param_type_name == "argument")
