"""Rows of the catalogue: models, the workspaces that may use them, and vector spaces."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, RowMapping, func, text
from sqlalchemy.dialects.postgresql import insert

from pipeline.db.tables import model_rates, models, vector_spaces, workspace_models


def add(connection: Connection, values: Mapping[str, Any]) -> bool:
    """Add a model. Return False if the name or its slug is taken."""
    statement = insert(models).values(**values).on_conflict_do_nothing().returning(models.c.name)
    return connection.execute(statement).first() is not None


def change(connection: Connection, name: str, **values: Any) -> None:
    """Set columns of a model."""
    connection.execute(models.update().where(models.c.name == name).values(**values))


def name_in_use(connection: Connection, name: str, wanted: Sequence[str]) -> str | None:
    """Return one of `wanted` that is the name or an alias of a model other than `name`, or the name of a collection;
    None if all are free. They stay free of models until the transaction ends, since it locks the catalogue against
    other writers."""
    connection.execute(text("lock table vectormill.models in share row exclusive mode"))
    return connection.execute(
        text("""
            select wanted from unnest(cast(:wanted as text[])) wanted
            where exists (select from vectormill.models m
                          where m.name <> :name and (wanted = m.name or wanted = any(m.aliases)))
               or exists (select from vectormill.collections c where c.name = wanted)
            order by wanted limit 1
        """),
        {"name": name, "wanted": list(wanted)},
    ).scalar_one_or_none()


def enable(connection: Connection, workspace_id: int, model: str) -> None:
    """Let a workspace use a model."""
    connection.execute(
        insert(workspace_models).values(workspace_id=workspace_id, model_name=model).on_conflict_do_nothing()
    )


def remove(connection: Connection, name: str) -> bool:
    """Remove a model from the catalogue; its jobs and vectors stay. Return False if there is none."""
    return connection.execute(models.delete().where(models.c.name == name)).rowcount == 1


def unfinished_jobs(connection: Connection, name: str) -> int:
    """Return the number of a model's jobs that haven't ended."""
    return connection.execute(
        text("""
            select count(*) from vectormill.jobs
            where model_name = :name and state not in ('completed', 'failed', 'cancelled')
        """),
        {"name": name},
    ).scalar_one()


def find(connection: Connection, workspace_id: int, name: str) -> RowMapping | None:
    """Return the model with this name or alias, if the workspace may use it."""
    return (
        connection.execute(
            text("""
            select m.* from vectormill.models m
            join vectormill.workspace_models w on w.model_name = m.name and w.workspace_id = :workspace
            where m.name = :name or :name = any(m.aliases) order by m.name = :name desc, m.name limit 1
        """),
            {"workspace": workspace_id, "name": name},
        )
        .mappings()
        .one_or_none()
    )


def is_called(connection: Connection, name: str) -> bool:
    """Return True if a model has this name or alias, whoever may use it."""
    found = text("select exists (select from vectormill.models where name = :name or :name = any(aliases))")
    return bool(connection.execute(found, {"name": name}).scalar_one())


def by_name(connection: Connection, name: str) -> RowMapping | None:
    """Return a model by name, whichever workspace asks."""
    return connection.execute(models.select().where(models.c.name == name)).mappings().one_or_none()


def of_job(connection: Connection, job_id: UUID) -> RowMapping | None:
    """Return the model that a job was submitted for, with the job's option `precision`; None if the model was removed,
    or makes another vector space now."""
    return (
        connection.execute(
            text("""
            select m.*, coalesce(j.options ->> 'precision', 'auto') as precision
            from vectormill.jobs j
            join vectormill.vector_spaces s on s.id = j.vector_space_id
            join vectormill.models m on m.name = j.model_name and m.weights_sha256 = s.weights
              and s.dimensions = any(m.dimensions || m.matryoshka) and m.document_prompt = s.document_prompt
            where j.id = :job
        """),
            {"job": job_id},
        )
        .mappings()
        .one_or_none()
    )


def of_space(connection: Connection, name: str, vector_space_id: int) -> RowMapping | None:
    """Return a model by name; None if it was removed, or makes other vectors than those of the space now."""
    return (
        connection.execute(
            text("""
            select m.* from vectormill.vector_spaces s
            join vectormill.models m on m.name = :name and m.weights_sha256 = s.weights
              and s.dimensions = any(m.dimensions || m.matryoshka) and m.document_prompt = s.document_prompt
            where s.id = :space
        """),
            {"name": name, "space": vector_space_id},
        )
        .mappings()
        .one_or_none()
    )


def of_collection(connection: Connection, workspace_id: int, name: str) -> RowMapping | None:
    """Return the model of the vectors that readers of a collection see, with their size `collection_dimensions`; None
    if there is no such collection, or the workspace may not use the model, or it makes other vectors now."""
    return (
        connection.execute(
            text("""
            select m.*, s.dimensions as collection_dimensions from vectormill.collections c
            join vectormill.collection_versions v on v.collection_id = c.id and v.state = 'current'
            join vectormill.vector_spaces s on s.id = v.vector_space_id
            join vectormill.models m on m.name = v.model_name and m.weights_sha256 = s.weights
              and s.dimensions = any(m.dimensions || m.matryoshka) and m.document_prompt = s.document_prompt
            join vectormill.workspace_models w on w.model_name = m.name and w.workspace_id = c.workspace_id
            where c.workspace_id = :workspace and c.name = :name
        """),
            {"workspace": workspace_id, "name": name},
        )
        .mappings()
        .one_or_none()
    )


def every(connection: Connection) -> list[RowMapping]:
    """Return all models, by name."""
    return list(connection.execute(models.select().order_by(models.c.name)).mappings())


def of_workspace(connection: Connection, workspace_id: int) -> list[RowMapping]:
    """Return the models that a workspace may use, by name."""
    return list(
        connection.execute(
            models.select()
            .join(workspace_models, workspace_models.c.model_name == models.c.name)
            .where(workspace_models.c.workspace_id == workspace_id)
            .order_by(models.c.name)
        ).mappings()
    )


def listed(connection: Connection, workspace_id: int | None) -> list[RowMapping]:
    """Return the models that a workspace may use, or all, by name, each with its `rates`: a list of `device,
    precision, tokens_per_second, measured_at`, the fastest first."""
    rows = connection.execute(
        text("""
            select m.*, coalesce((
                select jsonb_agg(to_jsonb(r) - 'model' order by r.tokens_per_second desc, r.device, r.precision)
                from vectormill.model_rates r where r.model = m.name
              ), '[]') as rates
            from vectormill.models m
            where cast(:workspace as bigint) is null or exists (
              select from vectormill.workspace_models w where w.model_name = m.name and w.workspace_id = :workspace
            )
            order by m.name
        """),
        {"workspace": workspace_id},
    )
    return list(rows.mappings())


def rates(connection: Connection, name: str, precision: str = "auto") -> dict[str, float]:
    """Return a local model's measured tokens per second of one slot by kind of device, the one measured last first.

    A kind's rate is the one in `precision`, if there is one; else the highest of those that were measured within an
    hour of the last: that of half precision, unless the fleet has been set to another one since.
    """
    rows = connection.execute(
        text("""
            select device,
                   coalesce(max(tokens_per_second) filter (where precision = :precision),
                            max(tokens_per_second) filter (where measured_at >= newest - interval '1 hour'))
            from (select *, max(measured_at) over (partition by device) as newest
                  from vectormill.model_rates where model = :name) r
            group by device order by max(measured_at) desc, device
        """),
        {"name": name, "precision": precision},
    )
    return {device: float(rate) for device, rate in rows}


def record_rate(
    connection: Connection,
    name: str,
    device: str,
    precision: str,
    tokens_per_second: float,
    measured_at: datetime | None = None,
) -> None:
    """Record a local model's tokens per second of one slot on a kind of device, measured now or at that time."""
    found = {"tokens_per_second": tokens_per_second, "measured_at": measured_at or func.now()}
    connection.execute(
        insert(model_rates)
        .values(model=name, device=device, precision=precision, **found)
        .on_conflict_do_update(index_elements=["model", "device", "precision"], set_=found)
    )


def set_rate(connection: Connection, name: str, tokens_per_second: float) -> None:
    """Record the measured tokens per second of an upstream's model on one slot, unless it changed by less than a
    tenth. That of a local model stays as it was when the model was added."""
    connection.execute(
        text("""
            update vectormill.models set tokens_per_second = :rate
            where name = :name and kind = 'gateway' and abs(tokens_per_second - :rate) > tokens_per_second * 0.1
        """),
        {"name": name, "rate": tokens_per_second},
    )


def vector_space(connection: Connection, values: Mapping[str, Any]) -> int:
    """Return the id of the vector space with this fingerprint, which is inserted if it is new."""
    connection.execute(insert(vector_spaces).values(**values).on_conflict_do_nothing())
    return connection.execute(
        vector_spaces.select()
        .with_only_columns(vector_spaces.c.id)
        .where(vector_spaces.c.fingerprint == values["fingerprint"])
    ).scalar_one()
