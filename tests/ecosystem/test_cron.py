"""Lines of ops/schedulers/cron/crontab, run by `sh` as cron does."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.ecosystem.conftest import SCHEDULERS, Site

_TEXTS = [{"id": f"d{n}", "text": f"in September the mill grinds {n} sacks"} for n in range(150)]


class _Crontab:
    """Crontab on a machine whose date a test sets."""

    def __init__(self, site: Site, which: int = 0) -> None:
        lines = (SCHEDULERS / "cron" / "crontab").read_text().splitlines()
        told = [line for line in lines if line and not line.startswith("#")]
        command = [line.split(maxsplit=5)[5] for line in told if not re.match(r"\w+=", line)][which]
        assert not re.search(r"(?<!\\)%", command), "cron ends a command at a bare percent sign"
        self._command = command.replace(r"\%", "%")
        self._bin = site.folder / "bin"
        self._bin.mkdir(exist_ok=True)
        environment = site.gateway.fleet.environment
        for name in ("database_url", "redis_url"):
            (site.folder / name).write_text(environment[f"VECTORMILL_{name.upper()}"])
        self._variables = {
            "PATH": f"{self._bin}:{Path(sys.executable).parent}:/usr/bin:/bin",
            "VECTORMILL_DATABASE_URL_FILE": str(site.folder / "database_url"),
            "VECTORMILL_REDIS_URL_FILE": str(site.folder / "redis_url"),
            "FOLDER": str(site.folder),
            "MODEL": "static",
        }
        assert {line.split("=")[0] for line in told if re.match(r"\w+=", line)} == self._variables.keys()

    def run(self, day: str) -> subprocess.CompletedProcess[str]:
        """Run the line on that day. It must ask for the day only once: by a second time another may have begun."""
        date, asked = self._bin / "date", self._bin / "asked"
        asked.write_text("")
        date.write_text(f'#!/bin/sh\ntest "$1" = +%F && echo {day} | tee -a {asked}\n')
        date.chmod(0o755)
        environment = {"HOME": os.environ["HOME"], "HF_HUB_OFFLINE": "1", **self._variables}
        done = subprocess.run(
            ["/bin/sh", "-c", self._command],
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert asked.read_text() == f"{day}\n"
        return done


@pytest.fixture
def crontab(site: Site) -> _Crontab:
    return _Crontab(site)


def test_the_line_runs_and_attaches_when_it_runs_again(site: Site, crontab: _Crontab) -> None:
    site.write("2026-09-24.jsonl", _TEXTS)
    before = site.embedded()
    first = crontab.run("2026-09-24")
    assert first.returncode == 0, first.stderr
    again = crontab.run("2026-09-24")
    assert again.returncode == 0, again.stderr
    assert (first.stdout, again.stdout) == ("", "")
    assert pq.read_table(site.folder / "2026-09-24.parquet").num_rows == len(_TEXTS)
    assert site.jobs("docs-2026-09-24") == ["completed"]
    assert site.embedded() == before + len(_TEXTS)


def test_a_bad_upstream_fails_loudly(site: Site, crontab: _Crontab) -> None:
    site.write("2026-09-25.jsonl", [row if n % 5 else {"id": row["id"]} for n, row in enumerate(_TEXTS)])
    done = crontab.run("2026-09-25")
    assert done.returncode == 3, done.stderr
    assert "too_many_rejects" in done.stderr
    assert not (site.folder / "2026-09-25.parquet").exists(), "nothing downstream sees half a result"


def test_a_missing_upstream_fails_loudly(site: Site, crontab: _Crontab) -> None:
    done = crontab.run("2026-09-26")
    assert (done.returncode, done.stdout) == (2, "")
    assert "2026-09-26.jsonl" in done.stderr


def test_a_table_is_kept_in_step(site: Site) -> None:
    site.collection("tickets")
    line = _Crontab(site, 1)
    rows = [{"id": f"c{n}", "subject": f"ticket {n}", "body": "the mill stands still"} for n in range(120)]
    site.write("tickets.jsonl", rows)
    for _ in range(2):
        first = line.run("2026-09-27")
        assert (first.returncode, first.stdout) == (0, ""), first.stderr
    site.write("tickets.jsonl", [{**rows[0], "body": "it turns again"}, *rows[1:-1]])
    second = line.run("2026-09-28")
    assert second.returncode == 0, second.stderr
    assert site.syncs("tickets") == [(120, 0, 0, 0), (0, 1, 118, 1)]
    site.write("tickets.jsonl", rows[:5])
    shrunk = line.run("2026-09-29")
    assert shrunk.returncode == 3
    assert "too_many_removed" in shrunk.stderr
