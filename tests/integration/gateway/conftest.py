"""Shared fixtures of tests of the upstream client."""

from collections.abc import Iterator

import pytest
from sqlalchemy import Engine

from tests.integration.gateway.world import World
from tests.support.scripted_gateway import ScriptedGateway, scripted_gateway
from workers.upstream import encoder as client
from workers.upstream import requests


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "_REST_SECONDS", 0.005)
    monkeypatch.setattr(client, "PATIENCE_SECONDS", 2.0)
    monkeypatch.setenv("FAR_KEY", "sk-one")


@pytest.fixture
def far() -> Iterator[ScriptedGateway]:
    with scripted_gateway() as made:
        yield made


@pytest.fixture
def world(engine: Engine, redis_url: str, far: ScriptedGateway) -> World:
    return World(engine, redis_url, far)
