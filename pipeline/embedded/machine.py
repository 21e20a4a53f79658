"""The whole of vectormill on one machine: embedded servers where no URL is set, then the processes that use them."""

from collections.abc import Callable, Iterable
from contextlib import suppress
from os import getpid
from secrets import token_urlsafe

from pydantic import SecretStr

from pipeline.core.errors import UserError
from pipeline.embedded.files import make_folder
from pipeline.embedded.ports import keep_port
from pipeline.embedded.postgres import Postgres
from pipeline.embedded.processes import ProcessMark, mark_process
from pipeline.embedded.runtime import Running, forget_running, hold_home, stop_leftovers, write_running
from pipeline.embedded.supervisor import Child, Supervisor
from pipeline.embedded.valkey import Valkey, check_redis
from pipeline.infra.settings import Settings

#: Function for the stages of children that follow the servers. All stages start at once and stop in reverse order.
Stages = Callable[[Running], Iterable[tuple[Child, ...]]]

_PREPARING = ("the database's schema",)
_COMPLETING = ("the bundled model",)


class Machine:
    """The process tree of `vectormill up`.

    Args:
        begin: called once before anything is started, for work that needs no server.
        prepare: called once with the database's URL when the servers are ready; may return an API key.
        stages: returns the children that start after `prepare`.
        complete: called once with the database's URL when these children are ready.
        metered: names of the children that serve metrics at a port of their own.
        on_wait: called with the record whenever the start or the stop waits for something else.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        prepare: Callable[[str], str | None],
        stages: Stages,
        begin: Callable[[], None] = lambda: None,
        complete: Callable[[str], None] = lambda _: None,
        metered: Iterable[str] = (),
        on_wait: Callable[[Running], None] = lambda _: None,
    ) -> None:
        self._settings = settings
        self._metered = metered
        self._begin = begin
        self._prepare = prepare
        self._stages = stages
        self._complete = complete
        self._on_wait = on_wait
        self._supervisor = Supervisor(settings.home / "logs", self._record_children, self._wait_for)
        self._running: Running

    def request_stop(self) -> None:
        """Ask `run` to end, from any thread or signal handler. A second request shortens the graces."""
        self._supervisor.request_stop()

    def run(self, on_ready: Callable[[Running], None]) -> None:
        """Start everything, call `on_ready`, and restart children that die; return when all is stopped on request.

        Raises:
            UserError: another `up` of this home runs.
            ServerFailed: something didn't start. Everything that did start has been stopped.
        """
        home = self._settings.home
        make_folder(home)
        with hold_home(home):
            stop_leftovers(home)
            servers = self._draft_servers()
            try:
                if self._start(*servers):
                    self._record(ready=True, waiting_for=())
                    on_ready(self._running)
                    self._supervisor.watch()
            finally:
                self._tell(ready=False, stopping=True)
                self._supervisor.stop()
                forget_running(home)

    def _draft_servers(self) -> tuple[Postgres | None, Valkey | None]:
        """Choose ports and passwords for the embedded servers, and record them before anything runs."""
        home, settings = self._settings.home, self._settings
        postgres = None if settings.database_url else Postgres.of_home(home)
        valkey = None if settings.redis_url else Valkey.of_home(home)
        self._running = self._draft(
            database_url=_url(settings.database_url, postgres), redis_url=_url(settings.redis_url, valkey)
        )
        self._record()
        return postgres, valkey

    def _start(self, postgres: Postgres | None, valkey: Valkey | None) -> bool:
        """Start the servers, then the stages. Return False if a stop was requested in the meantime."""
        self._begin()
        if valkey:
            valkey.prepare()
            self._supervisor.launch(valkey.child())
        else:
            check_redis(self._running.redis_url)
        if postgres:
            self._wait_for(("Postgres' data",))
            postgres.prepare()
            self._supervisor.launch(postgres.child())
        if not self._supervisor.wait_until_ready():
            return False
        self._wait_for(_PREPARING)
        self._record(api_key=self._prepare(self._running.database_url) or "")
        for stage in self._stages(self._running):
            self._supervisor.launch(*stage)
        if not self._supervisor.wait_until_ready():
            return False
        self._wait_for(_COMPLETING)
        self._complete(self._running.database_url)
        return True

    def _draft(self, *, database_url: str, redis_url: str) -> Running:
        me = mark_process("up", getpid())
        password = self._settings.flower_password
        return Running(
            home=self._settings.home,
            supervisor_pid=me.pid,
            supervisor_started=me.started,
            database_url=database_url,
            redis_url=redis_url,
            api_url=f"http://127.0.0.1:{_port(self._settings, 'api')}",
            flower_url=f"http://127.0.0.1:{_port(self._settings, 'flower')}",
            flower_password=password.get_secret_value() if password else token_urlsafe(24),
            metrics_ports={name: _metrics_port(self._settings, name) for name in self._metered},
            ready=False,
            children=(),
        )

    def _record_children(self, children: tuple[ProcessMark, ...]) -> None:
        self._record(children=children)

    def _wait_for(self, names: tuple[str, ...]) -> None:
        self._tell(waiting_for=names)

    def _tell(self, **changes: object) -> None:
        """Record and report a change that only informs people, and ignore errors.

        A full disk or a closed terminal must not keep a child from being stopped.
        """
        with suppress(UserError):
            self._record(**changes)
        with suppress(OSError):
            self._on_wait(self._running)

    def _record(self, **changes: object) -> None:
        self._running = self._running.model_copy(update=changes)
        write_running(self._running)


def forget_own_servers(settings: Settings) -> tuple[Settings, list[str]]:
    """Drop URLs that name the home's own servers, as `vectormill env` prints them, from the settings.

    Returns:
        The settings without these URLs, and the names of their variables.
    """
    own = []
    if settings.database_url and Postgres.is_at(settings.home, settings.database_url.get_secret_value()):
        own.append("database_url")
    if settings.redis_url and Valkey.is_at(settings.home, settings.redis_url.get_secret_value()):
        own.append("redis_url")
    return settings.model_copy(update=dict.fromkeys(own)), [f"VECTORMILL_{name.upper()}" for name in own]


def _url(given: SecretStr | None, server: Postgres | Valkey | None) -> str:
    """Return the configured URL, or else that of the embedded server."""
    if given:
        return given.get_secret_value()
    assert server
    return server.url


def _metrics_port(settings: Settings, name: str) -> int:
    """Return the port of a child's metrics. An engine serves them at the port at which it serves the api."""
    return _port(settings, name) if name == "engine" else keep_port(settings.home, name)


def _port(settings: Settings, name: str) -> int:
    """Return a free port for a process.

    A configured port is tried first. The default port is only tried after the port of the last run.
    """
    number: int = getattr(settings, f"{name}_port")
    wished = (number,) if number else ()
    if f"{name}_port" in settings.model_fields_set:
        return keep_port(settings.home, name, first=wished)
    return keep_port(settings.home, name, then=wished)
