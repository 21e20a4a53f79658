"""Commands that refuse a repeated option, since one of its two values would be dropped silently."""

from collections.abc import Callable
from inspect import cleandoc
from textwrap import dedent
from typing import Any

import typer
from typer.core import TyperCommand

from pipeline.core.errors import UserError


class OnceCommand(TyperCommand):
    """Command that refuses an option given twice, unless the option may be repeated."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments; raise `UserError` if an option is given twice."""
        *_, given = self.make_parser(ctx).parse_args(args=list(args))
        for option in given:
            if option.param_type_name == "option" and not option.multiple and given.count(option) > 1:
                raise UserError(f"{option.opts[0]}: it is given twice; give it once.")
        return super().parse_args(ctx, args)


class App(typer.Typer):
    """Typer app of such commands, below the command `vectormill`."""

    def __init__(self, **how: Any) -> None:
        super().__init__(add_completion=False, **how)

    def command(self, name: str | None = None, **how: Any) -> Callable[[Any], Any]:
        """Add a command, an `OnceCommand` unless `cls` is given. Its docstring is its help."""

        def add(callback: Any) -> Any:
            shown = {"cls": OnceCommand, "help": help_of(callback.__doc__ or ""), **how}
            return super(App, self).command(name, **shown)(callback)

        return add


def help_of(docstring: str) -> str:
    """Return a docstring as help for a terminal of any width: paragraphs in one line each, and examples flush left."""
    paragraphs = cleandoc(docstring).split("\n\n")
    return "\n\n".join(dedent(part) if part.startswith(" ") else part.replace("\n", " ") for part in paragraphs)
