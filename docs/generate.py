"""Generator of the reference pages: commands, settings, HTTP, SQL, tables and metrics, from the code that defines them.

`python docs/generate.py` writes them to `docs/reference`; a test holds them against the code.
"""

import inspect
import re
import textwrap
from collections.abc import Iterator, Mapping
from enum import Enum
from importlib import import_module
from pathlib import Path
from typing import Any

from pydantic import SecretStr
from pydantic.fields import FieldInfo

REFERENCE = Path(__file__).resolve().parent / "reference"


def pages() -> dict[str, str]:
    """Return the text of each generated page, by its file name."""
    made = {"cli": _cli, "settings": _settings, "http": _http, "sql": _sql, "tables": _tables, "metrics": _metrics}
    return {f"{name}.md": "\n".join(make()).rstrip() + "\n" for name, make in made.items()}


def _cell(text: str) -> str:
    """Return a text as it may stand in a table's cell."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _table(heads: tuple[str, ...], rows: list[tuple[str, ...]]) -> Iterator[str]:
    yield f"| {' | '.join(heads)} |"
    yield "|" + "---|" * len(heads)
    for row in rows:
        yield f"| {' | '.join(row)} |"
    yield ""


def _cli() -> Iterator[str]:
    from pipeline.cli import _Root

    yield "# Commands"
    yield ""
    yield "Each command explains itself by `--help`; this page is made of those texts."
    yield ""
    for name, entry in _Root.entries.items():
        yield from _command(f"vectormill {name}", entry.load(name))


def _command(called: str, command: Any) -> Iterator[str]:
    if hasattr(command, "commands"):
        for name, one in command.commands.items():
            yield from _command(f"{called} {name}", one)
        return
    yield f"## {called}"
    yield ""
    told, _, examples = inspect.cleandoc(command.help or "").partition("Example")
    for paragraph in filter(None, told.replace("\f", "").split("\n\n")):
        yield from textwrap.wrap(" ".join(paragraph.split()), 110, break_long_words=False, break_on_hyphens=False)
        yield ""
    lines = [line.strip() for line in examples.partition(":")[2].splitlines() if line.strip()]
    if lines:
        yield "```sh example"
        yield from lines
        yield "```"
        yield ""
    rows = [row for parameter in command.params if (row := _parameter(parameter))]
    if rows:
        yield from _table(("option", "is"), rows)


def _parameter(parameter: Any) -> tuple[str, str] | None:
    if getattr(parameter, "hidden", False) or parameter.name == "help":
        return None
    if not any(name.startswith("-") for name in parameter.opts):
        return f"`{parameter.metavar or parameter.name.upper()}`", _cell(parameter.help or "")
    names = ", ".join([*parameter.opts, *parameter.secondary_opts])
    value = "" if parameter.is_flag else f" {_metavar(parameter)}"
    default = parameter.default
    shown = "" if parameter.is_flag or default in (None, "", ()) or callable(default) else f" Default: `{default}`."
    if not parameter.show_default:
        shown = ""
    return f"`{names}{value}`", _cell((parameter.help or "") + shown)


def _metavar(parameter: Any) -> str:
    if parameter.metavar:
        return str(parameter.metavar)
    kind = parameter.type_descriptor.annotation
    if isinstance(kind, type) and issubclass(kind, Enum):
        return "|".join(str(choice.value) for choice in kind)
    return {int: "N", float: "N", Path: "PATH"}.get(kind, "TEXT")


def _settings() -> Iterator[str]:
    from pipeline.infra.settings import Settings

    yield "# Settings"
    yield ""
    yield "Environment variables of every process. Secrets may come from a file, which `VARIABLE_FILE` names."
    yield ""
    comments = _comments(inspect.getsource(Settings))
    rows = []
    for name, field in Settings.model_fields.items():
        rows.append((f"`VECTORMILL_{name.upper()}`", _default(name, field), _cell(comments[name])))
    yield from _table(("variable", "default", "is"), rows)


def _comments(source: str) -> dict[str, str]:
    """Return the `#:` comment of each field; fields without one share that of the field before."""
    found: dict[str, str] = {}
    comment: list[str] = []
    last = ""
    for line in source.splitlines():
        if marked := re.match(r"    #: ?(.*)", line):
            comment.append(marked[1])
        elif field := re.match(r"    (\w+): ", line):
            last = " ".join(comment) or last
            found[field[1]] = last
            comment = []
    return found


def _default(name: str, field: FieldInfo) -> str:
    default = field.default
    if default is None or default == () or name == "home" or isinstance(default, SecretStr):
        return ""
    value = ",".join(default) if isinstance(default, tuple) else default
    bounds = " ".join(
        f"{sign} {getattr(bound, attribute):,}"
        for bound in field.metadata
        for attribute, sign in (("ge", "≥"), ("gt", ">"), ("le", "≤"))
        if hasattr(bound, attribute)
    )
    return f"`{value}`" + (f" ({bounds})" if bounds else "")


def _http() -> Iterator[str]:
    from pipeline.api.app import make_app
    from pipeline.infra.settings import Settings

    nowhere = "postgresql://nowhere"  # nothing is connected to before the app starts
    described: Mapping[str, Any] = make_app(Settings(), nowhere, nowhere).openapi()
    yield "# HTTP"
    yield ""
    yield "`/openapi.json` of the api describes it all; this is the short form. Keys are sent as Bearer tokens. Errors"
    yield "of `/v1` have OpenAI's envelope, all others are problems of RFC 9457."
    yield ""
    by_tag: dict[str, list[tuple[str, str, Mapping[str, Any]]]] = {}
    for path, methods in described["paths"].items():
        for method, operation in methods.items():
            for tag in operation.get("tags", ["Other"]):
                by_tag.setdefault(tag, []).append((method.upper(), path, operation))
    for tag, operations in by_tag.items():
        yield f"## {tag}"
        yield ""
        rows = [(f"`{method} {path}`", _cell(_told(operation))) for method, path, operation in operations]
        yield from _table(("request", "does"), rows)
        for method, path, operation in operations:
            if fields := _fields(operation):
                yield f"Fields of `{method} {path}`:"
                yield ""
                yield from _table(("field", "is"), fields)


def _told(operation: Mapping[str, Any]) -> str:
    return str(operation.get("description") or operation.get("summary") or "").split("\n\n")[0]


def _fields(operation: Mapping[str, Any]) -> list[tuple[str, str]]:
    content = operation.get("requestBody", {}).get("content", {})
    schema = content.get("application/json", {}).get("schema", {})
    required = schema.get("required", ())
    return [
        (f"`{name}`{' (required)' if name in required else ''}", _cell(field.get("description", "")))
        for name, field in schema.get("properties", {}).items()
    ]


def _sql() -> Iterator[str]:
    from pipeline.ingest.request import JobRequest
    from pipeline.ingest.sql_requests import SUBMIT_OPTIONS, SYNC_OPTIONS
    from pipeline.ingest.sync import SyncRequest

    yield "# SQL"
    yield ""
    yield "Functions that ask for a job within a transaction ([guide](../how-to/sql.md)). Both return the job's id."
    yield "Once the transaction has committed, a dispatcher runs the query; how it goes is in `vectormill.job_status`."
    yield ""
    functions = (
        ("submit", "Embeds the rows of a query.", JobRequest, SUBMIT_OPTIONS),
        ("sync", "Brings a collection up to the rows of a query.", SyncRequest, SYNC_OPTIONS),
    )
    newest = import_module("migrations.versions.0022_sync_in_sql")
    for name, does, request, options in functions:
        yield f"## {name}"
        yield ""
        yield does
        yield ""
        yield "```sql example"
        yield re.sub(
            r"^\n?create (or replace )?function |\nlanguage.*", "", getattr(newest, name.upper()), flags=re.DOTALL
        )
        yield "```"
        yield ""
        described = request.model_json_schema()["properties"]
        yield from _table(
            ("option", "is"), [(f"`{option}`", _cell(described[option].get("description", ""))) for option in options]
        )
    yield "## Views"
    yield ""
    yield "`vectormill.job_status` has a row for each job and request. A collection has a view of"
    yield "its name with its keys, passages, carried columns and vectors ([guide](../how-to/nightly.md))."


def _tables() -> Iterator[str]:
    from sqlalchemy.dialects import postgresql

    from pipeline.db.tables import metadata

    yield "# Tables"
    yield ""
    yield "Tables of the schema `vectormill`. Their columns are a contract for whoever reads them."
    yield ""
    for table in metadata.tables.values():
        yield f"## {table.name}"
        yield ""
        rows = []
        for column in table.columns:
            kind = column.type.compile(postgresql.dialect()).lower()
            notes = [*(["key"] if column.primary_key else []), *([] if column.nullable else ["not null"])]
            notes += [f"→ {key.target_fullname}" for key in column.foreign_keys]
            rows.append((f"`{column.name}`", kind, ", ".join(notes)))
        yield from _table(("column", "type", ""), rows)


def _metrics() -> Iterator[str]:
    from pipeline.infra.metrics import EVERY

    yield "# Metrics"
    yield ""
    yield "What each process serves at `/metrics`."
    yield ""
    for process in dict.fromkeys(metric.process for metric in EVERY):
        yield f"## {process}"
        yield ""
        rows = [
            (
                f"`{each.name}`",
                each.kind,
                each.unit,
                _cell(each.meaning),
                ", ".join(f"`{name}`" for name in each.labels),
            )
            for each in EVERY
            if each.process == process
        ]
        yield from _table(("metric", "kind", "unit", "is", "labels"), rows)


if __name__ == "__main__":
    for name, text in pages().items():
        (REFERENCE / name).write_text(text, encoding="utf-8")
