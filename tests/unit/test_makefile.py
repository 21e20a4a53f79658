"""Messages of `make` before it has installed anything."""

import shutil
import subprocess
from pathlib import Path

import pytest

_CHECKOUT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("made_before", [False, True], ids=["none yet", "an environment of an older one"])
def test_an_old_python_gets_one_true_sentence(made_before: bool, tmp_path: Path) -> None:
    """A script stands in for Python 3.9, and gives the answer that `make` asks for."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(_CHECKOUT / name, tmp_path)
    old = tmp_path / (".venv/bin/python" if made_before else "python3.9")
    old.parent.mkdir(parents=True, exist_ok=True)
    old.write_text('#!/bin/sh\nprintf "3.9 False\\n"\n')
    old.chmod(0o755)
    done = _make(tmp_path, "./python3.9")
    assert done.returncode == 2
    where = ".venv/bin/python" if made_before else "./python3.9"
    assert done.stderr.splitlines()[0] == (
        f"{where} is Python 3.9; vectormill needs 3.11 or newer: make PYTHON=/path/to/python3"
    )


def test_a_python_that_is_not_there_is_named(tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(_CHECKOUT / name, tmp_path)
    done = _make(tmp_path, "./none")
    assert done.returncode == 2
    assert done.stderr.startswith("there is no ./none; vectormill needs Python 3.11 or newer")


def _make(folder: Path, python: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(["make", "demo", f"PYTHON={python}"], cwd=folder, capture_output=True, text=True, check=False)
