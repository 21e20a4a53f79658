"""Flower's own pages in a real Chromium: whose a task is, which chunk, what came of it, and where."""

import re
from collections.abc import Iterator
from pathlib import Path

import httpx2 as httpx
import pytest
from playwright.sync_api import HttpCredentials, Page, expect

from tests.acceptance.fleet import eventually
from tests.browser.conftest import Site

_PASSWORD = "sesame"


@pytest.fixture
def flower(site: Site) -> Iterator[Page]:
    """Run a Flower beside the site; yield a page of a browser that knows its password."""
    fleet = site.gateway.fleet
    fleet.start(
        "flower",
        *("pipeline.cli", "flower"),
        VECTORMILL_FLOWER_PORT=site.flower_url.rpartition(":")[2],
        VECTORMILL_FLOWER_PASSWORD=_PASSWORD,
    )
    eventually(lambda: _answers(site.flower_url), "a Flower that answers")
    credentials: HttpCredentials = {"username": "vectormill", "password": _PASSWORD}
    context = site.browser.new_context(base_url=site.flower_url, http_credentials=credentials)
    yield context.new_page()
    context.close()
    fleet.kill("flower")


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/healthcheck").status_code == 200
    except httpx.TransportError:
        return False


def _search(site: Site, page: Page, query: str, count: int = 1) -> None:
    """Search for tasks, once Flower has heard of `count` of them."""
    url, auth = f"{site.flower_url}/api/tasks", ("vectormill", _PASSWORD)
    eventually(lambda: len(httpx.get(url, params={"search": query}, auth=auth).json()) >= count, "tasks' events")
    page.goto("/tasks")
    page.get_by_role("searchbox").fill(query)


def test_its_pages_say_whose_a_task_is_and_what_came_of_it(site: Site, flower: Page, tmp_path: Path) -> None:
    fleet = site.gateway.fleet
    job = fleet.submit(
        site.corpus("nightly", 600, bad=1), "--max-rejects", "2", "--model", "static", "--name", "nightly"
    )
    gone = tmp_path / "gone.jsonl"
    gone.write_text('{"id": "1", "text": "a mill"}\n')
    lost = fleet.submit(str(gone), "--by-reference", "--model", "unserved", "--name", "gone")
    fleet.await_end(job)

    embedded = fleet.scalar("select count(*) from vectormill.chunks where embedded > 0")
    _search(site, flower, f"name:nightly result:embedded {job}", embedded)
    rows = flower.locator("#tasks-table tbody tr")
    chunks = fleet.scalar("select count(*) from vectormill.chunks where job_id = :job", job=job)
    expect(rows).to_have_count(embedded)
    for row in rows.all():
        expect(row).to_contain_text("nightly:static")
        expect(row).to_contain_text(re.compile(rf"chunk \d+/{chunks}, \d+ items, nightly"))
        expect(row).to_contain_text(re.compile(r"\d+ embedded, [\d,]+ tokens, \d+\.\d s"))
        expect(row).to_contain_text("SUCCESS")
    rows.first.get_by_role("link", name="nightly:static").click()
    expect(rows.first).to_contain_text("nightly:static")
    rows.filter(has_text="embedded").first.locator("a[href*='/task/']").click()
    expect(flower.locator("#task-page")).to_contain_text(f"(job={job}, chunk=")
    expect(flower.locator("#task-page")).to_contain_text("embedded, ")

    gone.unlink()
    fleet.start_worker(replicas=1, name="other", VECTORMILL_WORKER_MODELS="unserved")
    fleet.await_end(lost)
    _search(site, flower, "state:FAILURE name:gone")
    expect(rows.first).to_contain_text("gone:unserved")
    expect(rows.first).to_contain_text("Refused('SourceChanged: ")

    flower.goto("/broker")
    for queue in ("embed.static", "embed.unserved"):
        expect(flower.locator("#queue-table")).to_contain_text(queue)
    fleet.kill_tree("other")


def test_the_dashboard_leads_to_tasks_and_workers(site: Site, flower: Page) -> None:
    fleet = site.gateway.fleet
    job = fleet.submit(site.corpus("led", 600), "--model", "static", "--name", "led")
    fleet.await_end(job)
    flower.goto(f"{site.gateway.url}/login?next=/jobs/led")
    flower.get_by_label("API key", exact=True).fill(site.gateway.key)
    flower.get_by_role("button", name="Log in").click()
    first = flower.get_by_role("link", name="Task of chunk 1 in Flower", exact=True)
    task = fleet.scalar("select task_id from vectormill.chunks where job_id = :job and ordinal = 0", job=job)
    expect(first).to_have_attribute("href", f"{site.flower_url}/task/{task}")
    # Scripts load after the page.
    expect(flower.locator("#tip")).to_be_attached()
    flower.locator(".strip").focus()
    flower.keyboard.press("ArrowRight")
    flower.keyboard.press("Enter")
    expect(flower.locator("#task-page")).to_contain_text(f"(job={job}, chunk=")
    flower.goto(f"{site.gateway.url}/workers")
    name = fleet.scalar("select name from vectormill.workers order by started_at limit 1")
    flower.get_by_title(f"{name} in Flower").click()
    expect(flower).to_have_url(re.compile("/worker/"))
    expect(flower.locator("body")).to_contain_text(name)
