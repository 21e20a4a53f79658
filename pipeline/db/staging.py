"""Stagings: jobs that a producer is still writing, under a lease, until they are queued or deleted."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID, uuid4

from sqlalchemy import Connection, insert, text

from pipeline.core.jobs import Job, JobState
from pipeline.core.options import KeptOptions
from pipeline.db.tables import inputs, job_history


@dataclass(frozen=True, slots=True, kw_only=True)
class NewJob:
    """Row of a staging job, the first one that a submission writes."""

    id: UUID
    workspace_id: int
    name: str
    model_name: str
    vector_space_id: int
    priority: int = 0
    labels: Mapping[str, str] = field(default_factory=dict)
    options: KeptOptions = KeptOptions()
    idempotency_key: str | None = None
    payload_sha256: str | None = None
    #: Version of a collection that it syncs.
    version_id: int | None = None
    #: Who submitted it, for people, and the query whose rows it has.
    submitted_by: str | None = None
    query: str | None = None
    lease_seconds: float


@dataclass(frozen=True, slots=True)
class Producer:
    """Fenced right to stage a job."""

    job_id: UUID
    fence: int
    #: Unique even after a failover or a restore, when a fence may be given twice. `None`: begun by an older version.
    token: UUID | None

    @classmethod
    def of(cls, job: Job) -> "Producer":
        """Return the producer that a job's row names."""
        return cls(job.id, job.fence, job.token)

    def values(self) -> dict[str, Any]:
        """Return the parameters that the statements below bind."""
        return {"job": self.job_id, "fence": self.fence, "token": self.token}


def begin(connection: Connection, job: NewJob) -> Producer | None:
    """Insert a staging job under its producer's lease. Return None if the idempotency key is taken, or another sync of
    the same version hasn't ended."""
    producer = Producer(job.id, 1, uuid4())
    row = connection.execute(
        text("""
            insert into vectormill.jobs
              (id, workspace_id, name, model_name, vector_space_id, state, priority, labels, options, idempotency_key,
               payload_sha256, version_id, fence, token, lease_until)
            values (:id, :workspace_id, :name, :model_name, :vector_space_id, 'staging', :priority,
                    cast(:labels as jsonb), cast(:options as jsonb), :idempotency_key, :payload_sha256,
                    :version_id, :fence, :token, clock_timestamp() + make_interval(secs => :lease))
            on conflict do nothing returning id
        """),
        {
            "id": job.id,
            "workspace_id": job.workspace_id,
            "name": job.name,
            "model_name": job.model_name,
            "vector_space_id": job.vector_space_id,
            "priority": job.priority,
            "labels": json.dumps(dict(job.labels)),
            "options": json.dumps(job.options.to_json()),
            "idempotency_key": job.idempotency_key,
            "payload_sha256": job.payload_sha256,
            "version_id": job.version_id,
            "fence": producer.fence,
            "token": producer.token,
            "lease": job.lease_seconds,
        },
    )
    if row.first() is None:
        return None
    first = {"job_id": job.id, "state": JobState.STAGING, "priority": job.priority}
    connection.execute(insert(job_history), {**first, "submitted_by": job.submitted_by, "query": job.query})
    return producer


def insert_inputs(connection: Connection, job_id: UUID, files: Sequence[Mapping[str, Any]]) -> None:
    """Record a job's inputs: `uri`, `etag`, `bytes` of each file, in order."""
    if files:
        connection.execute(insert(inputs), [{"job_id": job_id, "ordinal": n, **file} for n, file in enumerate(files)])


def count_inputs(connection: Connection, job_id: UUID) -> int:
    """Return the number of a job's recorded inputs."""
    found = text("select count(*) from vectormill.inputs where job_id = :job")
    return int(connection.execute(found, {"job": job_id}).scalar_one())


def set_input_rows(connection: Connection, job_id: UUID, rows: Mapping[int, int]) -> None:
    """Record the number of rows of inputs, by ordinal."""
    if rows:
        connection.execute(
            text("update vectormill.inputs set rows = :rows where job_id = :job and ordinal = :ordinal"),
            [{"job": job_id, "ordinal": ordinal, "rows": count} for ordinal, count in rows.items()],
        )


def take_over(connection: Connection, dead: Producer, lease_seconds: float) -> Producer | None:
    """Take over a staging whose producer died: fence + 1, a new token, nothing staged yet. Return None if somebody else
    was faster."""
    heir = Producer(dead.job_id, dead.fence + 1, uuid4())
    taken = connection.execute(
        text("""
            update vectormill.jobs
            set fence = :heir_fence, token = :heir_token, items_total = 0,
                lease_until = clock_timestamp() + make_interval(secs => :lease)
            where id = :job and fence = :fence and token is not distinct from :token and state = 'staging'
              and lease_until < clock_timestamp()
        """),
        {**dead.values(), "heir_fence": heir.fence, "heir_token": heir.token, "lease": lease_seconds},
    ).rowcount
    return heir if taken else None


def hold(connection: Connection, producer: Producer, lease_seconds: float) -> bool:
    """Re-check and renew a producer's lease; the row stays locked until the transaction ends. Return False if the
    staging was taken over or cancelled."""
    return (
        connection.execute(
            text("""
            update vectormill.jobs set lease_until = clock_timestamp() + make_interval(secs => :lease)
            where id = :job and fence = :fence and token is not distinct from :token and state = 'staging'
        """),
            {**producer.values(), "lease": lease_seconds},
        ).rowcount
        == 1
    )


def advance(connection: Connection, producer: Producer, before: int, items: int) -> bool:
    """Record that `items` items are staged, up from `before`, in a transaction that holds the job by `hold`. Return
    False if the database has lost some of the earlier ones, to a failover."""
    return (
        connection.execute(
            text("""
            update vectormill.jobs set items_total = :items
            where id = :job and fence = :fence and token is not distinct from :token and state = 'staging'
              and items_total = :before
        """),
            {**producer.values(), "before": before, "items": items},
        ).rowcount
        == 1
    )


def queue(
    connection: Connection,
    producer: Producer,
    *,
    items_total: int,
    max_rejects: int | None,
    payload: str,
    keeps_texts: bool = True,
    notices: Sequence[str] = (),
) -> None:
    """Make a staged job runnable, in a transaction that holds it by `hold`. `keeps_texts`: its items are in Postgres,
    so retention removes their texts one day. `notices` are kept for the submitter."""
    connection.execute(
        text("""
            update vectormill.jobs
            set state = 'queued', queued_at = clock_timestamp(), items_total = :items, max_rejects = :max_rejects,
                payload_sha256 = :payload, lease_until = null,
                notices = cast(:notices as jsonb),
                texts_kept_from = case when :keeps_texts then 0 else cast(:items as bigint) end
            where id = :job and fence = :fence and token is not distinct from :token and state = 'staging'
        """),
        {
            **producer.values(),
            "items": items_total,
            "max_rejects": max_rejects,
            "payload": payload,
            "keeps_texts": keeps_texts,
            "notices": json.dumps(list(notices)),
        },
    )


def cancel(connection: Connection, job_id: UUID) -> None:
    """Cancel a staging: its producer's next step fails, and it is soon deleted, unless a
    submission with its key and payload takes it over."""
    connection.execute(
        text("""
            update vectormill.jobs set fence = fence + 1, lease_until = now() - interval '1 year'
            where id = :job and state = 'staging'
        """),
        {"job": job_id},
    )


def delete(connection: Connection, producer: Producer) -> bool:
    """Delete a staging job and its chunks, if it is still this producer's. Return False if it isn't."""
    gone = text("""
        delete from vectormill.jobs
        where id = :job and fence = :fence and token is not distinct from :token and state = 'staging'
    """)
    return connection.execute(gone, producer.values()).rowcount == 1


def delete_chunks(connection: Connection, job_id: UUID) -> None:
    """Delete a staging job's chunks and inputs, before it is staged again."""
    connection.execute(text("delete from vectormill.chunks where job_id = :job"), {"job": job_id})
    connection.execute(text("delete from vectormill.inputs where job_id = :job"), {"job": job_id})


def dead(connection: Connection, older_than_seconds: float, limit: int) -> list[Producer]:
    """Return the producers whose lease expired so long ago that nobody will come back for their stagings."""
    rows = connection.execute(
        text("""
            select id, fence, token from vectormill.jobs
            where state = 'staging' and lease_until < now() - make_interval(secs => :age)
            order by id limit :limit
        """),
        {"age": older_than_seconds, "limit": limit},
    )
    return [Producer(*row) for row in rows]
