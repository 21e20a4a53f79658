"""List of jobs in a real Chromium: filters that combine and live in the address, and names in addresses."""

import re
from urllib.parse import quote

import pytest
from playwright.sync_api import expect

from pipeline.core.chunks import RejectCode
from tests.browser.conftest import Site
from tests.browser.test_dashboard import overflow, serious
from tests.support.jobs_made import make_job, make_model, run_sql

LONG = "a-name-that-goes-on-and-on-" * 4


def labelled(site: Site) -> None:
    """Make a few jobs with labels and rejects, and one that runs, with an estimate."""
    engine = site.gateway.engine
    if run_sql(engine, "select from vectormill.jobs where name = 'of-search'"):
        return
    model = make_model(engine, "of-labels")
    make_job(engine, model, name="of-search", labels={"team": "search"}, rejected={0: RejectCode.EMPTY_TEXT})
    make_job(engine, model, name="of-both", labels={"team": "search", "a:b": "c:d"})
    make_job(engine, model, name="team/docs & more")
    running = make_job(engine, model, 8, name=LONG)
    for statement in (
        "update vectormill.jobs set state = 'running', started_at = now() - interval '2 hours' where id = :job",
        "update vectormill.chunks set state = 'done', embedded = items where job_id = :job and ordinal = 0",
        "insert into vectormill.usage (workspace_id, job_id, model, items) "
        "select workspace_id, id, model_name, 1 from vectormill.jobs where id = :job",
    ):
        run_sql(engine, statement, job=running)


def test_filters_combine_in_the_address(site: Site) -> None:
    labelled(site)
    page = site.visit(site.gateway.key).page
    page.goto(site.gateway.url + "/jobs?model=of-labels")
    rows = page.locator("table.jobs tbody tr")
    expect(rows).to_have_count(4)
    row = rows.filter(has_text="of-search")
    expect(row.locator(".c-rejects")).to_contain_text("1")
    row.get_by_role("link", name="team: search").click()
    expect(page).to_have_url(re.compile(r"/jobs\?model=of-labels&label=team:search$"))
    expect(rows).to_have_count(2)
    page.locator(".filters").get_by_role("link", name="a:b: c:d").click()
    expect(rows).to_have_count(1)
    expect(rows).to_contain_text("of-both")
    page.locator(".filters").get_by_role("link", name="last 7 days").click()
    expect(page).to_have_url(re.compile(r"since=\d{4}-\d\d-\d\d$"))
    expect(rows).to_have_count(1)
    page.locator(".filters").get_by_role("link", name="queued").click()
    expect(rows).to_have_count(1)
    page.goto(site.gateway.url + "/jobs?model=of-labels&until=2020-01-01")
    expect(page.get_by_text("None fits these filters")).to_be_visible()
    expect(page.locator(".filters")).to_contain_text("to 2020-01-01")


def test_an_address_may_hold_a_name(site: Site) -> None:
    labelled(site)
    page = site.visit(site.gateway.key).page
    for name in ("of-both", "team/docs & more"):
        page.goto(f"{site.gateway.url}/jobs/{quote(name, safe='')}")
        expect(page.get_by_role("heading", name=name)).to_be_visible()
    fresh = site.visit().page
    fresh.goto(f"{site.gateway.url}/jobs/{quote('team/docs & more', safe='')}")
    fresh.get_by_label("API key", exact=True).fill(site.gateway.key)
    fresh.keyboard.press("Enter")
    expect(fresh.get_by_role("heading", name="team/docs & more")).to_be_visible()


@pytest.mark.parametrize("width", [360, 768, 1_000, 1_200])
def test_estimates_and_names_are_never_cut(site: Site, width: int) -> None:
    labelled(site)
    page = site.visit(site.gateway.key, width=width).page
    page.goto(site.gateway.url + "/jobs?model=of-labels")
    row = page.locator("table.jobs tbody tr").filter(has_text=LONG)
    expect(row).to_contain_text("left")
    assert overflow(page) <= 0
    assert (
        page.evaluate("""() => [...document.querySelectorAll(".jobs *")]
        .filter(each => each.scrollWidth > each.clientWidth + 1 && getComputedStyle(each).overflowX !== "visible")
        .map(each => each.outerHTML)""")
        == []
    )
    assert (
        page.evaluate("""() => [...document.querySelectorAll(".jobs td, .jobs th")]
        .filter(each => each.clientWidth && each.scrollWidth > each.clientWidth + 1).map(each => each.outerHTML)""")
        == []
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious_in_the_list(site: Site, axe: str, scheme: str) -> None:
    labelled(site)
    visit = site.visit(site.gateway.key, scheme="dark" if scheme == "dark" else "light")
    for path in ("/jobs?model=of-labels", "/jobs?label=team:search&since=2020-01-01"):
        visit.go(path)
        assert serious(visit.page, axe) == [], path
    visit.errors.clear()
