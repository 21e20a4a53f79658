"""Templates: fields and escapes, and what is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.template import BadTemplateError, parse

_NAMES = st.text(st.characters(exclude_characters="{}", exclude_categories=["Cs"]), min_size=1, max_size=8)
_LETTERS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


@given(st.lists(st.tuples(_LETTERS, _NAMES), min_size=1, max_size=5), _LETTERS)
def test_what_is_escaped_comes_back(fields: list[tuple[str, str]], last: str) -> None:
    def escaped(letters: str) -> str:
        return letters.replace("\\", "\\\\").replace("{", "{{").replace("}", "}}")

    written = "".join(f"{escaped(letters)}{{{name}}}" for letters, name in fields) + escaped(last)
    template = parse(written)
    assert template.fields == tuple(name for _, name in fields)
    assert template.columns == tuple(dict.fromkeys(template.fields))
    filled = template.fill([f"<{name}>" for name in template.fields])
    assert filled == "".join(f"{letters}<{name}>" for letters, name in fields) + last


def test_escapes_of_a_shell_are_read() -> None:
    assert parse(r"{a}\n\n{b}\t\\").fill(["x", "y"]) == "x\n\ny\t\\"
    assert parse("{a}\n{b}").fill(["x", "y"]) == "x\ny"


@pytest.mark.parametrize(
    ("written", "told"),
    [
        ("plain", "names no column"),
        ("{a", 'a "{" without'),
        ("a} {b}", 'a "}" without'),
        ("{}", "without"),
        (r"\d {a}", r'"\d" stands for nothing'),
        ("{a}\\", "stands for nothing"),
    ],
)
def test_a_bad_template_is_refused(written: str, told: str) -> None:
    with pytest.raises(BadTemplateError, match=told.replace("\\", "\\\\").replace("{", r"\{").replace("}", r"\}")):
        parse(written)


@pytest.mark.parametrize("written", ["{a.b}", "{a[0]}", "{a!r}", "{a:>10}", "{__class__}"])
def test_a_field_is_a_column_and_no_code(written: str) -> None:
    assert parse(written).fields == (written[1:-1],)
