"""List of checks, in the order in which they are run and shown."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import redis
from psycopg.errors import InsufficientPrivilege
from sqlalchemy.exc import DBAPIError

from pipeline.core.errors import VectormillError
from pipeline.db.database import plain_reason
from pipeline.doctor import access, canary, fleet, host, servers
from pipeline.doctor.context import Context
from pipeline.doctor.report import Finding, State, fail, skipped

_POSTGRES, _SCHEMA = ("postgres",), ("postgres", "schema")


@dataclass(frozen=True, slots=True)
class Check:
    """Check with the name it is shown under, and the checks that must not have failed before it."""

    name: str
    look: Callable[[Context], Iterator[Finding]]
    after: tuple[str, ...] = ()


CHECKS = (
    Check("versions", host.versions),
    Check("postgres", servers.postgres),
    Check("pgvector", servers.pgvector, _POSTGRES),
    Check("schema", servers.schema, _POSTGRES),
    Check("role", servers.role, _SCHEMA),
    Check("settings", servers.settings, _SCHEMA),
    Check("partitions", servers.months, _SCHEMA),
    Check("space", host.space, _POSTGRES),
    Check("redis", servers.redis_server),
    Check("policy", servers.redis_policy, ("redis",)),
    Check("encryption", servers.verified),
    Check("clocks", servers.clocks, ("postgres", "redis")),
    Check("dispatcher", fleet.dispatcher, _SCHEMA),
    Check("workers", fleet.some_workers, _SCHEMA),
    Check("models", fleet.dropped_models, _SCHEMA),
    Check("chunks", fleet.overdue, _SCHEMA),
    Check("api", fleet.api),
    Check("engines", fleet.some_engines, _SCHEMA),
    Check("keys", host.keys, _SCHEMA),
    Check("flower", fleet.flower),
    Check("password", host.flower_password),
    Check("addresses", host.addresses),
    Check("queries", access.queries, _POSTGRES),
    Check("webhooks", access.webhooks, _SCHEMA),
    Check("canary", canary.canary, (*_SCHEMA, "role", "partitions", "redis", "dispatcher", "workers")),
)


def run_checks(context: Context, checks: Sequence[Check] = CHECKS) -> Iterator[tuple[str, Finding]]:
    """Run the checks and yield each finding as it is made, at least one for each check.

    A check is skipped if one that it comes `after` failed or was skipped for that.
    """
    failed: set[str] = set()
    for check in checks:
        before = [name for name in check.after if name in failed]
        findings = iter([skipped(f"not checked, because {before[0]} failed")]) if before else _look(check, context)
        for finding in findings:
            if finding.state is State.FAIL:
                failed.add(check.name)
            yield check.name, finding
        if before:
            failed.add(check.name)


def _look(check: Check, context: Context) -> Iterator[Finding]:
    """Run a check. One that can't be made has failed, or is skipped if this login lacks the rights."""
    try:
        yield from check.look(context)
    except DBAPIError as error:
        if isinstance(error.orig, InsufficientPrivilege):
            yield skipped(f"this login lacks the rights for it ({plain_reason(error)})")
            return
        yield fail(f"can't be checked: {plain_reason(error)}", "see Postgres' log.")
    except redis.RedisError as error:
        yield fail(f"can't be checked: {type(error).__name__}", "see Redis' log.")
    except VectormillError as error:
        yield fail(str(error), "")
