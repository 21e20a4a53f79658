"""The doors to a machine that runs all of vectormill: `up`, `down`, `env`."""

import queue
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from urllib.parse import urlsplit

import psutil
import typer
from rich.console import Console

from pipeline.embedded.files import last_lines, open_log
from pipeline.embedded.processes import find_process, wait_until_gone
from pipeline.embedded.runtime import Running, find_running, hold_home, stop_leftovers
from pipeline.embedded.stages import STOP_SECONDS, app_stages, metered_names
from pipeline.errors import ServerFailed, ServiceUnreachable, UserError
from pipeline.settings import Settings, load_settings

if TYPE_CHECKING:
    from pipeline.embedded.machine import Machine

_READY_SECONDS = 300.0
_HASTENED_SECONDS = 20.0
_POLL_SECONDS = 0.2

Workers = Annotated[int, typer.Option(min=1, max=64, help="Worker processes to start.")]
Detach = Annotated[bool, typer.Option("--detach", help="Return when all is ready.")]


def up(workers: Workers = 1, detach: Detach = False) -> None:
    """Run all of vectormill on this machine: servers, dispatcher, workers, engine, api, Flower.

    Servers that VECTORMILL_DATABASE_URL and VECTORMILL_REDIS_URL name are used; those not named are started.

    Examples:

        vectormill up

        vectormill up --workers 2 --detach && eval "$(vectormill env)"
    """
    settings = load_settings()
    if detach:
        _up_detached(settings, workers)
        return
    if find_running(settings.home):
        raise UserError("vectormill already runs here; stop it with: vectormill down")
    console = _console()
    machine = _machine(settings, workers)
    console.print("Starting; a first start makes the database and takes a few seconds.")
    with _on_signals(machine.request_stop):
        machine.run(lambda running: _greet(console, running, workers))
    console.print("Stopped.")


def down() -> None:
    """Stop what `up` runs here, in order: work at hand is finished first.

    Example:

        vectormill down
    """
    home = load_settings().home
    running = find_running(home)
    if running:
        _stop_supervisor(running)
    leftovers = _stop_leftovers(home)
    if running:
        message = "Stopped."
    elif leftovers:
        message = f"Stopped {leftovers} processes that an up left behind when it was killed."
    else:
        message = "Nothing runs here."
    _console().print(message)


def env() -> None:
    """Print export lines that reach what `up` runs here.

    Example:

        eval "$(vectormill env)"
    """
    running = find_running(load_settings().home)
    if running is None:
        raise ServiceUnreachable("nothing runs here; start it with: vectormill up --detach")
    values = {
        "VECTORMILL_DATABASE_URL": running.database_url,
        "VECTORMILL_REDIS_URL": running.redis_url,
        "VECTORMILL_API_URL": running.api_url,
        "VECTORMILL_API_KEY": running.api_key,
        "VECTORMILL_FLOWER_URL": running.flower_url,
        "VECTORMILL_FLOWER_PASSWORD": running.flower_password,
        "VECTORMILL_METRICS_URLS": " ".join(running.metrics_urls),
    }
    for name, value in values.items():
        typer.echo(f"export {name}={shlex.quote(value)}")


@contextmanager
def running_machine(settings: Settings, workers: int) -> Iterator[Running]:
    """Yield the `up` that runs already, or run one in this process for the length of the block.

    Raises:
        UserError: an `up` runs that isn't ready yet.
        ServerFailed: something didn't start.
    """
    running = _running_and_ready(settings.home)
    if running:
        yield running
        return
    machine = _machine(settings, workers)
    ready: queue.SimpleQueue[Running | None] = queue.SimpleQueue()
    with _on_signals(_exit, signal.SIGTERM), ThreadPoolExecutor(1, thread_name_prefix="machine") as pool:
        try:
            ended = pool.submit(machine.run, ready.put)
            ended.add_done_callback(lambda _: ready.put(None))
            if started := ready.get():
                yield started
        finally:
            with _on_signals(machine.request_stop):
                machine.request_stop()
                pool.shutdown()
    ended.result()


def _machine(settings: Settings, workers: int) -> "Machine":
    from pipeline.cli.prepare import prepare_database
    from pipeline.embedded.machine import Machine

    prepare = partial(prepare_database, home=settings.home)
    own = settings.database_url is None and settings.sql_url is None
    return Machine(
        settings,
        prepare=prepare,
        stages=lambda running: app_stages(running, workers, queries_as_owner=own),
        metered=metered_names(workers),
    )


def _up_detached(settings: Settings, workers: int) -> None:
    console = _console()
    running = _running_and_ready(settings.home)
    if running:
        console.print("vectormill already runs here and is ready.")
        return
    log = settings.home / "logs" / "up.log"
    with open_log(log) as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "pipeline.cli", "up", "--workers", str(workers)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        _greet(console, _wait_until_ready(settings.home, process, log), workers, detached=True)
    except BaseException:
        process.terminate()
        raise


def _wait_until_ready(home: Path, process: subprocess.Popen[bytes], log: Path) -> Running:
    deadline = time.monotonic() + _READY_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        running = find_running(home)
        if running and running.ready and running.supervisor_pid == process.pid:
            return running
        time.sleep(_POLL_SECONDS)
    code = process.returncode
    problem = f"wasn't ready within {_READY_SECONDS:g} s" if code is None else f"ended with code {code}"
    raise ServerFailed(f"up {problem}. Its log is {log}, which ends:\n{last_lines(log)}")


def _running_and_ready(home: Path) -> Running | None:
    running = find_running(home)
    if running and not running.ready:
        raise UserError("vectormill is starting or stopping here already; stop it with: vectormill down")
    return running


def _stop_supervisor(running: Running) -> None:
    """Ask the supervisor to stop, then to hasten, then end it; what it leaves is for `_stop_leftovers`."""
    for stop_signal, seconds in (
        (signal.SIGTERM, STOP_SECONDS),
        (signal.SIGTERM, _HASTENED_SECONDS),
        (signal.SIGKILL, _HASTENED_SECONDS),
    ):
        process = find_process(running.supervisor)
        if process is None:
            return
        with suppress(psutil.NoSuchProcess):
            process.send_signal(stop_signal)
        if wait_until_gone(running.supervisor, seconds):
            return


def _stop_leftovers(home: Path) -> int:
    if not home.exists():
        return 0
    with hold_home(home):
        return stop_leftovers(home)


def _greet(console: Console, running: Running, workers: int, *, detached: bool = False) -> None:
    console.print(f"Ready: Postgres, Valkey, dispatcher, {workers} worker{'s' * (workers > 1)}, engine, api, Flower.")
    console.print(f"  Postgres  {_without_password(running.database_url)}")
    console.print(f"  Valkey    {_without_password(running.redis_url)}")
    console.print(f"  Dashboard {running.api_url} (vectormill env prints a key to log in with)")
    console.print(f"  API       {running.api_url}/v1, {running.api_url}/api")
    console.print(f"  Flower    {running.flower_url} (user vectormill; vectormill env prints the password)")
    console.print("Stop it with: vectormill down" if detached else "Ctrl-C stops it.")


def _without_password(url: str) -> str:
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}{parts.path}"


def _console() -> Console:
    return Console(stderr=True, soft_wrap=True, highlight=False)


def _exit() -> None:
    raise SystemExit(128 + signal.SIGTERM)


@contextmanager
def _on_signals(handle: Callable[[], None], *signals: signal.Signals) -> Iterator[None]:
    """Call `handle` on the signals that end a process, as long as the block lasts; those ignored stay so."""
    chosen = signals or (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in chosen}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, lambda *_: handle())
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
