"""What workers counted, read from their files, dead children's too."""

from collections.abc import Iterable
from pathlib import Path

from prometheus_client.mmap_dict import MmapedDict

#: Where a worker's children write their counts, below its TMPDIR.
COUNTERS = "vectormill-metrics-*/counter_*.db"
#: And all else that they measure.
METRICS = "vectormill-metrics-*/*.db"


def counts_below(folder: Path) -> str:
    """A folder for `PROMETHEUS_MULTIPROC_DIR` of a worker that isn't started by `vectormill worker`."""
    made = folder / "vectormill-metrics-made"
    made.mkdir(parents=True)
    return str(made)


def tokens_embedded(files: Iterable[Path]) -> float:
    """Tokens of all batches that came back from a model, whatever became of them."""
    return sum(
        value
        for file in files
        if file.stat().st_size
        for key, value, *_ in MmapedDict.read_all_values_from_file(str(file))
        if '"vectormill_worker_tokens_total"' in key
    )
