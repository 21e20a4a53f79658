"""Overview in a real Chromium: it says that all is well only while it is."""

import re

from playwright.sync_api import Page, expect

from tests.browser.conftest import Site

_WORKSPACE, _NAME = "nights", "nightly"


def run_nightly(site: Site, texts: int, bad: int) -> str:
    """Run a job of the name to its end; return its state."""
    fleet = site.gateway.fleet
    corpus = site.corpus(f"{texts}-{bad}", texts, bad=bad)
    job = fleet.submit(corpus, "--model", "static", "--name", _NAME, "--workspace", _WORKSPACE)
    return str(fleet.await_end(job)["state"])


def tab_to(page: Page, name: str) -> None:
    """Press Tab until a link of this name has the focus."""
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.textContent") == name:
            return
    raise AssertionError(f"no Tab leads to {name}")


def test_all_is_well_until_a_job_fails_and_again_after_one_that_succeeds(site: Site) -> None:
    page = site.visit(site.gateway.workspace(_WORKSPACE)).page
    page.goto(site.gateway.url + "/")
    health = page.locator("#health")
    expect(health).to_have_text("All is well")
    expect(page.locator("#throughput")).to_contain_text("Nothing was embedded.")
    expect(page.locator("#queue")).to_contain_text("Nothing waits.")

    assert run_nightly(site, 0, bad=30) == "failed"
    expect(health).to_have_text("1 thing needs a look")
    expect(page.get_by_role("list", name="What isn’t well")).to_contain_text(f"{_NAME} failed")
    expect(page.locator("#failures")).to_contain_text(re.compile(r"Failed jobs\s+1\s+Rejected items\s+30\s"))
    tab_to(page, "The job")
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name=_NAME)).to_be_visible()

    assert run_nightly(site, 50, bad=0) == "completed"
    page.goto(site.gateway.url + "/")
    expect(health).to_have_text("All is well")
    expect(page).to_have_title("All is well · vectormill")
    expect(page.locator("#failures")).to_contain_text("a later job of this name is completed")
