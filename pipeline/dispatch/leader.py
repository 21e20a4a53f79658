"""Leader election among dispatchers, by a lease in Postgres that the leader renews."""

from uuid import uuid4

from sqlalchemy import Engine

from pipeline.db import workers

ROLE = workers.DISPATCHER_ROLE
_LEASE_SECONDS = 10
#: Interval at which the leader renews the lease, and the others try to take it.
CHECK_SECONDS = _LEASE_SECONDS / 5


class Leadership:
    """One dispatcher's part in the election."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._holder = engine, str(uuid4())

    def renew(self) -> bool:
        """Take or renew the lease. Return True if this dispatcher is the leader."""
        with self._engine.begin() as connection:
            return workers.hold_lease(connection, ROLE, self._holder, _LEASE_SECONDS)

    def resign(self) -> None:
        """Release the lease, so that another dispatcher can take it at once."""
        with self._engine.begin() as connection:
            workers.drop_lease(connection, ROLE, self._holder)
