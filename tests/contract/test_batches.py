"""Batch requests as openai-python makes them: files, states, results, errors, cancellation, expiry."""

import base64
import codecs
import gzip
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from openai import OpenAI
from openai.types import Batch
from sqlalchemy import text

from tests.acceptance.fleet import eventually
from tests.contract.conftest import Gateway
from tests.support.receiver import Receiver, receiving

SECRET = "whsec_" + base64.b64encode(b"a secret of thirty-two bytes....").decode()
ENDED = ("completed", "failed", "expired", "cancelled")


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    with receiving() as made:
        yield made


@pytest.fixture(scope="module")
def running(gateway: Gateway, receiver: Receiver) -> Gateway:
    """Start a dispatcher and a worker beside the gateway."""
    gateway.fleet.environment |= {
        "VECTORMILL_CHUNK_ITEMS": "2000",
        "VECTORMILL_WEBHOOKS": receiver.url,
        "VECTORMILL_WEBHOOK_SECRET": SECRET,
    }
    gateway.fleet.start_dispatcher()
    gateway.fleet.start_worker(replicas=1)
    return gateway


@pytest.fixture(scope="module")
def client(running: Gateway) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{running.url}/v1", api_key=running.key, max_retries=0) as made:
        yield made


def line(custom_id: Any, given: Any, **body: Any) -> dict[str, Any]:
    body = {"model": "static", "input": given, **body}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/embeddings", "body": body}


def packed(lines: list[Any]) -> bytes:
    return b"".join(one if isinstance(one, bytes) else json.dumps(one).encode() + b"\n" for one in lines)


def request(client: OpenAI, lines: list[Any], name: str = "nightly.jsonl", **how: Any) -> Any:
    """Upload these lines, and create a batch request of them."""
    file = client.files.create(file=(name, packed(lines)), purpose="batch")
    how = {"completion_window": "24h", **how}
    return client.batches.create(input_file_id=file.id, endpoint="/v1/embeddings", **how)


def ended(client: OpenAI, batch: Any) -> Any:
    def look() -> Any:
        now = client.batches.retrieve(batch.id)
        return now if now.status in ENDED else None

    return eventually(look, f"the end of {batch.id}")


def read(client: OpenAI, file_id: str | None) -> list[dict[str, Any]]:
    assert file_id
    return [json.loads(one) for one in client.files.content(file_id).text.splitlines()]


def counts(batch: Any) -> tuple[int, int, int]:
    assert batch.request_counts
    return batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed


def test_ten_thousand_lines_of_which_one_in_a_hundred_is_bad(running: Gateway, client: OpenAI, by_library: Any) -> None:
    bad = {
        0: b"this is no JSON\n",
        1: b'["an array"]\n',
        2: line(None, "no id"),
        3: line("x3", ["one", "two"]),
        4: {**line("x4", "a"), "url": "/v1/chat/completions"},
        5: {**line("x5", "a"), "method": "GET"},
        6: {**line("x6", "a"), "body": "a"},
        7: line("x7", ""),
        8: line("x8", [1, 2, 3]),
        9: line("doc-1", "its custom_id is the second line's"),
        10: line("x10", "a", input_type="query"),
    }
    texts = {number: f"document number {number} of the corpus" for number in range(10_000) if number % 100 != 50}
    lines = [line(f"doc-{n}", texts[n]) if n in texts else bad[n // 100 % 11] for n in range(10_000)]
    batch = ended(client, request(client, lines, metadata={"run": "2026-11-24"}))
    assert (batch.status, counts(batch), batch.errors) == ("completed", (10_000, 9_900, 100), None)
    assert (batch.metadata, batch.model, batch.completion_window) == ({"run": "2026-11-24"}, "static", "24h")
    assert batch.created_at <= batch.in_progress_at <= batch.finalizing_at <= batch.completed_at <= batch.expires_at

    assert set(Batch.model_fields) <= batch.model_fields_set, "all that the published schema has"

    results = read(client, batch.output_file_id)
    assert [one["custom_id"] for one in results] == [f"doc-{n}" for n in texts]
    assert len({one["id"] for one in results}) == len(results)
    assert all(one["error"] is None and one["response"]["status_code"] == 200 for one in results)
    bodies = [one["response"]["body"] for one in results]
    vectors = np.array([body["data"][0]["embedding"] for body in bodies], np.float32)
    np.testing.assert_allclose(vectors, by_library(list(texts.values())), atol=1e-6)
    assert {(body["object"], body["model"]) for body in bodies} == {("list", "static")}
    tokens = sum(body["usage"]["prompt_tokens"] for body in bodies)
    assert batch.usage.model_dump() == {
        "input_tokens": tokens,
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": 0,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": tokens,
    }

    errors = read(client, batch.error_file_id)
    assert [one["error"]["line"] for one in errors] == [n + 1 for n in range(50, 10_000, 100)]
    assert all(
        one["response"] is None and f"line {one['error']['line']:,}: " in one["error"]["message"] for one in errors
    )
    told = [(one["custom_id"], one["error"]["code"], one["error"]["message"].partition(": ")[2]) for one in errors[:11]]
    assert told == [
        (None, "bad_row", "not valid JSON (expecting value at column 1)"),
        (None, "bad_row", "not a JSON object; write one object per line"),
        (None, "bad_request", "custom_id is missing"),
        ("x3", "bad_request", "body.input is an array of 2 texts; write a line for each"),
        ("x4", "bad_request", 'url is "/v1/chat/completions"; this batch request is for /v1/embeddings'),
        ("x5", "bad_request", 'method is "GET"; it must be POST'),
        ("x6", "bad_request", "body isn't a JSON object"),
        ("x7", "empty_text", "text is empty"),
        ("x8", "bad_request", "body.input is an array; send one text, as a string"),
        ("doc-1", "bad_request", "custom_id comes twice, first on line 2"),
        ("x10", "bad_request", 'body.input_type is "query"; a batch request embeds documents'),
    ]
    # It is a job like any other.
    with running.client() as status_api:
        receipt = status_api.get(f"/api/jobs/{batch.job_id}/receipt?verify=true").json()
    assert (receipt["balanced"], receipt["missing"], receipt["double"]) == (True, 0, 0)
    assert receipt["items"]["embedded"] == 9_900
    assert receipt["tokens"]["prompt"] == sum(body["usage"]["prompt_tokens"] for body in bodies)


def test_the_same_content_again_attaches(running: Gateway, client: OpenAI) -> None:
    lines = [line(f"again-{n}", f"text {n}") for n in range(50)]
    first = ended(client, request(client, lines))
    used = running.fleet.scalar("select count(*) from vectormill.usage")
    second = ended(client, request(client, lines, metadata={"try": "2"}))
    assert second.id != first.id
    assert (second.job_id, second.status, counts(second)) == (first.job_id, "completed", (50, 50, 0))
    assert running.fleet.scalar("select count(*) from vectormill.usage") == used
    assert read(client, second.output_file_id) == read(client, first.output_file_id)
    assert second.output_file_id != first.output_file_id


def test_encodings_sizes_and_aliases(client: OpenAI, by_library: Any) -> None:
    lines = [
        line("numbers", "A mill grinds grain.", model="text-embedding-3-small", dimensions=64),
        line(
            "bytes", ["A mill grinds grain."], model="text-embedding-3-small", dimensions=64, encoding_format="base64"
        ),
    ]
    batch = ended(client, request(client, lines))
    numbers, written = (one["response"]["body"] for one in read(client, batch.output_file_id))
    assert (numbers["model"], len(numbers["data"][0]["embedding"])) == ("text-embedding-3-small", 64)
    as_bytes = np.frombuffer(base64.b64decode(written["data"][0]["embedding"]), "<f4")
    np.testing.assert_allclose(as_bytes, numbers["data"][0]["embedding"], atol=1e-7)
    whole = by_library(["A mill grinds grain."])[0][:64]
    np.testing.assert_allclose(as_bytes, whole / np.linalg.norm(whole), atol=1e-6)
    assert batch.error_file_id is None


REFUSED: Mapping[str, tuple[list[Any], str, int | None, str]] = {
    "no line": ([b"\n"], "empty_file", None, "no line"),
    "two models": ([line("a", "x"), line("b", "y", model="minilm")], "mismatched_model", 2, 'the model is "minilm"'),
    "two sizes": ([line("a", "x"), line("b", "y", dimensions=64)], "mismatched_dimensions", 2, "dimensions is 64"),
    "no such model": ([line("a", "x", model="nobody's")], "model_not_found", None, "nobody's"),
    "no such size": ([line("a", "x", dimensions=63)], "invalid_request", None, "64"),
    "no model's name": ([line("a", "x", model="a\0b")], "bad_request", 1, "isn't a model's name"),
    "only a line that is too long": ([b"x" * 8_000_000 + b"\n"], "too_large", 1, "longer than is ever read"),
    "no good line": ([b"{}\n", b"no\n"], "bad_request", 1, "custom_id is missing"),
    "packed": ([gzip.compress(packed([line("a", "x")]))], "invalid_request", None, "send it unpacked"),
    "UTF-16": ([json.dumps(line("a", "x")).encode("utf-16")], "invalid_request", None, "save it as UTF-8"),
    "only empty texts": ([line("a", ""), line("b", " ")], "all_rejected", None, "every line was rejected"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_fails_says_why(client: OpenAI, case: str) -> None:
    lines, code, at, told = REFUSED[case]
    batch = ended(client, request(client, lines))
    assert (batch.status, batch.output_file_id) == ("failed", None)
    assert batch.usage.total_tokens == 0
    assert batch.failed_at
    assert not batch.completed_at
    first = batch.errors.data[0]
    assert (first.code, first.line) == (code, at)
    assert told in first.message


def test_too_many_bad_lines_fail_it_and_no_half_result_is_seen(client: OpenAI) -> None:
    lines = [line(f"half-{n}", "" if n % 5 == 0 else f"text {n}") for n in range(200)]
    batch = ended(client, request(client, lines))
    assert (batch.status, batch.output_file_id) == ("failed", None)
    assert batch.errors.data[0].code == "too_many_rejects"
    assert batch.errors.data[0].message == "40 lines were rejected, max_rejects allows 20; see the error file."
    assert (batch.errors.data[1].code, batch.errors.data[1].line) == ("empty_text", 1)
    assert len(read(client, batch.error_file_id)) == 40
    for limit, state in ((None, "failed"), (39, "failed"), (40, "completed"), ("25%", "completed")):
        batch = ended(client, request(client, lines, extra_body={"max_rejects": limit}))
        assert (limit, batch.status, counts(batch)) == (limit, state, (200, 160 if state == "completed" else 0, 40))


def test_lines_as_windows_writes_them(client: OpenAI, by_library: Any) -> None:
    """Lines end in CRLF, with a byte-order mark, an empty line, no end of the last one, and one that isn't UTF-8."""
    good = [json.dumps(line(f"line-{n}", f"text {n}")).encode() for n in range(3)]
    bad = json.dumps(line("bad", "a?b")).encode().replace(b"?", b"\xff")
    data = codecs.BOM_UTF8 + b"\r\n".join([good[0], b"", bad, good[1], good[2]])
    batch = ended(client, request(client, [data]))
    assert (batch.status, counts(batch)) == ("completed", (4, 3, 1))
    results = read(client, batch.output_file_id)
    assert [one["custom_id"] for one in results] == ["line-0", "line-1", "line-2"]
    vectors = [one["response"]["body"]["data"][0]["embedding"] for one in results]
    np.testing.assert_allclose(vectors, by_library([f"text {n}" for n in range(3)]), atol=1e-6)
    (error,) = read(client, batch.error_file_id)
    assert (error["error"]["code"], error["error"]["line"]) == ("invalid_utf8", 3)


def test_more_lines_than_allowed(running: Gateway, client: OpenAI) -> None:
    running.fleet.kill("dispatcher")
    running.fleet.start("dispatcher", "pipeline.cli", "dispatcher", VECTORMILL_BATCH_LINES="3")
    try:
        batch = ended(client, request(client, [line(f"many-{n}", "text") for n in range(4)]))
        assert [error.code for error in batch.errors.data] == ["too_many_lines"]
        assert "more than 3 lines" in batch.errors.data[0].message
    finally:
        running.fleet.kill("dispatcher")
        running.fleet.start_dispatcher()


@pytest.fixture
def without_worker(running: Gateway) -> Iterator[Gateway]:
    """Stop the worker, so that nothing is embedded until `start_worker`, and start one again after the test."""
    process = running.fleet.processes.pop("worker")
    process.terminate()
    process.wait(60)
    yield running
    if "worker" not in running.fleet.processes:
        running.fleet.start_worker(replicas=1)


def in_progress(client: OpenAI, batch: Any) -> Any:
    def look() -> Any:
        now = client.batches.retrieve(batch.id)
        return now if now.status == "in_progress" else None

    return eventually(look, f"{batch.id} in progress")


def test_cancel_keeps_what_is_finished(without_worker: Gateway, client: OpenAI) -> None:
    # Two chunks: one is embedded before the cancellation, the other is held back for an hour.
    lines = [line(f"cancelled-{n}", f"text {n}") for n in range(4_000)]
    batch = in_progress(client, request(client, lines))
    fleet = without_worker.fleet
    with without_worker.engine.begin() as connection:
        half = connection.execute(
            text("""
                update vectormill.chunks set not_before = now() + interval '1 hour'
                where job_id = :job and ordinal > 0
            """),
            {"job": batch.job_id},
        ).rowcount
    assert half, "the job has one chunk only"
    fleet.start_worker(replicas=1)
    done = eventually(lambda: counts(client.batches.retrieve(batch.id))[1], "finished lines")
    cancelling = client.batches.cancel(batch.id)
    assert cancelling.status in ("cancelling", "cancelled")
    assert cancelling.cancelling_at
    now = ended(client, batch)
    assert (now.status, counts(now)) == ("cancelled", (4_000, done, 0))
    assert now.cancelled_at
    assert not now.completed_at
    assert [one["custom_id"] for one in read(client, now.output_file_id)] == [f"cancelled-{n}" for n in range(done)]
    left = read(client, now.error_file_id)
    assert [(one["custom_id"], one["error"]["code"]) for one in left] == [
        (f"cancelled-{n}", "batch_cancelled") for n in range(done, 4_000)
    ]
    assert left[0]["error"]["line"] == done + 1
    # Cancelling again changes nothing; the same content submitted again makes another job.
    assert client.batches.cancel(batch.id).status == "cancelled"
    again = ended(client, request(client, lines))
    assert (again.status, counts(again)) == ("completed", (4_000, 4_000, 0))
    assert again.job_id != now.job_id


def test_one_that_shares_a_job_goes_without_it(without_worker: Gateway, client: OpenAI) -> None:
    lines = [line(f"shared-{n}", f"text {n}") for n in range(20)]
    first, second = (in_progress(client, request(client, lines)) for _ in range(2))
    assert first.job_id == second.job_id
    client.batches.cancel(first.id)
    assert ended(client, first).status == "cancelled"
    without_worker.fleet.start_worker(replicas=1)
    now = ended(client, second)
    assert (now.status, counts(now)) == ("completed", (20, 20, 0))


def test_cancelled_before_it_is_a_job(without_worker: Gateway, client: OpenAI) -> None:
    """A batch request cancelled at once leaves nothing to pay for, whichever stage it had reached."""
    batches = [
        request(client, [line(f"at-once-{n}", f"number {n}") for n in range(2_000 * n, 2_000 * n + 2_000)])
        for n in range(5)
    ]
    for one in batches:
        client.batches.cancel(one.id)
    for one in batches:
        now = ended(client, one)
        assert (now.status, now.output_file_id) == ("cancelled", None)
    open_jobs = "select count(*) from vectormill.jobs where state not in ('completed', 'failed', 'cancelled')"
    eventually(lambda: without_worker.fleet.scalar(open_jobs) == 0, "the end of their jobs")


def test_a_window_that_passes(without_worker: Gateway, client: OpenAI) -> None:
    batch = in_progress(client, request(client, [line("late", "text that is never read")], completion_window="1h"))
    assert batch.expires_at - batch.created_at == 3_600
    with without_worker.engine.begin() as connection:
        connection.execute(
            text("update vectormill.batches set expires_at = now() where id = :batch"), {"batch": batch.id}
        )
    now = ended(client, batch)
    assert (now.status, now.output_file_id, counts(now)) == ("expired", None, (1, 0, 0))
    assert now.expired_at
    assert not now.cancelled_at
    (left,) = read(client, now.error_file_id)
    assert (left["custom_id"], left["error"]["code"]) == ("late", "batch_expired")


def test_a_dispatcher_that_dies_while_it_stages(without_worker: Gateway, client: OpenAI) -> None:
    fleet = without_worker.fleet
    lines = [line(f"staged-{n}", f"text {n}") for n in range(2_000)]
    staging = "select count(*) from vectormill.jobs where state = 'staging'"
    with without_worker.engine.begin() as holding:
        # No items can be copied while their table is locked.
        holding.execute(text("lock table vectormill.items in share mode"))
        batch = request(client, lines)
        eventually(lambda: fleet.scalar(staging), "a job that is being staged")
        fleet.kill("dispatcher")
    with without_worker.engine.begin() as connection:
        connection.execute(text("update vectormill.jobs set lease_until = now() where state = 'staging'"))
    fleet.start_dispatcher()
    fleet.start_worker(replicas=1)
    now = ended(client, batch)
    assert (now.status, counts(now)) == ("completed", (2_000, 2_000, 0))


def test_pages_of_files_and_batches(client: OpenAI) -> None:
    # Each has content of its own: with the same content, each would wait until the one before is staged.
    made = [
        client.files.create(file=(f"{n}.jsonl", packed([line("a", f"page {n}")])), purpose="batch") for n in range(3)
    ]
    assert [one.id for one in client.files.list(limit=2).data] == [made[2].id, made[1].id]
    page = client.files.list(limit=2, order="asc", after=made[0].id, purpose="batch")
    assert [one.id for one in page.data] == [made[1].id, made[2].id]
    assert not page.has_more
    batches = [
        client.batches.create(input_file_id=one.id, endpoint="/v1/embeddings", completion_window="24h") for one in made
    ]
    newest = client.batches.list(limit=2)
    assert ([one.id for one in newest.data], newest.has_more) == ([batches[2].id, batches[1].id], True)
    walked = [one.id for one in client.batches.list(limit=2)]
    assert walked[:3] == [one.id for one in reversed(batches)]
    assert len(set(walked)) == len(walked) > 3
    for one in batches:
        assert ended(client, one).status == "completed"


def test_a_page_after_what_isnt_there(running: Gateway, client: OpenAI) -> None:
    """The cursor's place in the list isn't known: other entries could come before or after it."""
    file = client.files.create(file=("a.jsonl", b"{}"), purpose="batch")
    client.files.delete(file.id)
    for after in ("file-none", file.id, "", "batch_none"):
        with pytest.raises(openai.BadRequestError, match="after: no such file") as refused:
            client.files.list(after=after)
        assert refused.value.param == "after"
        with pytest.raises(openai.BadRequestError, match="after: no such batch request"):
            client.batches.list(after=after)
    with running.client() as status_api:
        refused_jobs = status_api.get("/api/jobs", params={"after": "01900000-0000-7000-8000-000000000000"})
    assert refused_jobs.status_code == 400
    assert refused_jobs.json()["detail"].startswith("after: no such job")


def test_files_go(running: Gateway, client: OpenAI) -> None:
    data = packed([line("a", "x")])
    file = client.files.create(
        file=("kept.jsonl", data), purpose="batch", expires_after={"anchor": "created_at", "seconds": 3_600}
    )
    assert (file.filename, file.bytes, file.purpose, file.status) == ("kept.jsonl", len(data), "batch", "processed")
    assert file.expires_at is not None
    assert file.expires_at - file.created_at == 3_600
    assert client.files.content(file.id).read() == data
    with running.client() as plain:
        there = plain.head(f"/v1/files/{file.id}/content")
    assert (there.status_code, there.headers["content-length"], there.content) == (200, str(len(data)), b"")
    uri = running.fleet.scalar("select uri from vectormill.files where id = :file", file=file.id)
    assert client.files.delete(file.id).deleted
    with pytest.raises(openai.NotFoundError, match="no such file"):
        client.files.retrieve(file.id)
    assert not Path(uri).exists()
    batch = request(
        client,
        [line("a", "its output goes after an hour")],
        output_expires_after={"anchor": "created_at", "seconds": 3_600},
    )
    output = client.files.retrieve(str(ended(client, batch).output_file_id))
    assert output.expires_at is not None
    assert (output.expires_at - output.created_at, output.purpose) == (3_600, "batch_output")
    with running.engine.begin() as connection:
        connection.execute(text("update vectormill.files set expires_at = now() where id = :file"), {"file": output.id})
    with pytest.raises(openai.NotFoundError):
        client.files.content(output.id)
    gone = "select not exists (select from vectormill.files where id = :file)"
    eventually(lambda: running.fleet.scalar(gone, file=output.id), "the expired file's going")


def test_what_is_asked_wrongly(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match='purpose must be "batch"'):
        client.files.create(file=("a.jsonl", b"{}"), purpose="fine-tune")
    file = client.files.create(file=("a.jsonl", packed([line("a", "x")])), purpose="batch")
    with pytest.raises(openai.BadRequestError, match="endpoint"):
        client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
    wrong: list[Any] = ["many", "101%", -1, 2.5, True, [], 10**30]
    for limit in wrong:
        with pytest.raises(openai.BadRequestError, match="max_rejects") as refused:
            client.batches.create(
                input_file_id=file.id,
                endpoint="/v1/embeddings",
                completion_window="24h",
                extra_body={"max_rejects": limit},
            )
        assert refused.value.param == "max_rejects"
        assert "--" not in refused.value.message
    with pytest.raises(openai.BadRequestError, match="completion_window"):
        client.batches.create(input_file_id=file.id, endpoint="/v1/embeddings", completion_window="31d")  # type: ignore[arg-type]
    with pytest.raises(openai.NotFoundError, match="no such file"):
        client.batches.create(input_file_id="file-none", endpoint="/v1/embeddings", completion_window="24h")
    with pytest.raises(openai.NotFoundError, match="no such batch request"):
        client.batches.retrieve("batch_none")
    with pytest.raises(openai.NotFoundError, match="no such batch request"):
        client.batches.cancel("batch_none")


def test_a_storage_that_is_away(running: Gateway, client: OpenAI) -> None:
    """The error says that storage is away, but not where it is, and nothing is lost."""
    file = client.files.create(file=("a.jsonl", packed([line("a", "kept away")])), purpose="batch")
    folder = Path(running.fleet.environment["VECTORMILL_FILES"])
    away = folder.rename(folder.with_name("files-away"))
    folder.write_text("a file where a folder must be")
    try:
        for act in (
            lambda: client.files.create(file=("b.jsonl", b"{}\n"), purpose="batch"),
            lambda: client.files.content(file.id),
        ):
            with pytest.raises(openai.InternalServerError, match="storage of files can't be used for now") as refused:
                act()
            assert (refused.value.status_code, refused.value.code) == (503, "upstream_unavailable")
            assert str(folder) not in refused.value.message
    finally:
        folder.unlink()
        away.rename(folder)
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/embeddings", completion_window="24h")
    assert ended(client, batch).status == "completed"


def test_another_workspace_sees_nothing(running: Gateway, client: OpenAI) -> None:
    batch = ended(client, request(client, [line("a", "private")]))
    with OpenAI(base_url=f"{running.url}/v1", api_key=running.workspace("stranger"), max_retries=0) as stranger:
        assert not stranger.files.list().data
        assert not stranger.batches.list().data
        for look in (
            lambda: stranger.files.retrieve(batch.input_file_id),
            lambda: stranger.files.content(batch.output_file_id),
            lambda: stranger.files.delete(batch.input_file_id),
            lambda: stranger.batches.retrieve(batch.id),
            lambda: stranger.batches.cancel(batch.id),
            lambda: stranger.batches.create(
                input_file_id=batch.input_file_id, endpoint="/v1/embeddings", completion_window="24h"
            ),
        ):
            with pytest.raises(openai.NotFoundError):
                look()


def test_its_end_is_told_as_openai_tells_it(running: Gateway, receiver: Receiver) -> None:
    with OpenAI(base_url=f"{running.url}/v1", api_key=running.workspace("told"), webhook_secret=SECRET) as client:
        running.fleet.cli("workspaces", "set", "told", "--webhook", f"{receiver.url}/hook")
        ends = {
            ended(client, request(client, lines)).id: state
            for state, lines in (("completed", [line("a", "tell me")]), ("failed", [b"nothing\n"]))
        }
        told: dict[str, str] = {}
        for wanted in range(1, 100):
            receiver.wait_for(wanted)
            _, headers, body = receiver.got[wanted - 1]
            event: Any = client.webhooks.unwrap(body, headers)
            if event.type.startswith("batch."):
                told[event.data.id] = event.type.removeprefix("batch.")
            if told.keys() == ends.keys():
                break
        assert told == ends


def test_a_file_over_the_limit(running: Gateway) -> None:
    running.stop_api()
    try:
        running.start_api(VECTORMILL_BATCH_BYTES="4096")
        with running.client() as client:
            reply = client.post("/v1/files", data={"purpose": "batch"}, files={"file": ("a.jsonl", b"x" * 5_000)})
            assert reply.status_code == 413
            assert "5,000 bytes" in reply.json()["error"]["message"]
            reply = client.post("/v1/files", data={"purpose": "batch"}, files={"file": ("a.jsonl", b"x" * 3_000_000)})
            assert reply.status_code == 413
    finally:
        running.stop_api()
        running.start_api()
