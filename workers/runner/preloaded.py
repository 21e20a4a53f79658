"""Imports of a worker's children, made once in the process that forks them."""

import gc
from contextlib import suppress

from celery.platforms import set_pdeathsig

import workers.runner.tasks
from workers.encoders.imports import import_library

# Children die with this process, and it with the worker.
set_pdeathsig("SIGKILL")
# If the import fails, the first chunk reports the reason.
with suppress(Exception):
    import_library()
    import workers.encoders.local  # noqa: F401
# Keep memory pages shared with children: collections would write to them.
gc.collect()
gc.freeze()
