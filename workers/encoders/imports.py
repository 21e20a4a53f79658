"""Import of sentence-transformers without scikit-learn.

It imports scikit-learn, and with that pandas and most of SciPy, for measures of evaluation, which embedding never
computes: nearly a third of the import's CPU, and 100 MB in each worker and engine.
"""

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_METRICS = "sklearn.metrics"


class _StandIn(ModuleType):
    """Module of which any function can be imported. One that is called imports the real one."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None, is_package=True)
        self.__path__ = []

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*arguments: Any, **options: Any) -> Any:
            return getattr(import_module(_METRICS), name)(*arguments, **options)

        return call


def import_library() -> None:
    """Import sentence-transformers with stand-ins for scikit-learn's measures, unless one of both is imported already.

    Raises:
        ImportError: it can't be imported.
    """
    if not {"sklearn", "sentence_transformers"} & sys.modules.keys():
        with _uncollected(), _stand_ins():
            import_module("sentence_transformers")


@contextmanager
def _stand_ins() -> Iterator[None]:
    made = {name: _StandIn(name) for name in ("sklearn", _METRICS)}
    sys.modules.update(made)
    try:
        yield
    finally:
        for name in made:
            del sys.modules[name]


@contextmanager
def _uncollected() -> Iterator[None]:
    """Don't look for garbage within the block: among a million new objects it takes long, and finds nothing."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
