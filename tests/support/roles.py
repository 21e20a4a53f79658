"""A login of its own for each kind of process, with the rights of ops/postgres/roles.sql."""

from pathlib import Path
from urllib.parse import quote, urlsplit

import psycopg
from psycopg import sql

SCRIPT = Path(__file__).resolve().parents[2] / "ops" / "postgres" / "roles.sql"
PROCESSES = ("dispatcher", "worker", "engine", "api", "reader")


def logins(url: str) -> dict[str, str]:
    """Apply the script to the database that a superuser's `url` names, and make the logins, which all databases of its
    server share. Returns the URL of each process's."""
    address = urlsplit(url)
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(SCRIPT.read_bytes())
        for process in PROCESSES:
            login, group = sql.Identifier(f"test_{process}"), sql.Identifier(f"vectormill_{process}")
            if not connection.execute("select 1 from pg_roles where rolname = %s", (f"test_{process}",)).fetchone():
                connection.execute(sql.SQL("create role {} login in role {}").format(login, group))
            connection.execute(sql.SQL("alter role {} password {}").format(login, _password(process)))
    here = address.netloc.rpartition("@")[2]
    return {process: address._replace(netloc=_login(process) + here).geturl() for process in PROCESSES}


def _login(process: str) -> str:
    return f"test_{process}:{quote(_password(process), safe='')}@"


def _password(process: str) -> str:
    """One that stands nowhere by chance, and looks otherwise in a URL."""
    return f"open/sesame-{process}"
