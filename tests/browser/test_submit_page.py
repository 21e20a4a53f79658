"""Submission of a file in a real Chromium, with a real upload."""

import shlex
from http.client import HTTPConnection
from pathlib import Path
from uuid import UUID

import httpx2 as httpx
import pytest
from playwright.sync_api import Page, expect

from tests.browser.chromium import Scheme
from tests.browser.conftest import Site
from tests.browser.test_dashboard import collection, overflow, serious
from tests.browser.test_playground import forgive
from tests.support.jobs_made import job_row, run_sql


@pytest.fixture
def page(site: Site) -> Page:
    visit = site.visit(site.gateway.key)
    visit.go("/submit")
    return visit.page


def table(site: Site, name: str = "flour.csv") -> Path:
    path = site.folder / name
    path.write_text("sku,subject,body\n1,Flour,Fine and white\n2,Bran,Coarse\n")
    return path


def submitted(page: Page) -> UUID:
    """Return the job on whose page a submission has ended."""
    page.wait_for_url("**/jobs/*")
    return UUID(page.url.rpartition("/")[2])


def test_a_file_becomes_a_job(site: Site, page: Page) -> None:
    page.get_by_label("File", exact=True).set_input_files(table(site))
    page.get_by_label("Model").select_option("static")
    page.get_by_label("Or a template of several columns").fill(r"{subject}\n\n{body}")
    page.get_by_label("Key column").fill("sku")
    page.get_by_label("Name").fill("by hand")
    page.get_by_label("Labels, one a line").fill("team=search\n\nsource=shop floor\n")
    page.get_by_role("button", name="Submit").click()
    job = submitted(page)
    expect(page.get_by_role("heading", name="by hand")).to_be_visible()
    site.gateway.fleet.await_end(job)
    row = job_row(site.gateway.engine, job)
    assert row["labels"] == {"team": "search", "source": "shop floor"}
    found = run_sql(
        site.gateway.engine, "select key, text from vectormill.items where job_id = :job order by index", job=job
    )
    assert [tuple(each) for each in found] == [("1", "Flour\n\nFine and white"), ("2", "Bran\n\nCoarse")]


def test_the_command_beside_the_form_does_the_same(site: Site, page: Page) -> None:
    shown = page.locator("#command code")
    expect(shown).to_have_text("vectormill submit FILE")
    page.get_by_label("File", exact=True).set_input_files(table(site, "flour and bran.csv"))
    page.get_by_label("Model").select_option("static")
    page.get_by_label("Text column").fill("body")
    page.get_by_label("Key column").fill("sku")
    page.get_by_label("Labels, one a line").fill("a=1\nb=it's 2")
    expect(shown).to_have_text(
        "vectormill submit 'flour and bran.csv' --model static --text-column body --key-column sku "
        """--label a=1 --label 'b=it'"'"'s 2'"""
    )
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.locator("#command").get_by_role("button", name="Copy").click()
    expect(page.locator("#tip")).to_have_text("Copied")
    words = shlex.split(page.evaluate("navigator.clipboard.readText()"))
    words[2] = str(site.folder / words[2])
    job = UUID(site.gateway.fleet.cli(*words[1:]).stdout.strip())
    assert job_row(site.gateway.engine, job)["labels"] == {"a": "1", "b": "it's 2"}


def test_a_collection_is_synced(site: Site, page: Page) -> None:
    collection(site)
    page.reload()
    page.get_by_label("File", exact=True).set_input_files(site.corpus("fresh", 41))
    page.get_by_label("Goes to").select_option(label="the collection tickets, by static")
    expect(page.locator("#command code")).to_have_text("vectormill sync tickets fresh.jsonl")
    page.get_by_label("Text column").fill("body")
    page.get_by_role("button", name="Submit").click()
    fault = page.get_by_role("alert")
    expect(fault).to_contain_text("text_column: the collection tickets has its own; leave it empty.")
    page.get_by_label("Text column").fill("")
    page.get_by_label("File", exact=True).set_input_files(site.corpus("fresh", 41))
    page.get_by_role("button", name="Submit").click()
    job = submitted(page)
    assert site.gateway.fleet.await_end(job)["state"] == "completed"
    found = run_sql(site.gateway.engine, "select added from vectormill.syncs where job_id = :job", job=job)
    assert found[0][0] == 1
    forgive(site, "400")


def test_a_missing_column_is_told_and_the_other_fields_stay(site: Site, page: Page) -> None:
    page.get_by_label("File", exact=True).set_input_files(table(site))
    page.get_by_label("Model").select_option("static")
    page.get_by_label("Key column").fill("sku")
    page.get_by_label("Name").fill("kept")
    page.get_by_label("Labels, one a line").fill("team=search")
    page.get_by_role("button", name="Submit").click()
    fault = page.get_by_role("alert")
    expect(fault).to_contain_text('text_column: flour.csv line 1: no column "text"; columns are sku, subject, body.')
    expect(page.get_by_label("Model")).to_have_value("static")
    expect(page.get_by_label("Key column")).to_have_value("sku")
    expect(page.get_by_label("Name")).to_have_value("kept")
    expect(page.get_by_label("Labels, one a line")).to_have_value("team=search")
    expect(page.locator("#command code")).to_have_text(
        "vectormill submit FILE --model static --key-column sku --name kept --label team=search"
    )
    page.get_by_label("File", exact=True).set_input_files(table(site))
    page.get_by_label("Text column").fill("body")
    page.get_by_role("button", name="Submit").click()
    assert job_row(site.gateway.engine, submitted(page))["name"] == "kept"
    forgive(site, "400")


def test_files_that_are_none_of_ours_are_told(site: Site, page: Page) -> None:
    path = site.folder / "photo.png"
    path.write_bytes(b"\x89PNG")
    page.get_by_label("File", exact=True).set_input_files(path)
    page.get_by_label("Model").select_option("static")
    page.get_by_role("button", name="Submit").click()
    expect(page.get_by_role("alert")).to_contain_text("photo.png")
    page.get_by_label("Model").select_option("static")
    page.evaluate("document.getElementById('submission').noValidate = true")
    page.get_by_role("button", name="Submit").click()
    expect(page.get_by_role("alert")).to_contain_text("file: the form has no file.")
    forgive(site, "400")


def test_a_form_that_is_sent_twice_makes_one_job(site: Site) -> None:
    with table(site).open("rb") as file:
        content = file.read()
    fields = {"model": "static", "text_column": "body", "name": "sent twice", "idempotency_key": "a page's own"}
    cookies, ours = {"vectormill_key": site.gateway.key}, {"sec-fetch-site": "same-origin"}
    with httpx.Client(base_url=site.gateway.url, cookies=cookies, headers=ours, timeout=60) as client:
        places = {
            client.post("/submit", data=fields, files={"file": ("flour.csv", content)}).headers["location"]
            for _ in range(2)
        }
    assert len(places) == 1


def test_a_file_over_the_limit_is_refused_before_it_is_read(site: Site) -> None:
    connection = HTTPConnection(site.gateway.url.removeprefix("http://"))
    connection.putrequest("POST", "/submit")
    for name, value in {
        "accept": "text/html",
        "content-type": "multipart/form-data; boundary=x",
        "content-length": str(2**41),
        "expect": "100-continue",
    }.items():
        connection.putheader(name, value)
    connection.endheaders()
    reply = connection.getresponse()
    assert reply.status == 413
    assert b"<h1>Too large</h1>" in reply.read()
    connection.close()


def test_another_site_can_submit_nothing(site: Site, page: Page) -> None:
    elsewhere = page.context.new_page()
    address = f"{site.gateway.url}/submit"
    html = (
        f'<form method="post" action="{address}" enctype="multipart/form-data">'
        '<input name="model" value="static"><button>Win a prize</button></form>'
    )
    elsewhere.route("**/prize", lambda route: route.fulfill(body=html, content_type="text/html"))
    elsewhere.goto(site.gateway.url.replace("127.0.0.1", "localhost") + "/prize")
    with elsewhere.expect_response(address) as refused:
        elsewhere.get_by_role("button").click()
    assert refused.value.status == 403


def test_it_works_without_scripts(site: Site) -> None:
    context = site.browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(site.gateway.url + "/login?next=/submit")
    page.get_by_label("API key", exact=True).fill(site.gateway.key)
    page.keyboard.press("Enter")
    page.get_by_label("File", exact=True).set_input_files(table(site))
    page.get_by_label("Model").select_option("static")
    page.get_by_label("Text column").fill("body")
    page.get_by_label("Text column").press("Enter")
    assert job_row(site.gateway.engine, submitted(page))["name"] == "flour"
    context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 768, 1_280])
def test_it_is_accessible_and_fits(site: Site, axe: str, scheme: Scheme, width: int) -> None:
    collection(site)
    visit = site.visit(site.gateway.key, scheme=scheme, width=width)
    visit.go("/submit")
    for _ in range(2):
        assert overflow(visit.page) <= 0
        assert serious(visit.page, axe) == []
        visit.page.get_by_label("File", exact=True).set_input_files(table(site, f"{'long' * 30}.csv"))
        visit.page.get_by_label("Name").fill("n" * 190)
        visit.page.get_by_role("button", name="Submit").click()
        expect(visit.page.get_by_role("alert")).to_contain_text("model: name one of")
    forgive(site, "400")
