"""The command `vectormill`. Each module holds the commands of one subject; this one joins them and ends them well.

All are imported at each start, so what is slow to import and needed by few is imported where it is used.
"""

import os
import sys
from collections.abc import Callable
from typing import cast

import structlog
import typer
from rich.text import Text

from pipeline.cli import (
    demo,
    doctor,
    jobs,
    keys,
    models,
    processes,
    purge,
    restore,
    results,
    servers,
    submit,
    workspaces,
)
from pipeline.cli.look import sentence, stderr
from pipeline.cli.once import App
from pipeline.errors import VectormillError
from pipeline.store.database import reporting_unreachable

app = App(
    name="vectormill",
    help="Embed a corpus of texts into Postgres, exactly once.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)

_COMMANDS: dict[str, tuple[Callable[..., None], ...]] = {
    "One machine": (demo.demo, servers.up, servers.down, servers.env),
    "Jobs": (
        *(submit.submit, jobs.jobs, jobs.status, jobs.watch, jobs.rejects, jobs.receipt, results.results),
        *(results.search, jobs.cancel, jobs.pause, jobs.resume, jobs.priority, jobs.retry),
        purge.purge,
    ),
    "Processes": (
        *(processes.migrate, processes.dispatcher, processes.worker, processes.engine, processes.api),
        *(processes.flower, doctor.doctor, restore.restore_check),
    ),
}
for panel, commands in _COMMANDS.items():
    for command in commands:
        app.command(rich_help_panel=panel)(command)
app.add_typer(models.app, name="models", rich_help_panel="Catalogue")
app.add_typer(keys.app, name="keys", rich_help_panel="Catalogue")
app.add_typer(workspaces.app, name="workspaces", rich_help_panel="Catalogue")


#: What typer raises at wrong arguments; it has no public name for it.
_UsageError = cast("type[typer.BadParameter]", typer.BadParameter.__mro__[1])


def main() -> None:
    """Run the command line; end with DESIGN's exit codes, and one line for what a person can mend."""
    # Standard output is for data. Processes that serve configure their lines themselves.
    structlog.configure(logger_factory=lambda *_: structlog.PrintLogger(sys.stderr))
    try:
        with reporting_unreachable():
            code = app(standalone_mode=False)
    except VectormillError as error:
        stderr.print(Text("error ", "red"), Text(sentence(error)), sep="")
        code = error.exit_code
    except _UsageError as error:
        if message := error.format_message():  # empty where the help has been shown instead
            stderr.print(Text("error ", "red"), Text(message), sep="")
        code = 2
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except BrokenPipeError:
        # The reader of our output, a pager say, has gone; so has what is still buffered for it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    sys.exit(code if isinstance(code, int) else 0)
