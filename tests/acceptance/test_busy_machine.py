"""`vectormill up` on a busy machine, in a folder with Python modules that must not be imported."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.support.machines import remove_what_root_keeps

_BUSY_LOOPS = 4
#: Names of modules of ours, Celery's and Python's own, each imported by every process of an `up`.
_STRANGERS = ("pipeline", "workers", "celery", "typing")


class User:
    """User with a shell in a folder of their own."""

    def __init__(self, folder: Path) -> None:
        self.home = folder / "home"
        self._folder = folder / "here"
        self._folder.mkdir()
        for name in _STRANGERS:
            (self._folder / f"{name}.py").write_text("raise SystemExit('a stranger was run')\n")

    def types(self, line: str) -> str:
        """Run a line in bash; return what it prints on standard error."""
        environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "VECTORMILL_HOME": str(self.home),
            "VECTORMILL_API_PORT": "0",
            "VECTORMILL_FLOWER_PORT": "0",
        }
        done = subprocess.run(
            ["bash", "-euc", line], cwd=self._folder, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert "stranger" not in done.stderr + "".join(log.read_text() for log in self.home.glob("logs/*.log"))
        return done.stderr


@pytest.fixture
def user() -> Iterator[User]:
    """Yield a user who has no data yet, and delete the data at the end."""
    with TemporaryDirectory() as folder:
        Path(folder).chmod(0o711)
        made = User(Path(folder))
        try:
            yield made
        finally:
            made.types("vectormill down --delete --yes")
            if os.geteuid() == 0:
                remove_what_root_keeps(made.home)


@contextmanager
def busy_loops(count: int) -> Iterator[None]:
    """Run processes that compute for as long as the block lasts."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
        assert [loop.poll() for loop in loops] == [None] * count
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


@pytest.mark.timeout(1800)
@pytest.mark.alone
def test_up_succeeds_beside_four_busy_loops(user: User) -> None:
    """First start of a home, with its database to create and its model to describe; then a job.

    On two cores this takes one and a half to four minutes, two thirds of which go to the four loops. Time isn't
    asserted: the limit of half an hour is for a test that hangs.
    """
    with busy_loops(_BUSY_LOOPS):
        assert "Ready after" in user.types("vectormill up --detach")
        user.types("""printf '{"text": "%s"}\n' a b | vectormill submit - --model all-MiniLM-L6-v2 --wait""")
    # By then the shell's URLs are those of servers that are gone.
    said = user.types('eval "$(vectormill env)"; vectormill down; vectormill up --detach; vectormill jobs')
    assert "VECTORMILL_DATABASE_URL and VECTORMILL_REDIS_URL: this home's own" in said
