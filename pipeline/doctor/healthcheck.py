"""Health check of a process on this machine: `python -m pipeline.doctor.healthcheck worker`, for containers.

It imports little: a container asks every half minute.
"""

import socket
import sys
from collections.abc import Callable
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException

from pipeline.core.errors import VectormillError
from pipeline.infra.settings import Settings, load_settings

#: Above the period in which each of them shows itself.
_SEEN_SECONDS = 30.0
_ANSWER_SECONDS = 5.0


def worker(settings: Settings) -> bool:
    """Its parent shows itself in the database."""
    from pipeline.db import health

    return _ask(settings, health.worker_seen, socket.gethostname(), _SEEN_SECONDS)


def dispatcher(settings: Settings) -> bool:
    """It asks for the lease: one that stands by is as ready as the one that leads."""
    from pipeline.db import health

    return _ask(settings, health.neighbour_seen, "vectormill-dispatcher", _SEEN_SECONDS)


def api(settings: Settings) -> bool:
    """It answers, and its database answers it."""
    return _answers(settings.api_port, "/readyz")


def engine(settings: Settings) -> bool:
    """It answers. Its port must be a fixed one."""
    return _answers(settings.engine_port, "/healthz")


def flower(settings: Settings) -> bool:
    """It answers."""
    return _answers(settings.flower_port, "/healthcheck")


PROCESSES: dict[str, Callable[[Settings], bool]] = {
    each.__name__: each for each in (api, dispatcher, engine, flower, worker)
}


def _ask(settings: Settings, question: Callable[..., bool], *parameters: object) -> bool:
    from pipeline.db.database import make_engine, reporting_unreachable

    assert settings.database_url
    database = make_engine(settings.database_url.get_secret_value(), application="vectormill-ready", pool_size=1)
    try:
        with reporting_unreachable(), database.begin() as connection:
            return question(connection, *parameters)
    finally:
        database.dispose()


def _answers(port: int, path: str) -> bool:
    connection = HTTPConnection("127.0.0.1", port, timeout=_ANSWER_SECONDS)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == HTTPStatus.OK
    except (OSError, HTTPException):
        return False
    finally:
        connection.close()


if __name__ == "__main__":
    (name,) = sys.argv[1:]
    try:
        is_ready = PROCESSES[name](load_settings())
    except VectormillError as error:
        sys.exit(f"{name} isn't ready: {error}")
    if not is_ready:
        sys.exit(f"{name} isn't ready")
