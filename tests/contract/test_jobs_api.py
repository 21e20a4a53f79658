"""Endpoints below `/api/jobs` with real processes: from an upload to vectors, every control, and visibility."""

import csv
import gzip
import io
import json
import re
import select
import shutil
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote
from uuid import UUID

import httpx2 as httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fastapi import FastAPI
from fastapi.responses import JSONResponse
from fastapi.testclient import TestClient
from sqlalchemy import text

from pipeline.api.transfers import UPLOADS_AT_ONCE, UPLOADS_OF_ONE
from pipeline.cli.api_backend import ApiBackend
from pipeline.cli.jobs import watch_job
from pipeline.core.errors import UserError
from tests.acceptance.fleet import Fleet, eventually
from tests.contract.conftest import Gateway
from tests.contract.walk import Theirs, leaks, operations

_ROWS: list[dict[str, Any]] = [{"id": f"k{n}", "text": f"the mill grinds {n} sacks", "lang": "en"} for n in range(300)]
_WEBHOOK = "http://127.0.0.1:1/hooks/of-this-job"
_ROWS[7] = {"id": "k7", "text": "", "lang": "en"}
_ROWS[9] = {"id": '=cmd,"9"', "text": None, "lang": "en"}


def _lines(rows: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


@pytest.fixture(scope="module")
def working(gateway: Gateway, tmp_path_factory: pytest.TempPathFactory) -> Gateway:
    """Start a dispatcher, a worker, and an api with a folder that callers may name."""
    gateway.fleet.environment["VECTORMILL_CHUNK_ITEMS"] = "50"
    gateway.fleet.environment["TMPDIR"] = str(tmp_path_factory.mktemp("uploads"))
    allowed = tmp_path_factory.mktemp("allowed")
    (allowed / "docs.jsonl").write_bytes(_lines(_ROWS))
    gateway.fleet.environment["VECTORMILL_API_SOURCES"] = str(allowed)
    gateway.fleet.environment["VECTORMILL_API_OUTPUTS"] = str(allowed)
    gateway.fleet.environment["VECTORMILL_WEBHOOKS"] = "http://127.0.0.1:1/hooks"
    gateway.fleet.environment["VECTORMILL_API_UPLOAD_BYTES"] = "200000"
    gateway.fleet.kill("api")
    gateway.start_api()
    gateway.fleet.start_dispatcher()
    gateway.fleet.start_worker(replicas=1)
    return gateway


@pytest.fixture(scope="module")
def allowed(working: Gateway) -> Path:
    return Path(working.fleet.environment["VECTORMILL_API_SOURCES"])


@pytest.fixture(scope="module")
def line(working: Gateway) -> Iterator[httpx.Client]:
    with working.client() as client:
        yield client


def _upload(line: httpx.Client, rows: list[dict[str, Any]], name: str = "docs.jsonl", **fields: Any) -> httpx.Response:
    headers = {"idempotency-key": fields.pop("key")} if "key" in fields else {}
    form = {"model": "static", **({"name": fields.pop("name_")} if "name_" in fields else {}), **fields}
    return line.post("/api/jobs", data=form, files=[("file", (name, _lines(rows)))], headers=headers)


def _ended(line: httpx.Client, job: str) -> dict[str, Any]:
    def look() -> dict[str, Any] | None:
        row: dict[str, Any] = line.get(f"/api/jobs/{job}").json()
        return row if row["state"] in ("completed", "failed", "cancelled") else None

    return eventually(look, f"the end of job {job}")


@pytest.fixture(scope="module")
def done(line: httpx.Client) -> dict[str, Any]:
    """Upload a job, and return its status once it has completed."""
    reply = _upload(line, _ROWS, carry="lang", labels='{"team": "search"}', priority="3", webhook=_WEBHOOK)
    assert reply.status_code == 201, reply.text
    made = reply.json()
    assert (made["name"], made["state"], made["items"]["total"]) == ("docs", "queued", 300)
    assert _WEBHOOK not in reply.text, "an address may hold a token"
    return _ended(line, made["id"])


def test_what_was_asked_for_in_sql_and_is_no_job_has_a_status(working: Gateway, line: httpx.Client) -> None:
    ask = "select vectormill.submit('select 1 as text', 'static', name => 'asked')::text"
    job = working.fleet.scalar(ask)
    row = _ended(line, "asked")
    assert (row["id"], row["state"], row["reason"]) == (job, "failed", "request_refused")
    with closing(ApiBackend(working.url, working.key, "default")) as backend:
        assert watch_job(backend, UUID(job), 10) == 3
    replies = [line.post(f"/api/jobs/asked/{verb}") for verb in ("cancel", "pause", "resume", "retry")]
    replies += [line.get(f"/api/jobs/asked/{part}") for part in ("results", "receipt")]
    told = f"{job} isn't a job: it is a request made in SQL, and its state is failed."
    assert {(reply.status_code, reply.json()["detail"]) for reply in replies} == {(404, told)}


def test_upload_to_vectors(done: dict[str, Any], line: httpx.Client, by_library: Any) -> None:
    assert done["state"] == "completed"
    assert (done["items"]["embedded"], done["items"]["rejected"]) == (298, 2)
    assert done["labels"] == {"team": "search"}
    reply = line.get(f"/api/jobs/{done['id']}/results")
    assert reply.headers["content-type"] == "application/vnd.apache.parquet"
    table = pq.read_table(pa.BufferReader(reply.content))
    assert table.schema.names == ["index", "key", "embedding", "tokens", "truncated", "lang"]
    texts = [row["text"] for n, row in enumerate(_ROWS) if n not in (7, 9)]
    np.testing.assert_allclose(np.stack(table["embedding"].to_numpy()), by_library(texts), atol=1e-5)
    some = line.get(f"/api/jobs/{done['id']}/results", params={"format": "jsonl", "first": 5, "end": 12}).text
    rows = [json.loads(one) for one in some.splitlines()]
    assert [row["index"] for row in rows] == [5, 6, 8, 10, 11]
    assert rows[0]["embedding"] == pytest.approx(table["embedding"][5].as_py())
    assert line.get(f"/api/jobs/{done['id']}/results", params={"format": "jsonl", "first": 900}).content == b""
    empty = line.get(f"/api/jobs/{done['id']}/results", params={"first": 900}).content
    assert pq.read_table(pa.BufferReader(empty)).schema == table.schema


def test_passages_of_several_columns(line: httpx.Client, working: Gateway) -> None:
    rows = [{"id": n, "subject": f"mill {n}", "body": f"It grinds {n} sacks of grain a day. " * 6} for n in range(5)]
    fields = {"text": r"{subject}\n\n{body}", "title": "{subject}", "split": "24", "overlap": "4"}
    made = _upload(line, rows, name="passages.jsonl", **fields)
    assert made.status_code == 201, made.text
    ended = _ended(line, made.json()["id"])
    assert (ended["items"]["embedded"], ended["state"]) == (5, "completed")
    found = line.get(f"/api/jobs/{ended['id']}/results", params={"format": "jsonl", "first": 1, "end": 3}).text
    passages = [json.loads(one) for one in found.splitlines()]
    assert [each["passage"] for each in passages if each["index"] == 2] == list(range(len(passages) // 2))
    texts = [f"{row['subject']}\n\n{row['body']}" for row in rows]
    assert max(each["stop"] for each in passages if each["index"] == 2) == len(texts[2])
    assert max(each["tokens"] for each in passages) <= 24
    receipt = line.get(f"/api/jobs/{ended['id']}/receipt", params={"verify": True}).json()
    assert (receipt["verified"], receipt["passages"]) == (True, ended["passages"])
    hits = working.fleet.cli("search", "sacks of grain", "--job", ended["id"], "--json").stdout
    assert texts[(hit := json.loads(hits)[0])["index"]][hit["start"] : hit["stop"]] == hit["text"]


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"text": "{subject"}, "text: a"),
        ({"text": "{subject} {nosuch}"}, 'no column "nosuch"'),
        ({"split": "8"}, "split: input should be greater than or equal to 16"),
        ({"overlap": "8"}, "overlap: it is for passages"),
        ({"split": "32", "on_long": "reject"}, "split: a text that is split is never too long"),
        ({"split": "32", "overlap": "20"}, "overlap: give at most half of a passage"),
    ],
)
def test_texts_that_cant_be_made_are_refused(line: httpx.Client, fields: dict[str, str], told: str) -> None:
    reply = _upload(line, [{"id": 1, "text": "x", "subject": "y"}], name="bad.jsonl", **fields)
    assert reply.status_code == 400, reply.text
    assert told in reply.json()["detail"]


def test_shortened(line: httpx.Client, working: Gateway, by_library: Any) -> None:
    made = _upload(line, _ROWS[:5], name="short.jsonl", dimensions="64").json()
    assert _ended(line, made["id"])["state"] == "completed"
    lines = line.get(f"/api/jobs/{made['id']}/results", params={"format": "jsonl"}).text.splitlines()
    whole = by_library([row["text"] for row in _ROWS[:5]])[:, :64]
    shorter = whole / np.linalg.norm(whole, axis=1, keepdims=True)
    np.testing.assert_allclose([json.loads(one)["embedding"] for one in lines], shorter, atol=1e-5)
    hits = json.loads(working.fleet.cli("search", "2 sacks", "--job", "short", "--json").stdout)
    assert (hits[0]["key"], len(hits)) == ("k2", 5)
    refused = _upload(line, _ROWS[:5], dimensions="65")
    assert (refused.status_code, refused.json()["detail"]) == (
        400,
        "dimensions 65: static supports 64 or 128 or 256 dimensions.",
    )


def test_rejects(done: dict[str, Any], line: httpx.Client) -> None:
    path = f"/api/jobs/{done['id']}/rejects"
    page = line.get(path, params={"limit": 1}).json()
    assert page["counts"] == {"empty_text": 1, "missing_text": 1}
    assert ([row["index"] for row in page["data"]], page["has_more"], page["after"]) == ([7], True, 7)
    page = line.get(path, params={"limit": 1, "after": 7}).json()
    assert ([row["code"] for row in page["data"]], page["has_more"], page["after"]) == (["missing_text"], False, None)
    assert page["counts"] is None, "counted once for all pages"
    assert [row["index"] for row in line.get(path, params={"code": "missing_text"}).json()["data"]] == [9]
    lines = [json.loads(one) for one in line.get(path, params={"format": "jsonl"}).text.splitlines()]
    assert [(row["index"], row["key"]) for row in lines] == [(7, "k7"), (9, '=cmd,"9"')]
    reply = line.get(path, params={"format": "csv"})
    assert reply.headers["content-type"].startswith("text/csv")
    # A key that a spreadsheet would take for a formula is escaped.
    assert [row["key"] for row in csv.DictReader(io.StringIO(reply.text))] == ["k7", '\'=cmd,"9"']


def test_receipt_and_chunks(done: dict[str, Any], line: httpx.Client) -> None:
    account = line.get(f"/api/jobs/{done['id']}/receipt", params={"verify": True}).json()
    assert account["items"] == {
        "in": 300,
        "embedded": 298,
        "reused": 0,
        "unchanged": 0,
        "rejected": 2,
        "cancelled": 0,
        "removed": 0,
        "forgotten": 0,
    }
    assert (account["verified"], account["missing"], account["double"]) == (True, 0, 0)
    tokens = account["tokens"]["prompt"]
    assert account["embedded_on"] == [{"device": "cpu", "precision": "float32", "items": 298, "tokens": tokens}]
    for by, group in (("device", "cpu"), ("precision", "float32")):
        usage = line.get("/api/usage", params={"by": by}).json()["data"]
        assert group in [row["group"] for row in usage]
    assert "verified" not in line.get(f"/api/jobs/{done['id']}/receipt").json()
    path, seen, after = f"/api/jobs/{done['id']}/chunks", [], -1
    while True:
        page = line.get(path, params={"limit": 4, "after": after}).json()
        seen += page["data"]
        if not page["has_more"]:
            break
        after = page["after"]
    assert [chunk["ordinal"] for chunk in seen] == list(range(len(seen)))
    assert sum(chunk["items"] for chunk in seen) == 300
    assert line.get(path, params={"state": "running"}).json()["data"] == []


def test_list(done: dict[str, Any], line: httpx.Client) -> None:
    made = [_upload(line, _ROWS[:2], name=f"paged-{n}.jsonl").json()["id"] for n in range(3)]
    page = line.get("/api/jobs", params={"name": "PAGED-", "limit": 2}).json()
    assert ([row["id"] for row in page["data"]], page["has_more"]) == ([made[2], made[1]], True)
    page = line.get("/api/jobs", params={"name": "paged-", "limit": 2, "after": page["after"]}).json()
    assert ([row["id"] for row in page["data"]], page["has_more"]) == ([made[0]], False)
    for query in ({"label": "team=search"}, {"name": "docs", "state": "completed", "model": "static"}):
        found = line.get("/api/jobs", params=query).json()["data"]
        assert done["id"] in [row["id"] for row in found]
    assert line.get("/api/jobs", params={"label": "team=other"}).json()["data"] == []
    assert line.get("/api/jobs", params={"label": "team"}).status_code == 400
    by_name = line.get("/api/jobs/paged-1").json()
    assert by_name["id"] == made[1] == line.get(f"/api/jobs/{made[1][:23]}").json()["id"]


def test_controls(line: httpx.Client) -> None:
    job = _upload(line, _ROWS, name="steered.jsonl", priority="-100").json()["id"]

    def post(verb: str, **body: Any) -> httpx.Response:
        return line.post(f"/api/jobs/{job}/{verb}", **body)

    assert post("pause").json()["state"] == "paused"
    assert post("priority", json={"priority": 5}).status_code == 200
    assert post("priority", json={"priority": 500}).status_code == 400
    assert post("resume").json()["state"] == "queued"
    assert _ended(line, job)["state"] == "completed"
    refused = post("pause")
    assert (refused.status_code, refused.headers["content-type"]) == (409, "application/problem+json")
    assert refused.json()["detail"] == f"job {job} is completed and can't be paused."
    assert post("retry").json()["reopened_chunks"] == 0
    other = _upload(line, _ROWS, name="stopped.jsonl").json()["id"]
    assert line.post(f"/api/jobs/{other}/pause").status_code == 200
    assert line.post(f"/api/jobs/{other}/cancel").json()["state"] in ("cancelling", "cancelled")
    assert _ended(line, other)["state"] == "cancelled"


def test_an_idempotency_key_attaches(line: httpx.Client) -> None:
    first = _upload(line, _ROWS[:20], key="nightly-1")
    again = _upload(line, _ROWS[:20], name="docs.jsonl", key="nightly-1")
    assert (first.status_code, again.status_code) == (201, 200)
    assert first.json()["id"] == again.json()["id"]
    other = _upload(line, _ROWS[:21], key="nightly-1")
    assert (other.status_code, other.json()["title"]) == (422, "idempotency conflict")


def test_an_idempotency_key_attaches_to_what_is_under_way(working: Gateway, line: httpx.Client) -> None:
    """The first request can't copy its items while their table is locked; the second attaches to the same job."""
    with working.engine.begin() as holding, ThreadPoolExecutor(1) as threads:
        holding.execute(text("lock table vectormill.items in share mode"))
        first = threads.submit(_upload, line, _ROWS[:20], key="slow-1")
        query = "select id from vectormill.jobs where idempotency_key = 'slow-1'"
        job = str(eventually(lambda: working.fleet.scalar(query), "a job in staging"))
        again = _upload(line, _ROWS[:20], key="slow-1")
        assert (again.status_code, again.json()["id"], again.json()["state"]) == (200, job, "staging")
        holding.commit()
        assert (first.result().status_code, first.result().json()["id"]) == (201, job)


@pytest.mark.parametrize(
    "name", ["team/docs", "docs/cancel", "what? #1", "100 %", "a%2Fb", "../docs", "a/..", "ü ; & = +", "docs.v1"]
)
def test_any_name_can_be_addressed(line: httpx.Client, working: Gateway, name: str) -> None:
    made = _upload(line, _ROWS[:2], name="named.jsonl", name_=name).json()
    path = f"/api/jobs/{quote(name, safe='')}"
    assert made["name"] == name
    assert line.get(path).json()["id"] == made["id"]
    assert line.get(f"{path}/receipt").json()["id"] == made["id"]
    assert line.post(f"{path}/priority", json={"priority": 2}).json()["id"] == made["id"]
    with closing(ApiBackend(working.url, working.key, "default")) as backend:
        assert str(backend.status(name).id) == made["id"]


@pytest.mark.parametrize("name", [".", ".."])
def test_a_name_that_no_path_can_hold(line: httpx.Client, working: Gateway, name: str) -> None:
    refused = _upload(line, _ROWS[:2], name_=name)
    assert (refused.status_code, refused.json()["detail"]) == (
        400,
        f"name: \"{name}\" can't be a job's name: no path can hold it.",
    )
    with closing(ApiBackend(working.url, working.key, "default")) as backend, pytest.raises(UserError, match="no job"):
        backend.status(name)


def test_uploads_that_hardly_come_hold_up_no_other_workspace(working: Gateway, line: httpx.Client) -> None:
    """Six slow uploads of one key: three have a place and their bodies are asked for, three wait. An upload of another
    workspace goes through meanwhile, and so do requests that aren't uploads."""
    head = (
        "POST /api/jobs HTTP/1.1\r\nhost: here\r\nexpect: 100-continue\r\n"
        f"authorization: Bearer {working.key}\r\n"
        "content-type: multipart/form-data; boundary=x\r\ncontent-length: 1000\r\n\r\n"
    ).encode()
    host, port = working.url.removeprefix("http://").split(":")
    other = working.workspace("beside-slow-uploads")
    with ExitStack() as opened:

        def begin() -> socket.socket:
            made = opened.enter_context(socket.create_connection((host, int(port)), timeout=30))
            made.sendall(head)
            return made

        holding = [begin() for _ in range(UPLOADS_OF_ONE)]
        for one in holding:
            assert one.recv(100).startswith(b"HTTP/1.1 100 ")
            one.sendall(b"-")
        waiting = [begin() for _ in range(UPLOADS_AT_ONCE - UPLOADS_OF_ONE)]
        assert line.get("/api/jobs").status_code == 200, "statuses don't wait for uploads"
        with working.client(other) as theirs:
            assert _upload(theirs, _ROWS[:5], name="beside.jsonl").status_code == 201
            made = theirs.post("/v1/files", data={"purpose": "batch"}, files={"file": b"{}\n"})
            assert made.status_code == 200, made.text
        assert select.select([*holding, *waiting], [], [], 0)[0] == []
        holding[0].close()
        assert select.select(waiting, [], [], 30)[0]


def test_what_an_upload_must_be(line: httpx.Client, working: Gateway) -> None:
    def refused(**how: Any) -> str:
        reply = line.post("/api/jobs", **how)
        assert reply.status_code in (400, 404), reply.text
        return str(reply.json()["detail"])

    file = [("file", ("a.jsonl", _lines(_ROWS[:2])))]
    assert "model" in refused(data={}, files=file)
    assert "no model" in refused(data={"model": "missing"}, files=file)
    assert "the form has no file" in refused(files=[("model", (None, b"static"))])
    unknown = refused(data={"model": "static"}, files=[("file", ("a.exe", b"x"))])
    assert unknown.startswith("a.exe: unknown kind of file")
    long = [("file", ("文" * 100 + ".jsonl", _lines(_ROWS[:2])))]
    assert line.post("/api/jobs", data={"model": "static"}, files=long).status_code == 201
    deep = {"content": b"[" * 200_000, "headers": {"content-type": "application/json"}}
    assert "neither JSON nor" in refused(**deep)
    charset = "multipart/form-data; boundary=x; charset=undefined"
    assert refused(content=b"--x--", headers={"content-type": charset})
    wrong = refused(data={"model": "static"}, files=[("file", ("../../b.jsonl", b'{"body": "x"}\n'))])
    # The error has the file's name as its submitter gave it, not as it is stored.
    assert wrong.startswith('text_column: b.jsonl line 1: no column "text"')
    assert "priority" in refused(data={"model": "static", "priority": "many"}, files=file)
    assert refused(data={"model": "static", "surprise": "1"}, files=file) == "surprise: there is no such field."
    for option in ("query", "from", "into", "hnsw", "dry_run", "at"):
        told = refused(data={"model": "static", option: "1"}, files=file)
        assert told == f"{option}: only vectormill submit takes it, with VECTORMILL_DATABASE_URL set."
        assert told == refused(json={"model": "static", "sources": ["/x"], option: "1"})
    assert "by_value: it is what happens" in refused(data={"model": "static", "by_value": "1"}, files=file)
    assert "the header Idempotency-Key" in refused(data={"model": "static", "idempotency_key": "a"}, files=file)
    assert refused(data={"model": "static"}, files=file, params={"priority": 3}).startswith("priority: send it in the")
    assert "neither JSON nor" in refused(content=b"\xff", headers={"content-type": "text/plain"})
    large = line.post("/api/jobs", data={"model": "static"}, files=[("file", ("a.jsonl", b"x" * 300_000))], headers={})
    assert (large.status_code, large.headers["content-type"]) == (413, "application/problem+json")
    assert list(Path(working.fleet.environment["TMPDIR"]).glob("vectormill-upload-*")) == []


def test_packed_and_several_files(line: httpx.Client) -> None:
    files = [
        ("file", ("a.jsonl.gz", gzip.compress(_lines(_ROWS[:4])))),
        ("file", ("b.csv", b"id,text\n1,sail\n2,mast\n")),
    ]
    made = line.post("/api/jobs", data={"model": "static", "name": "two"}, files=files).json()
    assert made["items"]["total"] == 6
    assert _ended(line, made["id"])["state"] == "completed"


def test_rows_of_csv_are_read_as_the_request_says(line: httpx.Client) -> None:
    def sent(data: bytes, name: str = "stray.tsv", **fields: str) -> httpx.Response:
        form = {"model": "static", "name": "stray", "key_column": "id", **fields}
        headers = {"idempotency-key": "stray-1"}
        return line.post("/api/jobs", data=form, files=[("file", (name, data))], headers=headers)

    stray = b'id;text\n1;"one\n2;two\n3;five inches: 5"\n'
    made = sent(stray, delimiter=";")
    assert (made.status_code, made.json()["items"]["total"], made.json()["notices"]) == (201, 3, [])
    assert (again := sent(stray, delimiter=";")).status_code == 200, again.text
    assert sent(stray, delimiter=";", quote='"').status_code == 422
    _ended(line, made.json()["id"])
    keys = [json.loads(row)["key"] for row in line.get("/api/jobs/stray/results?format=jsonl").text.splitlines()]
    assert keys == ["1", "2", "3"]
    told = sent(b'{"text": "x"}', name="a.jsonl", key_column="", quote="none")
    assert told.status_code == 400
    told = line.post(
        "/api/jobs", data={"model": "static", "quote": "none"}, files=[("file", ("a.jsonl", b'{"text": "x"}'))]
    )
    assert told.json()["detail"] == "quote: a.jsonl has no .csv or .tsv file, so it has no effect; leave it out."


def test_what_is_given_twice_or_could_be_several_is_refused(line: httpx.Client) -> None:
    file = ("file", ("a.csv", b"text\nsail\n"))
    twice = line.post("/api/jobs", files=[file, ("model", (None, b"static")), ("model", (None, b"static"))])
    assert (twice.status_code, twice.json()["detail"]) == (400, "model: it is given twice.")
    body = b'{"model": "static", "sources": [], "model": "other"}'
    twice = line.post("/api/jobs", content=body, headers={"content-type": "application/json"})
    assert (twice.status_code, twice.json()["detail"]) == (400, "model: it is given twice.")
    data = {"model": "static", "name": "namesake", "priority": "-100"}
    first, second = (line.post("/api/jobs", data=data, files=[file]).json() for _ in range(2))
    assert [notice.partition(",")[0] for notice in second["notices"]] == [
        'another job is called "namesake" too',
        'a.csv line 1: no column "id"',
    ]
    assert {_ended(line, job["id"])["state"] for job in (first, second)} == {"completed"}
    several = line.post("/api/jobs/namesake/retry")
    assert several.status_code == 400
    assert all(job["id"] in several.json()["detail"] for job in (first, second))
    assert line.get("/api/jobs/namesake").json()["id"] == second["id"]


def test_a_carried_number_beyond_64_bits(line: httpx.Client) -> None:
    rows = [{"id": "a", "text": "sail", "far": 1e30}]
    made = _upload(line, rows, name="far.jsonl", carry="far").json()
    assert _ended(line, made["id"])["state"] == "completed"
    assert line.get(f"/api/jobs/{made['id']}/results", params={"format": "jsonl"}).json()["far"] == 10**30
    table = pq.read_table(pa.BufferReader(line.get(f"/api/jobs/{made['id']}/results").content))
    assert float(table["far"][0].as_py()) == 1e30


def test_many_uploads_at_once(line: httpx.Client) -> None:
    """There are more uploads than connections: each waits for its turn, and status requests don't wait for them."""
    with ThreadPoolExecutor(16) as threads:
        made = list(threads.map(lambda n: _upload(line, _ROWS[:50], name=f"crowd-{n}.jsonl"), range(16)))
    assert {reply.status_code for reply in made} == {201}
    assert len({reply.json()["id"] for reply in made}) == 16


def test_a_jobs_webhook_is_the_one_that_its_request_names(working: Gateway, done: dict[str, Any]) -> None:
    url = working.fleet.scalar("select url from vectormill.events where body like :job", job=f"%{done['id']}%")
    assert url == _WEBHOOK


def test_sources_that_the_operator_allows(line: httpx.Client, allowed: Path, tmp_path: Path) -> None:
    wish = {"model": "static", "sources": [str(allowed)], "by_reference": True, "output": str(allowed / "out")}
    made = line.post("/api/jobs", json=wish)
    assert made.status_code == 201, made.text
    assert _ended(line, made.json()["id"])["state"] == "completed"
    assert (allowed / "out" / "_SUCCESS").exists()
    reply = line.get(f"/api/jobs/{made.json()['id']}/results", params={"format": "jsonl", "first": 290})
    assert len(reply.text.splitlines()) == 10
    (allowed / "link").symlink_to(tmp_path)
    (allowed / "here").symlink_to(allowed / "out")
    for source in (
        "-",
        f"{allowed}/[h]ere/../docs.jsonl",
        "/etc/passwd",
        f"{allowed}/../x.jsonl",
        f"{allowed}x",
        f"{allowed}/link/x.jsonl",
        "s3://secret/x",
    ):
        refused = line.post("/api/jobs", json={"model": "static", "sources": [source]})
        assert (refused.status_code, "isn't below a place" in refused.text) == (400, True), source
    (allowed / "link").unlink()
    (allowed / "here").unlink()
    for field, value in (("output", "vectors"), ("sources", ["docs.jsonl"])):
        refused = line.post("/api/jobs", json={**wish, field: value})
        assert (
            refused.status_code,
            f"{field}: {value[0] if field == 'sources' else value} is relative" in refused.text,
        ) == (
            400,
            True,
        )
    refused = line.post("/api/jobs", json={**wish, "output": str(tmp_path)})
    assert (refused.status_code, "VECTORMILL_API_OUTPUTS" in refused.text) == (400, True)
    refused = line.post("/api/jobs", json={**wish, "output": None, "webhook": "https://evil.test/hooks"})
    assert (refused.status_code, "VECTORMILL_WEBHOOKS" in refused.text) == (400, True)


@pytest.fixture(scope="module")
def theirs(done: dict[str, Any], line: httpx.Client) -> Theirs:
    """Return one of each thing that can be named, of the workspace `default`."""
    key = line.get("/api/keys").json()[0]["id"]
    file = line.post("/v1/files", data={"purpose": "batch"}, files={"file": ("ours.jsonl", b"{}\n")}).json()["id"]
    batch = line.post("/v1/batches", json=_batch_of(file)).json()["id"]
    assert line.post("/api/collections", json={"name": "tickets-of-ours", "model": "static"}).status_code == 201
    forget = line.post("/api/forgets", json={"keys": ["nobody at all"]}).json()["id"]
    return Theirs(
        named={
            "job": (done["id"], done["id"][:20], done["name"]),
            "key_id": (key,),
            "model": ("minilm",),
            "file_id": (file,),
            "batch_id": (batch,),
            "collection": ("tickets-of-ours",),
            "forget": (forget,),
        },
        workspace="default",
        secrets=(done["id"], key, file, batch, "minilm", "ours.jsonl", "tickets-of-ours"),
    )


def _batch_of(file: str) -> dict[str, str]:
    return {"input_file_id": file, "endpoint": "/v1/embeddings", "completion_window": "24h"}


@pytest.mark.parametrize("source", ["{}/links/*.jsonl", "{}/links", "{}/links/*/*.jsonl", "{}/**/away.jsonl"])
def test_what_a_pattern_finds_is_judged_by_where_it_is(
    line: httpx.Client, allowed: Path, tmp_path: Path, source: str
) -> None:
    (tmp_path / "away.jsonl").write_bytes(_lines(_ROWS[:1]))
    links = allowed / "links"
    links.mkdir(exist_ok=True)
    for name, target in (("away.jsonl", tmp_path / "away.jsonl"), ("folder", tmp_path)):
        (links / name).unlink(missing_ok=True)
        (links / name).symlink_to(target)
    if not source.endswith("*/*.jsonl"):
        (links / "folder").unlink()
    try:
        reply = line.post("/api/jobs", json={"model": "static", "sources": [source.format(allowed)]})
        assert (reply.status_code, "leads out of the places" in reply.text) == (400, True), reply.text
    finally:
        shutil.rmtree(links)


def test_a_pattern_holds_nobody_up(line: httpx.Client, working: Gateway, allowed: Path) -> None:
    """A pattern that a regular expression would try for half a minute doesn't delay another workspace's requests."""
    folder = allowed / "deep" / "/".join("a" * 40)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "x.jsonl").write_bytes(_lines(_ROWS[:1]))
    sources = [f"{allowed}/deep/{'**/' * 30}{'*a' * 100}b.jsonl"]
    with working.client(working.workspace("beside-globs")) as other, ThreadPoolExecutor(1) as threads:
        asked = threads.submit(line.post, "/api/jobs", json={"model": "static", "sources": sources})
        assert other.get("/v1/models").status_code == 200
        assert "no such file" in asked.result().text


@pytest.mark.parametrize("admin", [False, True])
def test_a_workspace_sees_nothing_of_another(working: Gateway, line: httpx.Client, theirs: Theirs, admin: bool) -> None:
    """Walk the whole description. An admin's key sees jobs, usage, workers and models of all, and no more."""
    name = f"walkers-{admin}"
    working.workspace(name)
    description = line.get("/openapi.json").json()
    with working.client(working.new_key(name, admin=admin)) as other:
        found, walked = leaks(description, other, theirs)
        assert walked == len(list(operations(description))) > 30
        assert other.get("/api/keys").status_code == (200 if admin else 403)
        assert other.post("/v1/batches", json=_batch_of(theirs.named["file_id"][0])).status_code == 404
        embedded = other.post("/v1/embeddings", json={"model": "minilm", "input": "sail"})
        assert embedded.status_code == 404
    if admin:
        found = [leak for leak in found if not re.search(r"/api/(jobs|usage|workers|models|collections)\b", leak)]
    assert found == []
    held = {hole: names[0] for hole, names in theirs.named.items()}
    for path in ("/v1/files/{file_id}", "/v1/batches/{batch_id}", "/api/jobs/{job}"):
        assert line.get(path.format(**held)).status_code == 200, path
    assert held["key_id"] in [row["id"] for row in line.get("/api/keys").json() if row["live"]]


def test_the_walk_sees_what_leaks(theirs: Theirs) -> None:
    """The walk finds each operation that was added carelessly."""
    app = FastAPI(openapi_url="/openapi.json")

    @app.get("/api/jobs/{job}/owner")
    def name_by_id(job: str) -> dict[str, str]:
        return {"workspace": theirs.workspace}

    @app.get("/api/jobs/{job}/size")
    def refuse_in_other_words(job: str) -> Any:
        told = "there is none" if job == "never" else "it isn't yours"
        return JSONResponse({"detail": told}, 404)

    @app.get("/api/recent")
    def list_everybodys() -> list[str]:
        return [theirs.named["job"][0]]

    @app.get("/api/bills")
    def list_of_any_workspace(workspace: str | None = None) -> list[str]:
        return []

    @app.get("/api/labels/{label}")
    def take_a_new_name(label: str) -> None: ...

    @app.post("/api/purges")
    def take_a_body() -> None: ...

    with TestClient(app) as other:
        found, walked = leaks(app.openapi(), other, theirs)
    assert walked == 6
    assert {leak.split(":")[0].split(" of ")[0].split(" shows ")[0] for leak in found} == {
        *("get /api/jobs/{job}/owner", "get /api/jobs/{job}/size", "get /api/recent", "get /api/bills"),
        *("get /api/labels/{label}", "post /api/purges"),
    }


def test_workspaces_are_told_apart(working: Gateway, done: dict[str, Any], line: httpx.Client) -> None:
    with working.client(working.workspace("strangers")) as other:
        assert other.get("/api/jobs").json()["data"] == []
        assert other.get("/api/usage").json()["data"] == []
        (model,) = other.get("/api/models").json()["data"]
        assert (model["name"], {rate["device"] for rate in model["rates"]}) == ("static", {"cpu"})
        assert {kind for row in other.get("/api/workers").json()["workers"] for kind in row["device_kinds"]} == {"cpu"}
        mine = _upload(other, _ROWS[:3], name="theirs.jsonl").json()
        elsewhere = other.post(
            "/api/jobs",
            data={"model": "static"},
            files=[("file", ("docs.jsonl", _lines(_ROWS[:3])))],
            params={"workspace": "default"},
        )
        assert elsewhere.status_code == 404
    assert line.get("/api/usage", params={"workspace": "strangers"}).status_code == 200
    # An admin's key sees all workspaces, and may filter by one.
    everything = line.get("/api/jobs", params={"name": "theirs"}).json()["data"]
    assert [(row["id"], row["workspace"]) for row in everything] == [(mine["id"], "strangers")]
    assert line.get("/api/jobs", params={"name": "theirs", "workspace": "default"}).json()["data"] == []
    # A job is made in the workspace that an admin names. If two jobs share a name, that of the admin's own comes first.
    file = [("file", ("docs.jsonl", _lines(_ROWS[:3])))]
    there = line.post("/api/jobs", data={"model": "static"}, files=file, params={"workspace": "strangers"}).json()
    assert line.get(f"/api/jobs/{there['id']}", params={"workspace": "strangers"}).status_code == 200
    own = line.get("/api/jobs/docs").json()["id"]
    assert own not in (there["id"], mine["id"])
    assert line.get("/api/jobs/docs", params={"workspace": "strangers"}).json()["id"] == there["id"]


def _plain(value: Any) -> Any:
    """Return the fields with timestamps parsed, since these are written in several ways."""
    return {
        name: datetime.fromisoformat(held) if name.endswith("_at") and held else held for name, held in value.items()
    }


def test_what_reads_a_job_reads_the_same_over_the_api(working: Gateway, done: dict[str, Any], far: Fleet) -> None:
    """Fields that other programs rely on are the same by the command at the database and by the one over the api."""

    def read(*command: str) -> Any:
        here, there = (json.loads(fleet.cli(*command, "--json").stdout) for fleet in (working.fleet, far))
        return (here, there)

    here, there = map(_plain, read("status", done["id"]))
    assert here.keys() >= {
        *("id", "name", "state", "reason", "model", "labels", "items", "tokens", "rate", "eta_seconds", "chunks"),
        *("created_at", "started_at", "finished_at"),
    }
    assert here["items"].keys() == {
        *("total", "embedded", "reused", "unchanged", "rejected", "cancelled", "pending", "truncated", "removed"),
    }
    assert here["tokens"].keys() == {"prompt"}
    assert here["rate"].keys() == {"items_per_second", "tokens_per_second", "roofline"}
    assert here["chunks"].keys() == {"pending", "running", "done", "cancelled"}
    # Rates cover the last minute, so they change between two reads.
    assert {**there, "rate": here["rate"]} == {**here, "workspace": None}
    assert there["rate"].keys() == here["rate"].keys()

    here, there = read("rejects", done["id"])
    assert [row.keys() for row in here] == [{"index", "key", "code", "message"}] * 2
    assert there == here
    assert json.loads(far.cli("rejects", done["id"], "--limit", "1", "--json").stdout) == here[:1]

    for verify in ((), ("--verify",)):
        here, there = read("receipt", done["id"], *verify)
        kinds = {"in", "embedded", "reused", "unchanged", "rejected", "cancelled", "removed", "forgotten"}
        assert here["items"].keys() == kinds
        assert here["tokens"].keys() >= {"prompt", "billed"}
        assert (here["balanced"], here["truncated"]) == (True, 0)
        assert ({"verified", "missing", "double"} <= here.keys()) == bool(verify)
        assert there == here


def test_keys_over_the_api(working: Gateway, far: Fleet) -> None:
    made = far.cli("keys", "create", "--name", "nightly", "--expires", "12h")
    key = made.stdout.split("_")[1]
    assert key in made.stderr
    other = far.cli("keys", "rotate", key, "--overlap", "1h").stdout.strip()
    assert "revoked" in far.cli("keys", "revoke", key).stderr
    rows = {row["id"]: row for row in json.loads(far.cli("keys", "list", "--json").stdout)}
    here = json.loads(working.fleet.cli("keys", "list", "--json").stdout)
    assert list(map(_plain, rows.values())) == list(map(_plain, here))
    assert (rows[key]["name"], rows[key]["admin"], rows[key]["live"]) == ("nightly", False, False)
    new = _plain(rows[other.split("_")[1]])
    assert new["live"]
    assert (new["expires_at"] - new["created_at"]).total_seconds() == 12 * 3_600
    with closing(ApiBackend(working.url, working.key, "default")) as backend:
        for name in (key, "a/b", ".."):
            with pytest.raises(UserError, match=f'no key "{name}"'):
                backend.revoke_key(name)
    with (
        closing(ApiBackend(working.url, working.key, "search")) as backend,
        pytest.raises(UserError, match="leave it out"),
    ):
        backend.keys()
    with closing(ApiBackend(working.url, other, "default")) as backend, pytest.raises(UserError, match="admin's key"):
        backend.keys()


@pytest.fixture
def far(working: Gateway, tmp_path: Path) -> Fleet:
    """Return a fleet whose commands have no database in their environment."""
    environment = {**working.fleet.environment, "VECTORMILL_API_URL": working.url, "VECTORMILL_API_KEY": working.key}
    del environment["VECTORMILL_DATABASE_URL"], environment["VECTORMILL_REDIS_URL"]
    return Fleet(engine=working.engine, environment=environment, logs=tmp_path)


def test_without_a_key(working: Gateway, line: httpx.Client) -> None:
    for method, path, _ in operations(line.get("/openapi.json").json()):
        reply = httpx.request(method, working.url + path.replace("{", "").replace("}", ""))
        assert reply.status_code == 401, (method, path)


def test_the_command_line_over_the_api(far: Fleet, tmp_path: Path) -> None:
    """Every command on jobs works without a database in its environment."""
    fleet, environment = far, far.environment
    corpus = tmp_path / "far.jsonl"
    corpus.write_bytes(_lines(_ROWS))
    options = ("--carry", "lang", "--label", "a=b", "--max-item-tokens", "3", "--wait")
    sent = fleet.cli("submit", str(corpus), "--model", "static", *options, check=False)
    assert sent.returncode == 0, sent.stderr
    job = sent.stdout.strip()
    assert "balanced" in sent.stderr
    said = " ".join(sent.stderr.split())
    assert "298 texts were truncated at the token limit; about " in said
    assert "tokens weren't read, most of " in said
    assert "--on-long split makes passages of such texts, --on-long reject rejects them" in said
    assert json.loads(fleet.cli("receipt", job, "--json").stdout)["truncated"] == 298
    status = json.loads(fleet.cli("status", "far", "--json").stdout)
    assert (status["id"], status["state"], status["labels"]) == (job, "completed", {"a": "b"})
    assert job in [row["id"] for row in json.loads(fleet.cli("jobs", "--json", "--limit", "200").stdout)]
    assert [row["index"] for row in json.loads(fleet.cli("rejects", job, "--json").stdout)] == [7, 9]
    assert json.loads(fleet.cli("receipt", job, "--verify", "--json").stdout)["verified"]
    fleet.cli("results", job, "--to", str(tmp_path / "far.parquet"))
    assert pq.read_metadata(tmp_path / "far.parquet").num_rows == 298
    assert "has nothing to retry" in fleet.cli("retry", job).stderr
    assert fleet.cli("watch", job).returncode == 0
    assert "static" in [row["name"] for row in json.loads(fleet.cli("models", "list", "--json").stdout)]
    failed = fleet.cli("pause", job, check=False)
    assert (failed.returncode, "can't be paused" in failed.stderr) == (2, True)
    assert fleet.cli("status", "nothing", check=False).returncode == 2
    for option in ("--into", "--query", "--from"):
        refused = fleet.cli("submit", str(corpus), "--model", "static", option, "t", check=False)
        told = f"{option} needs the database itself: set VECTORMILL_DATABASE_URL."
        assert (refused.returncode, told in refused.stderr) == (2, True)
    environment["VECTORMILL_API_KEY"] = "vm_wrong"
    assert fleet.cli("jobs", check=False).returncode == 2
    environment["VECTORMILL_API_URL"] = "http://127.0.0.1:1"
    assert fleet.cli("jobs", check=False).returncode == 6
