"""Leader election: of several dispatchers one leads, as long as it renews a lease in Postgres."""

from uuid import uuid4

from sqlalchemy import Engine

from pipeline.db import workers

ROLE = "dispatcher"
_LEASE_SECONDS = 10
#: How often the lease is renewed, or asked for.
CHECK_SECONDS = _LEASE_SECONDS / 5


class Leadership:
    """One dispatcher's candidacy."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._holder = engine, str(uuid4())

    def renew(self) -> bool:
        """Lead, or go on leading. False: another dispatcher leads."""
        with self._engine.begin() as connection:
            return workers.hold_lease(connection, ROLE, self._holder, _LEASE_SECONDS)

    def resign(self) -> None:
        """Let another dispatcher lead at once."""
        with self._engine.begin() as connection:
            workers.drop_lease(connection, ROLE, self._holder)
