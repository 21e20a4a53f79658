"""Dashboard without a browser: login, permitted content of pages, visibility of jobs, forms."""

import re
from collections.abc import Iterator
from typing import Any
from uuid import UUID, uuid4

import httpx2 as httpx
import pytest
from sqlalchemy import create_engine, text

from pipeline.catalog import keys, models
from pipeline.core.chunks import RejectCode
from pipeline.core.models import Model
from pipeline.core.options import JobOptions
from pipeline.db import collections, workspaces
from pipeline.ingest.collections import create_collection
from tests.acceptance.fleet import eventually
from tests.contract.conftest import Gateway
from tests.support.jobs_made import job_row, make_job, make_model, run_sql

COOKIE = "vectormill_key"
EVIL = "<script>alert(1)</script>"
OURS = {"sec-fetch-site": "same-origin"}


@pytest.fixture(scope="module")
def model(gateway: Gateway) -> Model:
    return make_model(gateway.engine, "small")


@pytest.fixture
def browser(gateway: Gateway) -> Iterator[httpx.Client]:
    """Yield an HTTP client with the cookie and headers of an admin who is logged in."""
    with visitor(gateway, gateway.key) as client:
        yield client


@pytest.fixture(scope="module")
def other(gateway: Gateway, model: Model) -> str:
    """Return a key of another workspace."""
    return gateway.workspace(f"other-{uuid4().hex[:6]}")


def visitor(gateway: Gateway, key: str | None) -> httpx.Client:
    cookies = {COOKIE: key} if key else {}
    return httpx.Client(base_url=gateway.url, cookies=cookies, headers=OURS, timeout=60)


def log_in(gateway: Gateway, key: str, next_: str = "/", **headers: str) -> httpx.Response:
    with visitor(gateway, None) as client:
        return client.post("/login", data={"key": key, "next": next_}, headers={**OURS, **headers})


def pages(job: UUID) -> list[str]:
    of_jobs = ["/", "/jobs", f"/jobs/{job}", f"/jobs/{job}/rejects"]
    return [*of_jobs, "/collections", "/workers", "/models", "/usage", "/usage?by=key", "/keys"]


def test_nobody_is_sent_to_log_in_and_back(gateway: Gateway) -> None:
    with visitor(gateway, None) as client:
        reply = client.get("/usage?by=key&days=7")
        assert (reply.status_code, reply.headers["location"]) == (303, "/login?next=/usage%3Fby%3Dkey%26days%3D7")
        assert client.get("/").headers["location"] == "/login"
        assert client.get("/login").status_code == 200
    back = log_in(gateway, gateway.key, "/usage?by=key&days=7")
    assert (back.status_code, back.headers["location"]) == (303, "/usage?by=key&days=7")


def test_the_cookie_is_out_of_reach(gateway: Gateway) -> None:
    plain = log_in(gateway, f" {gateway.key}\n").headers["set-cookie"]
    assert plain.startswith(f"{COOKIE}={gateway.key};")
    attributes = {part.strip().lower() for part in plain.split(";")[1:]}
    assert attributes == {"httponly", "samesite=strict", "path=/"}
    secure = log_in(gateway, gateway.key, **{"x-forwarded-proto": "https"}).headers["set-cookie"]
    assert "secure" in secure.lower()


def test_a_wrong_key_is_told_so_and_not_repeated(gateway: Gateway) -> None:
    wrong = keys_like(gateway.key)
    reply = log_in(gateway, wrong)
    assert reply.status_code == 401
    assert "set-cookie" not in reply.headers
    assert "unknown, revoked or expired" in reply.text
    assert wrong not in reply.text
    assert "Give a key" in log_in(gateway, "").text


def keys_like(key: str) -> str:
    """Return the key with another secret."""
    return key[:-1] + ("A" if key[-1] != "A" else "B")


@pytest.mark.parametrize(
    "goal", ["//evil.example", "https://evil.example", "/\\evil.example", "javascript:1", "", "/a\tb"]
)
def test_only_paths_of_ours_are_gone_on_to(gateway: Gateway, goal: str) -> None:
    assert log_in(gateway, gateway.key, goal).headers["location"] == "/"


def test_log_out_forgets(gateway: Gateway, browser: httpx.Client) -> None:
    reply = browser.post("/logout")
    assert (reply.status_code, reply.headers["location"]) == (303, "/login")
    assert re.search(rf'{COOKIE}="?"?;.*(max-age=0|expires)', reply.headers["set-cookie"], re.IGNORECASE)


@pytest.mark.parametrize(
    ("headers", "allowed"),
    [
        ({}, False),
        ({"sec-fetch-site": "cross-site"}, False),
        ({"sec-fetch-site": "same-site"}, False),
        ({"sec-fetch-site": "none"}, False),
        ({"sec-fetch-site": "cross-site", "origin": "HERE"}, False),
        ({"origin": "https://evil.example"}, False),
        ({"origin": "null"}, False),
        ({"sec-fetch-site": "same-origin"}, True),
        ({"origin": "HERE"}, True),
    ],
)
def test_forms_of_other_sites_do_nothing(
    gateway: Gateway, model: Model, headers: dict[str, str], allowed: bool
) -> None:
    job = make_job(gateway.engine, model)
    sent = {name: gateway.url if value == "HERE" else value for name, value in headers.items()}
    with httpx.Client(base_url=gateway.url, cookies={COOKIE: gateway.key}) as client:
        status = client.post(f"/jobs/{job}/cancel", headers=sent).status_code
        assert status == (303 if allowed else 403)
        for path in ("/login", "/logout", "/keys", f"/keys/{'0' * 16}/revoke"):
            assert (client.post(path, headers=sent).status_code == 403) is not allowed
    assert job_row(gateway.engine, job)["state"] == ("cancelling" if allowed else "queued")


def test_pages_hold_nothing_inline_and_allow_nothing_from_elsewhere(
    gateway: Gateway, browser: httpx.Client, model: Model
) -> None:
    job = make_job(gateway.engine, model, rejected={1: RejectCode.EMPTY_TEXT})
    for path in (*pages(job), "/login", "/jobs/nothing", f"/jobs/{uuid4()}"):
        reply = browser.get(path)
        policy = reply.headers["content-security-policy"]
        assert policy.startswith("default-src 'self'; ")
        assert "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy
        assert reply.headers["cache-control"] == "no-store"
        assert reply.headers["x-content-type-options"] == "nosniff"
        assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)|javascript:", reply.text), path
        for address in re.findall(r'(?:src|href|action)="([^"]*)"', reply.text):
            assert address.startswith(("/", "?", "#")), (path, address)


def test_what_people_wrote_is_text(gateway: Gateway, browser: httpx.Client, model: Model) -> None:
    job = make_job(
        gateway.engine, model, name=EVIL, labels={EVIL: EVIL}, rejected={0: RejectCode.BAD_KEY}, idempotency_key=EVIL
    )
    run_sql(
        gateway.engine,
        "update vectormill.rejects set key = :evil, message = :evil where job_id = :job",
        evil=EVIL,
        job=job,
    )
    run_sql(
        gateway.engine,
        "update vectormill.jobs set state = 'paused', reason = 'key_refused', message = :evil where id = :job",
        evil=EVIL,
        job=job,
    )
    for path in ("/", "/jobs", f"/jobs?name={EVIL}", f"/jobs/{job}", f"/jobs/{job}/rejects"):
        reply = browser.get(path)
        assert reply.status_code == 200
        assert EVIL not in reply.text
        assert "&lt;script&gt;" in reply.text


def test_a_collection_is_shown_to_its_workspace_alone(
    gateway: Gateway, browser: httpx.Client, model: Model, other: str
) -> None:
    with gateway.engine.begin() as connection:
        workspace = models.workspace_id(connection)
        made = create_collection(
            connection, workspace, "tickets", model=model.name, options=JobOptions(carry=[EVIL[:50]], text_column=EVIL)
        )
        collections.begin_sync(connection, uuid4(), made, whole=True, beside=None)
    page = f"/collections/{made.id}"
    shown = browser.get(page)
    assert (shown.status_code, EVIL in shown.text, "&lt;script&gt;" in shown.text) == (200, False, True)
    assert ">tickets<" in browser.get("/collections").text
    assert "nobody serves" in browser.get(f"{page}?q=refund").text or "engine" in browser.get(f"{page}?q=refund").text
    assert browser.get("/collections/999999").status_code == 404
    with visitor(gateway, other) as stranger:
        assert stranger.get(page).status_code == 404
        assert ">tickets<" not in stranger.get("/collections").text


def test_every_page_is_there_for_everybody(gateway: Gateway, model: Model, other: str) -> None:
    job = make_job(gateway.engine, model)
    for key in (gateway.key, gateway.new_key()):
        with visitor(gateway, key) as client:
            assert [client.get(path).status_code for path in pages(job)] == [200] * len(pages(job))
    with visitor(gateway, other) as client:
        assert "No jobs yet" in client.get("/jobs").text


def test_jobs_of_others_are_not_there(gateway: Gateway, browser: httpx.Client, model: Model, other: str) -> None:
    job = make_job(gateway.engine, model, name="ours-only", rejected={1: RejectCode.EMPTY_TEXT})
    with visitor(gateway, other) as client:
        for path in (f"/jobs/{job}", f"/jobs/{job}/rejects", f"/jobs/{job}/rejects?text=1", f"/jobs/{uuid4()}"):
            assert client.get(path).status_code == 404
        for action in ("cancel", "pause", "resume", "retry"):
            assert client.post(f"/jobs/{job}/{action}").status_code == 404
        assert "ours-only" not in client.get("/jobs").text
    assert job_row(gateway.engine, job)["state"] == "queued"
    assert "ours-only" in browser.get("/jobs").text


def test_an_unknown_address_is_a_page_for_people_and_a_problem_for_programs(gateway: Gateway) -> None:
    job = uuid4()
    with visitor(gateway, gateway.key) as client:
        people = {"accept": "text/html,application/xhtml+xml"}
        for path, status in (("/nothing", 404), (f"/jobs/{job}/cancel", 405), ("/logout", 405)):
            page = client.get(path, headers=people)
            assert (page.status_code, page.headers["content-type"]) == (status, "text/html; charset=utf-8")
            assert 'href="/jobs">To the jobs' in page.text
            assert "frame-ancestors 'none'" in page.headers["content-security-policy"]
            assert client.get(path).headers["content-type"] == "application/problem+json"
        assert client.get("/api/nothing", headers=people).headers["content-type"] == "application/problem+json"
        assert "error" in client.get("/v1/nothing", headers=people).json()


def test_a_receipt_is_verified_in_its_workspace(gateway: Gateway, browser: httpx.Client, model: Model) -> None:
    with gateway.engine.begin() as connection:
        place = workspaces.create(connection, "two words", 1.0)
    ended = "update vectormill.jobs set state = 'cancelled', finished_at = now() where id = :job"
    for workspace, said in ((None, "--verify<"), (place, "--verify --workspace &#39;two words&#39;<")):
        job = make_job(gateway.engine, model, workspace=workspace)
        run_sql(gateway.engine, ended, job=job)
        assert f"vectormill receipt {str(job)[:13]} {said}" in browser.get(f"/jobs/{job}").text


def test_a_job_is_paused_resumed_and_cancelled(gateway: Gateway, browser: httpx.Client, model: Model) -> None:
    job = make_job(gateway.engine, model)
    for action, state in (("pause", "paused"), ("resume", "queued"), ("cancel", "cancelling")):
        reply = browser.post(f"/jobs/{job}/{action}")
        assert (reply.status_code, reply.headers["location"]) == (303, f"/jobs/{job}")
        assert job_row(gateway.engine, job)["state"] == state
    refused = browser.post(f"/jobs/{job}/pause")
    assert refused.status_code == 409
    assert "can&#39;t be paused" in refused.text
    assert browser.post(f"/jobs/{job}/purge").status_code == 404


def test_large_numbers_are_shortened_in_the_list(gateway: Gateway, browser: httpx.Client, model: Model) -> None:
    job = make_job(gateway.engine, model, name="hundred-million")
    run_sql(gateway.engine, "update vectormill.jobs set items_total = 100000000 where id = :job", job=job)
    run_sql(gateway.engine, "update vectormill.chunks set rejected = 600000 where job_id = :job", job=job)
    page = browser.get("/jobs?name=hundred-million").text
    assert '<span title="100,000,000 items">100M</span>' in page
    assert 'title="1,200,000 rejects">1.2M<' in page


def test_retry_is_offered_where_it_can_help(gateway: Gateway, browser: httpx.Client, model: Model) -> None:
    job = make_job(gateway.engine, model, rejected={0: RejectCode.ENCODE_FAILED, 5: RejectCode.EMPTY_TEXT})
    hopeless = make_job(gateway.engine, model, rejected={0: RejectCode.EMPTY_TEXT})
    run_sql(
        gateway.engine,
        "update vectormill.jobs set state = 'completed', finished_at = now() where id = any(:jobs)",
        jobs=[job, hopeless],
    )
    run_sql(
        gateway.engine,
        "update vectormill.chunks set state = 'done', embedded = items - rejected where job_id = any(:jobs)",
        jobs=[job, hopeless],
    )
    assert "Retry 1 reject<" in browser.get(f"/jobs/{job}").text
    assert "Retry" not in browser.get(f"/jobs/{hopeless}").text
    assert browser.post(f"/jobs/{hopeless}/retry").status_code == 409
    assert browser.post(f"/jobs/{job}/retry").status_code == 303
    assert job_row(gateway.engine, job)["state"] == "queued"


def test_texts_are_shown_only_on_request_and_not_once_they_are_gone(
    gateway: Gateway, browser: httpx.Client, model: Model
) -> None:
    job = make_job(gateway.engine, model, rejected={1: RejectCode.EMPTY_TEXT})
    run_sql(
        gateway.engine,
        "insert into vectormill.rejects (job_id, index, key, code, message) values (:job, 3, 'k3', 'bad_vector', 'x')",
        job=job,
    )
    path = f"/jobs/{job}/rejects"
    assert "text 3" not in browser.get(f"/jobs/{job}").text
    assert "text 3" not in browser.get(path).text
    assert "text 3" in browser.get(f"{path}?text=3").text
    assert "was not kept" in browser.get(f"{path}?text=1").text
    run_sql(
        gateway.engine,
        "update vectormill.jobs set state = 'completed', finished_at = now(), texts_removed_at = now(), "
        "texts_kept_from = items_total where id = :job",
        job=job,
    )
    gone = browser.get(f"{path}?text=3").text
    assert "text 3" not in gone
    assert "was removed on" in gone


def test_rejects_are_paged_by_code(gateway: Gateway, browser: httpx.Client, model: Model) -> None:
    codes = {at: RejectCode.EMPTY_TEXT if at % 2 else RejectCode.NUL_CHARACTER for at in range(130)}
    job = make_job(gateway.engine, model, 130, rejected=codes)
    seen: list[int] = []
    path: str | None = f"/jobs/{job}/rejects?code=empty_text"
    while path:
        reply = browser.get(path).text
        seen += [int(found) for found in re.findall(r'id="item-(\d+)"', reply)]
        found = re.search(r'href="([^"]*)" rel="next"', reply)
        path = found[1].replace("&amp;", "&") if found else None
    assert seen == list(range(1, 130, 2))


def test_jobs_are_filtered_and_paged(gateway: Gateway, model: Model) -> None:
    with gateway.engine.begin() as connection:
        place = workspaces.create(connection, "paged", 1.0)
        assert place
        key = keys.create(connection, place, "test").token
    made = [make_job(gateway.engine, model, workspace=place, name=f"paged {n:02}") for n in range(30)]
    run_sql(
        gateway.engine,
        "update vectormill.jobs set state = 'failed', reason = 'all_rejected' where id = :job",
        job=made[3],
    )
    with visitor(gateway, key) as client:
        first = client.get("/jobs?name=paged").text
        shown = re.findall(r'<tr id="job-([0-9a-f-]+)"', first)
        assert shown == [str(job) for job in reversed(made[5:])]
        found = re.search(r'href="([^"]*)" rel="next"', first)
        assert found
        second = client.get(found[1].replace("&amp;", "&")).text
        assert re.findall(r'<tr id="job-([0-9a-f-]+)"', second) == [str(job) for job in reversed(made[:5])]
        failed = client.get("/jobs?state=failed").text
        assert re.findall(r'<tr id="job-([0-9a-f-]+)"', failed) == [str(made[3])]
        assert "too" not in failed
        assert "every item was rejected" in failed
        assert "None fits these filters" in client.get("/jobs?name=nothing-like-it").text
        assert client.get("/jobs?state=nonsense").status_code == 400
        assert "28 jobs before it" in first


def test_an_unchanged_page_is_not_sent_again(gateway: Gateway, browser: httpx.Client, model: Model) -> None:
    job = make_job(gateway.engine, model)
    first = browser.get(f"/jobs/{job}")
    same = browser.get(f"/jobs/{job}", headers={"if-none-match": first.headers["etag"]})
    assert (same.status_code, same.content) == (304, b"")
    browser.post(f"/jobs/{job}/pause")
    changed = browser.get(f"/jobs/{job}", headers={"if-none-match": first.headers["etag"]})
    assert changed.status_code == 200
    assert changed.headers["etag"] != first.headers["etag"]


def test_a_revoked_key_ends_its_session(gateway: Gateway) -> None:
    key = gateway.new_key()
    with visitor(gateway, key) as client:
        assert client.get("/workers").status_code == 200
        with gateway.engine.begin() as connection:
            keys.revoke(connection, models.workspace_id(connection), key.split("_")[1])
        eventually(lambda: client.get("/workers").status_code == 303, "the way to the log-in")
        assert "max-age=0" in client.get("/workers").headers["set-cookie"].lower()


def test_keys_are_made_shown_once_and_revoked(gateway: Gateway, browser: httpx.Client) -> None:
    made = browser.post("/keys", data={"name": "for-a-test", "days": "30"})
    assert made.status_code == 200
    token = re.search(r"vm_[0-9a-f]{16}_[\w-]{43}", made.text)
    assert token
    assert "data-live" not in made.text
    assert token[0] not in browser.get("/keys").text
    assert log_in(gateway, token[0]).status_code == 303
    key_id = token[0].split("_")[1]
    again = browser.post(f"/keys/{key_id}/rotate")
    assert re.search(r"vm_[0-9a-f]{16}_[\w-]{43}", again.text)
    assert browser.post(f"/keys/{key_id}/revoke").headers["location"] == "/keys"
    assert browser.post(f"/keys/{key_id}/revoke").status_code == 400
    assert browser.post("/keys", data={"name": ""}).status_code == 400
    assert browser.post("/keys", data={"name": "x", "days": "0"}).status_code == 400
    assert browser.post("/keys", data={"name": "x" * 40_000}).status_code == 413


def test_keys_are_for_admins(gateway: Gateway) -> None:
    with visitor(gateway, gateway.new_key()) as client:
        assert "Keys are kept by admins" in client.get("/keys").text
        assert client.post("/keys", data={"name": "mine"}).status_code == 403
        assert client.post(f"/keys/{'0' * 16}/rotate").status_code == 403
        assert client.post(f"/keys/{'0' * 16}/revoke").status_code == 403


def test_usage_counts_what_was_metered(gateway: Gateway, browser: httpx.Client) -> None:
    with gateway.client() as client:
        client.post("/v1/embeddings", json={"model": "static", "input": ["A mill grinds grain."]}).raise_for_status()
    day = "/usage?by=day"
    eventually(lambda: 'id="group-' in browser.get(day).text, "usage by day")
    for by in ("model", "key", "device", "workspace"):
        assert 'id="group-' in browser.get(f"/usage?by={by}").text
    assert "workspace" not in re.findall(r"by=(\w+)", visit_usage(gateway))
    assert browser.get("/usage?by=nonsense").status_code == 404


def visit_usage(gateway: Gateway) -> str:
    with visitor(gateway, gateway.new_key()) as client:
        return client.get("/usage").text


def test_static_files_are_typed(gateway: Gateway) -> None:
    with visitor(gateway, None) as client:
        kinds = {
            name: client.get(f"/static/{name}").headers["content-type"].split(";")[0]
            for name in (
                "look.css",
                "parts.css",
                "live.js",
                "morph.js",
                "tips.js",
                "copy.js",
                "asks.js",
                "log_in.js",
                "mark.svg",
            )
        }
        assert set(kinds.values()) == {"text/css", "text/javascript", "image/svg+xml"}
        assert client.get("/static/%2e%2e/answer.py").status_code == 404


def test_the_description_knows_nothing_of_it(gateway: Gateway) -> None:
    with visitor(gateway, None) as client:
        described: dict[str, Any] = client.get("/openapi.json").json()
    assert all(path.startswith(("/v1", "/api")) for path in described["paths"])


def test_without_a_database_a_page_says_so_and_recovers(gateway: Gateway, browser: httpx.Client) -> None:
    assert browser.get("/").status_code == 200
    name = gateway.engine.url.database
    elsewhere = create_engine(gateway.engine.url.set(database="template1"), isolation_level="AUTOCOMMIT")
    with elsewhere.connect() as connection:
        connection.execute(text(f'alter database "{name}" with allow_connections false'))
        try:
            ended = "select pg_terminate_backend(pid) from pg_stat_activity where datname = :name"
            connection.execute(text(f"{ended} and application_name = 'vectormill-api'"), {"name": name})
            reply = browser.get("/")
            assert reply.status_code == 503
            assert "can&#39;t be reached" in reply.text
            assert 'data-live="2"' in reply.text
        finally:
            connection.execute(text(f'alter database "{name}" with allow_connections true'))
    elsewhere.dispose()
    eventually(lambda: browser.get("/").status_code == 200, "the page again")


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("state=nonsense", "a job&#39;s state is one of staging, queued"),
        ("label=team", "write a label as name:value"),
        ("since=yesterday", "write a date such as 2026-11-01"),
        ("until=9999-12-31", "write a date such as 2026-11-01"),
        ("before=x", "it is no id of a job"),
        ("model=%00", "none of them NUL"),
        ("label=team:a&label=team:b", "a job has one value of a label; ask for one"),
        ("name=" + "x" * 1_001, "give at most 1,000 characters"),
    ],
)
def test_a_malformed_filter_is_told_so(browser: httpx.Client, query: str, said: str) -> None:
    reply = browser.get(f"/jobs?{query}")
    assert reply.status_code == 400
    assert said in reply.text


def test_the_address_of_the_list_was_once_the_first_page(browser: httpx.Client) -> None:
    reply = browser.get("/?state=failed&name=two%20words")
    assert (reply.status_code, reply.headers["location"]) == (308, "/jobs?state=failed&name=two%20words")


def test_a_name_stands_for_its_newest_job(gateway: Gateway, browser: httpx.Client, model: Model, other: str) -> None:
    first, newest = (make_job(gateway.engine, model, name="again/and again") for _ in range(2))
    shown = browser.get("/jobs/again%2Fand%20again").text
    assert str(newest) in shown
    assert str(first) not in shown
    assert browser.get("/jobs/again%2Fand%20again/rejects").status_code == 200
    with visitor(gateway, other) as stranger:
        assert stranger.get("/jobs/again%2Fand%20again").status_code == 404


def test_the_overview_names_each_trouble_with_its_remedy(
    gateway: Gateway, browser: httpx.Client, model: Model, other: str
) -> None:
    waiting, failed, paused = (make_job(gateway.engine, model, name=f"ill-{n}") for n in range(3))
    ended = (
        "update vectormill.jobs set state = 'failed', reason = 'source_damaged', finished_at = now() where id = :job"
    )
    run_sql(gateway.engine, ended, job=failed)
    run_sql(
        gateway.engine,
        "update vectormill.jobs set state = 'paused', reason = 'key_refused', message = 'no' where id = :job",
        job=paused,
    )
    shown = browser.get("/").text
    assert f"No worker serves {model.name}" in shown
    assert f"vectormill worker --model {model.name}" in shown
    assert f'href="/jobs/{paused}">The job' in shown
    assert "ill-2 is paused: the upstream refuses the key." in shown
    assert "ill-1 failed just now: a source file can&#39;t be read." in shown
    with visitor(gateway, other) as stranger:
        assert "ill-" not in stranger.get("/").text
    make_job(gateway.engine, model, name="ill-1")
    run_sql(
        gateway.engine, "update vectormill.jobs set state = 'completed' where name = 'ill-1' and id <> :job", job=failed
    )
    assert "ill-1 failed just now" not in browser.get("/").text
    assert job_row(gateway.engine, waiting)["state"] == "queued"


def test_chunks_of_others_that_nobody_takes_over_are_for_admins_to_know(
    gateway: Gateway, browser: httpx.Client, model: Model, other: str
) -> None:
    job = make_job(gateway.engine, model)
    run_sql(
        gateway.engine,
        """
        update vectormill.chunks set state = 'running', lease_until = now() - interval '1 minute'
        where job_id = :job and ordinal = 0
        """,
        job=job,
    )
    run_sql(
        gateway.engine,
        """
        insert into vectormill.leases (name, holder, lease_until)
        values ('dispatcher', 'a test', now() + interval '1 minute')
        on conflict (name) do update set lease_until = excluded.lease_until
        """,
    )
    said = "1 chunk of workers that have gone can’t be given to others."
    assert said in browser.get("/").text
    with visitor(gateway, other) as stranger:
        assert said not in stranger.get("/").text
    run_sql(gateway.engine, "delete from vectormill.leases")
    run_sql(gateway.engine, "delete from vectormill.chunks where job_id = :job", job=job)


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (b"text=" + b"x" * 600_000, 413, "larger than 524,288 bytes"),
        (b"&".join([b"text=x"] * 100_000), 413, "larger than 524,288 bytes"),
        (b"&".join([b"text=x"] * 1_000), 400, "more than 20 fields"),
        (b"model=small&text=" + b"%C3%A9" * 70_000, 503, "No engine serves the model"),
    ],
)
def test_forms_of_the_playground_are_bounded(
    browser: httpx.Client, model: Model, body: bytes, status: int, said: str
) -> None:
    reply = browser.post(
        "/playground?trial=embed", content=body, headers={"content-type": "application/x-www-form-urlencoded"}
    )
    assert (reply.status_code, said in reply.text) == (status, True)
    assert ("retry-after" in reply.headers) == (status == 503)
