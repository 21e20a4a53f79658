"""What tests on real servers share."""

import pytest
from sqlalchemy import Engine

from pipeline.jobs import Model
from tests.jobs_made import make_model


@pytest.fixture
def model(engine: Engine) -> Model:
    """A model of the catalogue that nobody can load."""
    return make_model(engine)
