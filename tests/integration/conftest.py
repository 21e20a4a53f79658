"""Shared fixtures of tests on real servers."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import Engine

from pipeline.catalog.models import add_model
from pipeline.core.models import Model
from pipeline.dispatch.state import Dispatcher
from tests.integration.dispatching import make_dispatcher
from tests.integration.tickets import SMALL, Tickets, upgrade
from tests.support.jobs_made import make_model
from tests.support.models import described, static_folder
from workers.encoders.local import LocalEncoder

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


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


@pytest.fixture
def static(engine: Engine, static_description: dict[str, Any]) -> None:
    """Add the static model to the catalogue."""
    with engine.begin() as connection:
        add_model(connection, "static", static_description)


@pytest.fixture(scope="module")
def library(static_model: Path) -> "SentenceTransformer":
    """Load the static model by its library."""
    from sentence_transformers import SentenceTransformer  # takes seconds, and few tests need it

    return SentenceTransformer(str(static_model), device="cpu")


@pytest.fixture
def make_tickets(
    engine: Engine, encoder: LocalEncoder, library: "SentenceTransformer", static: None, tmp_path: Path
) -> Callable[..., Tickets]:
    """Return what creates a collection with some options."""
    return partial(Tickets, engine, encoder, library, tmp_path)


@pytest.fixture
def tickets(make_tickets: Callable[..., Tickets]) -> Tickets:
    """Create a collection that carries a column."""
    return make_tickets(carry=["lang"])


@pytest.fixture(scope="module")
def small_encoder() -> LocalEncoder:
    """Load a static model of other vectors than those of `static`."""
    return LocalEncoder(static_folder(SMALL), "cpu")


@pytest.fixture(scope="module")
def small_library() -> "SentenceTransformer":
    """Load the model `small` by its library."""
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(static_folder(SMALL)), device="cpu")


@pytest.fixture
def upgraded(tickets: Tickets, small_encoder: LocalEncoder) -> Tickets:
    """Return a collection of the model `static` with a next version of the model `small`."""
    tickets.encoders["small"] = small_encoder
    with tickets.engine.begin() as connection:
        add_model(connection, "small", described("static-64", static_folder(SMALL)))
    upgrade(tickets)
    return tickets
