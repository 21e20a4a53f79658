"""Templates: texts composed of a row's columns. They hold replacement fields and no code."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

#: A doubled brace, a replacement field, an escape, letters as they are, or what none of these is.
_PIECES = re.compile(r"(\{\{|\}\})|\{([^{}]+)\}|\\(.?)|([^{}\\]+)|(.)", re.DOTALL)
#: A shell hands these on as they are typed.
_ESCAPES = {"n": "\n", "t": "\t", "\\": "\\"}


class BadTemplateError(ValueError):
    """The template can't be read; the message says why."""


@dataclass(frozen=True, slots=True)
class Template:
    """Template such as `{subject}\\n\\n{body}`."""

    #: Letters between the fields: one more than there are fields.
    letters: tuple[str, ...]
    #: Column of each field, in order.
    fields: tuple[str, ...]

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of the fields, each once."""
        return tuple(dict.fromkeys(self.fields))

    def fill(self, values: Sequence[str]) -> str:
        """Return the text with a value in the place of each field."""
        between = zip(values, self.letters[1:], strict=True)
        return "".join((self.letters[0], *(part for pair in between for part in pair)))


@lru_cache
def parse(written: str) -> Template:
    """Read a template. `{column}` stands for a column's value, `{{` and `}}` for braces; `\\n`, `\\t` and `\\\\` for a
    new line, a tab and a backslash.

    Raises:
        BadTemplateError: it has a brace or a backslash that stands for nothing, or no field.
    """
    letters, fields = [""], list[str]()
    for brace, column, escape, plain, stray in _PIECES.findall(written):
        if column:
            fields.append(column)
            letters.append("")
        elif stray:
            raise BadTemplateError(f'a "{stray}" without its partner; write it twice where it is a mere letter')
        elif not (brace or plain) and escape not in _ESCAPES:
            raise BadTemplateError(f'"\\{escape}" stands for nothing; write a backslash as \\\\')
        else:
            letters[-1] += brace[:1] or plain or _ESCAPES[escape]
    if not fields:
        raise BadTemplateError("it names no column; write a column's name in braces, such as {body}")
    return Template(tuple(letters), tuple(fields))
