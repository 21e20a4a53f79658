"""Heartbeats of workers, their dropped models, and the lease for leader election among dispatchers."""

import json
from collections.abc import Sequence
from uuid import UUID

from sqlalchemy import Connection, RowMapping, text

#: A worker without a heartbeat for this long counts as gone.
SEEN_SECONDS = 30
#: Name of the lease that the leading dispatcher holds.
DISPATCHER_ROLE = "dispatcher"


def show(
    connection: Connection,
    worker_id: UUID,
    *,
    name: str,
    host: str,
    device: str,
    device_kinds: Sequence[str],
    models: Sequence[str],
    slots: int,
) -> None:
    """Record a worker's heartbeat, and the models it serves. `name` is Celery's; `device_kinds` has an entry for each
    device."""
    connection.execute(
        text("""
            insert into vectormill.workers (id, name, host, device, device_kinds, models, slots)
            values (:id, :name, :host, :device, :kinds, :models, :slots)
            on conflict (id) do update set models = excluded.models, seen_at = now()
        """),
        {
            "id": worker_id,
            "name": name,
            "host": host,
            "device": device,
            "kinds": list(device_kinds),
            "models": list(models),
            "slots": slots,
        },
    )


def rest(connection: Connection, worker_id: UUID, reason: str | None) -> None:
    """Record why a worker takes no chunks for now; `None`: it takes them again."""
    connection.execute(
        text("update vectormill.workers set resting = :reason where id = :id"),
        {"id": worker_id, "reason": reason},
    )


def drop_model(connection: Connection, worker_id: UUID, model: str, reason: str) -> None:
    """Record that a worker has dropped a model, and the reason."""
    connection.execute(
        text("""
            update vectormill.workers set dropped = dropped || cast(:dropped as jsonb) where id = :id
        """),
        {"id": worker_id, "dropped": json.dumps({model: reason})},
    )


def take_up_model(connection: Connection, model: str, worker_id: UUID | None = None) -> None:
    """Record that a worker, or every worker, may serve a dropped model again."""
    connection.execute(
        text("""
            update vectormill.workers set dropped = dropped - :model
            where dropped ? :model and (cast(:id as uuid) is null or id = :id)
        """),
        {"id": worker_id, "model": model},
    )


def dropped_by(connection: Connection, worker_id: UUID) -> dict[str, str]:
    """Return the models that a worker has dropped, with the reasons."""
    found = connection.execute(
        text("select dropped from vectormill.workers where id = :id"), {"id": worker_id}
    ).scalar_one_or_none()
    return dict(found or {})


def delete(connection: Connection, worker_id: UUID) -> None:
    """Delete a worker that has stopped."""
    connection.execute(text("delete from vectormill.workers where id = :id"), {"id": worker_id})


def forget_unseen(connection: Connection, seconds: float) -> int:
    """Delete the workers not seen for `seconds`. Return their number."""
    return connection.execute(
        text("delete from vectormill.workers where seen_at < now() - make_interval(secs => :age)"),
        {"age": seconds},
    ).rowcount


def live(connection: Connection, seen_within_seconds: float = SEEN_SECONDS) -> list[RowMapping]:
    """Return the workers seen within `seen_within_seconds`, the longest running first."""
    return list(
        connection.execute(
            text("""
            select id, name, host, device, device_kinds, models, dropped, slots, resting, started_at, seen_at
            from vectormill.workers
            where seen_at > now() - make_interval(secs => :age) order by started_at
        """),
            {"age": seen_within_seconds},
        ).mappings()
    )


def kinds_serving(connection: Connection, model: str) -> list[str]:
    """Return the kinds of devices of the live workers that serve a model, each once."""
    serving = [worker for worker in live(connection) if model in worker["models"]]
    # A worker of a version before tells its devices' names only.
    kinds = (kind for worker in serving for kind in worker["device_kinds"] or worker["device"].split(","))
    return list(dict.fromkeys(kinds))


def hold_lease(connection: Connection, name: str, holder: str, seconds: float) -> bool:
    """Acquire or renew the lease of the role `name`. Return False while another holder's lease lasts."""
    return (
        connection.execute(
            text("""
            insert into vectormill.leases as l (name, holder, lease_until)
            values (:name, :holder, clock_timestamp() + make_interval(secs => :seconds))
            on conflict (name) do update set holder = excluded.holder, lease_until = excluded.lease_until
            where l.holder = excluded.holder or l.lease_until < clock_timestamp()
            returning 1
        """),
            {"name": name, "holder": holder, "seconds": seconds},
        ).first()
        is not None
    )


def drop_lease(connection: Connection, name: str, holder: str) -> None:
    """Release a lease, so that another holder can acquire it at once."""
    connection.execute(
        text("delete from vectormill.leases where name = :name and holder = :holder"),
        {"name": name, "holder": holder},
    )


def server_age_seconds(connection: Connection) -> float:
    """Return the database server's uptime in seconds."""
    return float(connection.execute(text("select extract(epoch from now() - pg_postmaster_start_time())")).scalar_one())
