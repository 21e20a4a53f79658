"""Checks of access: the login that runs the queries of requests in SQL, and webhooks."""

from collections.abc import Iterator

import sqlalchemy
from sqlalchemy.exc import DBAPIError

from pipeline.db import events, health
from pipeline.db.database import make_engine, plain_reason
from pipeline.doctor.context import Context
from pipeline.doctor.report import Finding, fail, ok, skipped, warn
from pipeline.webhooks.allowlist import is_allowed

_LATELY_SECONDS = 86_400.0


def queries(context: Context) -> Iterator[Finding]:
    """Check that the login for requests in SQL works, and has no more rights than it should."""
    if context.settings.sql_url is None:
        yield skipped("VECTORMILL_SQL_URL isn't set; requests in SQL are refused, except by vectormill up's dispatcher")
        return
    engine = make_engine(context.settings.sql_url.get_secret_value(), application="vectormill-doctor", pool_size=1)
    try:
        with engine.begin() as connection:
            found = health.query_login(connection)
    except DBAPIError as error:
        yield fail(
            f"the login of VECTORMILL_SQL_URL can't connect ({plain_reason(error)})",
            "make the role, and let it connect: ops/docker/postgres-init.sh.",
        )
        return
    finally:
        engine.dispose()
    yield from _judge(found)


def _judge(found: sqlalchemy.RowMapping) -> Iterator[Finding]:
    much = {
        "superuser": "is a superuser",
        "owner": "is, or may become, the owner of vectormill's tables",
        "reads_keys": "may read vectormill.api_keys",
    }
    too_much = [told for name, told in much.items() if found[name]]
    if too_much:
        yield fail(
            f"{found['name']} {too_much[0]}, and every query of a request runs with its rights",
            "set VECTORMILL_SQL_URL to a role that may read what requests select from, and nothing else.",
        )
    else:
        yield ok(f"{found['name']} runs the queries of requests in SQL")


def webhooks(context: Context) -> Iterator[Finding]:
    """Check that webhooks can be signed, and that recent events were delivered."""
    settings = context.settings
    if not settings.webhooks:
        yield skipped("VECTORMILL_WEBHOOKS is empty; no webhook is allowed")
        return
    wrong = [url for url in settings.webhooks if not is_allowed(url, [url])]
    if wrong:
        yield fail(
            f"VECTORMILL_WEBHOOKS: {wrong[0]} isn't a valid address", "write https://host/path, without a password."
        )
    if settings.webhook_secret is None:
        yield fail("VECTORMILL_WEBHOOK_SECRET isn't set, and nothing is sent unsigned", "set it, also for dispatchers.")
    found = context.ask(events.backlog, _LATELY_SECONDS)
    for name, told in (("given_up", "given up since yesterday"), ("late", "waiting, after tries that failed")):
        if found[name]:
            yield warn(
                f"{found[name]:,} events {told}", "see the last try's outcome: column answer of vectormill.events."
            )
    if not wrong and settings.webhook_secret and not found["given_up"] and not found["late"]:
        yield ok(f"{len(settings.webhooks)} addresses allowed, no event is late")
