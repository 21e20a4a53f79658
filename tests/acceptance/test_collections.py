"""Collections through a week of nights, by real processes that are killed."""

import json
import os
import random
from pathlib import Path
from uuid import UUID

import pytest
from sentence_transformers import SentenceTransformer

from pipeline.catalog.models import add_model
from tests.acceptance.fleet import Fleet, eventually
from tests.acceptance.nights import Tickets, differences, file_differences
from tests.support.jobs_made import run_sql
from tests.support.models import described, static_folder

#: A week of 4,000 rows takes two minutes; `make nights` gives it more.
_ROWS = int(os.environ.get("NIGHTS_ROWS", "4000"))
_QUERY = "select id, subject, body, lang from public.shop"


@pytest.fixture(scope="module")
def library(static_model: Path) -> SentenceTransformer:
    return SentenceTransformer(str(static_model), device="cpu")


def test_a_week_of_nights(fleet: Fleet, library: SentenceTransformer, tmp_path: Path) -> None:
    """By file, by reference and by SQL, a worker or the dispatcher killed in each sync; with an upgrade."""
    tickets, chance = Tickets.new(7, _ROWS), random.Random(8)
    fleet.environment["VECTORMILL_SQL_URL"] = fleet.environment["VECTORMILL_DATABASE_URL"]
    with fleet.engine.begin() as connection:
        add_model(connection, "small", described("static-64", static_folder(64)))
    libraries = {"static": library, "small": SentenceTransformer(str(static_folder(64)), device="cpu")}
    read = "static"
    fleet.start_dispatcher()
    fleet.start_worker()
    template = "{subject}\n\n{body}"
    folders = {name: tmp_path / name for name in libraries}
    made = ("collections", "create", "tickets", "--model", "static", "--text", template, "--carry", "lang")
    fleet.cli(*made, "--output", str(folders["static"]))
    for night in range(7):
        if night:
            tickets.change(night)
        if night == 3:
            fleet.cli("collections", "upgrade", "tickets", "--model", "small", "--output", str(folders["small"]))
        job = _by_sql(fleet, tickets) if night % 2 else _by_file(fleet, tickets, tmp_path, night)
        if chance.random() < 0.7:
            _await_staged(fleet, job)
            fleet.kill_tree("worker")
            fleet.start_worker()
        else:
            fleet.kill("dispatcher")
            fleet.start_dispatcher()
        ended = fleet.await_end(job)
        assert ended["state"] == "completed", ended["message"]
        receipt = fleet.cli("receipt", str(job), "--verify", "--json")
        assert json.loads(receipt.stdout)["verified"]
        items = ended["items"]
        expected = tickets.expected()
        assert {name: items["total" if name == "in" else name] for name in expected} == expected, f"night {night}"
        if night >= 3:
            _await_the_other_version(fleet, job)
        if verb := {4: "swap", 6: "swap-back"}.get(night):
            fleet.cli("collections", verb, "tickets", "--yes")
            read = "small" if verb == "swap" else "static"
        found = list(differences(tickets, fleet.engine, libraries[read], "vectormill.tickets"))
        assert found == [], f"night {night}"
        if night == 5:
            fleet.cli("collections", "compact", "tickets")
        _await_files(fleet)
        for name in ("static", "small")[: 1 + (night >= 3)]:
            assert list(file_differences(tickets, folders[name], libraries[name])) == [], f"night {night}, {name}"


def _await_files(fleet: Fleet) -> None:
    def written() -> bool:
        shown = json.loads(fleet.cli("collections", "show", "tickets", "--json").stdout)
        return not any(each["output"]["behind"] for each in (shown, *shown["versions"]))

    eventually(written, "the files")


def _await_the_other_version(fleet: Fleet, job: UUID) -> None:
    beside = "select job_id from vectormill.syncs where beside = :job"
    other = eventually(lambda: fleet.scalar(beside, job=job), "the sync of the other version")
    assert fleet.await_end(UUID(str(other)))["state"] == "completed"


def _await_staged(fleet: Fleet, job: UUID) -> None:
    eventually(lambda: fleet.status(job)["state"] != "staging", "a sync that is staged")


def _by_file(fleet: Fleet, tickets: Tickets, folder: Path, night: int) -> UUID:
    """Sync a file: on two nights of four, one that workers read themselves."""
    by_reference = night % 4 == 0
    path = tickets.write(folder / f"night-{night}.{'parquet' if night else 'jsonl'}")
    options = ["--max-rejects", "5%", *(["--by-reference"] if by_reference else [])]
    return UUID(fleet.cli("sync", "tickets", str(path), *options).stdout.strip())


def _by_sql(fleet: Fleet, tickets: Tickets) -> UUID:
    tickets.load(fleet.engine)
    asked = "select vectormill.sync('tickets', :query)"
    job = UUID(str(run_sql(fleet.engine, asked, query=_QUERY)[0][0]))
    eventually(lambda: fleet.scalar("select count(*) from vectormill.jobs where id = :job", job=job), "a job")
    return job
