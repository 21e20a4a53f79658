"""Screenshots of each page and of the terminal in light and dark, with jobs in every state, and of the tutorial's
notebook: `make screenshots` writes docs/screenshots/."""

import fcntl
import io
import os
import pty
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from math import inf
from pathlib import Path
from tempfile import TemporaryDirectory

from nbconvert import HTMLExporter
from PIL import Image
from playwright.sync_api import Browser, FloatRect, Page
from rich.console import Console
from rich.terminal_theme import DEFAULT_TERMINAL_THEME, SVG_EXPORT_THEME
from rich.text import Text
from sqlalchemy import Engine, text

from pipeline.catalog import keys, models
from pipeline.db.database import make_engine
from pipeline.db.migrate import upgrade
from pipeline.embedded.runtime import Running
from tests.acceptance.fleet import Fleet
from tests.browser import demo_state
from tests.browser.chromium import Scheme, chromium, visiting
from tests.contract.conftest import Gateway
from tests.support.machines import remove_what_root_keeps, running_servers
from tests.support.ports import free_port

_DOCS = Path(__file__).resolve().parent.parent.parent / "docs"
_FOLDER = _DOCS / "screenshots"
_NOTEBOOK = _DOCS / "tutorials" / "support_tickets.ipynb"
_COLOURS = 256
#: Limit in pixels: a long table looks the same further down.
_MOST_HEIGHT = 2_000
_COMMANDS = (
    ("jobs",),
    ("status", "docs-nightly"),
    ("receipt", "crawl-0731"),
    ("rejects", "crawl-0731", "--limit", "4"),
    ("models", "list"),
    ("collections", "list"),
)


def main() -> None:
    """Take all screenshots."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else _FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as temporary:
        Path(temporary).chmod(0o711)
        home = Path(temporary, "home")
        try:
            with (
                running_servers(home, _migrate) as servers,
                _api(servers, Path(temporary)) as (gateway, paths),
                chromium() as browser,
            ):
                for scheme in ("light", "dark"):
                    _take(browser, gateway, paths, folder, scheme)
                _take_terminal(browser, gateway, folder)
                _take_notebook(browser, folder / "notebook.png")
        finally:
            remove_what_root_keeps(home)


def _migrate(url: str) -> None:
    engine = make_engine(url, application="vectormill-tests")
    with engine.begin() as connection:
        upgrade(connection)
    engine.dispose()


@contextmanager
def _api(servers: Running, logs: Path) -> Iterator[tuple[Gateway, dict[str, str]]]:
    """Run an api on the demo state. Yield its gateway, and the paths of its pages by the names of their pictures."""
    engine = make_engine(servers.database_url, application="vectormill-tests")
    environment = {
        "VECTORMILL_DATABASE_URL": servers.database_url,
        "VECTORMILL_REDIS_URL": servers.redis_url,
        "VECTORMILL_FLOWER_URL": "http://127.0.0.1:5555",
    }
    with engine.begin() as connection:
        workspace = models.workspace_id(connection)
        made = {
            name: keys.create(connection, workspace, name, admin=name == "operations")
            for name in ("operations", "search-service", "nightly-etl", "notebook")
        }
    jobs = demo_state.fill(engine, {name: key.id for name, key in made.items() if name != "operations"})
    with engine.begin() as connection:
        keys.revoke(connection, workspace, made["notebook"].id)
    fleet = Fleet(engine=engine, environment=environment, logs=logs)
    gateway = Gateway(fleet, engine, f"http://127.0.0.1:{free_port()}", made["operations"].token)
    try:
        gateway.start_api()
        yield (
            gateway,
            {
                "overview": "/",
                "jobs": "/jobs",
                "job": f"/jobs/{jobs['docs-nightly']}",
                "failed": f"/jobs/{jobs['crawl-0731']}",
                "paused": f"/jobs/{jobs['mail-archive']}",
                "rejects": f"/jobs/{jobs['crawl-0731']}/rejects?code=too_long",
                "collections": "/collections",
                "collection": f"/collections/{_collection(engine)}",
                "playground": "/playground",
                "submit": "/submit",
                "workers": "/workers",
                "models": "/models",
                "usage": "/usage",
                "keys": "/keys",
            },
        )
    finally:
        fleet.close()
        engine.dispose()


def _collection(engine: Engine) -> int:
    with engine.begin() as connection:
        return int(
            connection.execute(text("select id from vectormill.collections where name = 'tickets'")).scalar_one()
        )


def _take(browser: Browser, gateway: Gateway, paths: dict[str, str], folder: Path, scheme: Scheme) -> None:
    for width, suffix in ((1_280, ""), (390, "-phone")):
        with visiting(browser, gateway.url, scheme=scheme, width=width, height=844) as visit:
            visit.go("/login")
            _save(visit.page, folder / f"login-{scheme}{suffix}.png")
            visit.log_in(gateway.key)
            for name, path in paths.items():
                demo_state.stay_awake(gateway.engine)
                visit.go(path)
                _save(visit.page, folder / f"{name}-{scheme}{suffix}.png")
            assert not visit.errors, visit.errors


def _take_terminal(browser: Browser, gateway: Gateway, folder: Path) -> None:
    """Take commands on narrow and wide terminals."""
    for width in (80, 200):
        demo_state.stay_awake(gateway.engine)
        shown = "".join(_on_terminal(gateway, width, *command) for command in _COMMANDS)
        for scheme, theme in (("light", DEFAULT_TERMINAL_THEME), ("dark", SVG_EXPORT_THEME)):
            console = Console(record=True, file=io.StringIO(), width=width)
            console.print(Text.from_ansi(shown))
            page = browser.new_page(viewport={"width": 12 * width + 80, "height": 844})
            page.set_content(f"<title>terminal</title>{console.export_svg(title='', theme=theme)}")
            _save(page, folder / f"terminal-{width}-{scheme}.png")
            page.close()


def _on_terminal(gateway: Gateway, width: int, *arguments: str) -> str:
    """Run a command on a terminal of this width. Return what it shows below a prompt."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, width, 0, 0))
    environment = {**os.environ, **gateway.fleet.environment, "TERM": "xterm-256color", "COLORTERM": "truecolor"}
    command = [sys.executable, "-m", "pipeline.cli", *arguments]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs, env=environment):
        os.close(theirs)
        shown = b""
        with suppress(OSError):  # the end of a terminal that nobody writes to
            while read := os.read(ours, 65_536):
                shown += read
    os.close(ours)
    lines = shown.decode().replace("\r", "")
    return f"$ vectormill {' '.join(arguments)}\n{lines}\n"


def _take_notebook(browser: Browser, path: Path) -> None:
    """Take the first half of what the notebook shows, with the outputs that are kept in it."""
    # Neither library is needed, and both come from elsewhere.
    html, _ = HTMLExporter(mathjax_url="", require_js_url="", exclude_anchor_links=True).from_filename(str(_NOTEBOOK))
    page = browser.new_page(viewport={"width": 1_000, "height": 844})
    page.set_content(html)
    _save(page, path, top=_heading(page, "Embed"), bottom=_heading(page, "A collection"))


def _heading(page: Page, name: str) -> float:
    """Return the place of a heading in pixels, with a margin above it."""
    box = page.get_by_role("heading", name=name, exact=True).bounding_box()
    assert box
    return box["y"] - 16


def _save(page: Page, path: Path, *, top: float = 0, bottom: float = inf) -> None:
    """Write a page's picture from `top` to `bottom`, with few colours, by which flat areas and text lose nothing."""
    # Debian's system-ui is DejaVu; Inter, where it is installed, is nearer to what other systems have.
    page.evaluate("document.documentElement.style.setProperty('--sans', 'Inter, system-ui')")
    height = page.evaluate("document.documentElement.scrollHeight")
    width = page.evaluate("document.documentElement.clientWidth")
    clip: FloatRect = {"x": 0, "y": top, "width": width, "height": min(min(height, bottom) - top, _MOST_HEIGHT)}
    page.screenshot(path=path, full_page=True, clip=clip)
    with Image.open(path) as full:
        few = full.convert("RGB").quantize(_COLOURS, Image.Quantize.MAXCOVERAGE, kmeans=3, dither=Image.Dither.NONE)
    few.save(path, optimize=True)


if __name__ == "__main__":
    main()
