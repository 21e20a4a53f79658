"""The documentation site, as `make docs` builds it."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

_DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_the_site_builds_without_a_dead_link() -> None:
    done = subprocess.run([sys.executable, str(_DOCS / "site.py")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    site: Path = runpy.run_path(str(_DOCS / "site.py"))["SITE"]
    named = re.findall(r"\]\((.+?)\)", (site / "llms.txt").read_text(encoding="utf-8"))
    assert len(named) > 60
    assert [page for page in named if not (site / page).is_file()] == []
    there = {str(path.relative_to(_DOCS.parent)) for path in _DOCS.rglob("*.md")}
    assert there - set(named) == set(), "a page that no list names"
    start = (site / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"(?:src|href)=\"https?://(?!zensical\.org)", start), "nothing is loaded from elsewhere"
