"""Command `vectormill doctor`: checks of a deployment, with advice for each problem."""

from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from pipeline.cli.context import server_urls
from pipeline.cli.options import Json
from pipeline.cli.output import print_json, stderr, stdout
from pipeline.core.errors import ServiceUnreachable
from pipeline.doctor.report import Finding, State
from pipeline.embedded.runtime import find_running
from pipeline.infra.settings import load_settings

if TYPE_CHECKING:
    from pipeline.doctor.context import Context

_MARKS = {State.OK: "✓", State.WARN: "!", State.FAIL: "✗", State.SKIPPED: "–"}
_COLOURS = {State.OK: "green", State.WARN: "yellow", State.FAIL: "red", State.SKIPPED: "bright_black"}


def doctor(
    as_json: Json = False,
    model: Annotated[
        list[str] | None,
        typer.Option(help="Send the canary text through this model; may be repeated. Default: all local ones served."),
    ] = None,
    canary: Annotated[bool, typer.Option("--canary/--no-canary", help="Send the canary text through workers.")] = True,
    timeout: Annotated[float, typer.Option(min=1, metavar="SECONDS", help="How long the canary may take.")] = 60.0,
) -> None:
    """Check a deployment from end to end and say what to fix: versions, servers, rights, disk space, clocks, processes,
    keys, addresses. Also send a text through a worker, as a job that is purged afterwards.

    Exit code: 0 if nothing failed, 1 if something did, 6 if Postgres or Redis doesn't answer.

    Examples:

        vectormill doctor

        vectormill doctor --json --no-canary

        vectormill doctor --model openai-small --timeout 120
    """
    from pipeline.doctor.checks import CHECKS, run_checks

    context = _context(model or [], timeout)
    checks = [check for check in CHECKS if canary or check.name != "canary"]
    width = max(len(check.name) for check in checks)
    found: list[tuple[str, Finding]] = []
    try:
        for name, finding in run_checks(context, checks):
            found.append((name, finding))
            if not as_json:
                stdout.print(_line(name, finding, width))
    finally:
        context.close()
    if as_json:
        print_json([{"check": name, **_as_json(finding)} for name, finding in found])
    else:
        stderr.print(_summary(found))
    if any(finding.unreachable for _, finding in found):
        raise typer.Exit(ServiceUnreachable.exit_code)
    if any(finding.state is State.FAIL for _, finding in found):
        raise typer.Exit(1)


def _context(canary_models: list[str], timeout: float) -> "Context":
    from pipeline.doctor.context import Context

    settings = load_settings()
    database, redis = server_urls(settings)
    running = find_running(settings.home)
    # Ignore an `up` that runs here if the environment names another database.
    ours = running if running and running.database_url == database else None
    password = settings.flower_password
    return Context(
        settings=settings,
        database_url=database,
        redis_url=redis,
        api_url=settings.api_url or (ours.api_url if ours else None),
        flower_url=settings.flower_url or (ours.flower_url if ours else None),
        flower_password=password.get_secret_value() if password else (ours.flower_password if ours else None),
        canary_models=canary_models,
        canary_seconds=timeout,
    )


def _line(name: str, finding: Finding, width: int) -> Text:
    colour = _COLOURS[finding.state]
    mend = f". {finding.mend}" if finding.mend else ""
    return Text.assemble(
        (f"{_MARKS[finding.state]} {finding.state:<8}", colour),
        f"{name:<{width}}  {finding.found}",
        (mend, "bold" if finding.state is State.FAIL else ""),
    )


def _as_json(finding: Finding) -> dict[str, str]:
    return {"state": finding.state.value, "found": finding.found, "mend": finding.mend}


def _summary(found: list[tuple[str, Finding]]) -> str:
    counts = {state: sum(finding.state is state for _, finding in found) for state in State}
    words = {**_WORDS, State.WARN: "warning" if counts[State.WARN] == 1 else "warnings"}
    parts = [f"{counts[state]} {word}" for state, word in words.items() if counts[state]]
    return ", ".join(parts) + "."


_WORDS = {State.OK: "ok", State.WARN: "warnings", State.FAIL: "failed", State.SKIPPED: "skipped"}
