"""Dashboard in a real Chromium, on real jobs."""

import re
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from playwright.sync_api import Page, expect
from sqlalchemy import create_engine, text

from pipeline.catalog import keys, models
from pipeline.core.chunks import RejectCode
from pipeline.db import tables, workers
from tests.acceptance.fleet import eventually
from tests.browser.chromium import Scheme
from tests.browser.conftest import Site
from tests.support.jobs_made import job_row, make_job, make_model, run_sql
from tests.support.models import described, static_folder


def submit(site: Site, name: str, count: int, *, bad: int = 0, paused: bool = False) -> UUID:
    """Submit a real job. A `paused` one has a model that nobody serves, so that none of its chunks has started."""
    fleet, model = site.gateway.fleet, "unserved" if paused else "static"
    job = fleet.submit(site.corpus(name, count, bad=bad), "--model", model, "--name", name, "--max-rejects", "100%")
    if paused:
        fleet.cli("pause", str(job))
    return job


def test_log_in_with_a_wrong_key_and_a_right_one(site: Site) -> None:
    visit = site.visit()
    visit.go("/workers")
    page = visit.page
    expect(page).to_have_url(re.compile("/login"))
    key = page.get_by_label("API key", exact=True)
    expect(key).to_be_focused()
    key.fill("vm_0123456789abcdef_" + "x" * 43)
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("unknown, revoked or expired")
    # The browser itself logs the 401.
    assert all("401" in error for error in visit.errors)
    visit.errors.clear()
    key.fill(site.gateway.key)
    page.keyboard.press("Enter")
    expect(page).to_have_url(site.gateway.url + "/workers")
    (cookie,) = page.context.cookies()
    assert (cookie["httpOnly"], cookie["sameSite"], cookie["path"]) == (True, "Strict", "/")
    assert page.evaluate("document.cookie") == ""
    page.get_by_role("button", name="Log out").click()
    expect(page).to_have_url(site.gateway.url + "/login")
    assert not page.context.cookies()


def test_a_visitor_by_a_link_elsewhere_need_not_log_in_again(site: Site) -> None:
    page = site.visit(site.gateway.key).page
    # The first request by a link elsewhere comes without the cookie, and ends at the log-in page.
    page.goto(site.gateway.url + "/login?next=/models")
    expect(page).to_have_url(site.gateway.url + "/models")


def test_a_job_moves_to_done_without_a_reload(site: Site) -> None:
    visit = site.visit(site.gateway.key)
    page = visit.page
    visit.go("/jobs")
    expect(page.get_by_role("heading", name="Jobs", exact=True)).to_be_visible()
    page.evaluate("window.same = true")
    job = submit(site, "watched", 3_000, bad=3)
    row = page.locator(f"#job-{job}")
    expect(row).to_be_visible()
    expect(row).to_contain_text("completed")
    assert page.evaluate("window.same") is True
    row.get_by_role("link", name="watched").click()
    expect(page.locator("main")).to_contain_text("3,000 embedded")
    expect(page.locator("main")).to_contain_text("balanced")
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.locator(".facts .id").click()
    expect(page.locator("#tip")).to_have_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == str(job)
    page.wait_for_load_state("networkidle")
    asked = len(visit.requests)
    page.wait_for_timeout(2_500)
    assert len(visit.requests) == asked, "a job that has ended is not asked for each second"


def test_what_did_not_change_stays_the_same_element(site: Site) -> None:
    job = submit(site, "steady", 2_000, paused=True)
    page = site.visit(site.gateway.key).page
    page.goto(f"{site.gateway.url}/jobs/{job}")
    page.get_by_text("Cancel…").click()
    page.get_by_role("button", name=re.compile("^Cancel 2,000")).focus()
    page.evaluate("window.strip = document.querySelector('.strip'); window.heading = document.querySelector('h1')")
    run_sql(
        site.gateway.engine,
        "update vectormill.jobs set message = 'changed', reason = 'budget_spent' where id = :job",
        job=job,
    )
    expect(page.locator("main")).to_contain_text("Changed")
    assert page.evaluate("window.strip.isConnected && window.heading.isConnected")
    assert page.evaluate("document.querySelector('details.ask').open")
    expect(page.get_by_role("button", name=re.compile("^Cancel 2,000"))).to_be_focused()


def test_cancel_asks_once(site: Site) -> None:
    job = submit(site, "unwanted", 1_000, paused=True)
    page = site.visit(site.gateway.key).page
    page.goto(f"{site.gateway.url}/jobs/{job}")
    sure = page.get_by_role("button", name="Cancel 1,000 items")
    expect(sure).to_be_hidden()
    page.get_by_text("Cancel…").click()
    expect(page.locator(".ask")).to_contain_text("can’t be resumed")
    page.keyboard.press("Escape")
    expect(sure).to_be_hidden()
    page.get_by_text("Cancel…").click()
    sure.click()
    expect(page.locator("main")).to_contain_text("Cancelled")
    expect(page.locator("main")).to_contain_text("1,000 cancelled")


def test_pause_and_resume(site: Site) -> None:
    job = submit(site, "halted", 1_000, paused=True)
    page = site.visit(site.gateway.key).page
    page.goto(f"{site.gateway.url}/jobs/{job}")
    page.get_by_role("button", name="Resume 1,000 items").click()
    expect(page.locator("main")).to_contain_text("No worker serves unserved now")
    page.get_by_role("button", name="Pause: start no chunk").click()
    expect(page.locator("main")).to_contain_text("Paused")
    expect(page.locator("main")).to_contain_text("by a person")


def test_a_failed_job_is_retried(site: Site) -> None:
    job = submit(site, "again", 600)
    site.gateway.fleet.await_end(job)
    with site.gateway.engine.begin() as connection:
        for statement in (
            "delete from vectormill.embeddings where job_id = '{}' and index = 7",
            "insert into vectormill.rejects values ('{}', 7, 'doc-7', 'encode_failed', 'the model failed')",
            "update vectormill.chunks set embedded = embedded - 1, rejected = 1 "
            "where job_id = '{}' and first_index = 0",
            "update vectormill.jobs set state = 'failed', reason = 'too_many_rejects', message = 'too many' "
            "where id = '{}'",
        ):
            connection.exec_driver_sql(statement.format(job))
    page = site.visit(site.gateway.key).page
    page.goto(f"{site.gateway.url}/jobs/{job}")
    expect(page.locator("main")).to_contain_text("Failed")
    page.get_by_role("button", name="Retry 1 reject").click()
    expect(page.locator("main")).to_contain_text("Completed")
    expect(page.locator("main")).to_contain_text("600 embedded")


def test_rejects_are_read_and_a_text_only_on_a_click(site: Site) -> None:
    job = submit(site, "rejected", 500, bad=60)
    site.gateway.fleet.await_end(job)
    run_sql(
        site.gateway.engine,
        "update vectormill.items set text = 'not asked for' where index >= 500 and job_id = :job",
        job=job,
    )
    page = site.visit(site.gateway.key).page
    page.goto(f"{site.gateway.url}/jobs/{job}")
    expect(page.locator("#code-empty_text")).to_contain_text("60 items")
    expect(page.locator("#code-empty_text")).to_contain_text("bad-0")
    page.locator("#code-empty_text").get_by_role("link", name="60 items").click()
    expect(page.locator("tbody tr")).to_have_count(50)
    page.get_by_role("link", name="Next").click()
    expect(page.locator("tbody tr")).to_have_count(10)
    assert "not asked for" not in page.content()
    page.locator("#item-555").get_by_role("link", name="Show text").click()
    expect(page.locator("#text-555")).to_contain_text("not asked for")


def test_by_keyboard_alone(site: Site) -> None:
    submit(site, "by-keyboard", 50)
    page = site.visit(site.gateway.key).page
    page.goto(site.gateway.url + "/jobs")
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to content")).to_be_focused()
    page.keyboard.press("Enter")
    reached: set[str] = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.textContent.trim() || document.activeElement.name"))
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline != "none" or page.evaluate("document.activeElement === document.body")
        if "by-keyboard" in reached:
            break
    assert {"name", "by-keyboard"} <= reached
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="by-keyboard")).to_be_visible()
    # Scripts load after the page.
    expect(page.locator("#tip")).to_be_attached()
    strip = page.locator(".strip")
    strip.focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator("#tip")).to_contain_text("chunk 1")
    page.keyboard.press("Escape")
    expect(page.locator("#tip")).to_be_empty()


def test_a_revoked_key_is_logged_out_without_a_reload(site: Site) -> None:
    key = site.gateway.new_key()
    page = site.visit(key).page
    page.goto(site.gateway.url + "/workers")
    with site.gateway.engine.begin() as connection:
        keys.revoke(connection, models.workspace_id(connection), key.split("_")[1])
    expect(page).to_have_url(site.gateway.url + "/login?next=/workers")


def test_a_form_of_another_site_is_refused(site: Site) -> None:
    job = submit(site, "not-yours", 200, paused=True)
    page = site.visit(site.gateway.key).page
    # `localhost` is another site than `127.0.0.1`, and still this machine. The page isn't ours: ours send no such form.
    elsewhere = page.context.new_page()
    address = f"{site.gateway.url}/jobs/{job}/cancel"
    html = f'<form method="post" action="{address}"><button>Win a prize</button></form>'
    elsewhere.route("**/prize", lambda route: route.fulfill(body=html, content_type="text/html"))
    elsewhere.goto(site.gateway.url.replace("127.0.0.1", "localhost") + "/prize")
    with elsewhere.expect_response(address) as refused:
        elsewhere.get_by_role("button").click()
    assert refused.value.status == 403
    assert job_row(site.gateway.engine, job)["state"] == "paused"


def test_a_lost_connection_is_told_and_recovers(site: Site) -> None:
    visit = site.visit(site.gateway.key)
    page = visit.page
    page.goto(site.gateway.url + "/workers")
    site.gateway.fleet.kill("api")
    expect(page.locator("#lost")).to_contain_text("can’t be reached")
    expect(page.get_by_role("heading", name="Workers")).to_be_visible()
    site.gateway.start_api()
    expect(page.locator("#lost")).to_be_hidden()
    visit.errors.clear()


def test_a_page_found_while_the_database_is_away_comes_back_whole(site: Site) -> None:
    visit = site.visit()
    page, url = visit.page, site.gateway.engine.url
    # The api hasn't looked this key up yet, so it must ask the database.
    page.context.add_cookies([{"name": "vectormill_key", "value": site.gateway.new_key(), "url": site.gateway.url}])
    elsewhere = create_engine(url.set(database="template1"), isolation_level="AUTOCOMMIT")
    with elsewhere.connect() as connection:
        connection.exec_driver_sql(f'alter database "{url.database}" with allow_connections false')
        try:
            ended = "select pg_terminate_backend(pid) from pg_stat_activity where datname = :name"
            connection.execute(text(f"{ended} and application_name = 'vectormill-api'"), {"name": url.database})
            page.goto(site.gateway.url + "/models")
            expect(page.get_by_role("heading", name="The database can't be reached")).to_be_visible()
        finally:
            connection.exec_driver_sql(f'alter database "{url.database}" with allow_connections true')
    elsewhere.dispose()
    expect(page.get_by_role("heading", name="Models")).to_be_visible()
    expect(page.get_by_role("link", name="Workers")).to_be_visible()
    expect(page.get_by_role("button", name="Log out")).to_be_visible()
    visit.errors.clear()


def test_a_new_key_stays_until_it_is_left(site: Site) -> None:
    page = site.visit(site.gateway.key).page
    page.goto(site.gateway.url + "/keys")
    page.get_by_text("Make a key…").click()
    page.get_by_label("What it is for").fill("kept")
    page.get_by_role("button", name="Make it and show it once").click()
    expect(page.get_by_role("heading", name="Keep this key now")).to_be_visible()
    expect(page.locator("#tip")).to_be_attached()
    # The page gets these events when a person comes back from where they pasted the key.
    asked = page.evaluate("""() => {
        let count = 0;
        const fetch = window.fetch;
        window.fetch = (...what) => { count += 1; return fetch(...what); };
        document.dispatchEvent(new Event("visibilitychange"));
        window.dispatchEvent(new Event("online"));
        return count;
    }""")
    assert asked == 0
    expect(page.locator(".command code")).to_contain_text("vm_")


def long_names(site: Site) -> list[str]:
    """Return pages with names that have no place to break them."""
    engine, long = site.gateway.engine, "W" * 200
    found = run_sql(engine, "select id from vectormill.jobs where name = :name", name=long)
    if found:
        job = found[0][0]
    else:
        model = make_model(engine, "M" * 200)
        codes = {0: RejectCode.ENCODE_FAILED, 1: RejectCode.BAD_KEY}
        labels = {"L" * 200: long}
        job = make_job(engine, model, rejected=codes, name=long, labels=labels, idempotency_key=long)
        endless = (
            "update vectormill.rejects set key = repeat('k', 1000), message = repeat('m', 500) where job_id = :job"
        )
        run_sql(engine, endless, job=job)
        run_sql(engine, "update vectormill.items set text = repeat('t', 5000) where job_id = :job", job=job)
        run_sql(
            engine,
            "update vectormill.jobs set message = repeat('x', 300), state = 'failed', "
            "reason = 'too_many_rejects' where id = :job",
            job=job,
        )
        with engine.begin() as connection:
            worker = uuid4()
            workers.show(
                connection,
                worker,
                name="cpu-1@" + "H" * 200,
                host="H" * 200,
                device="cpu",
                device_kinds=["cpu"],
                models=[model.name],
                slots=1,
            )
            workers.drop_model(connection, worker, model.name, "E" * 300)
            metered = {"workspace_id": models.workspace_id(connection), "model": model.name, "job_id": job}
            usage = tables.usage.insert().values(items=1, prompt_tokens=10**12, total_tokens=10**12, **metered)
            connection.execute(usage)
            keys.create(connection, models.workspace_id(connection), "N" * 100)
    rejects = f"/jobs/{job}/rejects"
    pages = ["/", "/jobs", f"/jobs?name={long}", f"/jobs/{job}", rejects, f"{rejects}?text=2"]
    return [*pages, "/workers", "/models", "/keys", "/usage?by=job", "/usage?by=model"]


@pytest.mark.parametrize("width", [360, 768, 1_280])
def test_long_names_break(site: Site, width: int) -> None:
    visit = site.visit(site.gateway.key, width=width)
    for path in long_names(site):
        visit.go(path)
        assert overflow(visit.page) <= 0, path
        assert visit.page.locator(".brand").bounding_box()["height"] < 30, path


def every_page(site: Site) -> list[str]:
    """Return one of each page, with something on it."""
    name = "on-every-page"
    found = run_sql(site.gateway.engine, "select id from vectormill.jobs where name = :name", name=name)
    job = found[0][0] if found else submit(site, name, 450, bad=4)
    site.gateway.fleet.await_end(job)
    rejects = f"/jobs/{job}/rejects"
    pages = ["/", "/jobs", "/jobs?name=nothing", f"/jobs/{job}", rejects, f"{rejects}?text=451"]
    return [
        *pages,
        f"{rejects}?code=empty_text",
        "/collections",
        collection(site),
        "/workers",
        "/models",
        "/usage",
        "/usage?by=job",
        "/keys",
        "/jobs/nothing",
    ]


def collection(site: Site, name: str = "tickets", texts: int = 40) -> str:
    """Return the page of a collection that has been synced, and is being upgraded."""
    fleet = site.gateway.fleet
    if not run_sql(site.gateway.engine, "select from vectormill.collections where name = :name", name=name):
        folder = str(Path(site.corpus(name, texts, bad=1)).with_name(f"files-of-{name}"))
        fleet.cli("collections", "create", name, "--model", "static", "--expect-every", "24h", "--output", folder)
        fleet.await_end(UUID(fleet.cli("sync", name, site.corpus(name, texts, bad=1)).stdout.strip()))
        with site.gateway.engine.begin() as connection:
            models.add_model(connection, "small", described("static-64", static_folder(64)))
        fleet.cli("collections", "upgrade", name, "--model", "small", "--output", f"{folder}-small")
    found = run_sql(site.gateway.engine, "select id from vectormill.collections where name = :name", name=name)
    return f"/collections/{found[0][0]}"


def test_a_collection_shows_its_syncs_and_is_searched(site: Site) -> None:
    visit = site.visit(site.gateway.key)
    page = collection(site)
    visit.go("/collections")
    visit.page.get_by_role("link", name="tickets").click()
    expect(visit.page.get_by_role("heading", name="tickets")).to_be_visible()
    row = visit.page.locator("table.syncs tbody tr").first
    expect(row).to_contain_text("completed")
    expect(row.locator("[data-label=New]")).to_have_text("40")
    expect(row.locator("[data-label=Rejected]")).to_have_text("1")
    expect(visit.page.get_by_text("files-of-tickets")).to_be_visible()
    expect(visit.page.locator("#versions tbody tr")).to_contain_text("no whole sync has reached it yet")
    visit.page.get_by_label("Search what it holds").fill("The mill number 7 stands by the river.")
    visit.page.keyboard.press("Enter")
    expect(visit.page.locator("#hits")).to_be_visible()
    assert page in visit.page.url
    found = visit.page.locator("#hits").inner_text()
    assert "doc-7" in found or "can’t" in found or "engine" in found, found


@pytest.mark.parametrize("width", [360, 768, 1_000, 1_280])
def test_nothing_scrolls_sideways(site: Site, width: int) -> None:
    visit = site.visit(site.gateway.key, width=width)
    for path in every_page(site):
        visit.go(path)
        assert overflow(visit.page) <= 0, path
        for ask in visit.page.locator("details.ask").all():
            ask.locator("summary").click()
            assert overflow(visit.page) <= 0, path
            ask.locator("summary").click()
    visit.go("/keys")
    visit.page.get_by_text("Make a key…").click()
    visit.page.get_by_label("What it is for").fill("phone")
    visit.page.get_by_role("button", name="Make it and show it once").click()
    expect(visit.page.get_by_role("heading", name="Keep this key now")).to_be_visible()
    visit.page.wait_for_load_state("load")
    assert overflow(visit.page) <= 0
    visit.errors.clear()
    stranger = site.visit(width=width)
    stranger.go("/login")
    assert overflow(stranger.page) <= 0


def overflow(page: Page) -> int:
    """Return by how many pixels a page is wider than its window, once its style sheets are there."""
    page.wait_for_load_state()
    wider: int = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    return wider


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(site: Site, axe: str, scheme: Scheme) -> None:
    visit = site.visit(site.gateway.key, scheme=scheme)
    for path in every_page(site):
        visit.go(path)
        assert serious(visit.page, axe) == [], path
        for summary in visit.page.locator("details.ask summary").all()[:1]:
            summary.click()
            assert serious(visit.page, axe) == [], path
    visit.errors.clear()
    stranger = site.visit(scheme=scheme)
    stranger.go("/login")
    assert serious(stranger.page, axe) == []


def test_axe_would_find_a_fault(site: Site, axe: str) -> None:
    page = site.visit(site.gateway.key).page
    page.goto(site.gateway.url + "/usage")
    page.evaluate("document.querySelector('h1').style.color = '#ddd'; document.documentElement.removeAttribute('lang')")
    assert {found[0] for found in serious(page, axe)} == {"color-contrast", "html-has-lang"}


def serious(page: Page, axe: str) -> list[Any]:
    """Return the serious and critical violations of a page that has loaded, each with its first places."""
    page.wait_for_load_state()
    page.evaluate(axe)
    found = page.evaluate("axe.run()")
    return [
        (each["id"], each["help"], [node["target"] for node in each["nodes"]][:3])
        for each in found["violations"]
        if each["impact"] in ("serious", "critical")
    ]


def test_jobs_work_without_scripts(site: Site) -> None:
    job = submit(site, "plain", 300, paused=True)
    context = site.browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(site.gateway.url + "/login")
    page.get_by_label("API key", exact=True).fill(site.gateway.key)
    page.get_by_role("button", name="Log in").click()
    page.wait_for_url(lambda url: "/login" not in url)
    page.goto(f"{site.gateway.url}/jobs/{job}")
    page.get_by_text("Cancel…").click()
    page.get_by_role("button", name="Cancel 300 items").click()
    eventually(lambda: job_row(site.gateway.engine, job)["state"] == "cancelled", "the end of the job")
    context.close()
