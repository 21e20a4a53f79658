"""Programs shared by root's homes, and deletion of a home's data."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from pipeline.core.errors import ServerFailed, UserError
from pipeline.embedded import deletion, place, programs
from pipeline.embedded.deletion import data_folders, delete_data, size_bytes
from pipeline.embedded.programs import remove_unused_programs, share_programs, shared_programs
from pipeline.embedded.runtime import hold_home
from tests.support.commands import run_command

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root's homes share programs")


@pytest.fixture
def roots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Replace the folder in which root keeps all data."""
    folder = tmp_path / "roots"
    monkeypatch.setattr(programs, "ROOTS_FOLDER", folder)
    monkeypatch.setattr(place, "ROOTS_FOLDER", folder)
    return folder


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    """Make a package with a program that runs until it is stopped."""
    folder = tmp_path / "site-packages" / "server"
    (folder / "bin").mkdir(parents=True)
    shutil.copy(shutil.which("sleep") or "", folder / "bin" / "sleep")
    (folder / "bin" / "sleep").chmod(0o700)
    return folder


@contextmanager
def running_from(folder: Path) -> Iterator[psutil.Process]:
    """Run the program of a folder for the length of the block."""
    with subprocess.Popen([folder / "bin" / "sleep", "600"]) as process:
        try:
            yield psutil.Process(process.pid)
        finally:
            process.kill()


@as_root
def test_many_starts_at_once_make_one_copy_that_all_may_read_and_root_alone_may_write(roots: Path, wheel: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: share_programs(wheel, "1"), range(8)))
    copy = shared_programs(wheel, "1")
    assert (copy / "bin" / "sleep").stat().st_mode & 0o777 == 0o755
    assert [each.name for each in (roots / "programs").iterdir()] == ["server-1"]
    assert not [path for path in roots.rglob("*") if path.stat().st_uid or path.stat().st_mode & 0o022]


@as_root
@pytest.mark.parametrize("open_one", ["", "programs", "programs/server-1"])
def test_programs_that_others_could_change_are_not_run(open_one: str, roots: Path, wheel: Path) -> None:
    share_programs(wheel, "1")
    (roots / open_one).chmod(0o777)
    with pytest.raises(ServerFailed, match=f"{roots / open_one} must be a folder that only root can write to"):
        share_programs(wheel, "1")


@as_root
def test_a_copy_half_made_is_made_anew(roots: Path, wheel: Path) -> None:
    half = roots / "programs" / ".new-killed"
    half.mkdir(parents=True)
    share_programs(wheel, "1")
    assert not half.exists()
    assert shared_programs(wheel, "1").exists()


@as_root
def test_a_new_version_takes_away_those_that_nothing_runs_from(roots: Path, wheel: Path) -> None:
    share_programs(wheel, "1")
    with running_from(shared_programs(wheel, "1")):
        share_programs(wheel, "2")
        assert shared_programs(wheel, "1").exists()
    share_programs(wheel, "3")
    assert [each.name for each in (roots / "programs").iterdir()] == ["server-3"]


@as_root
def test_the_last_home_takes_the_programs_away_that_nothing_runs_from(roots: Path, wheel: Path) -> None:
    share_programs(wheel, "1")
    (roots / "a home").mkdir()
    remove_unused_programs()
    assert shared_programs(wheel, "1").exists()
    (roots / "a home").rmdir()
    with running_from(shared_programs(wheel, "1")):
        remove_unused_programs()
        assert shared_programs(wheel, "1").exists()
    remove_unused_programs()
    assert list((roots / "programs").iterdir()) == []


@pytest.fixture
def home(tmp_path: Path, roots: Path) -> Path:
    """Make a home with data, and with a file that somebody else put there."""
    folder = tmp_path / "home"
    for name in ("run/api.key", "logs/up.log", "valkey/password", "files/a", "mine/notes.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("some\n")
    kept = place.Place.of_home(folder)
    (kept.data / "base").mkdir(parents=True)
    (kept.data / "base" / "1").write_text("rows\n")
    kept.make_staging()
    return folder


def test_a_homes_own_data_go_and_nothing_else(home: Path, roots: Path, tmp_path: Path) -> None:
    (other := place.Place.of_home(tmp_path / "other").data).mkdir(parents=True)
    folders = data_folders(home)
    assert size_bytes(folders) == 4 * len("some\n") + len("rows\n")
    with hold_home(home):
        delete_data(home)
    assert not [folder for folder in folders if folder.exists()]
    assert [path.name for path in home.iterdir()] == ["mine"]
    assert (home / "mine" / "notes.txt").exists()
    assert other.exists()
    assert data_folders(home) == []
    with hold_home(home):  # a start must not wait for anything that was deleted
        pass


def test_data_behind_a_link_stay(home: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    shutil.rmtree(home / "files")
    (home / "files").symlink_to(tmp_path / "disk")
    with hold_home(home), pytest.raises(UserError, match="files is a link"):
        delete_data(home)
    assert (tmp_path / "disk").exists()
    assert (home / "logs" / "up.log").exists()


def test_data_that_a_server_works_on_stay(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = place.Place.of_home(home).data
    with subprocess.Popen(["sleep", "600"], cwd=data) as server:
        monkeypatch.setattr(deletion, "_SERVER", "sleep")
        with hold_home(home), pytest.raises(ServerFailed, match=f"process {server.pid}"):
            delete_data(home)
        server.kill()
    assert (data / "base" / "1").exists()
    assert (home / "logs" / "up.log").exists()


def test_nobody_who_could_be_asked_means_that_nothing_is_deleted(home: Path) -> None:
    environment = {**os.environ, "VECTORMILL_HOME": str(home)}
    before = sorted(home.rglob("*"))
    done = run_command("down", "--delete", environment=environment)
    assert (done.returncode, done.stderr) == (
        2,
        "error there is no terminal to confirm the deletion of the data; confirm it with --yes.\n",
    )
    assert sorted(home.rglob("*")) == before
    done = run_command("down", "--delete", "--yes", environment=environment)
    assert done.returncode == 0
    assert done.stderr.splitlines() == ["Nothing runs here.", f"Deleted the data of {home}: 25 bytes."]
    assert data_folders(home) == []


def test_yes_without_its_question_is_refused(home: Path) -> None:
    done = run_command("down", "--yes", environment={**os.environ, "VECTORMILL_HOME": str(home)})
    assert done.returncode == 2
    assert data_folders(home) != []
