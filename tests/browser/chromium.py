"""Headless Chromium, and a record of the requests and errors of its pages."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from shutil import which
from typing import Literal
from urllib.parse import urlsplit

from playwright.sync_api import Browser, BrowserContext, Page, Request, expect, sync_playwright

_ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
_PATIENCE_MS = 90_000
Scheme = Literal["light", "dark"]


@contextmanager
def chromium() -> Iterator[Browser]:
    """Run a browser with an empty profile, for the length of the block."""
    program = which("chromium") or which("chromium-browser")
    assert program, "Chromium is missing: apt-get install chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=_ARGUMENTS)
        try:
            yield browser
        finally:
            browser.close()


@dataclass
class Visit:
    """Visit of a person with a browser."""

    url: str
    page: Page
    requests: list[Request] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def go(self, path: str) -> None:
        """Open a page."""
        self.page.goto(self.url + path)

    def log_in(self, key: str) -> None:
        """Log in from the log-in page."""
        self.go("/login")
        self.page.get_by_label("API key", exact=True).fill(key)
        self.page.get_by_role("button", name="Log in").click()
        self.page.wait_for_url(lambda url: "/login" not in url)

    def hosts(self) -> set[str | None]:
        """Return the hosts that requests went to."""
        return {urlsplit(request.url).hostname for request in self.requests}


@contextmanager
def visiting(
    browser: Browser, url: str, *, scheme: Scheme = "light", width: int = 1_280, height: int = 800
) -> Iterator[Visit]:
    """Open a visit without cookies. Its requests and the errors of scripts are recorded."""
    context: BrowserContext = browser.new_context(
        color_scheme=scheme, viewport={"width": width, "height": height}, reduced_motion="reduce"
    )
    page = context.new_page()
    page.set_default_timeout(_PATIENCE_MS)
    expect.set_options(timeout=_PATIENCE_MS)
    visit = Visit(url, page)
    page.on("request", lambda request: visit.requests.append(request))
    page.on("pageerror", lambda error: visit.errors.append(str(error)))
    page.on("console", lambda message: visit.errors.append(message.text) if message.type == "error" else None)
    try:
        yield visit
    finally:
        context.close()
