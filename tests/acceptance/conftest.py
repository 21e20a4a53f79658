"""Fixtures of the acceptance tests: a fleet of real processes on a database of its own, with both models."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine

from pipeline.catalog.models import add_model
from pipeline.cli.demo import docstrings
from tests.acceptance import witness
from tests.acceptance.fleet import Fleet

LEASE_SECONDS = 3


@pytest.fixture
def fleet(
    database: str,
    redis_url: str,
    engine: Engine,
    tmp_path: Path,
    bundled_description: dict[str, Any],
    static_description: dict[str, Any],
) -> Iterator[Fleet]:
    with engine.begin() as connection:
        witness.install(connection)
        add_model(connection, "minilm", bundled_description)
        add_model(connection, "static", static_description)
    made = Fleet(
        engine=engine,
        environment={
            "VECTORMILL_DATABASE_URL": database,
            "VECTORMILL_REDIS_URL": redis_url,
            "VECTORMILL_LEASE_SECONDS": str(LEASE_SECONDS),
            "VECTORMILL_CHUNK_ITEMS": "250",
            "HF_HUB_OFFLINE": "1",
        },
        logs=tmp_path,
    )
    try:
        yield made
    finally:
        made.close()


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Return 5,200 short, distinct texts: the beginnings of docstrings."""
    found: dict[str, None] = {}
    for _, text in docstrings():
        sentence = " ".join(text.split())[:40]
        found[sentence] = None
        if len(found) == 5_200:
            break
    return list(found)


def write_corpus(path: Path, texts: list[str]) -> Path:
    """Write texts as JSON lines with ids; return the path."""
    lines = (json.dumps({"id": f"doc-{n}", "text": text}) for n, text in enumerate(texts))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
