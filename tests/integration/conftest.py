"""Shared fixtures of tests on real servers."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine

from pipeline.core.models import Model
from pipeline.dispatch.state import Dispatcher
from tests.integration.dispatching import make_dispatcher
from tests.support.jobs_made import make_model
from workers.encoders.local import LocalEncoder


@pytest.fixture(scope="module")
def encoder(static_model: Path, static_description: dict[str, Any]) -> LocalEncoder:
    """Load the static model, and prove it."""
    made = LocalEncoder(static_model, "cpu")
    made.prove(bytes.fromhex(static_description["canary"]))
    return made


@pytest.fixture
def model(engine: Engine) -> Model:
    """Make a model of the catalogue that nobody can load."""
    return make_model(engine)


@pytest.fixture
def dispatcher(engine: Engine, redis_url: str) -> Iterator[Dispatcher]:
    """Yield a dispatcher that does a duty only when told to."""
    with_publisher = make_dispatcher(engine, redis_url)
    yield with_publisher
    with_publisher.publisher.close()
