"""Counters of workers, read from their metrics files, those of dead children included."""

from collections.abc import Iterable
from pathlib import Path

from prometheus_client.mmap_dict import MmapedDict

#: Counter files of a worker's children, below the worker's TMPDIR.
COUNTERS = "vectormill-metrics-*/counter_*.db"
#: All metrics files of the children, counters included.
METRICS = "vectormill-metrics-*/*.db"


def counts_below(folder: Path) -> str:
    """Make a `PROMETHEUS_MULTIPROC_DIR` for a worker that `vectormill worker` doesn't start; return its path."""
    made = folder / "vectormill-metrics-made"
    made.mkdir(parents=True)
    return str(made)


def tokens_embedded(files: Iterable[Path]) -> float:
    """Return the tokens of all batches that a model has embedded, committed or not."""
    return sum(
        value
        for file in files
        if file.stat().st_size
        for key, value, *_ in MmapedDict.read_all_values_from_file(str(file))
        if '"vectormill_worker_tokens_total"' in key
    )
