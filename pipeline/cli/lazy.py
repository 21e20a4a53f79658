"""A group of commands that are imported when they are run: to list them all costs a tenth of importing them."""

from importlib import import_module
from typing import Any, ClassVar, NamedTuple

import typer
from typer.core import TyperCommand, TyperGroup

from pipeline.cli.once import App


class Entry(NamedTuple):
    """A command, as the list shows it."""

    #: Of the list.
    panel: str
    #: `module:function` in this package, or `module:app` for a group of commands.
    place: str
    summary: str

    def load(self, name: str) -> Any:
        """Import the command."""
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
    """A group whose commands are `entries`, by their names."""

    entries: ClassVar[dict[str, Entry]] = {}

    def __init__(self, **how: Any) -> None:
        super().__init__(**how)
        #: For the list: with nothing to run.
        for name, entry in self.entries.items():
            self.add_command(TyperCommand(name, help=entry.summary, rich_help_panel=entry.panel))

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that the arguments name, imported."""
        name, command, rest = super().resolve_command(ctx, args)
        return name, self.entries[str(name)].load(str(name)) if command else command, rest
