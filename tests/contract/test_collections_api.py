"""Collections over HTTP, from their creation to a search, with real processes."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import httpx2 as httpx
import pytest

from tests.acceptance.fleet import eventually
from tests.contract.conftest import Gateway

_ROWS: list[dict[str, Any]] = [
    {"id": f"t{n}", "subject": f"ticket {n}", "body": f"the mill number {n} stands still", "lang": "en"}
    for n in range(60)
]
_PATH = "/api/collections/tickets"


@pytest.fixture(scope="module")
def outputs(gateway: Gateway, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Let the api write to a folder; return that."""
    folder = tmp_path_factory.mktemp("outputs")
    gateway.fleet.environment["VECTORMILL_API_OUTPUTS"] = str(folder)
    gateway.fleet.kill("api")
    gateway.start_api()
    return folder


@pytest.fixture(scope="module")
def line(gateway: Gateway, outputs: Path) -> Iterator[httpx.Client]:
    """Yield a client of an api with a dispatcher, a worker and an engine."""
    gateway.fleet.start_dispatcher()
    gateway.fleet.start_worker(replicas=1)
    with gateway.client() as client:
        wish = {"name": "tickets", "model": "static", "text": "{subject}\n\n{body}", "carry": ["lang"]}
        assert client.post("/api/collections", json=wish).status_code == 201
        assert client.post("/api/collections", json=wish).status_code == 400
        yield client


def sync(line: httpx.Client, rows: list[dict[str, Any]], path: str = _PATH, **fields: Any) -> dict[str, Any]:
    """Sync rows by an upload; return the status of the job at its end."""
    headers = {"idempotency-key": fields.pop("key")} if "key" in fields else {}
    lines = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    reply = line.post(f"{path}/syncs", data=fields, files=[("file", ("tickets.jsonl", lines))], headers=headers)
    assert reply.status_code in (200, 201), reply.text
    job = reply.json()["id"]

    def ended() -> dict[str, Any] | None:
        found = line.get(f"/api/jobs/{job}").json()
        return found if found["state"] in ("completed", "failed", "cancelled") else None

    return eventually(ended, "the end of a sync")


def test_a_collection_is_synced_shown_and_searched(line: httpx.Client) -> None:
    first = sync(line, _ROWS, key="night 1")
    assert (first["state"], first["items"]["embedded"], first["name"]) == ("completed", 60, "tickets")
    assert sync(line, _ROWS, key="night 1")["id"] == first["id"]
    changed = [{**_ROWS[0], "body": "a refund was paid", "lang": "de"}, *_ROWS[1:]]
    second = sync(line, changed, labels='{"run": "nightly"}')
    assert (second["items"]["embedded"], second["items"]["unchanged"]) == (1, 59)
    assert second["labels"] == {"run": "nightly"}
    receipt = line.get(f"/api/jobs/{second['id']}/receipt", params={"verify": True}).json()
    assert (receipt["verified"], receipt["tokens"]["saved"] > 0) == (True, True)
    shown = line.get(_PATH).json()
    assert (shown["keys"], shown["running"], shown["view"]) == (60, None, 'vectormill."tickets"')
    assert [each["name"] for each in line.get("/api/collections").json()["data"]] == ["tickets"]
    newest, oldest = line.get(f"{_PATH}/syncs").json()["data"]
    assert (newest["changed"], newest["unchanged"], oldest["added"]) == (1, 59, 60)
    wish = {"query": "a refund was paid", "limit": 3}
    found = line.post(f"{_PATH}/search", json=wish).json()["data"]
    assert (found[0]["key"], found[0]["carried"], len(found)) == ("t0", {"lang": "de"}, 3)
    (only,) = line.post(f"{_PATH}/search", json={**wish, "where": {"lang": "de"}}).json()["data"]
    assert only == found[0]
    unknown = line.post(f"{_PATH}/search", json={**wish, "where": {"size": "1"}})
    assert (unknown.status_code, unknown.json()["field"]) == (400, "where")
    of_job = line.post(f"/api/jobs/{second['id']}/search", json=wish).json()["data"]
    assert [(hit["key"], hit["index"], "a refund was paid" in hit["text"]) for hit in of_job] == [("t0", 0, True)]


def test_an_upload_may_be_larger_than_other_bodies(line: httpx.Client) -> None:
    rows = [{**row, "padding": "x" * 300_000} for row in _ROWS]
    done = sync(line, [{**rows[0], "body": "a refund was paid", "lang": "de"}, *rows[1:]])
    assert (done["state"], done["items"]["unchanged"]) == ("completed", 60)


def test_a_delta_removes_what_it_names(line: httpx.Client) -> None:
    done = sync(line, [{**_ROWS[5], "gone": True}], delta="true", removed_column="gone")
    assert (done["state"], done["items"]["removed"]) == ("completed", 1)


def test_mistakes_are_told(line: httpx.Client) -> None:
    def refused(**fields: Any) -> str:
        reply = line.post(f"{_PATH}/syncs", data=fields, files=[("file", ("a.jsonl", b"{}\n"))])
        assert reply.status_code == 400, reply.text
        return str(reply.json()["detail"])

    assert "removed_column: it is for a delta" in refused(removed_column="gone")
    assert 'max_removed "many": give a count' in refused(max_removed="many")
    assert refused(surprise="1") == "surprise: there is no such field."
    assert 'no column "subject"' in refused()
    assert line.post("/api/collections/other/syncs", json={}).status_code == 404
    assert line.get("/api/collections/a%00b").status_code == 404
    wish = {"name": "jobs", "model": "static"}
    assert "has a table of this name" in line.post("/api/collections", json=wish).json()["detail"]
    assert "model" in line.post("/api/collections", json={"name": "x"}).json()["detail"]


def test_an_upgrade_is_swapped_in_and_back(line: httpx.Client) -> None:
    def size(model: str) -> int:
        reply = line.post("/v1/embeddings", json={"model": model, "input": "a refund"})
        assert reply.status_code == 200, reply.text
        return len(reply.json()["data"][0]["embedding"])

    assert (size("tickets"), line.get("/v1/models/tickets").json()["dimensions"]) == (256, 256)
    begun = line.post(f"{_PATH}/upgrade", json={"model": "minilm"})
    (version,) = begun.json()["versions"]
    assert (begun.status_code, version["state"], version["keys"]) == (201, "next", 0)
    early = line.post(f"{_PATH}/swap", json={})
    assert (early.status_code, "no whole sync has reached it" in early.json()["detail"]) == (400, True)
    sync(line, [*_ROWS[:5], *_ROWS[6:]])
    filled = eventually(lambda: line.get(_PATH).json()["versions"][0]["differs"] is None, "a filled version")
    assert filled
    compared = line.get(f"{_PATH}/comparison").json()
    assert (compared["keys"], compared["next_keys"], compared["next_model"]) == (59, 59, "minilm")
    wish = {"query": "the mill number 17 stands still", "limit": 1}
    for which in ("current", "next"):
        (hit,) = line.post(f"{_PATH}/search", json={**wish, "version": which}).json()["data"]
        assert hit["key"] == "t17"
    none = line.post(f"{_PATH}/search", json={**wish, "version": "previous"})
    assert (none.status_code, "has no previous version" in none.json()["detail"]) == (400, True)
    swapped = line.post(f"{_PATH}/swap", json={"keep_seconds": 3_600})
    assert (swapped.status_code, swapped.json()["model"], size("tickets")) == (200, "minilm", 384)
    assert line.post(f"{_PATH}/search", json=wish).json()["data"][0]["key"] == "t17"
    back = line.post(f"{_PATH}/swap-back")
    assert (back.status_code, back.json()["model"], size("tickets")) == (200, "static", 256)
    assert line.delete(f"{_PATH}/upgrade").status_code == 204
    assert line.get(_PATH).json()["versions"] == []


def test_files_follow_the_collection(line: httpx.Client, outputs: Path) -> None:
    path, folder = "/api/collections/filed", outputs / "filed"
    wish = {"name": "filed", "model": "static", "text": "{body}"}
    refused = line.post("/api/collections", json={**wish, "output": "/elsewhere"})
    assert (refused.status_code, "VECTORMILL_API_OUTPUTS" in refused.json()["detail"]) == (400, True)
    made = line.post("/api/collections", json={**wish, "output": str(folder)})
    assert (made.status_code, made.json()["output"]["uri"]) == (201, str(folder))

    def written(version: int) -> bool:
        found = line.get(path).json()["output"]
        return bool(found["version"] == version and not found["behind"])

    sync(line, _ROWS, path)
    eventually(lambda: written(1), "files of the first sync")
    sync(line, _ROWS[10:], path, max_removed="100%")
    eventually(lambda: written(2), "files of the second sync")
    newest = f"select key from '{folder}/*.parquet' qualify _version = max(_version) over (partition by key)"
    shown = f"select count(*) from ({newest} and not _deleted)"
    assert duckdb.sql(shown).fetchall() == [(50,)]
    assert line.post(f"{path}/compact").status_code == 202
    eventually(lambda: written(3), "a full set")
    assert len(list(folder.glob("*.parquet"))) == 1
    assert duckdb.sql(shown).fetchall() == [(50,)]
    assert line.post(f"{_PATH}/compact").status_code == 400
    outside = line.post(f"{path}/upgrade", json={"model": "minilm", "output": "/elsewhere"})
    assert (outside.status_code, "VECTORMILL_API_OUTPUTS" in outside.json()["detail"]) == (400, True)
    assert line.delete(path).status_code == 204


def test_a_second_sync_is_told_to_wait(line: httpx.Client, gateway: Gateway) -> None:
    gateway.fleet.kill_tree("worker")
    lines = json.dumps({**_ROWS[0], "body": "waits for a worker"}).encode()
    files = [("file", ("tickets.jsonl", lines))]
    fields = {"delta": "true"}
    made = line.post(f"{_PATH}/syncs", data=fields, files=files, headers={"idempotency-key": "waits"})
    assert made.status_code == 201
    again = line.post(f"{_PATH}/syncs", data=fields, files=files)
    assert (again.status_code, made.json()["id"] in again.json()["detail"]) == (409, True)
    assert line.delete(_PATH).status_code == 409
    attached = line.post(f"{_PATH}/syncs", data=fields, files=files, headers={"idempotency-key": "waits"})
    assert (attached.status_code, attached.json()["id"]) == (200, made.json()["id"])
    gateway.fleet.start_worker(replicas=1)
    eventually(lambda: line.get(_PATH).json()["running"] is None, "the end of the sync")


def test_keys_are_forgotten(line: httpx.Client, gateway: Gateway) -> None:
    sync(line, _ROWS)
    made = line.post("/api/forgets", json={"keys": ["t1", "t2", "never"], "collection": "tickets"})
    assert (made.status_code, made.json()["keys"]) == (201, 3)
    path = f"/api/forgets/{made.json()['id']}"
    done = eventually(lambda: found if (found := line.get(path).json())["finished_at"] else None, "the erasure")
    assert (done["collected"], done["items"] > 0, done["requested_by"].startswith("key ")) == (2, True, True)
    again = sync(line, _ROWS)
    assert (again["items"]["unchanged"], again["items"]["rejected"]) == (58, 2)
    (reject, _) = line.get(f"/api/jobs/{again['id']}/rejects").json()["data"]
    assert (reject["code"], reject["key"]) == ("forgotten", None)
    first = line.get(f"{_PATH}/syncs").json()["data"][-1]["job_id"]
    receipt = line.get(f"/api/jobs/{first}/receipt", params={"verify": True}).json()
    assert (receipt["items"]["forgotten"], receipt["verified"]) == (2, True)
    assert line.post("/api/forgets/allow", json={"keys": ["t1"], "collection": "tickets"}).json() == {"allowed": 1}
    assert line.get("/api/forgets/01a22c53-f368-728b-b4ab-41ad26e546c6").status_code == 404
    assert line.get("/api/forgets/nothing").status_code == 404
    assert line.post("/api/forgets", json={"keys": []}).status_code == 400
    gateway.workspace("strangers")
    with gateway.client(gateway.new_key("strangers", admin=False)) as other:
        assert other.get(path).status_code == 404


def test_a_dropped_collection_is_gone(line: httpx.Client) -> None:
    assert line.delete(_PATH).status_code == 204
    assert line.get(_PATH).status_code == 404
    assert line.get("/api/collections").json()["data"] == []
