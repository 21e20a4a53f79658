"""Import of sentence-transformers, without scikit-learn, and of torch, with threads that yield the CPU.

It imports scikit-learn, and with that pandas and most of SciPy, for measures of evaluation, which embedding never
computes: nearly a third of the import's CPU, and 100 MB in each worker and engine.

A thread that waits for others of its team spins, by libgomp's default for milliseconds, while on busy cores those
others can't run.
"""

import gc
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_METRICS = "sklearn.metrics"
#: Variable that libgomp reads when it is loaded, with torch.
SPIN_VARIABLE = "GOMP_SPINCOUNT"
#: Rounds that a waiting thread spins: few enough for a second encoder on the same cores (`two_encoders_vs_spinning` of
#: `make bench`), and enough for one that has them to itself, which loses 1 % by these and 7 % by half of them.
SPIN_ROUNDS = "10000"


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

    How long threads spin is left to the environment if it says so.

    Raises:
        ImportError: it can't be imported.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault(SPIN_VARIABLE, SPIN_ROUNDS)
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
