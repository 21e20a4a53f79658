"""Context of a command: the servers that the environment names, else those of the `up` that runs here."""

import getpass
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from sqlalchemy import Engine

from pipeline.catalog.models import DEFAULT_WORKSPACE, workspace_id
from pipeline.core.errors import ServiceUnreachable
from pipeline.db.database import make_engine
from pipeline.embedded.runtime import find_running
from pipeline.infra.settings import Settings, load_settings


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandContext:
    """Settings, database engine and workspace of a command."""

    settings: Settings
    engine: Engine
    workspace_id: int


def server_urls(settings: Settings) -> tuple[str, str]:
    """Return the URLs of Postgres and Redis.

    Raises:
        ServiceUnreachable: the environment doesn't name both, and nothing runs here.
    """
    database, redis = settings.database_url, settings.redis_url
    if database and redis:
        return database.get_secret_value(), redis.get_secret_value()
    running = find_running(settings.home)
    if running is None:
        raise ServiceUnreachable(
            "no server to work with: start them here with vectormill up --detach, "
            "or set VECTORMILL_DATABASE_URL and VECTORMILL_REDIS_URL."
        )
    return (
        database.get_secret_value() if database else running.database_url,
        redis.get_secret_value() if redis else running.redis_url,
    )


def database_url(settings: Settings) -> str:
    """Return the URL of Postgres. If the environment names it, no URL of Redis is needed."""
    if settings.database_url:
        return settings.database_url.get_secret_value()
    return server_urls(settings)[0]


def submitter() -> str:
    """Return who runs this command, as the history of a job names them: a login at its machine."""
    try:
        login = getpass.getuser()
    except (OSError, KeyError):  # in a container, an account without a name
        login = f"uid {os.getuid()}"
    return f"{login}@{socket.gethostname()}"


@contextmanager
def working(workspace: str = DEFAULT_WORKSPACE) -> Iterator[CommandContext]:
    """Yield the context of a command in a workspace; dispose of its database engine afterwards."""
    settings = load_settings()
    engine = make_engine(database_url(settings), application="vectormill-cli")
    try:
        with engine.begin() as connection:
            found = workspace_id(connection, workspace)
        yield CommandContext(settings=settings, engine=engine, workspace_id=found)
    finally:
        engine.dispose()
