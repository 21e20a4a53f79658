"""Command group with lazy imports: listing all commands costs a tenth of importing them."""

from importlib import import_module
from typing import Any, ClassVar, NamedTuple

import typer
from typer.core import TyperCommand, TyperGroup

from pipeline.cli.once import App


class Entry(NamedTuple):
    """Command in the help's list, and where to import it from."""

    #: Panel of the help in which the command is listed.
    panel: str
    #: `module:function` in this package, or `module:app` for a group of commands.
    place: str
    summary: str

    def load(self, name: str) -> Any:
        """Import the command, and return it under this name."""
        module, _, attribute = self.place.partition(":")
        found = getattr(import_module(f"pipeline.cli.{module}"), attribute)
        if not isinstance(found, typer.Typer):
            app = App()
            app.command()(found)
            found = app
        command = typer.main.get_command(found)
        command.name = name
        return command


class LazyGroup(TyperGroup):
    """Group of the commands in `entries`, by their names."""

    entries: ClassVar[dict[str, Entry]] = {}

    def __init__(self, **how: Any) -> None:
        super().__init__(**how)
        # Placeholders for the help's list, with nothing to run.
        for name, entry in self.entries.items():
            self.add_command(TyperCommand(name, help=entry.summary, rich_help_panel=entry.panel))

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Return the command that the arguments name, imported."""
        name, command, rest = super().resolve_command(ctx, args)
        return name, self.entries[str(name)].load(str(name)) if command else command, rest
