"""Health check of a process on this machine: `python -m pipeline.doctor.healthcheck worker`, for containers.

It imports little: a container asks every half minute.
"""

import socket
import sys
from collections.abc import Callable
from http import HTTPStatus

from pipeline.core.errors import VectormillError
from pipeline.infra.settings import Settings, load_settings

#: Longer than the period of each process's heartbeat.
_SEEN_SECONDS = 30.0
_ANSWER_SECONDS = 5.0


def worker(settings: Settings) -> bool:
    """Return True if the worker's parent has sent a heartbeat to the database lately."""
    from pipeline.db import health

    return _ask(settings, health.worker_seen, socket.gethostname(), _SEEN_SECONDS)


def dispatcher(settings: Settings) -> bool:
    """Return True if the dispatcher asks for the lease: a standby is as ready as the leader."""
    from pipeline.db import health

    return _ask(settings, health.neighbour_seen, "vectormill-dispatcher", _SEEN_SECONDS)


def api(settings: Settings) -> bool:
    """Return True if the api answers, and its database answers it."""
    return _answers(settings.api_port, "/readyz")


def engine(settings: Settings) -> bool:
    """Return True if the engine answers. Its port must be a fixed one."""
    return _answers(settings.engine_port, "/healthz")


def flower(settings: Settings) -> bool:
    """Return True if Flower answers."""
    return _answers(settings.flower_port, "/healthcheck")


PROCESSES: dict[str, Callable[[Settings], bool]] = {
    each.__name__: each for each in (api, dispatcher, engine, flower, worker)
}


def _ask(settings: Settings, question: Callable[..., bool], *parameters: object) -> bool:
    from pipeline.db.database import make_engine, reporting_unreachable

    assert settings.database_url
    database = make_engine(settings.database_url.get_secret_value(), application="vectormill-healthcheck", pool_size=1)
    try:
        with reporting_unreachable(), database.begin() as connection:
            return question(connection, *parameters)
    finally:
        database.dispose()


def _answers(port: int, path: str) -> bool:
    from pipeline.infra.http import status_of

    return status_of(f"http://127.0.0.1:{port}{path}", seconds=_ANSWER_SECONDS) == HTTPStatus.OK


if __name__ == "__main__":
    (name,) = sys.argv[1:]
    try:
        is_ready = PROCESSES[name](load_settings())
    except VectormillError as error:
        sys.exit(f"{name} isn't ready: {error}")
    if not is_ready:
        sys.exit(f"{name} isn't ready")
