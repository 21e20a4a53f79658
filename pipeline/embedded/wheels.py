"""Paths of the files of installed wheels. The wheels' own Python code is never run."""

from importlib.util import find_spec
from pathlib import Path

from pipeline.core.errors import ServerFailed


def wheel_folder(package: str, variable: str) -> Path:
    """Return the folder of an installed package.

    Raises:
        ServerFailed: it isn't installed; the message names the variable to set in its place.
    """
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ServerFailed(f"the package {package} isn't installed: install the extra 'embedded', or set {variable}.")
    return Path(spec.submodule_search_locations[0])
