"""Import of sentence-transformers: what it leaves out, and that nothing is lost by it."""

import json
import os
import subprocess
import sys

import pytest

from workers.encoders.imports import SPIN_ROUNDS, SPIN_VARIABLE

_PROGRAM = """
import json, sys
from workers.encoders.imports import import_library
import_library()
import workers.encoders.local
heavy = sorted({"sklearn", "pandas", "scipy.stats"} & sys.modules.keys())
from sentence_transformers.util.similarity import pairwise_distances
apart = pairwise_distances([[1.0, 0.0], [0.0, 1.0]], metric="manhattan")
import sklearn.metrics
real = sklearn.metrics.pairwise_distances
print(json.dumps([heavy, apart.tolist(), real.__module__, callable(real)]))
"""


def test_scikit_learn_is_imported_when_a_measure_is_called_and_not_before() -> None:
    done = subprocess.run([sys.executable, "-c", _PROGRAM], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [[], [[0.0, 2.0], [2.0, 0.0]], "sklearn.metrics.pairwise", True]


_SPINS = """
import os, sys
sys.modules["sklearn"] = sys  # as if it were imported already, which is quicker
from workers.encoders.imports import import_library
import_library()
print(os.environ.get("GOMP_SPINCOUNT"))
"""


@pytest.mark.parametrize(
    ("given", "spins"), [({}, SPIN_ROUNDS), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "None")]
)
def test_threads_yield_the_cpu_unless_the_environment_says_otherwise(given: dict[str, str], spins: str) -> None:
    others = {name: value for name, value in os.environ.items() if name not in (SPIN_VARIABLE, "OMP_WAIT_POLICY")}
    environment = {**others, **given}
    done = subprocess.run([sys.executable, "-c", _SPINS], env=environment, check=False, capture_output=True, text=True)
    assert done.stdout.strip() == spins, done.stderr
