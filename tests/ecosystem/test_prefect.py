"""Prefect's runs of ops/schedulers/prefect/nightly_sync.py."""

import json
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import httpx2 as httpx
import pytest

from tests.acceptance.fleet import eventually
from tests.ecosystem.conftest import SCHEDULERS, Site
from tests.support.ports import free_port

#: One run of the flow; what it returns and the artifact that it leaves, as JSON.
_RUN = """
import json, runpy, sys
from prefect.artifacts import Artifact
flow = runpy.run_path(sys.argv[1])["nightly_sync"]
returned = flow(**json.loads(sys.argv[2]))
print(json.dumps([returned, json.loads(Artifact.get("nightly-sync-receipt").data)]))
"""


@dataclass
class _Prefect:
    """Prefect with a home and a server of its own."""

    site: Site
    environment: dict[str, str]

    def run(self, collection: str, **parameters: str) -> subprocess.CompletedProcess[str]:
        """Run the flow."""
        given = json.dumps({"folder": str(self.site.folder), "collection": collection, **parameters})
        example = str(SCHEDULERS / "prefect" / "nightly_sync.py")
        return self.site.orchestrate("python", "-c", _RUN, example, given, **self.environment)

    def answers(self) -> bool:
        """Return True if the server does."""
        try:
            return httpx.get(f"{self.environment['PREFECT_API_URL']}/health").status_code == 200
        except httpx.TransportError:
            return False


@pytest.fixture(scope="module")
def prefect(site: Site, tmp_path_factory: pytest.TempPathFactory) -> Iterator[_Prefect]:
    port = str(free_port())
    environment = {
        "PREFECT_HOME": str(tmp_path_factory.mktemp("prefect")),
        "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
    }
    made = _Prefect(site, environment)
    started = site.orchestrate("prefect", "server", "start", "--background", "--port", port, **environment)
    assert started.returncode == 0, started.stdout[-2000:] + started.stderr[-2000:]
    try:
        eventually(made.answers, "a server of Prefect that answers")
        yield made
    finally:
        site.orchestrate("prefect", "server", "stop", **environment)


def _shown(done: subprocess.CompletedProcess[str]) -> tuple[Mapping[str, int], list[dict[str, Any]]]:
    """Return what the flow returned, and the rows of its artifact."""
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    returned, artifact = json.loads(done.stdout.splitlines()[-1])
    return returned, artifact


def test_a_table_is_kept_in_step(prefect: _Prefect) -> None:
    site = prefect.site
    site.collection("sacks")
    rows = [{"id": f"s{n}", "subject": f"sack {n}", "body": "the seam has split"} for n in range(110)]
    site.write("sacks.jsonl", rows)
    returned, artifact = _shown(prefect.run("sacks", day="2026-11-20"))
    assert (returned["in"], returned["embedded"]) == (110, 110)
    assert {row["items"]: row["count"] for row in artifact} == returned
    assert _shown(prefect.run("sacks", day="2026-11-20")) == (returned, artifact), "it attaches"
    site.write("sacks.jsonl", [{**rows[0], "body": "it is sewn"}, *rows[1:-1]])
    _shown(prefect.run("sacks"))  # on the day that it runs
    assert site.syncs("sacks") == [(110, 0, 0, 0), (0, 1, 108, 1)]


def test_too_many_rejects_fail_the_run_at_once(prefect: _Prefect) -> None:
    prefect.site.collection("scraps")
    rows = [{"id": f"x{n}", "subject": f"scrap {n}" if n % 5 else None, "body": None} for n in range(100)]
    prefect.site.write("scraps.jsonl", rows)
    done = prefect.run("scraps", day="2026-11-20")
    assert done.returncode != 0
    assert "20 items rejected, 10 allowed" in done.stdout + done.stderr
    assert "Retry 1/3" not in done.stdout + done.stderr


def test_a_missing_export_fails_the_run(prefect: _Prefect) -> None:
    prefect.site.collection("nothing")
    done = prefect.run("nothing", day="2026-11-20")
    assert done.returncode != 0
    assert "nothing.jsonl: no such file" in done.stdout + done.stderr
    assert prefect.site.syncs("nothing") == []
