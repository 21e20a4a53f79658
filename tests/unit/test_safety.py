"""Static checks that no code makes SQL of values, or executes data that it has read."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

_ROOT = Path(__file__).resolve().parents[2]
_FILES = sorted(path for folder in ("pipeline", "workers", "migrations") for path in (_ROOT / folder).rglob("*.py"))
_SQL = re.compile(
    r"\s*(select|insert into|update|delete from|with \w|create|drop|alter|copy|grant|revoke|lock|truncate|set local)\s",
    re.IGNORECASE,
)
#: Functions of SQLAlchemy, psycopg and Alembic that take a text as SQL unchanged.
_TAKERS = {"text", "SQL", "execute", "exec_driver_sql"}
#: Calls that would execute data.
_NEVER = {
    "eval", "exec", "compile", "__import__", "torch.load", "yaml.load", "yaml.unsafe_load", "os.system", "os.popen",
    "subprocess.getoutput", "subprocess.getstatusoutput",
}  # fmt: skip
_NEVER_IMPORTED = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}


def trees() -> Iterator[tuple[str, ast.AST]]:
    """Yield every file's path, as messages name it, and its syntax tree."""
    for path in _FILES:
        yield path.relative_to(_ROOT).as_posix(), ast.parse(path.read_text(encoding="utf-8"))


def is_constant(part: ast.expr) -> bool:
    """Return True if a part of a text stands in the code: a literal, a module's constant, or made of these alone."""
    match part:
        case ast.Constant():
            return True
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name.isupper()
        case ast.FormattedValue(value=value):
            return is_constant(value)
        case ast.JoinedStr(values=parts):
            return all(map(is_constant, parts))
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return is_constant(left) and is_constant(right)
        case ast.Call(func=ast.Attribute(value=whole, attr="format"), args=args, keywords=named):
            return all(map(is_constant, (whole, *args, *(each.value for each in named))))
    return False


def is_made(part: ast.expr) -> bool:
    """Return True if an expression puts a text together."""
    match part:
        case ast.JoinedStr():
            return True
        case ast.BinOp(left=left, op=ast.Add() | ast.Mod(), right=right):
            return any(is_made(each) or isinstance(each, ast.Constant) for each in (left, right))
        case ast.Call(func=ast.Attribute(value=whole, attr="format" | "join")):
            return isinstance(whole, ast.Constant | ast.Name | ast.JoinedStr)
    return False


def first_words(part: ast.expr) -> str:
    """Return the literal that an expression begins with."""
    match part:
        case ast.Constant(value=str(words)):
            return words
        case ast.JoinedStr(values=[first, *_]):
            return first_words(first)
        case ast.BinOp(left=left):
            return first_words(left)
        case ast.Call(func=ast.Attribute(value=whole)):
            return first_words(whole)
    return ""


def sql_of_values(tree: ast.AST) -> Iterator[int]:
    """Yield the numbers of lines where SQL is made of more than constants."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and node.args and name_of(node.func).rpartition(".")[2] in _TAKERS:
            given = node.args[0]
            if is_made(given) and not is_constant(given):
                yield node.lineno
        elif isinstance(node, ast.expr) and is_made(node) and _SQL.match(first_words(node)) and not is_constant(node):
            yield node.lineno


def name_of(function: ast.expr) -> str:
    """Return the name of a called function as it is written: `torch.load`."""
    match function:
        case ast.Name(id=name):
            return name
        case ast.Attribute(value=value, attr=name):
            return f"{name_of(value)}.{name}"
    return ""


def ways_to_run(tree: ast.AST) -> Iterator[int]:
    """Yield the numbers of lines that might execute data."""
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=function, keywords=named):
                on = {each.arg for each in named if not (isinstance(each.value, ast.Constant) and not each.value.value)}
                if name_of(function) in _NEVER or on & {"shell", "trust_remote_code", "allow_pickle"}:
                    yield node.lineno
            case ast.Import(names=names) if {each.name.split(".")[0] for each in names} & _NEVER_IMPORTED:
                yield node.lineno
            case ast.ImportFrom(module=str(module)) if module.split(".")[0] in _NEVER_IMPORTED:
                yield node.lineno


def test_sql_is_made_of_constants_alone() -> None:
    assert [f"{where}:{line}" for where, tree in trees() for line in sql_of_values(tree)] == []


def test_nothing_that_was_read_is_run() -> None:
    assert [f"{where}:{line}" for where, tree in trees() for line in ways_to_run(tree)] == []
    assert len(_FILES) > 150, "all of them"


@pytest.mark.parametrize(
    "bad",
    [
        "connection.execute(text(f\"select * from t where name = '{name}'\"))",
        "connection.execute(text('select ' + columns))",
        "connection.execute('select * from t where id = %s' % given)",
        "statement = 'delete from {}'.format(table)",
        "statement = f'  update t set x = {row[0]}'",
        "sql.SQL('drop table ' + name)",
        "op.execute(f'create index on {TABLE} ({column})')",
        "text(_QUERY.format(which=which))",
        "text(', '.join(parts))",
    ],
)
def test_sql_of_values_would_be_found(bad: str) -> None:
    assert list(sql_of_values(ast.parse(bad)))


@pytest.mark.parametrize(
    "good",
    [
        "connection.execute(text(f'select to_regclass({SCHEMA})'))",
        "text(_LOSE.format(which='select 1'))",
        "sql.SQL('drop table {}').format(sql.Identifier(name))",
        "text('update t set x = :x where ' + chunks.OURS)",
        "log.info(f'{name} selected')",
    ],
)
def test_constants_and_composed_sql_are_let_be(good: str) -> None:
    assert not list(sql_of_values(ast.parse(good)))


@pytest.mark.parametrize(
    "bad",
    [
        "import pickle",
        "from cloudpickle import loads",
        "torch.load(path)",
        "yaml.load(file)",
        "eval(text)",
        "subprocess.run(command, shell=True)",
        "SentenceTransformer(path, trust_remote_code=wish)",
        "np.load(path, allow_pickle=True)",
    ],
)
def test_ways_to_run_would_be_found(bad: str) -> None:
    assert list(ways_to_run(ast.parse(bad)))
