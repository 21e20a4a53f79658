"""Commands for all of vectormill on one machine: `up`, `down`, `env`."""

import os
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
from typing import TYPE_CHECKING, Annotated, Self
from urllib.parse import urlsplit

import psutil
import typer
from rich.console import Console

from pipeline.cli.waiting import Waiting
from pipeline.core.errors import ServerFailed, ServiceUnreachable, UserError, VectormillError
from pipeline.core.humanize import size
from pipeline.embedded.deletion import data_folders, delete_data, size_bytes
from pipeline.embedded.files import log_end, open_log, written_since
from pipeline.embedded.place import Place
from pipeline.embedded.processes import find_process, our_environment, our_module, wait_until_gone
from pipeline.embedded.runtime import Running, find_running, hold_home, stop_leftovers
from pipeline.embedded.stages import STOP_SECONDS, app_stages, metered_names
from pipeline.infra.settings import Settings, load_settings

if TYPE_CHECKING:
    from pipeline.embedded.machine import Machine

_HASTENED_SECONDS = 20.0
_POLL_SECONDS = 0.2

Workers = Annotated[int, typer.Option(min=1, max=64, help="Worker processes to start.")]
Detach = Annotated[bool, typer.Option("--detach", help="Return when all is ready.")]
Delete = Annotated[bool, typer.Option("--delete", help="Then delete the data: databases, files, logs. It asks first.")]
Yes = Annotated[bool, typer.Option("--yes", help="Delete without asking.")]


def up(workers: Workers = 1, detach: Detach = False) -> None:
    """Run all of vectormill on this machine: servers, dispatcher, workers, engine, api, Flower.

    Servers that VECTORMILL_DATABASE_URL and VECTORMILL_REDIS_URL name are used; those not named are started. The start
    waits for each process while it is alive and makes progress, and shows which one it waits for.

    Examples:

        vectormill up

        vectormill up --workers 2 --detach && eval "$(vectormill env)"
    """
    console = _console()
    settings = _without_own_servers(console, load_settings())
    if detach:
        _up_detached(console, settings, workers)
        return
    if find_running(settings.home):
        raise UserError("vectormill already runs here; stop it with: vectormill down")
    lines = _Lines(console)
    machine = _machine(settings, workers, lines.show)
    with lines, _on_signals(machine.request_stop):
        machine.run(lambda running: lines.greet(running, workers))
    console.print("Stopped.")


def down(delete: Delete = False, yes: Yes = False) -> None:
    """Shut down what `up` runs here, in order: work in progress is finished first.

    Examples:

        vectormill down

        vectormill down --delete
    """
    console = _console()
    home = load_settings().home
    if yes and not delete:
        raise UserError("--yes has no effect without --delete; leave it out, or give both.")
    if delete and not yes:
        _confirm_deletion(console, home)
    running = find_running(home)
    if running:
        with Waiting(console, "Stopping") as waiting:
            _stop_supervisor(running, waiting)
    leftovers = _stop_leftovers(home)
    if running:
        message = "Stopped."
    elif leftovers:
        message = f"Stopped {leftovers} processes that an up left behind when it was killed."
    else:
        message = "Nothing runs here."
    console.print(message)
    if delete:
        _delete(console, home)


def _confirm_deletion(console: Console, home: Path) -> None:
    folders = data_folders(home)
    if not folders:
        return
    if not sys.stdin.isatty():
        raise UserError("there is no terminal to confirm the deletion of the data; confirm it with --yes.")
    runs = " It runs, and is stopped first." if find_running(home) else ""
    console.print(f"All data of {home}, {size(size_bytes(folders))}: databases, files, logs in", markup=False)
    for folder in folders:
        console.print(f"  {folder}", markup=False)
    typer.confirm(f"Delete it for good?{runs}", abort=True, err=True)


def _delete(console: Console, home: Path) -> None:
    from pipeline.embedded.machine import forget_own_servers

    folders = data_folders(home)
    if not folders:
        console.print(f"{home} has no data.", markup=False)
        return
    freed = size(size_bytes(folders))
    _, own = forget_own_servers(load_settings())
    with hold_home(home):
        delete_data(home)
    console.print(f"Deleted the data of {home}: {freed}.", markup=False)
    if own:
        console.print(f"Its servers are gone for good: unset {' '.join(own)}")


def env() -> None:
    """Print export lines with the addresses and passwords of what `up` runs here.

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
        UserError: an `up` is starting or stopping.
        ServerFailed: a process didn't start.
    """
    running = _running_and_ready(settings.home)
    if running:
        yield running
        return
    console = _console()
    lines = _Lines(console)
    machine = _machine(_without_own_servers(console, settings), workers, lines.show)
    ready: queue.SimpleQueue[Running | None] = queue.SimpleQueue()
    with lines, _on_signals(_exit, signal.SIGTERM), ThreadPoolExecutor(1, thread_name_prefix="machine") as pool:
        try:
            ended = pool.submit(machine.run, ready.put)
            ended.add_done_callback(lambda _: ready.put(None))
            if started := ready.get():
                lines.end()
                yield started
        finally:
            with _on_signals(machine.request_stop):
                machine.request_stop()
                pool.shutdown()
    ended.result()


def _without_own_servers(console: Console, settings: Settings) -> Settings:
    """Return the settings without URLs that name this home's own servers, and tell the user of those."""
    from pipeline.embedded.machine import forget_own_servers

    settings, own = forget_own_servers(settings)
    if own:
        console.print(f"{' and '.join(own)}: this home's own, as vectormill env prints them, so they are run here.")
    return settings


def _machine(settings: Settings, workers: int, on_wait: Callable[[Running], None]) -> "Machine":
    from pipeline.cli.bootstrap import BundledModel, prepare_database
    from pipeline.embedded.machine import Machine

    own = settings.database_url is None and settings.sql_url is None
    # A home without data has no catalogue yet, so the bundled model will be needed. A named database may have one.
    first = settings.database_url is None and not Place.of_home(settings.home).data.exists()
    model = BundledModel()
    return Machine(
        settings,
        begin=model.describe if first else lambda: None,
        prepare=partial(prepare_database, home=settings.home),
        stages=lambda running: app_stages(running, workers, queries_as_owner=own),
        complete=model.add,
        metered=metered_names(workers),
        on_wait=on_wait,
    )


class _Lines:
    """Progress lines of an `up` in this terminal: starting, ready, stopping."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._waiting: Waiting | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def show(self, running: Running) -> None:
        """Show the names that the start or the stop waits for."""
        verb = "Stopping" if running.stopping else "Starting"
        if self._waiting is None or self._waiting.verb != verb:
            self.end()
            self._waiting = Waiting(self._console, verb).__enter__()
        self._waiting.show(running.waiting_for)

    def greet(self, running: Running, workers: int) -> None:
        """Print that all is ready, with the addresses."""
        seconds = 0.0
        if self._waiting:
            self._waiting.show(())
            seconds = self._waiting.seconds
        self.end()
        _greet(self._console, running, workers, seconds)

    def end(self) -> None:
        """End the progress line; `show` begins another one."""
        if self._waiting:
            self._waiting.end()
            self._waiting = None


def _up_detached(console: Console, settings: Settings, workers: int) -> None:
    running = _running_and_ready(settings.home)
    if running:
        console.print("vectormill already runs here and is ready.")
        return
    log = settings.home / "logs" / "up.log"
    with open_log(log) as output:
        begin = output.seek(0, os.SEEK_END)
        process = subprocess.Popen(
            our_module("pipeline.cli", "up", "--workers", str(workers)),
            env=our_environment({}),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        with Waiting(console, "Starting") as waiting:
            running = _wait_until_ready(settings.home, process, waiting)
        if running is None:
            raise _failure(process.returncode, log, begin)
    except BaseException:
        process.terminate()
        raise
    _greet(console, running, workers, waiting.seconds, detached=True)


def _wait_until_ready(home: Path, process: subprocess.Popen[bytes], waiting: Waiting) -> Running | None:
    """Wait until the `up` is ready; return None if it ends first. No timeout: it gives up by itself if it stalls."""
    while process.poll() is None:
        running = find_running(home)
        if running and running.supervisor_pid == process.pid:
            if running.ready:
                waiting.show(())
                return running
            if running.stopping:
                waiting.verb = "Stopping"
            waiting.show(running.waiting_for)
        time.sleep(_POLL_SECONDS)
    return None


def _failure(code: int, log: Path, begin: int) -> VectormillError:
    """Return an error with the message, from its log, and the exit code of the `up` in the background."""
    _, marked, sentence = f"\n{written_since(log, begin)}".rpartition("\nerror ")
    if not marked:
        return ServerFailed(f"up ended with code {code}. {log_end(log, begin)}")
    kinds: dict[int, type[VectormillError]] = {2: UserError, 6: ServiceUnreachable}
    return kinds.get(code, ServerFailed)(sentence.rstrip())


def _running_and_ready(home: Path) -> Running | None:
    running = find_running(home)
    if running and not running.ready:
        what = "stopping here; wait until it has" if running.stopping else "starting here already"
        raise UserError(f"vectormill is {what}, or stop it with: vectormill down")
    return running


def _stop_supervisor(running: Running, waiting: Waiting) -> None:
    """Stop the supervisor: SIGTERM, SIGTERM again to hasten it, SIGKILL. `_stop_leftovers` stops its orphans."""
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
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if wait_until_gone(running.supervisor, _POLL_SECONDS):
                return
            if (now := find_running(running.home)) and now.stopping:
                waiting.show(now.waiting_for)


def _stop_leftovers(home: Path) -> int:
    if not (home / "run").exists():
        return 0
    with hold_home(home):
        return stop_leftovers(home)


def _greet(console: Console, running: Running, workers: int, seconds: float, *, detached: bool = False) -> None:
    some = f"{workers} worker{'s' * (workers > 1)}"
    console.print(f"Ready after {seconds:,.0f} s: Postgres, Valkey, dispatcher, {some}, engine, api, Flower.")
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
    """Call `handle` on the signals that end a process, for the length of the block. Ignored signals stay ignored."""
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
