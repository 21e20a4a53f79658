"""Predictions of time, size and cost, and the number of items that they are scaled to."""

import socket
from dataclasses import replace

import pytest

from pipeline.cli.dry_run import read_count, slots_of_a_machine
from pipeline.core.errors import UserError
from pipeline.db.usage import ChunkWork
from pipeline.ingest.prediction import (
    NO_ROW,
    Load,
    Measured,
    Rates,
    RowCost,
    catalogue_rates,
    is_enough,
    predict,
    workers_rates,
)

_LOAD = Load(
    items=1_000_000,
    vectors=900_000,
    tokens=90_000_000,
    reading_seconds=2.0,
    slots=2,
    devices=1,
    chunk_items=10_000,
    chunk_tokens=1_000_000,
    price_per_million=None,
)
_RATES = Rates(token_seconds=1e-5, vector_seconds=1e-4, measured=Measured.HERE)
_ITEM = RowCost(seconds=1e-5, wal_bytes=100, disk_bytes=120)
_VECTOR = RowCost(seconds=2e-5, wal_bytes=1_100, disk_bytes=1_300)


def test_the_pieces_of_a_large_job() -> None:
    found = predict(_LOAD, _RATES, _ITEM, _VECTOR)
    # 900 + 90 s of slots on two, and a little for the last chunk, of which one in a hundred is an eighth.
    assert found.embed_seconds + found.write_seconds == pytest.approx(495, rel=0.01)
    assert found.embed_seconds == pytest.approx(10 * found.write_seconds)
    assert found.submit_seconds == pytest.approx(12)
    assert found.wal_bytes == 1_000_000 * 100 + 900_000 * 1_100
    assert found.disk_bytes == 1_000_000 * 120 + 900_000 * 1_300
    assert found.cost is None
    assert found.device_hours == pytest.approx(495 / 3_600, rel=0.01)
    assert found.seconds == pytest.approx(495 + 12 + found.start_seconds, rel=0.01)


def test_a_price_makes_a_cost() -> None:
    assert predict(replace(_LOAD, price_per_million=0.02), _RATES, _ITEM, _VECTOR).cost == pytest.approx(1.8)


def test_files_take_parquet_and_no_rows() -> None:
    parquet = RowCost(seconds=1e-5, wal_bytes=0, disk_bytes=0, parquet_bytes=1_000)
    found = predict(_LOAD, _RATES, NO_ROW, parquet)
    assert (found.wal_bytes, found.disk_bytes, found.submit_seconds) == (0, 900_000_000, 2.0)


@pytest.mark.parametrize(
    ("items", "slots", "seconds"),
    [
        (100, 64, 0.1),  # a part of a chunk has one slot
        (8_000, 64, 1.25),  # an eighth of a full chunk of ten seconds is the smallest
        (80_000, 1, 80.0),
        (80_000, 8, 10.5),  # one is late by half of the smallest chunk
    ],
)
def test_slots_work_as_far_as_chunks_go(items: int, slots: int, seconds: float) -> None:
    load = replace(_LOAD, items=items, vectors=items, tokens=items * 100, slots=slots)
    rates = replace(_RATES, token_seconds=1e-5, vector_seconds=0.0)
    assert predict(load, rates, NO_ROW, NO_ROW).embed_seconds == pytest.approx(seconds, rel=0.06)


def test_nothing_takes_nothing() -> None:
    found = predict(replace(_LOAD, items=0, vectors=0, tokens=0, reading_seconds=0.0), _RATES, _ITEM, _VECTOR)
    assert found.seconds == found.start_seconds
    assert found.disk_bytes == 0


def test_what_workers_did_is_told_apart() -> None:
    work = ChunkWork(chunks=10, vectors=1_000, tokens=100_000, device_seconds=20.0, slot_seconds=40.0)
    found = workers_rates(work, tokenise_seconds=1e-5, vector_seconds=1e-3)
    # 20 s of passes; of the other 20 s as much for a thousand items as for their tokens, and what is between chunks.
    assert found.token_seconds == pytest.approx(30 / 100_000)
    assert found.vector_seconds == pytest.approx(10.7 / 1_000)
    assert (found.measured, found.seconds) == (Measured.WORKERS, 40.0)


def test_requests_to_an_upstream_overlap() -> None:
    work = ChunkWork(chunks=10, vectors=1_000, tokens=100_000, device_seconds=160.0, slot_seconds=40.0)
    found = workers_rates(work, tokenise_seconds=0.0, vector_seconds=1e-5)
    assert found.token_seconds == pytest.approx(40 / 100_000)


@pytest.mark.parametrize(
    ("seconds", "items", "enough"), [(31.0, 10, True), (29.0, 10, False), (4.0, 1_000, True), (1.0, 1_000, False)]
)
def test_how_much_work_tells_rates(seconds: float, items: int, enough: bool) -> None:
    work = ChunkWork(chunks=1, vectors=items, tokens=1, device_seconds=1.0, slot_seconds=seconds)
    assert is_enough(work, 1_000) is enough
    assert not is_enough(replace(work, tokens=0), 1_000)


def test_the_catalogue_is_the_last_resort() -> None:
    found = catalogue_rates(500.0, 1e-5)
    assert (found.token_seconds, found.vector_seconds) == (0.002, 1e-5)


def _worker(slots: int, device: str = "cpu", host: str = "elsewhere") -> dict[str, object]:
    return {"slots": slots, "device": device, "host": host}


@pytest.mark.parametrize(
    ("live", "slots"),
    [
        ([], (2, 2)),
        ([_worker(3)], (3, 3)),
        # Workers of one machine share its CPU, but each of a GPU's replicas only that.
        ([_worker(2), _worker(2)], (4, 2)),
        ([_worker(8, "cuda:0,cuda:1,cuda:2,cuda:3"), _worker(2, "cuda:4")], (2, 2)),
        ([_worker(2), _worker(2), _worker(1, host=socket.gethostname())], (1, 1)),
    ],
)
def test_as_many_slots_are_measured_as_share_a_device(live: list[dict[str, object]], slots: tuple[int, int]) -> None:
    assert slots_of_a_machine(live) == slots


@pytest.mark.parametrize(
    ("given", "count"), [("1", 1), ("1e9", 10**9), ("1_000_000", 10**6), ("2.5e3", 2_500), (None, None)]
)
def test_numbers_of_items(given: str | None, count: int | None) -> None:
    assert read_count(given) == count


@pytest.mark.parametrize("given", ["", "0", "-5", "1.5", "many", "nan", "inf", "1e999999999", "1e16"])
def test_what_is_no_number_of_items(given: str) -> None:
    with pytest.raises(UserError) as raised:
        read_count(given)
    assert raised.value.field == "at"
    assert "positive whole number of items, such as 1e9 or 1_000_000" in str(raised.value)
