"""Parquet files of collections, read by DuckDB and Polars: a full set, and what each sync changes."""

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import polars as pl
import pytest
from sqlalchemy import Engine

from pipeline.catalog.models import add_model, workspace_id
from pipeline.core.errors import StorageUnreachable, UserError, Waiting
from pipeline.core.options import JobOptions
from pipeline.db import collection_files as stored
from pipeline.db.database import held
from pipeline.infra import storage
from pipeline.ingest.collections import create_collection, upgrade_collection
from pipeline.jobs import collection_files, forgetting
from pipeline.jobs.collections import collection_status, compact, drop_collection, find_collection
from tests.integration.test_forget import erase, forget
from tests.integration.tickets import SMALL, Row, Tickets, beside, rows_of
from tests.support.jobs_made import run_sql
from tests.support.models import described, static_folder
from workers.encoders.local import LocalEncoder

MakeTickets = Callable[..., Tickets]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "files"


@pytest.fixture
def tickets(make_tickets: MakeTickets, folder: Path) -> Tickets:
    return make_tickets(output=str(folder), carry=["lang"])


def write_due(engine: Engine) -> int:
    """Write the files that are due; return how many versions had some."""
    with engine.begin() as connection:
        due = stored.due(connection, 10)
    for version in due:
        collection_files.write_files(engine, version)
    return len(due)


def sync(tickets: Tickets, rows: list[Row], **how: Any) -> dict[str, int]:
    found = tickets.sync(rows, **how)
    write_due(tickets.engine)
    return found


def by_duckdb(folder: Path) -> dict[str, tuple[Any, list[float]]]:
    """Read the newest set, of whatever files are there."""
    rows = duckdb.sql(f"""
        select key, lang, embedding from read_parquet('{folder}/*.parquet')
        qualify _version = max(_version) over (partition by key) and not _deleted
    """).fetchall()
    assert len({row[0] for row in rows}) == len(rows)
    return {key: (lang, list(vector)) for key, lang, vector in rows}


def by_polars(folder: Path) -> dict[str, tuple[Any, list[float]]]:
    """Read the set that the manifest lists."""
    manifest = json.loads((folder / "_manifest.json").read_text())
    files = [folder / file["name"] for file in manifest["files"]]
    newest = pl.col("_version") == pl.col("_version").max().over("key")
    found = pl.scan_parquet(files).filter(newest & ~pl.col("_deleted")).collect()
    return {row["key"]: (row["lang"], list(row["embedding"])) for row in found.iter_rows(named=True)}


def shows(tickets: Tickets, folder: Path, rows: Sequence[Row]) -> None:
    """Assert that both readers find a fresh embedding of these rows, and that nothing else lies there."""
    wanted, langs = tickets.fresh(rows), {row["id"]: row["lang"] for row in rows}
    for found in (by_duckdb(folder), by_polars(folder)):
        assert {key: lang for key, (lang, _) in found.items()} == langs
        for key, vector in wanted.items():
            np.testing.assert_allclose(found[key][1], vector, atol=1e-5)
    listed = {file["name"] for file in json.loads((folder / "_manifest.json").read_text())["files"]}
    assert {path.name for path in folder.glob("*.parquet")} == listed


def status(tickets: Tickets) -> Any:
    with tickets.engine.begin() as connection:
        return collection_status(connection, find_collection(connection, tickets.workspace, "tickets")).output


def test_each_sync_adds_what_it_changed(tickets: Tickets, folder: Path) -> None:
    assert json.loads((folder / "_manifest.json").read_text()) == {"version": 0, "files": []}
    rows: list[Row] = list(rows_of(20))
    sync(tickets, rows)
    shows(tickets, folder, rows)
    rows = [{**rows[0], "text": "another"}, {**rows[1], "lang": "fr"}, *rows[4:], *rows_of(30)[25:]]
    assert tickets.sync(rows)["removed"] == 2
    assert status(tickets).behind
    write_due(tickets.engine)
    shows(tickets, folder, rows)
    full, delta = sorted(folder.glob("*.parquet"), key=lambda path: path.name, reverse=True)
    assert (full.name[:12], delta.name[:13]) == ("full-000001-", "delta-000002-")
    changes = pl.read_parquet(delta)
    assert sorted(changes.filter("_deleted")["key"]) == ["k2", "k3"]
    assert sorted(changes.filter(~pl.col("_deleted"))["key"]) == ["k0", "k1", "k25", "k26", "k27", "k28", "k29"]
    found = status(tickets)
    assert (found.version, found.files, found.rows, found.behind, found.problem) == (2, 2, 29, False, None)
    first = json.loads((folder / "_manifest-000001.json").read_text())
    assert [file["name"] for file in first["files"]] == [full.name]
    assert sync(tickets, rows) == {"in": 23, "unchanged": 23}
    assert status(tickets).version == 2, "nothing changed"


def test_files_are_compacted(tickets: Tickets, folder: Path) -> None:
    rows: list[Row] = list(rows_of(12))
    sync(tickets, rows)
    rows = [{**row, "text": f"{row['text']} again"} for row in rows[1:]]
    sync(tickets, rows)
    with tickets.engine.begin() as connection:
        compact(connection, find_collection(connection, tickets.workspace, "tickets"))
    assert write_due(tickets.engine) == 1
    assert sorted(path.name[:12] for path in folder.iterdir()) == ["_manifest-00", "_manifest.js", "full-000003-"]
    shows(tickets, folder, rows)
    assert len(pl.read_parquet(folder / "*.parquet")) == 11


def test_passages_and_half_precision(make_tickets: MakeTickets, folder: Path) -> None:
    tickets = make_tickets(output=str(folder), split=16, dtype="float16")
    long = " ".join(f"word{n}" for n in range(80))
    sync(tickets, [{"id": "a", "text": long}, {"id": "b", "text": "short"}])
    found = pl.read_parquet(folder / "*.parquet").sort("key", "passage")
    seen = run_sql(
        tickets.engine, "select key, passage, start, stop, vector::text from vectormill.tickets order by 1, 2"
    )
    assert [row[:4] for row in found.select("key", "passage", "start", "stop").rows()] == [row[:4] for row in seen]
    for vector, row in zip(found["embedding"], seen, strict=True):
        np.testing.assert_allclose(vector, json.loads(row[4]), rtol=1e-3)


def test_many_files_of_one_set(tickets: Tickets, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collection_files, "_BLOCK", 7)
    monkeypatch.setattr(collection_files, "_FILE_BYTES", 1)
    rows: list[Row] = list(rows_of(30))
    sync(tickets, rows)
    assert len(list(folder.glob("full-000001-*.parquet"))) == 5
    shows(tickets, folder, rows)


@pytest.mark.parametrize("call", range(8))
def test_an_interruption_anywhere_is_mended(
    tickets: Tickets, folder: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    """The dispatcher dies before the nth write or deletion."""
    monkeypatch.setattr(collection_files, "_BLOCK", 7)
    monkeypatch.setattr(collection_files, "_FILE_BYTES", 1)
    rows: list[Row] = list(rows_of(20))
    sync(tickets, rows)
    rows = [{**row, "text": f"{row['text']} again"} for row in rows[1:]]
    tickets.sync(rows)
    with tickets.engine.begin() as connection:
        compact(connection, find_collection(connection, tickets.workspace, "tickets"))
    left = iter(range(call))

    def dying(act: Callable[..., None]) -> Callable[..., None]:
        def run(*values: Any) -> None:
            if next(left, None) is None:
                raise KeyboardInterrupt
            act(*values)

        return run

    with monkeypatch.context() as patch:
        patch.setattr(storage, "write", dying(storage.write))
        patch.setattr(storage, "delete", dying(storage.delete))
        with pytest.raises(KeyboardInterrupt):
            write_due(tickets.engine)
    if by_polars_reads(folder):
        assert len(by_polars(folder)) in (19, 20)
    assert write_due(tickets.engine) in (0, 1)
    more = [*rows, *rows_of(25)[20:]]
    sync(tickets, more)
    shows(tickets, folder, more)


def by_polars_reads(folder: Path) -> bool:
    manifest = json.loads((folder / "_manifest.json").read_text())
    return all((folder / file["name"]).exists() for file in manifest["files"])


def test_one_at_a_time_writes_them(tickets: Tickets, folder: Path) -> None:
    tickets.sync(rows_of(5))
    ((version,),) = run_sql(tickets.engine, "select id from vectormill.collection_versions")
    with held(tickets.engine, f"vectormill collection files {version}"), pytest.raises(Waiting):
        collection_files.write_files(tickets.engine, version)
    collection_files.write_files(tickets.engine, version)
    shows(tickets, folder, list(rows_of(5)))


def test_a_file_that_the_database_remembers_and_nobody_finds_is_written_anew(tickets: Tickets, folder: Path) -> None:
    """As after a restore of the database to a time before a full set replaced it."""
    rows: list[Row] = list(rows_of(10))
    sync(tickets, rows)
    for path in folder.glob("*.parquet"):
        path.unlink()
    sync(tickets, [*rows, *rows_of(12)[10:]])
    shows(tickets, folder, list(rows_of(12)))


def test_a_folder_that_is_not_there_is_told(tickets: Tickets, folder: Path) -> None:
    tickets.sync(rows_of(5))
    aside = folder.rename(folder.with_name("aside"))
    with pytest.raises(StorageUnreachable, match="mount the folder"):
        write_due(tickets.engine)
    assert not folder.exists(), "as it isn't mounted, nothing is written under it"
    assert "mount the folder" in status(tickets).problem
    tickets.sync(rows_of(5))
    assert status(tickets).problem is None, "who waits for this sync's files isn't told of an earlier try"
    with pytest.raises(StorageUnreachable):
        write_due(tickets.engine)
    made = forgetting.forget_keys(tickets.engine, 1, ["k0"], by="a test", collection=None)
    with pytest.raises(Waiting, match="mount the folder"):
        erase(tickets.engine, made)
    aside.rename(folder)
    erase(tickets.engine, made)
    write_due(tickets.engine)
    assert status(tickets).problem is None
    shows(tickets, folder, [*rows_of(5)][1:])


def test_a_forgotten_key_leaves_the_files(tickets: Tickets, folder: Path) -> None:
    rows: list[Row] = [{"id": f"person-{n}", "text": f"letter {n}", "lang": "en"} for n in range(12)]
    sync(tickets, rows)
    sync(tickets, [{**rows[0], "text": "another letter"}, *rows[1:]])
    sync(tickets, rows[:11])  # removes the last one, which the first file still has
    forget(tickets.engine, "person-0", "person-11")
    write_due(tickets.engine)
    shows(tickets, folder, rows[1:11])
    everything = b"".join(path.read_bytes() for path in folder.iterdir())
    assert b"person-1" in everything
    keys = pl.read_parquet(folder / "*.parquet")["key"].to_list()
    assert {"person-0", "person-11"}.isdisjoint(keys)
    assert b"person-11" not in everything
    assert len(list(folder.glob("_manifest-*.json"))) == 1, "the others name files that are gone"


def test_each_version_has_its_own_folder(
    tickets: Tickets, folder: Path, tmp_path: Path, small_encoder: LocalEncoder
) -> None:
    tickets.encoders["small"] = small_encoder
    with tickets.engine.begin() as connection:
        add_model(connection, "small", described("static-64", static_folder(SMALL)))
    rows: list[Row] = list(rows_of(10))
    sync(tickets, rows)
    other = tmp_path / "other"

    def upgrade(output: Path | None = None) -> None:
        with tickets.engine.begin() as connection:
            place = str(output) if output else None
            upgrade_collection(connection, tickets.workspace, "tickets", model="small", output=place)

    with pytest.raises(UserError, match="name another folder"):
        upgrade()
    with pytest.raises(UserError, match="the collection tickets keeps files there"):
        upgrade(folder)
    upgrade(other)
    leader = tickets.submit(rows)
    tickets.run(leader)
    tickets.run(beside(tickets, leader))
    assert write_due(tickets.engine) == 1, "the other one is up to date"
    assert {len(vector) for _, vector in by_duckdb(other).values()} == {64}
    assert len(by_duckdb(other)) == 10
    shows(tickets, folder, rows)


def test_what_is_asked_wrongly_is_refused(engine: Engine, static: None, tmp_path: Path) -> None:
    def create(**options: Any) -> None:
        with engine.begin() as connection:
            wish = JobOptions.model_validate(options)
            create_collection(connection, workspace_id(connection), "other", model="static", options=wish)

    with pytest.raises(UserError, match='the files have a column "_version" already'):
        create(output=str(tmp_path / "new"), carry=["_version"])
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match=r"mine\.txt is there already"):
        create(output=str(tmp_path / "used"))
    create()
    with engine.begin() as connection:
        found = find_collection(connection, workspace_id(connection), "other")
        with pytest.raises(UserError, match="has no files"):
            compact(connection, found)


def test_a_dropped_collection_leaves_its_files_and_no_changes(tickets: Tickets, folder: Path) -> None:
    rows: list[Row] = list(rows_of(6))
    sync(tickets, rows)
    tickets.sync(rows[1:])
    with tickets.engine.begin() as connection:
        drop_collection(connection, find_collection(connection, tickets.workspace, "tickets"))
    assert run_sql(tickets.engine, "select count(*) from vectormill.collection_changes") == [(0,)]
    assert write_due(tickets.engine) == 0
    assert len(by_polars(folder)) == 6


def test_any_nights_equal_a_fresh_embedding(tickets: Tickets, folder: Path) -> None:
    chance = random.Random(5)
    rows: dict[str, Row] = {}
    for night in range(8):
        for n in chance.sample(range(40), 10):
            rows[f"k{n}"] = {"id": f"k{n}", "text": f"{n} at {night}", "lang": chance.choice(["en", "de"])}
        for key in chance.sample(sorted(rows), 2):
            del rows[key]
        tickets.sync(list(rows.values()), max_removed="100%")
        if chance.random() < 0.3:
            with tickets.engine.begin() as connection:
                compact(connection, find_collection(connection, tickets.workspace, "tickets"))
        if chance.random() < 0.7 or night == 7:
            write_due(tickets.engine)
            shows(tickets, folder, list(rows.values()))
