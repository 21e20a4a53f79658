"""Postgres logins, one for each kind of process, with the rights of ops/postgres/roles.sql."""

from pathlib import Path
from urllib.parse import quote, urlsplit

import psycopg
from psycopg import sql

SCRIPT = Path(__file__).resolve().parents[2] / "ops" / "postgres" / "roles.sql"
PROCESSES = ("dispatcher", "worker", "engine", "api", "reader")


def logins(url: str) -> dict[str, str]:
    """Apply the script to the database that a superuser's `url` names, and create the logins.

    All databases of the server share the logins. Return the URL of each process.
    """
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
    """Return a password that appears nowhere by chance, and is spelled differently in a URL."""
    return f"open/sesame-{process}"
