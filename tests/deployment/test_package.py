"""The package as `pip install vectormill[worker,embedded]` gives it, in an empty environment."""

import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

_CHECKOUT = Path(__file__).resolve().parents[2]
_FIRST_VECTORS = """
import vectormill

with vectormill.connect() as mill:
    job = mill.embed(["a mill grinds grain", "Postgres keeps rows"], model="all-MiniLM-L6-v2")
    job.wait(300)
    assert job.to_arrow().num_rows == 2
    assert job.receipt().verify().verified
"""


def _run(*command: str | Path, cwd: Path, **environment: str) -> str:
    # Nothing of the checkout, and none of its environment's programs.
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env={**kept, **environment},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Build the sdist from the committed and the new files, and the wheel from the sdist; return both."""
    folder = tmp_path_factory.mktemp("built")
    source, dist = folder / "source", folder / "dist"
    listed = _run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=_CHECKOUT).splitlines()
    for name in filter(lambda name: (_CHECKOUT / name).is_file(), listed):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((_CHECKOUT / name).read_bytes())
    dist.mkdir()
    build = f"from setuptools import build_meta; build_meta.build_sdist({str(dist)!r})"
    _run(sys.executable, "-c", build, cwd=source)
    (sdist,) = dist.glob("*.tar.gz")
    _run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", dist, sdist, cwd=dist)
    (wheel,) = dist.glob("*.whl")
    return {"sdist": sdist, "wheel": wheel}


def test_the_wheel_has_what_it_needs_and_nothing_else(built: dict[str, Path]) -> None:
    with zipfile.ZipFile(built["wheel"]) as wheel:
        names = set(wheel.namelist())
    code = {name.partition("/")[0] for name in names if ".dist-info/" not in name}
    assert code == {"pipeline", "workers", "migrations", "vectormill"}
    assert not [name for name in names if name.startswith("pipeline/client")]
    tracked = _run("git", "ls-files", "pipeline", "workers", "migrations", cwd=_CHECKOUT).splitlines()
    moved = {name.replace("pipeline/client/", "") for name in tracked if (_CHECKOUT / name).is_file()}
    assert moved - names == set()
    assert [name for name in names if name.endswith("licenses/LICENSE")]
    with tarfile.open(built["sdist"]) as sdist:
        assert [name for name in sdist.getnames() if name.endswith("/LICENSE")]


def test_it_gives_first_vectors_in_an_empty_environment(built: dict[str, Path], tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    venv.create(tmp_path / "env", with_pip=True)
    programs = tmp_path / "env" / "bin"
    install = ("install", "--quiet", "--constraint", _CHECKOUT / "constraints.txt")
    _run(programs / "python", "-m", "pip", *install, f"{built['wheel']}[worker,embedded]", cwd=tmp_path)
    there = {"HOME": str(home), "PATH": f"{programs}:/usr/bin:/bin"}
    assert _run(programs / "vectormill", "--version", cwd=tmp_path, **there).startswith("vectormill ")
    try:
        _run(programs / "vectormill", "up", "--detach", cwd=tmp_path, **there)
        assert (home / ".vectormill").is_dir()
        _run(programs / "python", "-c", _FIRST_VECTORS, cwd=tmp_path, **there)
    finally:
        _run(programs / "vectormill", "down", "--delete", "--yes", cwd=tmp_path, **there)
