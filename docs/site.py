"""Builder of the documentation site in `.vectormill/docs/site`, of the repository's pages and notebooks as they are.

`python docs/site.py` builds it by Zensical, which fails on a link or an anchor that leads nowhere.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / ".vectormill" / "docs"
SITE = BUILD / "site"
#: Marks of blocks that tests don't run; no reader needs them.
_MARK = re.compile(r"^```(sh|sql|python) \w+$", re.MULTILINE)
#: A data frame's own style. Without it a table looks as others of the site do.
_FRAME = re.compile(r'<style>.*?</style>\s*<table border="1" class="dataframe">', re.DOTALL)
_GUIDES = (
    *("README", "texts", "nightly", "python", "jobs", "results", "large-corpora", "sql", "gateway", "models"),
    *("upstreams", "deploy", "indexing", "retrieval", "similarity", "batching", "snowflake", "bigquery"),
)
_REFERENCE = ("cli", "settings", "http", "sql", "tables", "metrics", "states", "reject-codes", "limits", "glossary")
_EXPLANATION = ("exactly-once", "faults", "benchmarks", "where-a-change-goes")


def build() -> None:
    """Copy the pages, describe the site, and build it."""
    shutil.rmtree(BUILD, ignore_errors=True)
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md", "LICENSE", "docs", "ops"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    for name in names:
        there = BUILD / "pages" / name
        there.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".md"):
            text = (ROOT / name).read_text(encoding="utf-8").replace(".ipynb)", ".md)")
            there.write_text(_MARK.sub(r"```\1", text), encoding="utf-8")
        elif name.endswith(".ipynb"):
            text, _ = MarkdownExporter().from_filename(str(ROOT / name))
            there.with_suffix(".md").write_text(_FRAME.sub("<table>", text).lstrip(), encoding="utf-8")
        elif not name.endswith(".py") or name.startswith("ops/"):
            shutil.copyfile(ROOT / name, there)
    nav = _nav()
    (BUILD / "pages" / "llms.txt").write_text(_for_models(nav), encoding="utf-8")
    (BUILD / "mkdocs.yml").write_text(yaml.safe_dump(_site(nav), sort_keys=False), encoding="utf-8")
    subprocess.run([Path(sys.executable).with_name("zensical"), "build", "--clean", "--strict"], cwd=BUILD, check=True)
    for page in (BUILD / "pages").rglob("*.md"):  # llms.txt names them
        shutil.copyfile(page, SITE / page.relative_to(BUILD / "pages"))


def _site(nav: list[Any]) -> dict[str, Any]:
    scheme = {"light": ("default", "moon"), "dark": ("slate", "sun")}
    palette = [
        {
            "media": f"(prefers-color-scheme: {name})",
            "scheme": colours,
            "toggle": {"icon": f"lucide/{icon}", "name": f"Switch from {name} mode"},
        }
        for name, (colours, icon) in scheme.items()
    ]
    return {
        "site_name": "vectormill",
        "site_description": "Corpora into vectors, exactly once, and an OpenAI-compatible embeddings gateway",
        "docs_dir": "pages",
        "site_dir": SITE.name,
        # Nothing is loaded from elsewhere.
        "theme": {"font": False, "palette": palette, "features": ["navigation.sections", "content.code.copy"]},
        "nav": nav,
    }


def _nav() -> list[Any]:
    def pages(folder: str, names: tuple[str, ...]) -> list[str]:
        return [f"docs/{folder}/{name}.md" for name in names]

    decisions = sorted(f"docs/explanation/decisions/{path.name}" for path in _in("docs/explanation/decisions"))
    operations = ["ops/schedulers/README.md", "ops/postgres/README.md", "ops/runbooks/README.md"]
    operations += sorted(f"ops/runbooks/{path.name}" for path in _in("ops/runbooks") if path.stem != "README")
    return [
        {"Start": "README.md"},
        {"Tutorials": ["docs/tutorials/support_tickets.md"]},
        {"Guides": pages("how-to", _GUIDES)},
        {"Reference": pages("reference", _REFERENCE)},
        {"Explanation": [*pages("explanation", _EXPLANATION), {"Decisions": decisions}]},
        {"Operations": operations},
        {"Changelog": "CHANGELOG.md"},
    ]


def _in(folder: str) -> list[Path]:
    return list((ROOT / folder).glob("*.md"))


def _for_models(nav: list[Any]) -> str:
    """Return `llms.txt`: a list of the pages, for programs that read instead of people."""
    lines = ["# vectormill", "", "> Corpora of texts into vectors in Postgres or Parquet, exactly once.", ""]
    for section in nav:
        for name, found in section.items():
            lines += [f"## {name}", ""]
            lines += [f"- [{_title(page)}]({page})" for page in _flat(found)]
            lines.append("")
    return "\n".join(lines)


def _flat(found: Any) -> list[str]:
    if isinstance(found, str):
        return [found]
    inner = found.values() if isinstance(found, dict) else found
    return [page for one in inner for page in _flat(one)]


def _title(page: str) -> str:
    first = (BUILD / "pages" / page).read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix("# ").replace("`", "")


if __name__ == "__main__":
    build()
