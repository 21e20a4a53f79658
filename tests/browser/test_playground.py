"""Playground in a real Chromium, with a real engine."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import Locator, Page, expect

from pipeline.catalog import models as catalog
from pipeline.db import workspaces
from tests.acceptance.fleet import eventually
from tests.browser.chromium import Scheme
from tests.browser.conftest import Site
from tests.browser.test_dashboard import collection, overflow, serious
from tests.support.jobs_made import run_sql

TEXT = 'Millstones of granite, it’s said, last "longest".\n\n$HOME isn\'t read by a shell.'


@pytest.fixture(scope="module")
def engine(running_site: Site, bundled_description: dict[str, Any]) -> None:
    """Run an engine that serves `static`, and `minilm`, which reads 256 tokens of a text."""
    fleet = running_site.gateway.fleet
    with running_site.gateway.engine.begin() as connection:
        catalog.add_model(connection, "minilm", bundled_description)
    fleet.start("engine", "workers.engine.server", VECTORMILL_WORKER_MODELS="static,minilm")
    eventually(lambda: fleet.scalar("select count(*) from vectormill.engines"), "an engine")


@pytest.fixture
def page(site: Site, engine: None) -> Iterator[Page]:
    visit = site.visit(site.gateway.key)
    visit.go("/playground")
    yield visit.page
    assert not any("granite" in request.url for request in visit.requests), "a text is in an address"


def part(page: Page, name: str) -> Locator:
    return page.locator(f"#{name}")


def requests_metered(site: Site, model: str) -> list[tuple[int, int]]:
    """Return items and tokens of each request for a model, in their order."""
    found = run_sql(
        site.gateway.engine,
        "select items, prompt_tokens from vectormill.usage where model = :model and request_id is not null order by id",
        model=model,
    )
    return [(row[0], row[1]) for row in found]


def test_a_collection_is_searched(site: Site, page: Page) -> None:
    collection(site)
    page.reload()
    before = len(requests_metered(site, "static"))
    search = part(page, "search")
    search.get_by_label("Collection").select_option(label="tickets")
    search.get_by_label("Query").fill("The mill number 7 stands by the river.")
    search.get_by_label("Results").fill("3")
    search.get_by_role("button", name="Search").click()
    rows = search.locator("tbody tr")
    expect(rows).to_have_count(3)
    expect(rows.first).to_contain_text("doc-7")
    expect(rows.first).to_contain_text("1.000")
    assert page.url == f"{site.gateway.url}/playground?trial=search#search"
    expect(search.get_by_label("Query")).to_have_value("The mill number 7 stands by the river.")
    eventually(lambda: len(requests_metered(site, "static")) == before + 1, "the search's usage")


def test_two_texts_are_compared_and_metered_one_by_one(site: Site, page: Page) -> None:
    before = len(requests_metered(site, "minilm"))
    compare = part(page, "compare")
    compare.get_by_label("Model").select_option("minilm")
    compare.get_by_label("First text").fill("granite")
    compare.get_by_label("Second text").fill("granite " * 300)
    compare.get_by_role("button", name="Compare").click()
    first, second = compare.locator("dl div").nth(1), compare.locator("dl div").nth(2)
    expect(first).to_contain_text("3 tokens")
    expect(first).not_to_contain_text("truncated")
    expect(second).to_contain_text("256 tokens truncated: minilm reads no more of a text")
    similarity = compare.locator("dl div").first.locator("dd").inner_text()
    assert re.fullmatch(r"0\.\d{4}", similarity)
    eventually(lambda: requests_metered(site, "minilm")[before:] == [(1, 3), (1, 256)], "the usage of both")


def test_a_text_is_embedded_and_curl_and_python_do_the_same(site: Site, page: Page) -> None:
    embed = part(page, "embed")
    embed.get_by_label("Model").select_option("static")
    embed.get_by_label("Text", exact=True).fill(TEXT)
    embed.get_by_role("button", name="Embed").click()
    expect(embed.locator("dl")).to_contain_text("256")
    expect(embed.get_by_label("Text", exact=True)).to_have_value(TEXT)
    shown = embed.locator("dl").inner_text()
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    copied = []
    for button in embed.get_by_role("button", name="Copy").all():
        button.click()
        expect(page.locator("#tip")).to_have_text("Copied")
        copied.append(page.evaluate("navigator.clipboard.readText()"))
    curl, python = copied
    assert site.gateway.key not in page.content()
    by_curl = json.loads(run(site, "bash", "-c", curl))
    by_python = json.loads(run(site, sys.executable, "-c", f"{python}\nprint(vector)"))
    vector = by_curl["data"][0]["embedding"]
    assert vector == pytest.approx(by_python, abs=1e-6)
    assert f"{by_curl['usage']['prompt_tokens']} tokens" in shown
    assert ", ".join(f"{number:.4f}" for number in vector[:8]) in shown


def run(site: Site, *command: str) -> str:
    """Run a command with the gateway's address and key in its environment; return what it prints."""
    environment = {"VECTORMILL_API_URL": site.gateway.url, "VECTORMILL_API_KEY": site.gateway.key}
    done = subprocess.run(command, env={**os.environ, **environment}, check=True, capture_output=True, text=True)
    return done.stdout


def test_an_error_is_told_beside_the_form_and_the_text_stays(site: Site, page: Page) -> None:
    embed = part(page, "embed")
    embed.get_by_label("Model").select_option("unserved")
    embed.get_by_label("Text", exact=True).fill("granite")
    embed.get_by_role("button", name="Embed").click()
    expect(embed.get_by_role("alert")).to_have_text('No engine serves the model "unserved" now.')
    expect(embed.get_by_label("Text", exact=True)).to_have_value("granite")
    expect(embed.get_by_label("Model")).to_have_value("unserved")
    forgive(site, "503")


def test_the_limits_of_the_workspace_hold(site: Site, engine: None) -> None:
    visit = site.visit(site.gateway.workspace("limited", requests_per_minute=1))
    visit.go("/playground")
    compare = part(visit.page, "compare")
    for label in ("First text", "Second text"):
        compare.get_by_label(label).fill("granite")
    compare.get_by_role("button", name="Compare").click()
    expect(compare.get_by_role("alert")).to_contain_text("requests")
    forgive(site, "429")


def test_where_no_model_is_served_the_command_is_shown(site: Site, engine: None) -> None:
    with site.gateway.engine.begin() as connection:
        made = workspaces.create(connection, "unserved-only", 1.0)
        assert made
        workspaces.enable_models(connection, made, ["unserved"])
    visit = site.visit(site.gateway.new_key("unserved-only"))
    visit.go("/playground")
    expect(visit.page.locator(".notice")).to_contain_text("vectormill engine --model unserved")
    expect(part(visit.page, "search")).to_contain_text("vectormill collections create")


def test_another_site_can_try_nothing(site: Site, page: Page) -> None:
    elsewhere = page.context.new_page()
    address = f"{site.gateway.url}/playground?trial=embed"
    html = f'<form method="post" action="{address}"><input name="text" value="granite"><button>Win</button></form>'
    elsewhere.route("**/prize", lambda route: route.fulfill(body=html, content_type="text/html"))
    elsewhere.goto(site.gateway.url.replace("127.0.0.1", "localhost") + "/prize")
    with elsewhere.expect_response(address) as refused:
        elsewhere.get_by_role("button").click()
    assert refused.value.status == 403


def test_it_works_by_keyboard_and_without_scripts(site: Site, engine: None) -> None:
    context = site.browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(site.gateway.url + "/login?next=/playground")
    page.get_by_label("API key", exact=True).fill(site.gateway.key)
    page.keyboard.press("Enter")
    embed = part(page, "embed")
    embed.get_by_label("Model").focus()
    page.keyboard.press("Tab")
    page.keyboard.type("granite")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(embed.locator("dl")).to_contain_text("tokens")
    context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 768, 1_280])
def test_it_is_accessible_and_fits(site: Site, engine: None, axe: str, scheme: Scheme, width: int) -> None:
    visit = site.visit(site.gateway.key, scheme=scheme, width=width)
    visit.go("/playground")
    check(visit.page, axe)
    embed = part(visit.page, "embed")
    embed.get_by_label("Text", exact=True).fill("granite" * 40)
    embed.get_by_role("button", name="Embed").click()
    expect(embed.get_by_role("heading", name="The same with curl")).to_be_visible()
    check(visit.page, axe)


def check(page: Page, axe: str) -> None:
    page.wait_for_load_state("load")
    assert overflow(page) <= 0
    assert serious(page, axe) == []


def test_no_text_is_logged(site: Site, page: Page) -> None:
    embed = part(page, "embed")
    embed.get_by_label("Text", exact=True).fill("granite-by-itself")
    embed.get_by_role("button", name="Embed").click()
    expect(embed.locator("dl")).to_contain_text("tokens")
    logs = [path.read_text() for path in site.gateway.fleet.logs.glob("*.log")]
    assert logs
    assert not any("granite" in log for log in logs)


def forgive(site: Site, status: str) -> None:
    """Forget the browser's own messages about a page that came with this status."""
    for visit in site.visits:
        assert all(status in error for error in visit.errors), visit.errors
        visit.errors.clear()
