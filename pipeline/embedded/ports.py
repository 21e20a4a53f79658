"""Ports on loopback. A server keeps its port, so that its URL stays the same after a restart."""

import random
import socket
from collections.abc import Iterable
from pathlib import Path

from pipeline.core.errors import ServerFailed
from pipeline.embedded.files import write_private

# Below the ephemeral range, from which systems take ports for outgoing connections.
_PORTS = range(20_000, 32_000)
_ATTEMPTS = 200


def keep_port(home: Path, name: str, *, first: Iterable[int] = (), then: Iterable[int] = ()) -> int:
    """Choose a free port for the server `name` and record it in the home.

    Ports are tried in this order: those in `first`, the server's last port, those in `then`, and random ones that no
    other server of the home has.

    Raises:
        ServerFailed: no free port was found.
    """
    file = home / "run" / f"{name}.port"
    others = {port for other in file.parent.glob("*.port") if other != file for port in _last_port(other)}
    random_ports = random.Random().sample(_PORTS, _ATTEMPTS)  # noqa: S311 - a port is no secret  # nosec B311
    for port in (*first, *_last_port(file), *then, *(port for port in random_ports if port not in others)):
        if _is_free(port):
            write_private(file, f"{port}\n")
            return port
    raise ServerFailed(f"no free port on 127.0.0.1 for {name}.")


def _last_port(file: Path) -> tuple[int, ...]:
    try:
        port = int(file.read_text())
    except (FileNotFoundError, ValueError):
        return ()
    return (port,) if 0 < port < 65_536 else ()


def _is_free(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # Connections in TIME_WAIT don't count: a server can bind despite them.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
