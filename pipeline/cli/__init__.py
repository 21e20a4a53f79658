"""Command line `vectormill`: the list of commands, and their exit codes."""

import os
import sys
from typing import Annotated, Any, cast

import typer
from rich.text import Text

from pipeline.cli.lazy import Entry, LazyGroup
from pipeline.cli.output import sentence, stderr
from pipeline.core.errors import VectormillError


class _Root(LazyGroup):
    entries = {  # noqa: RUF012 - a constant
        "demo": Entry("One machine", "demo:demo", "Run the main job here, and search what it wrote."),
        "up": Entry("One machine", "servers:up", "Run all of vectormill on this machine."),
        "down": Entry("One machine", "servers:down", "Stop what up runs here; --delete deletes its data too."),
        "env": Entry("One machine", "servers:env", "Print export lines that reach what up runs here."),
        "submit": Entry("Jobs", "submit:submit", "Submit a corpus."),
        "jobs": Entry("Jobs", "jobs:jobs", "List jobs, newest first."),
        "status": Entry("Jobs", "jobs:status", "Show where a job stands."),
        "watch": Entry("Jobs", "jobs:watch", "Follow a job to its end; the exit code says how."),
        "rejects": Entry("Jobs", "jobs:rejects", "List items that could not be embedded, and why."),
        "receipt": Entry("Jobs", "jobs:receipt", "Show a job's receipt; --verify counts its rows."),
        "results": Entry("Jobs", "results:results", "Write a job's vectors to a file."),
        "collections": Entry("Collections", "collections:app", "Manage collections: create, show, upgrade, drop."),
        "forget": Entry("Collections", "forget:forget", "Erase keys for good, and keep them from coming back."),
        "sync": Entry("Collections", "sync:sync", "Bring a collection up to its source."),
        "search": Entry("Collections", "search:search", "Find what is nearest to a query, in a collection or a job."),
        "cancel": Entry("Jobs", "jobs:cancel", "Cancel a job; vectors that are committed stay."),
        "pause": Entry("Jobs", "jobs:pause", "Pause a job: running chunks finish, no others start."),
        "resume": Entry("Jobs", "jobs:resume", "Resume a paused job."),
        "priority": Entry("Jobs", "jobs:priority", "Put a job before or behind others."),
        "retry": Entry("Jobs", "jobs:retry", "Retry rejects that may succeed, and items left undone."),
        "purge": Entry("Jobs", "purge:purge", "Delete an ended job, or whole months of jobs."),
        "migrate": Entry("Processes", "processes:migrate", "Create the schema, or bring it up to date."),
        "dispatcher": Entry("Processes", "processes:dispatcher", "Queue chunks for workers, sweep leases, end jobs."),
        "worker": Entry("Processes", "processes:worker", "Take chunks and embed them, on GPUs or the CPU."),
        "engine": Entry("Processes", "processes:engine", "Serve local models to the api."),
        "api": Entry("Processes", "processes:api", "Serve the dashboard, /api, and /v1 as OpenAI does."),
        "flower": Entry("Processes", "processes:flower", "Show Celery's tasks and workers in a browser."),
        "doctor": Entry("Processes", "doctor:doctor", "Check a deployment, and say what to fix."),
        "restore-check": Entry("Processes", "restore:restore_check", "Check a restored database; --mend repairs it."),
        "models": Entry("Catalogue", "models:app", "Manage the catalogue of models."),
        "keys": Entry("Catalogue", "keys:app", "Manage API keys."),
        "workspaces": Entry("Catalogue", "workspaces:app", "Manage workspaces, their weights and limits."),
    }

    def invoke(self, ctx: Any) -> Any:
        """Run a command. Raise a lost database connection as `ServiceUnreachable`, which `main` prints in one line."""
        import structlog

        from pipeline.db.database import reporting_unreachable

        # Standard output is for data, so logs go to standard error. Server processes configure their logs themselves.
        structlog.configure(logger_factory=lambda *_: structlog.PrintLogger(sys.stderr))
        with reporting_unreachable():
            return super().invoke(ctx)


app = typer.Typer(
    cls=_Root,
    name="vectormill",
    help="Embed a corpus of texts into Postgres, exactly once.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"vectormill {version('vectormill')}")
        raise typer.Exit


@app.callback()
def _root(
    *,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version, and exit.")
    ] = False,
) -> None: ...


#: Error that typer raises for wrong arguments; it has no public name there.
_UsageError = cast("type[typer.BadParameter]", typer.BadParameter.__mro__[1])


def main() -> None:
    """Run the command line. Print an error that the user can fix as one line, and exit with the error's code."""
    try:
        code = app(standalone_mode=False)
    except VectormillError as error:
        stderr.print(Text("error ", "red"), Text(sentence(error)), sep="")
        code = error.exit_code
    except _UsageError as error:
        if message := error.format_message():  # empty if the help has been shown instead
            stderr.print(Text("error ", "red"), Text(message), sep="")
        code = 2
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except BrokenPipeError:
        # The reader of our output, such as a pager, has gone; flushing the rest at exit would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    sys.exit(code if isinstance(code, int) else 0)
