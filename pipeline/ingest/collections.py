"""Collections from the doors: made, and upgraded to another model."""

import re
from datetime import timedelta
from typing import Any

from sqlalchemy import Connection

from pipeline.catalog.models import DEFAULT_WORKSPACE, find_model, vector_space_of
from pipeline.core.collections import VersionState
from pipeline.core.errors import UserError
from pipeline.core.models import Model
from pipeline.core.options import JobOptions
from pipeline.db import collections, models, user_table, workspaces
from pipeline.db.collections import Collection
from pipeline.ingest.request import read_fields
from pipeline.ingest.submit import check_model
from pipeline.jobs import collection_files, control
from pipeline.jobs.collections import find_collection, locked

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
#: Names that tables of the schema have or will have.
_RESERVED = re.compile(r"(items|embeddings|passages|rejects|collection|alembic|vectormill)_.*", re.IGNORECASE)
_MOST_COLLECTIONS = 1_000
#: Longest name of a view in Postgres, in bytes.
_MOST_NAME = 63
#: Columns of each collection's view, beside those of passages.
_VIEW_COLUMNS = ("key", "vector")


def create_collection(
    connection: Connection,
    workspace_id: int,
    name: str,
    *,
    model: str | None,
    options: JobOptions,
    expect_every: timedelta | None = None,
) -> Collection:
    """Create an empty collection, with its tables and the view that shows it.

    Raises:
        UserError: the name can't be used or is taken, or an option doesn't fit.
        UnknownModel: the workspace may not use such a model.
    """
    found = find_model(connection, workspace_id, model)
    check_model(options, found)
    _check_options(options)
    if expect_every is not None and expect_every <= timedelta():
        raise UserError("give a time such as 24h.", field="expect_every")
    view = _view_of(workspaces.name_of(connection, workspace_id), name)
    if collections.count(connection, workspace_id) >= _MOST_COLLECTIONS:
        raise UserError(f"a workspace has at most {_MOST_COLLECTIONS:,} collections; drop one.")
    reserved = _RESERVED.fullmatch(view) or collections.relation_exists(connection, view)
    if reserved and collections.by_name(connection, workspace_id, name) is None:
        raise UserError("vectormill has a table of this name; choose another.", field="name", given=f'"{name}"')
    if models.is_called(connection, name):
        raise UserError("a model is called so; choose another.", field="name", given=f'"{name}"')
    _check_table(connection, found, options)
    _check_output(connection, options)
    made = collections.create(
        connection,
        workspace_id,
        name=name,
        view=view,
        expect_every=expect_every,
        model=found.name,
        vector_space_id=_space_of(connection, found, options),
        options=_kept(options),
        output=options.output,
    )
    if not made:
        raise UserError("there is a collection of this name already.", field="name", given=f'"{name}"')
    if options.output:
        collection_files.prepare(options.output, options.carry)
    return find_collection(connection, workspace_id, name)


def _kept(options: JobOptions) -> dict[str, Any]:
    """Return the options of each sync's job. Files are written from the collection, not by its jobs."""
    return options.model_dump(mode="json", exclude_defaults=True, exclude={"output"})


def _space_of(connection: Connection, model: Model, options: JobOptions) -> int:
    return vector_space_of(connection, model, dimensions=options.dimensions, max_item_tokens=options.max_item_tokens)


def _view_of(workspace: str, name: str) -> str:
    view = name if workspace == DEFAULT_WORKSPACE else f"{workspace}.{name}"
    if not _NAME.fullmatch(name) or len(view.encode()) > _MOST_NAME:
        raise UserError(
            f"use letters, digits, dashes and underscores, at most {_MOST_NAME - len(view) + len(name)} of them.",
            field="name",
            given=f'"{name[:80]}"',
        )
    return view


def _check_options(options: JobOptions) -> None:
    control.reject_limit(options.max_rejects, 0)
    for field in ("unique_keys", "by_reference", "webhook"):
        if getattr(options, field):
            raise UserError("a collection has no such option.", field=field)
    if long := next((column for column in options.carry if len(column.encode()) > _MOST_NAME), None):
        raise UserError(f'"{long[:80]}" has more than {_MOST_NAME} bytes, so no view can have it.', field="carry")
    if options.hnsw and not options.into:
        raise UserError("the view has an index anyway; this one is made on a table of yours.", field="hnsw")
    if taken := next((column for column in options.carry if column in _VIEW_COLUMNS), None):
        raise UserError(f'the collection has a column "{taken}" already; rename it.', field="carry")


def _check_table(connection: Connection, model: Model, options: JobOptions) -> None:
    """Refuse a table that can't take the vectors, or has rows: those of keys that go are deleted, and nothing says
    whose the others are."""
    if options.into is None:
        return
    table = user_table.check(
        connection,
        options.into,
        key_column=options.columns.key,
        dimensions=options.dimensions or model.dimensions,
        hnsw=options.hnsw,
        passages=options.splits,
        deletes=True,
    )
    if user_table.has_rows(connection, table):
        raise UserError(
            "it has rows; a collection needs an empty table of its own, since rows of keys that go are deleted.",
            field="into",
            given=options.into,
        )
    collections.lock_places(connection)
    if other := collections.writing_to(connection, options.into):
        raise UserError(f"the collection {other} writes to this table; name another.", field="into", given=options.into)


def _check_output(connection: Connection, options: JobOptions) -> None:
    """Refuse a folder in which another collection keeps files."""
    if options.output is None:
        return
    collections.lock_places(connection)
    if other := collections.keeping_files_in(connection, options.output):
        raise UserError(
            f"the collection {other} keeps files there; give an empty folder.", field="output", given=options.output
        )


def upgrade_collection(
    connection: Connection,
    workspace_id: int,
    name: str,
    *,
    model: str,
    dimensions: int | None = None,
    into: str | None = None,
    output: str | None = None,
) -> Collection:
    """Begin a collection's next version, of another model: the next whole sync fills it beside the current one. `into`
    is the version's own table of the user, `output` its own folder.

    Raises:
        UnknownCollection: there is none of this name.
        UnknownModel: the workspace may not use such a model.
        UserError: a next version is there already, or the model doesn't fit the collection's options.
    """
    with locked(connection, find_collection(connection, workspace_id, name), "upgraded") as versions:
        current = versions[VersionState.CURRENT]
        if other := versions.get(VersionState.NEXT):
            raise UserError(
                f"a version of model {other.model} is being filled already; swap the collection, or abandon that "
                "upgrade."
            )
        found = find_model(connection, workspace_id, model)
        options = _options_of(current, dimensions, into, output)
        check_model(options, found)
        space = _space_of(connection, found, options)
        if space == current.vector_space_id:
            raise UserError("the collection has the vectors of this model; name another.", field="model", given=model)
        _check_table(connection, found, options)
        _check_output(connection, options)
        collections.add_version(
            connection,
            current.id,
            model=found.name,
            vector_space_id=space,
            options=_kept(options),
            output=output,
            state=VersionState.NEXT,
        )
        if output:
            collection_files.prepare(output, options.carry)
        return collections.versions(connection, current.id)[VersionState.NEXT]


def _options_of(current: Collection, dimensions: int | None, into: str | None, output: str | None) -> JobOptions:
    if into is None and (table := current.options.get("into")):
        raise UserError(
            f"the current version's vectors are in {table}; name another table for those of the next one.", field="into"
        )
    if output is None and current.output:
        raise UserError(
            f"the current version's files are in {current.output}; name another folder for those of the next one.",
            field="output",
        )
    return read_fields(JobOptions, {**current.options, "dimensions": dimensions, "into": into, "output": output})
