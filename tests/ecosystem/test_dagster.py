"""Dagster's runs of ops/schedulers/dagster/nightly_sync.py."""

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.ecosystem.conftest import SCHEDULERS, Site

_EXAMPLE = str(SCHEDULERS / "dagster" / "nightly_sync.py")
#: Metadata of the newest materialization, as JSON.
_SHOWN = """
import json, dagster
with dagster.DagsterInstance.get() as instance:
    event = instance.get_latest_materialization_event(dagster.AssetKey("ticket_vectors"))
print(json.dumps({name: shown.value for name, shown in event.asset_materialization.metadata.items()}))
"""


@dataclass
class _Dagster:
    """Dagster with a home of its own."""

    site: Site
    home: Path

    def materialize(self, collection: str, day: str) -> subprocess.CompletedProcess[str]:
        """Materialize a day's partition, as `dagster asset materialize` does."""
        config = {"ops": {"ticket_vectors": {"config": {"folder": str(self.site.folder), "collection": collection}}}}
        select = ("--select", "ticket_vectors", "--partition", day, "--config-json", json.dumps(config))
        return self._run("dagster", "asset", "materialize", "--python-file", _EXAMPLE, *select)

    def shown(self) -> dict[str, str | int]:
        """Return the metadata of the newest materialization."""
        return dict(json.loads(self._run("python", "-c", _SHOWN).stdout))

    def _run(self, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self.site.orchestrate(program, *arguments, DAGSTER_HOME=str(self.home))


@pytest.fixture
def dagster(site: Site, tmp_path: Path) -> _Dagster:
    (tmp_path / "dagster.yaml").write_text("telemetry: {enabled: false}\n")
    return _Dagster(site, tmp_path)


def test_a_table_is_kept_in_step(dagster: _Dagster) -> None:
    site = dagster.site
    site.collection("parts")
    rows = [{"id": f"p{n}", "subject": f"part {n}", "body": "the cog is worn"} for n in range(110)]
    site.write("parts.jsonl", rows)
    done = dagster.materialize("parts", "2026-11-20")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    first = dagster.shown()
    assert (first["items/in"], first["items/embedded"]) == (110, 110)
    assert str(first["job"]).startswith(f"{site.gateway.url}/jobs/")
    assert dagster.materialize("parts", "2026-11-20").returncode == 0
    assert dagster.shown() == first, "it attaches"
    site.write("parts.jsonl", [{**rows[0], "body": "it is new"}, *rows[1:-1]])
    assert dagster.materialize("parts", "2026-11-21").returncode == 0
    assert site.syncs("parts") == [(110, 0, 0, 0), (0, 1, 108, 1)]


def test_too_many_rejects_fail_the_run_at_once(dagster: _Dagster) -> None:
    dagster.site.collection("torn")
    rows = [{"id": f"t{n}", "subject": f"torn {n}" if n % 5 else None, "body": None} for n in range(100)]
    dagster.site.write("torn.jsonl", rows)
    done = dagster.materialize("torn", "2026-11-20")
    assert done.returncode != 0
    assert "20 items rejected, 10 allowed" in done.stdout + done.stderr
    assert "STEP_UP_FOR_RETRY" not in done.stdout + done.stderr


def test_a_missing_export_fails_the_run(dagster: _Dagster) -> None:
    dagster.site.collection("absent")
    done = dagster.materialize("absent", "2026-11-20")
    assert done.returncode != 0
    assert "absent.jsonl: no such file" in done.stdout + done.stderr
    assert dagster.site.syncs("absent") == []
