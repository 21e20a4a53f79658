"""Commands in README.md, in the runbooks and in the guides, as they stand there, on an `up` of their own.

All blocks of a file run in order, except those with a word after the language for a need that can't be met here:
```sh docker.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deployment.reader import CHECKOUT, Reader, blocks_of, reading

_RUNBOOKS = CHECKOUT / "ops" / "runbooks"
#: Guides, in an order in which each finds the results that it builds on.
_GUIDES = [
    CHECKOUT / "docs" / "how-to" / f"{name}.md"
    for name in (
        *("README", "texts", "large-corpora", "sql", "jobs", "results", "python", "gateway", "upstreams", "models"),
        *("deploy", "nightly", "indexing", "retrieval", "similarity", "batching", "snowflake", "bigquery"),
    )
]
#: Languages of the documents' blocks.
_LANGUAGES = {"sh", "sql", "python"}
#: Needs of blocks that can't be met here: a container engine, a GPU, somebody's account, a state or names of its own.
_MARKS = {"docker", "gpu", "cloud", "example"}


@pytest.fixture(scope="module")
def reader() -> Iterator[Reader]:
    """Yield a reader who has run all blocks of the README, in order."""
    with reading() as made:
        for block in blocks_of(CHECKOUT / "README.md"):
            if not block.mark:
                made.run(block)
                # A reader's shell keeps the variables that a block has set.
                made.load_environment()
        yield made


def test_the_readmes_commands_have_run(reader: Reader) -> None:
    assert (reader.folder / "tickets-vectors.parquet").exists()


def test_the_readme_is_short() -> None:
    lines = (CHECKOUT / "README.md").read_text().splitlines()
    assert len(lines) <= 160
    assert max(map(len, lines)) <= 120


def test_every_link_leads_somewhere() -> None:
    pages = [CHECKOUT / "README.md", *(CHECKOUT / "docs").rglob("*.md"), *(CHECKOUT / "ops").rglob("*.md")]
    for page in pages:
        for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)):
            path, _, anchor = link.partition("#")
            if link.startswith(("http://", "https://")):
                continue
            there = (page.parent / path).resolve() if path else page
            assert there.exists(), f"{page}: {link}"
            if anchor:
                assert anchor in _anchors(there), f"{page}: {link}"


def _anchors(page: Path) -> set[str]:
    heads = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def test_the_metrics_of_each_process_are_where_env_says(reader: Reader) -> None:
    import httpx2 as httpx

    urls = reader.environment["VECTORMILL_METRICS_URLS"].split()
    pages = [httpx.get(url).text for url in urls]
    kinds = [re.findall(r"^# HELP vectormill_([a-z]+)_", page, re.MULTILINE) for page in pages]
    assert [set(kind) for kind in kinds] == [{"api"}, {"engine"}, {"dispatcher"}, {"worker"}]
    assert 'vectormill_worker_items_total{model="all-MiniLM-L6-v2",outcome="embedded"}' in pages[-1]


def test_the_runbooks_commands_run(reader: Reader) -> None:
    reader.environment |= {"JOB": "tickets", "COLLECTION": "support"}
    done: set[str] = set()
    for page in sorted(_RUNBOOKS.glob("*.md")):
        for block in blocks_of(page):
            if not block.mark and block.code not in done:
                reader.run(block)
                done.add(block.code)
    assert len(done) > 20


def test_the_guides_do_what_they_say(reader: Reader) -> None:
    shown = {page.stem: [reader.run(block) for block in blocks_of(page) if not block.mark] for page in _GUIDES}
    assert (reader.folder / "vectors" / "_SUCCESS").exists()
    assert shown["python"][0].splitlines()[-1] == "True"
    assert shown["python"][1].splitlines() == ["1 1", "m-2", "1"]
    assert shown["python"][2] == "['m-2', 'm-1']\n"
    view, changed = shown["nightly"][2:4]
    assert [line.split("  ")[:2] for line in view.splitlines()] == [["1", "en"], ["2", "en"], ["3", "de"], ["4", "en"]]
    assert "The refund came" not in changed, "no text is kept"
    assert [line.split()[3:8] for line in changed.splitlines()[-2:]] == [
        ["0", "1", "2", "1", "1"],
        ["4", "0", "0", "0", "1"],
    ]
    index = shown["indexing"]
    assert index[-1].split("\n")[0] == "1", "an article is nearest to itself"
    by_sdk, by_command, prompts, filtered, recall = shown["retrieval"]
    found = [line.split("  ")[1] for line in by_sdk.splitlines()]
    assert set(found) == {"Mills", "Millstones", "Bread"}
    assert all(f"{title}. " in by_command for title in found)
    assert prompts == "all-MiniLM-L6-v2    "
    assert filtered.splitlines()[0] == "Mills"
    assert float(recall) > 0.5
    assert shown["batching"] == ["(500, 384)\n", "500 (384,)\n"]
    alike, threshold, pairs, _, by_file = shown["similarity"]
    assert alike.splitlines()[0].split("  ")[0] == "Millstones"
    assert threshold
    assert pairs.split("  ")[:2] == ["1", "2"]
    assert by_file == "2 is like 1\n"


def test_every_guide_is_read() -> None:
    assert sorted(_GUIDES) == sorted((CHECKOUT / "docs" / "how-to").glob("*.md"))


def test_every_block_is_run_or_says_what_it_needs() -> None:
    more = (CHECKOUT / "ops" / folder / "README.md" for folder in ("schedulers", "postgres"))
    for document in (CHECKOUT / "README.md", *more, *_RUNBOOKS.glob("*.md"), *_GUIDES):
        for block in blocks_of(document):
            assert block.language in _LANGUAGES, block.where
            assert not block.mark or block.mark in _MARKS, block.where
            if block.mark == "docker":
                assert "docker compose " in block.code, block.where
