"""The tutorial's notebook, run from top to bottom as its reader would, and the outputs that are kept with it.

New outputs are kept, beside a fresh `vectormill up`, by
`jupyter nbconvert --to notebook --execute --inplace --ExecutePreprocessor.record_timing=False FILE`.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests.support.machines import remove_what_root_keeps

_NOTEBOOK = Path(__file__).resolve().parents[2] / "docs" / "tutorials" / "support_tickets.ipynb"
_PROGRAMS = Path(sys.executable).parent


def _code_cells(notebook: Path) -> list[Any]:
    return [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]


def _kinds(cell: Any) -> list[tuple[str, list[str]]]:
    """Return the kind of each output of a cell, and the formats that it is in."""
    return [(output["output_type"], sorted(output.get("data", {}))) for output in cell["outputs"]]


def _text(cell: Any) -> str:
    """Return a cell's outputs as plain text."""
    parts = [output.get("text") or output["data"]["text/plain"] for output in cell["outputs"]]
    return "\n".join("".join(part) for part in parts)


def test_it_runs_and_gives_what_is_kept_with_it() -> None:
    with TemporaryDirectory() as there:
        folder, home = Path(there), Path(there, "home")
        folder.chmod(0o711)
        run = Path(shutil.copy(_NOTEBOOK, folder))
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("VECTORMILL_")},
            "PATH": f"{_PROGRAMS}:{os.environ['PATH']}",
            "VECTORMILL_HOME": str(home),
            "VECTORMILL_API_PORT": "0",
            "VECTORMILL_FLOWER_PORT": "0",
            "HF_HUB_OFFLINE": "1",
            # No settings of the user's.
            "JUPYTER_CONFIG_DIR": str(folder / "jupyter"),
            "IPYTHONDIR": str(folder / "ipython"),
        }

        def command(*words: str) -> None:
            done = subprocess.run(
                words, cwd=folder, env=environment, capture_output=True, text=True, timeout=600, check=False
            )
            assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

        try:
            command("vectormill", "up", "--detach")
            command("jupyter", "nbconvert", "--to", "notebook", "--execute", "--inplace", str(run))
        finally:
            command("vectormill", "down")
            if os.geteuid() == 0:
                remove_what_root_keeps(home)
        ran, kept = _code_cells(run), _code_cells(_NOTEBOOK)
    assert [cell["execution_count"] for cell in kept] == list(range(1, len(kept) + 1))
    assert [(cell["source"], _kinds(cell)) for cell in ran] == [(cell["source"], _kinds(cell)) for cell in kept]
    receipt = (
        "{'in': 40, 'embedded': 38, 'reused': 1, 'rejected': 1}\nbalanced: True, verified: True\nmissing: 0, double: 0"
    )
    for cells in (ran, kept):
        shown = "\n".join(map(_text, cells))
        assert receipt in shown
        assert re.search(r"│ 39 +┆ 0 +┆ 0 +┆ 0 .*\n│ 1 +┆ 1 +┆ 37 +┆ 1 ", shown), "what the two syncs changed"
        assert "┆ 1040 ┆ shop     ┆ Still waiting for my money" in shown


def test_what_is_kept_has_no_error_and_nothing_of_the_machine() -> None:
    kept = _NOTEBOOK.read_text()
    kinds = {kind for cell in _code_cells(_NOTEBOOK) for kind, _ in _kinds(cell)}
    assert kinds == {"execute_result", "display_data", "stream"}
    assert not re.search(
        r"Traceback|stderr|127\.0\.0\.1|localhost|(?<![\w/.])/(home|root|tmp|usr|var|opt|mnt|Users)/", kept
    )
    assert not [place for place in (Path.home(), _NOTEBOOK.parents[2]) if str(place) in kept]
