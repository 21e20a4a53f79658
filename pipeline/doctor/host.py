"""Checks of this machine: versions, disk space, keys, addresses."""

import platform
import shutil
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from urllib.parse import urlsplit

import redis
from packaging.requirements import Requirement

from pipeline.db import health
from pipeline.doctor.context import Context, is_loopback
from pipeline.doctor.report import Finding, fail, ok, warn
from pipeline.infra.settings import read_key

_LITTLE_BYTES = 2_000_000_000
_TOO_LITTLE_BYTES = 200_000_000
_PASSWORD_CHARACTERS = 12


def versions(_: Context) -> Iterator[Finding]:
    """Check that the installed packages are those that this version of vectormill requires."""
    wrong = [problem for line in requires("vectormill") or () if (problem := _misfit(Requirement(line)))]
    if wrong:
        yield fail("; ".join(wrong), "install it again, with the pinned versions: pip install -c constraints.txt …")
    else:
        yield ok(f"vectormill {version('vectormill')}, Python {platform.python_version()}, packages as required")


def _misfit(requirement: Requirement) -> str | None:
    if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
        return None
    try:
        found = version(requirement.name)
    except PackageNotFoundError:
        return f"{requirement.name} isn't installed"
    return None if requirement.specifier.contains(found, prereleases=True) else f"{requirement.name} {found} is here"


def space(context: Context) -> Iterator[Finding]:
    """Check that there is disk space where data grow, as far as it can be seen from here."""
    folders = [context.settings.home] if context.settings.home.exists() else []
    data = context.ask(health.data_folder)
    if data and is_loopback(urlsplit(context.database_url).hostname) and Path(data).exists():
        folders.append(Path(data))
    size = context.ask(health.server)["database_bytes"]
    if not folders:
        yield ok(f"the database takes {_gigabytes(size)}; its disk can't be seen from here")
        return
    free, folder = min((shutil.disk_usage(folder).free, folder) for folder in folders)
    found = f"{_gigabytes(free)} free at {folder}; the database takes {_gigabytes(size)}"
    mend = "make room: vectormill purge --before YYYY-MM drops whole months."
    if free < _TOO_LITTLE_BYTES:
        yield fail(found, mend)
    elif free < _LITTLE_BYTES:
        yield warn(found, mend)
    else:
        yield ok(found)


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB"


def keys(context: Context) -> Iterator[Finding]:
    """Check that the API keys of the models' upstreams can be read here."""
    needed = {row["key_env"]: row["name"] for row in context.ask(health.enabled_models) if row["key_env"]}
    missing = {variable: name for variable, name in needed.items() if read_key(variable) is None}
    for variable, name in missing.items():
        yield fail(
            f"no key for {name} in {variable}",
            f"set {variable}, or {variable}_FILE to a readable file with the key in it.",
        )
    if not missing:
        yield ok(f"all {len(needed)} can be read here" if needed else "no model needs one")


def addresses(context: Context) -> Iterator[Finding]:
    """Check that nothing that this environment starts is open to a network unprotected, and that Redis asks for a
    password."""
    settings = context.settings
    why = {
        "api": (settings.api_host, "keys would cross it unencrypted: put a proxy with TLS before it"),
        "engine": (settings.engine_host, "texts would cross it unencrypted: keep that network closed"),
        "flower": (settings.flower_host, "its password would cross it unencrypted: put a proxy with TLS before it"),
    }
    findings = [
        warn(f"{name} listens at {host}, on a network", f"{reason}, or unset VECTORMILL_{name.upper()}_HOST.")
        for name, (host, reason) in why.items()
        if not is_loopback(host)
    ]
    if _redis_is_open(context.redis_url):
        findings.append(
            fail("Redis accepts connections without a password", "give it one: requirepass, or an ACL file.")
        )
    yield from findings or [ok("nothing here listens beyond this machine; Redis asks for a password")]


def _redis_is_open(url: str) -> bool:
    parts = urlsplit(url)
    bare = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
    with redis.Redis.from_url(bare, socket_timeout=5, socket_connect_timeout=5) as client:
        try:
            client.llen("vectormill.idle")
        except redis.RedisError:
            return False
    return True


def flower_password(context: Context) -> Iterator[Finding]:
    """Check that Flower has a password of at least 12 characters."""
    password = context.flower_password
    if password is None:
        yield warn(
            "no password for Flower here, without which it doesn't start",
            "set VECTORMILL_FLOWER_PASSWORD or VECTORMILL_FLOWER_PASSWORD_FILE, if it is to run.",
        )
    elif len(password) < _PASSWORD_CHARACTERS:
        yield warn(
            f"Flower's password has {len(password)} characters", f"use {_PASSWORD_CHARACTERS} or more random ones."
        )
    else:
        yield ok("set")
