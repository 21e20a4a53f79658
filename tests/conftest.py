"""Shared fixtures: real servers, a fresh database for each test, and a small model made once per checkout."""

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch
from uuid import uuid4

import psycopg
import pytest
import redis
import tiktoken
from hypothesis import HealthCheck, settings
from psycopg import sql
from sqlalchemy import Engine

from pipeline.db.database import make_engine
from pipeline.db.migrate import upgrade
from pipeline.embedded import place, postgres
from pipeline.embedded.runtime import Running
from tests.support.cl100k import encoding
from tests.support.machines import running_servers
from tests.support.models import bundled_folder, described, static_folder
from workers.encoders.imports import SPIN_ROUNDS, SPIN_VARIABLE

_TEMPLATE = "vectormill_template"
_ROOM_BYTES = 8 * 1024**3

# Tests ignore settings of the shell that starts them, and never use the network.
for _name in [name for name in os.environ if name.startswith("VECTORMILL_")]:
    del os.environ[_name]
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# As in workers and engines, wherever a test imports torch first: several tests share the cores.
os.environ.setdefault(SPIN_VARIABLE, SPIN_ROUNDS)

# No deadline: the speed of the machine must not decide if a test passes.
settings.register_profile("vectormill", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("vectormill")


@pytest.fixture(scope="session")
def servers() -> Iterator[Running]:
    """Run embedded Postgres, with a migrated template database, and Valkey."""
    with TemporaryDirectory(dir=_memory()) as folder:
        Path(folder).chmod(0o711)
        home, roots = Path(folder, "home"), Path(folder, "what root keeps")
        roots.mkdir(mode=0o711)
        # A setting given on the command line couldn't be changed later.
        settings = {name: value for name, value in postgres._SETTINGS.items() if name != "fsync"}
        with ExitStack() as stack:
            with patch.dict(postgres._SETTINGS, settings, clear=True), patch.object(place, "ROOTS_FOLDER", roots):
                started = stack.enter_context(running_servers(home, _make_template))
            yield started


def _memory() -> Path | None:
    """Return a folder in memory if there is much room. A test's database has 800 files, which take a tenth of the time
    there as on ext4."""
    memory = Path("/dev/shm")
    return memory if memory.exists() and shutil.disk_usage(memory).free > _ROOM_BYTES else None


def _make_template(url: str) -> None:
    _administer(url, sql.SQL("create database {}").format(sql.Identifier(_TEMPLATE)))
    engine = make_engine(_with_database(url, _TEMPLATE), application="vectormill-tests")
    with engine.begin() as connection:
        upgrade(connection)
    engine.dispose()
    # Each test has a database of its own, and waiting for the disk would take most of the time to create it.
    set_fsync(url, "off")


def set_fsync(url: str, value: str) -> None:
    """Set the server's `fsync` to `on` or `off`."""
    _administer(url, sql.SQL("alter system set fsync = {}").format(sql.Identifier(value)))
    _administer(url, sql.SQL("select pg_reload_conf()").format())


def _with_database(url: str, name: str) -> str:
    return url.rsplit("/", 1)[0] + "/" + name


def _administer(url: str, statement: sql.Composed) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(statement)


@pytest.fixture
def empty_database(servers: Running) -> Iterator[str]:
    """Yield the URL of the test's own database, without a schema."""
    with _new_database(servers.database_url, "template1") as url:
        yield url


@pytest.fixture
def database(servers: Running) -> Iterator[str]:
    """Yield the URL of the test's own migrated database."""
    with new_database(servers.database_url) as url:
        yield url


def new_database(server: str) -> "_new_database":
    """Create a migrated database for the length of a `with` block, which gets its URL."""
    return _new_database(server, _TEMPLATE)


class _new_database:  # noqa: N801 - used as a function
    def __init__(self, server: str, template: str) -> None:
        self._server, self._template, self._name = server, template, f"test_{uuid4().hex}"

    def __enter__(self) -> str:
        # Copying files takes half as long as logging their blocks.
        create = sql.SQL("create database {} template {} strategy file_copy")
        _administer(self._server, create.format(sql.Identifier(self._name), sql.Identifier(self._template)))
        return _with_database(self._server, self._name)

    def __exit__(self, *_: object) -> None:
        _administer(self._server, sql.SQL("drop database {} with (force)").format(sql.Identifier(self._name)))


@pytest.fixture
def engine(database: str) -> Iterator[Engine]:
    """Yield a SQLAlchemy engine on the test's database."""
    made = make_engine(database, application="vectormill-tests", pool_size=8)
    yield made
    made.dispose()


@pytest.fixture
def redis_url(servers: Running) -> str:
    """Return the URL of an empty Valkey database."""
    url = servers.redis_url.rsplit("/", 1)[0] + "/1"
    with redis.Redis.from_url(url) as client:
        client.flushdb()
    return url


@pytest.fixture(scope="session")
def bundled_model() -> Path:
    """Return the folder of all-MiniLM-L6-v2."""
    return bundled_folder()


@pytest.fixture(scope="session")
def cl100k(tmp_path_factory: pytest.TempPathFactory) -> tiktoken.Encoding:
    """Return the encoding with which OpenAI's clients turn a text into token ids."""
    return encoding(tmp_path_factory.mktemp("vocabulary"))


@pytest.fixture(scope="session")
def static_model() -> Path:
    """Return the folder of a model of static embeddings with 256 dimensions; it loads and embeds in no time."""
    return static_folder()


@pytest.fixture(scope="session")
def static_description(static_model: Path) -> dict[str, Any]:
    """Return the catalogue's description of `static_model`."""
    return described("static-256", static_model)


@pytest.fixture(scope="session")
def bundled_description(bundled_model: Path) -> dict[str, Any]:
    """Return the catalogue's description of `bundled_model`."""
    return described("all-MiniLM-L6-v2", bundled_model)
