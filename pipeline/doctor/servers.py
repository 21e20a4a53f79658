"""Checks of Postgres and Redis: reachable, of the right version, and configured so that nothing is lost."""

import os
import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import redis
from psycopg.conninfo import conninfo_to_dict
from sqlalchemy.exc import DBAPIError

from pipeline.db import health, partitions, workers
from pipeline.db.database import connection_reason
from pipeline.db.migrate import known_revisions
from pipeline.dispatch.background import CONNECTIONS
from pipeline.doctor.context import Context, is_loopback
from pipeline.doctor.report import Finding, fail, ok, warn

_LEAST_POSTGRES = 15
_LEAST_VECTOR = (0, 7)
_LEAST_REDIS = (6, 2)
#: Time that our longest statements may take: a COPY, or an index.
_LEAST_TIMEOUT_SECONDS = 600
_SKEW_SECONDS = 2.0
_GREAT_SKEW_SECONDS = 60.0
#: Messages of a server that refuses the connection, and the advice for each.
_REFUSALS = (
    ('database ".*" does not exist', "create it, or set VECTORMILL_DATABASE_URL to another."),
    (
        "authentication failed|no password supplied|role .* does not exist|not permitted to log in",
        "correct the user and password in VECTORMILL_DATABASE_URL, here and for all processes.",
    ),
    (
        "no pg_hba.conf entry|SSL",
        "allow this machine in its pg_hba.conf, or give the URL the sslmode that it requires.",
    ),
    ("permission denied for database", "grant connect on it to the role."),
)
#: Connections of a worker's child, of its parent, and of two dispatchers, two apis, an engine and background tasks.
_A_SLOT, _A_WORKER, _THE_REST = 4, 1, 45 + CONNECTIONS


def postgres(context: Context) -> Iterator[Finding]:
    """Check that Postgres answers, is new enough and takes writes."""
    where = ",".join(f"{host}:{port}" for host, port in _database_places(context.database_url))
    try:
        server = context.ask(health.server)
    except DBAPIError as error:
        yield _no_connection(where, error)
        return
    if server["version_number"] < _LEAST_POSTGRES * 10_000:
        yield fail(f"{server['version']} at {where}", f"use PostgreSQL {_LEAST_POSTGRES} or newer.")
    elif server["in_recovery"] or server["read_only"]:
        what = "a standby" if server["in_recovery"] else "set to default_transaction_read_only"
        yield fail(f"{where} is {what}: it takes no writes", "set VECTORMILL_DATABASE_URL to one that does.")
    else:
        yield ok(f"{server['version']} at {where}")


def _no_connection(where: str, error: DBAPIError) -> Finding:
    """Return the finding for a failed connection. A refusal needs a person; otherwise a retry may succeed."""
    reason = connection_reason(error)
    for pattern, mend in _REFUSALS:
        if re.search(pattern, reason):
            return fail(f"{where} refuses us: {reason}", mend)
    mend = "check VECTORMILL_DATABASE_URL, or start one here: vectormill up --detach"
    if re.search("too many clients|connection slots", reason):
        mend = "raise max_connections and restart it, or run fewer workers."
    return fail(f"no connection to {where}: {reason}", mend, unreachable=True)


def pgvector(context: Context) -> Iterator[Finding]:
    """Check that the extension is installed, and new enough for half precision."""
    found = context.ask(health.vector_version)
    if found is None and not context.ask(health.vector_available):
        yield fail("not on this server", "install it there (Debian: postgresql-NN-pgvector); create extension vector;")
    elif found is None:
        yield fail("not in this database", "as a superuser: create extension vector;")
    elif _numbers(found) < _LEAST_VECTOR:
        yield fail(found, "install 0.7 or newer, then: alter extension vector update;")
    else:
        yield ok(found)


def schema(context: Context) -> Iterator[Finding]:
    """Check that the schema is at the revision that this version of vectormill works with."""
    found, known = context.ask(health.revision), known_revisions()
    if found == known[-1]:
        yield ok(f"at {found}, the newest")
    elif found is None:
        yield fail("there is none yet", "run: vectormill migrate")
    elif found in known:
        yield fail(f"at {found}, {len(known) - 1 - known.index(found)} behind {known[-1]}", "run: vectormill migrate")
    else:
        yield fail(f"at {found}, which this vectormill doesn't know", "a newer one made it: upgrade this one.")


def role(context: Context) -> Iterator[Finding]:
    """Check that the database's role has the rights that processes need, and isn't a superuser on another machine."""
    missing = context.ask(health.missing_rights)
    served = context.ask(health.processes_served)
    server = context.ask(health.server)
    if missing and served:
        yield ok(f"a login for {' and '.join(served)}; the owner's sees all")
    elif missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        yield fail(
            f"it may not {', '.join(missing[:3])}{more}",
            "use the role that made the schema, or a process's login: ops/postgres/roles.sql.",
        )
    elif server["superuser"] and not _is_here(context.database_url):
        yield warn(
            "it is a superuser",
            "a plain role that owns the database is enough, or one for each process: ops/postgres/roles.sql.",
        )
    else:
        yield ok("may read, write and make partitions")
    if served or not missing:
        yield from _outdated_roles(context)


def _outdated_roles(context: Context) -> Iterator[Finding]:
    given, found = context.ask(health.roles_revision), context.ask(health.revision)
    if given is not None and given != found:
        yield fail(
            f"ops/postgres/roles.sql was run for {given}, the schema is at {found}: processes' logins lack rights",
            "run it again, as after each migrate.",
        )


def settings(context: Context) -> Iterator[Finding]:
    """Check that the server isn't configured to lose data, to run out of connections, or to end our statements."""
    found = context.ask(health.settings)
    findings = [
        fail(f"{name} is off", f"a crash can then damage every table: set {name} = on and restart it.")
        for name in ("fsync", "full_page_writes")
        if found[name] == "off"
    ]
    if found["autovacuum"] == "off":
        findings.append(warn("autovacuum is off", "claims get slower with every job: set autovacuum = on."))
    for name in ("statement_timeout", "transaction_timeout", "idle_session_timeout"):
        seconds = int(found.get(name, 0)) / 1000
        if 0 < seconds < _LEAST_TIMEOUT_SECONDS:
            mend = f"for its role: alter role … set {name} = 0; or {_LEAST_TIMEOUT_SECONDS} s and more."
            findings.append(warn(f"{name} is {seconds:g} s", mend))
    findings += _connections(context, found)
    findings += _replication(context)
    yield from findings or [ok(f"max_connections {found['max_connections']}, fsync on")]


def _connections(context: Context, found: dict[str, str]) -> list[Finding]:
    reserved = ("superuser_reserved_connections", "reserved_connections")
    there = int(found["max_connections"]) - sum(int(found.get(name, 0)) for name in reserved)
    live = context.ask(workers.live)
    wanted = sum(_A_SLOT * worker["slots"] + _A_WORKER for worker in live) + _THE_REST
    if wanted <= there:
        return []
    what = f"{there} connections, and {wanted} may be wanted by {len(live)} workers and the rest"
    return [warn(what, f"set max_connections to {wanted + 20} or more, or run fewer slots.")]


def _replication(context: Context) -> list[Finding]:
    """Return warnings about failover: it is lossless only if commits wait for a standby, and we find the new primary
    only if a URL with several hosts has `target_session_attrs`."""
    found = context.ask(health.replication)
    findings = []
    if found["standbys"] and not found["synchronous_standby_names"]:
        findings.append(
            warn(
                f"{found['standbys']} standbys, and no commit waits for one: a failover loses the last commits",
                "set synchronous_standby_names; see ops/runbooks/Failover.md.",
            )
        )
    elif found["standbys"] and found["synchronous_commit"] in ("off", "local"):
        mend = "set synchronous_commit = on, so that commits wait for a standby."
        findings.append(warn(f"synchronous_commit is {found['synchronous_commit']}", mend))
    parameters = conninfo_to_dict(context.database_url)
    if "," in str(parameters.get("host", "")) and "target_session_attrs" not in parameters:
        mend = "add target_session_attrs=read-write to it, or a standby may be taken for the primary."
        findings.append(warn("VECTORMILL_DATABASE_URL names several hosts", mend))
    return findings


def months(context: Context) -> Iterator[Finding]:
    """Check that the partitions for jobs of this month and the next one exist."""
    missing = context.ask(partitions.missing_ahead)
    if missing:
        yield fail(f"no {', '.join(missing)}", "a dispatcher makes them; at once: vectormill migrate")
    else:
        yield ok("this month's and the next one's are there")


def redis_server(context: Context) -> Iterator[Finding]:
    """Check that Redis answers, is new enough and takes writes."""
    where = _place(context.redis_url, 6379)
    client = context.redis
    try:
        info: Any = client.info()
    except (redis.AuthenticationError, redis.exceptions.NoPermissionError) as error:
        yield fail(
            f"{where} refuses us: {str(error).rstrip('.')}",
            "correct the user and password in VECTORMILL_REDIS_URL, and allow info in its ACL.",
        )
        return
    except redis.RedisError as error:
        yield fail(
            f"no answer from {where} ({type(error).__name__})",
            "check VECTORMILL_REDIS_URL, or start one here: vectormill up --detach",
            unreachable=True,
        )
        return
    name = "Valkey" if info.get("server_name") == "valkey" else "Redis"
    number = str(info.get("valkey_version") or info["redis_version"])
    if _numbers(str(info["redis_version"])) < _LEAST_REDIS:
        yield fail(f"{name} {number} at {where}", "use Redis 6.2 or newer, or Valkey.")
    elif problem := _write_problem(client):
        yield fail(f"{where} takes no writes ({problem})", _mend_of_write(problem))
    else:
        yield ok(f"{name} {number} at {where}")


def _write_problem(client: redis.Redis) -> str | None:
    try:
        client.set("vectormill.doctor", "1", ex=60)
        client.delete("vectormill.doctor")
    except redis.RedisError as error:
        return str(error).split(".", 1)[0]
    return None


def _mend_of_write(problem: str) -> str:
    if "MISCONF" in problem:
        return "its disk is full or not writable: make room, or switch its snapshots off."
    if "READONLY" in problem or "read only" in problem:
        return "set VECTORMILL_REDIS_URL to the primary."
    return "see its log and its ACL; vectormill needs keys, channels and scripts."


def redis_policy(context: Context) -> Iterator[Finding]:
    """Check that Redis evicts nothing, and that its last save to disk succeeded."""
    info: Any = context.redis.info()
    policy = info.get("maxmemory_policy", "unknown")
    findings = []
    if policy != "noeviction":
        findings.append(
            fail(
                f"maxmemory-policy is {policy}: full, it drops queues and limits",
                "set maxmemory-policy noeviction.",
            )
        )
    failed = [name for name in ("rdb_last_bgsave_status", "aof_last_write_status") if info.get(name, "ok") != "ok"]
    if failed:
        findings.append(warn(f"its last save failed ({', '.join(failed)})", "see its disk and its log."))
    yield from findings or [ok("noeviction")]


def clocks(context: Context) -> Iterator[Finding]:
    """Check that the clocks of this machine, Postgres and Redis agree. Leases need only Postgres' own; job ids and rate
    limits need all."""
    skews = {
        "Postgres": _skew(context.clock, lambda: context.ask(health.now)),
        "Redis": _skew(context.clock, lambda: _redis_time(context.redis)),
    }
    name, worst = max(skews.items(), key=lambda each: abs(each[1]))
    if abs(worst) < _SKEW_SECONDS:
        yield ok(f"within {max(0.1, abs(worst)):.1f} s")
        return
    found = f"{name}'s is {abs(worst):.1f} s {'ahead of' if worst > 0 else 'behind'} this machine's"
    mend = "keep all machines on time: chrony, or systemd-timesyncd."
    yield fail(found, mend) if abs(worst) >= _GREAT_SKEW_SECONDS else warn(found, mend)


def _skew(clock: Callable[[], float], ask: Callable[[], datetime]) -> float:
    """Return how far a server's clock is ahead of ours, in seconds, less what the round trip may explain."""
    before = clock()
    theirs = ask().timestamp()
    after = clock()
    if before <= theirs <= after:
        return 0.0
    return theirs - after if theirs > after else theirs - before


def _redis_time(client: redis.Redis) -> datetime:
    time: Any = client.time()
    return datetime.fromtimestamp(time[0] + time[1] / 1e6, UTC)


def verified(context: Context) -> Iterator[Finding]:
    """Check that servers beyond this machine prove their identity before they get a password."""
    yield from encryption(context.database_url, context.redis_url)


def encryption(database_url: str, redis_url: str) -> Iterator[Finding]:
    """Yield the findings of `verified` for these URLs."""
    redis_ = urlsplit(redis_url)
    mode = conninfo_to_dict(database_url).get("sslmode") or os.environ.get("PGSSLMODE", "prefer")
    findings = []
    if not _is_here(database_url) and mode != "verify-full":
        hosts = ",".join(host for host, _ in _database_places(database_url))
        found = f"the database at {hosts} isn't verified (sslmode={mode})"
        findings.append(
            warn(found, "add ?sslmode=verify-full&sslrootcert=FILE (or system) to VECTORMILL_DATABASE_URL.")
        )
    if not is_loopback(redis_.hostname):
        said = dict(parse_qsl(redis_.query))
        if redis_.scheme != "rediss":
            findings.append(
                warn(f"Redis at {redis_.hostname} isn't encrypted", "write rediss:// in VECTORMILL_REDIS_URL.")
            )
        elif not _verifies(said):
            found = f"Redis at {redis_.hostname} isn't verified, because of the ssl_… in its URL"
            mend = "remove those parameters; set VECTORMILL_REDIS_CA to the file of a private certificate authority."
            findings.append(warn(found, mend))
    yield from findings or [ok("servers beyond this machine prove their identity")]


def _verifies(said: dict[str, str]) -> bool:
    strict = said.get("ssl_cert_reqs", "required").lower() in ("required", "cert_required")
    return strict and said.get("ssl_check_hostname", "true").lower() in ("true", "1", "yes")


def _database_places(url: str) -> list[tuple[str, str]]:
    """Return the hosts and ports that a Postgres URL names; there may be several."""
    told = conninfo_to_dict(url)
    hosts = str(told.get("host") or told.get("hostaddr") or "localhost").split(",")
    ports = str(told.get("port") or "5432").split(",")
    return list(zip(hosts, ports if len(ports) == len(hosts) else ports[:1] * len(hosts), strict=True))


def _is_here(url: str) -> bool:
    return all(is_loopback(host) for host, _ in _database_places(url))


def _place(url: str, default_port: int) -> str:
    parts = urlsplit(url)
    return f"{parts.hostname or 'localhost'}:{parts.port or default_port}"


def _numbers(written: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", written))
